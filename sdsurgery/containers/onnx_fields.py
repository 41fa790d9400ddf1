"""Numbers of the fields of ONNX's messages, as far as weights and the graphs that are drawn need them.

Source: ``onnx.proto`` of ONNX 1.18, whose fields keep their numbers for ever.
"""

from __future__ import annotations

from typing import Final

MODEL_IR: Final = 1
MODEL_PRODUCER: Final = 2
MODEL_GRAPH: Final = 7
MODEL_OPSET: Final = 8
MODEL_METADATA: Final = 14

OPSET_DOMAIN: Final = 1
OPSET_VERSION: Final = 2

ENTRY_KEY: Final = 1
ENTRY_VALUE: Final = 2

GRAPH_NODE: Final = 1
GRAPH_NAME: Final = 2
GRAPH_INITIALIZER: Final = 5
GRAPH_INPUT: Final = 11
GRAPH_OUTPUT: Final = 12

NODE_INPUT: Final = 1
NODE_OUTPUT: Final = 2
NODE_NAME: Final = 3
NODE_OP: Final = 4
NODE_ATTRIBUTE: Final = 5
NODE_DOMAIN: Final = 7
NODE_METADATA: Final = 9

ATTRIBUTE_NAME: Final = 1
ATTRIBUTE_FLOAT: Final = 2
ATTRIBUTE_INT: Final = 3
ATTRIBUTE_STRING: Final = 4
ATTRIBUTE_TENSOR: Final = 5
ATTRIBUTE_INTS: Final = 8
ATTRIBUTE_TYPE: Final = 20

TENSOR_DIMS: Final = 1
TENSOR_TYPE: Final = 2
TENSOR_INT32: Final = 5
TENSOR_NAME: Final = 8
TENSOR_RAW: Final = 9
TENSOR_EXTERNAL: Final = 13
TENSOR_LOCATION: Final = 14

VALUE_NAME: Final = 1
VALUE_TYPE: Final = 2
TYPE_TENSOR: Final = 1
TENSOR_TYPE_ELEMENT: Final = 1
TENSOR_TYPE_SHAPE: Final = 2
SHAPE_SIZE: Final = 1
SIZE_NUMBER: Final = 1
SIZE_NAME: Final = 2

EXTERNAL: Final = 1
"""The value of ``TensorProto.data_location`` that says that the bytes lie in another file."""
