"""ONNX graphs of the networks, drawn from their configs: no weight is read, and neither torch nor onnx imported."""
