"""ONNX graphs of the networks, drawn from their configs without a weight and without torch."""
