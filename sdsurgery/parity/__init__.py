"""The same picture from every format: single file, diffusers folder and ONNX, compared stage by stage."""
