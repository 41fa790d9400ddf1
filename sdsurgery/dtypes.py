"""The one table of element types: safetensors, NumPy, torch and ONNX names, and sizes.

Names and sizes of the safetensors types follow the reference library (0.8); ONNX numbers are those of
``onnx.TensorProto.DataType``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: The name that safetensors uses, and everything here with it.
        bits: Size of one element; the 4 and 6 bit types pack several elements into a byte.
        kind: What the element is.
        numpy: NumPy's name, or that of ``ml_dtypes`` for types NumPy lacks; ``None`` where neither can hold it.
        torch: The attribute of the torch module.
        onnx: ``onnx.TensorProto.DataType``.
        storable: Whether safetensors can hold it; torch pickles hold more.
    """

    name: str
    bits: int
    kind: Kind
    numpy: str | None
    torch: str | None
    onnx: int | None
    storable: bool = True

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a dense tensor of this shape takes.

        Raises:
            ValueError: If the elements do not fill whole bytes.
        """
        bits = math.prod(shape) * self.bits
        if bits % 8:
            raise ValueError(f"{self.name}{list(shape)} does not end on a byte")
        return bits // 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element; types packed within a byte have none."""
        if self.bits % 8:
            raise ValueError(f"{self.name} elements are smaller than a byte")
        return self.bits // 8

    @property
    def computable(self) -> bool:
        """Whether torch has it, element by element."""
        return self.torch is not None and not self.bits % 8

    def to_numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, with ``ml_dtypes`` for the types NumPy lacks.

        Raises:
            ValueError: If neither library can hold it.
        """
        import numpy as np

        if self.numpy is None:
            raise ValueError(f"NumPy has no type for {self.name}")
        name: Any = self.numpy
        if name in _ML_DTYPES:
            import ml_dtypes

            name = getattr(ml_dtypes, name)
        dtype: np.dtype[Any] = np.dtype(name)
        return dtype

    def __str__(self) -> str:
        return self.name


_ML_DTYPES = frozenset(
    {"bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"}
)

# In the order in which the reference library sorts tensors before it writes them (it sorts by its own enum,
# descending, then by key).
_TABLE = (
    DType("U64", 64, "int", "uint64", "uint64", 13),
    DType("I64", 64, "int", "int64", "int64", 7),
    DType("F64", 64, "float", "float64", "float64", 11),
    DType("C64", 64, "complex", "complex64", "complex64", 14),
    DType("F32", 32, "float", "float32", "float32", 1),
    DType("U32", 32, "int", "uint32", "uint32", 12),
    DType("I32", 32, "int", "int32", "int32", 6),
    DType("BF16", 16, "float", "bfloat16", "bfloat16", 16),
    DType("F16", 16, "float", "float16", "float16", 10),
    DType("U16", 16, "int", "uint16", "uint16", 4),
    DType("I16", 16, "int", "int16", "int16", 5),
    DType("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz", "float8_e5m2fnuz", 20),
    DType("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz", "float8_e4m3fnuz", 18),
    DType("F8_E8M0", 8, "float", "float8_e8m0fnu", "float8_e8m0fnu", 24),
    DType("F8_E4M3", 8, "float", "float8_e4m3fn", "float8_e4m3fn", 17),
    DType("F8_E5M2", 8, "float", "float8_e5m2", "float8_e5m2", 19),
    DType("I8", 8, "int", "int8", "int8", 3),
    DType("U8", 8, "int", "uint8", "uint8", 2),
    DType("F6_E3M2", 6, "float", None, None, None),
    DType("F6_E2M3", 6, "float", None, None, None),
    DType("F4", 4, "float", None, None, 23),
    DType("BOOL", 8, "bool", "bool", "bool", 9),
    DType("C128", 128, "complex", "complex128", "complex128", 15, storable=False),
    DType("C32", 32, "complex", None, "complex32", None, storable=False),
)

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch is not None}
BY_NUMPY = {dtype.numpy: dtype for dtype in _TABLE if dtype.numpy is not None}

SAFETENSORS_RANK = {dtype.name: rank for rank, dtype in enumerate(_TABLE) if dtype.storable}

I64 = BY_NAME["I64"]
I32 = BY_NAME["I32"]
F32 = BY_NAME["F32"]
F16 = BY_NAME["F16"]
BF16 = BY_NAME["BF16"]

CAST_TARGETS = {"fp16": F16, "bf16": BF16, "fp32": F32}
"""What people call the types they cast to."""
