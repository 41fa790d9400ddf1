"""ONNX graphs of the networks, drawn from their configs without a weight and without torch."""

from importlib.util import find_spec

from ..errors import UnsupportedError

if find_spec("onnx") is None:
    raise UnsupportedError("graphs are written with the onnx package", remedy="pip install 'sdsurgery[onnx]'")
