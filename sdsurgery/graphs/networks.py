"""Which graphs a model's folder has, drawn from its configs: text encoders, UNet, the VAE's encoder and decoder."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoint import Tensor
from ..dtypes import BF16, BY_NAME, F32, I32, I64, DType
from ..errors import CorruptError, MismatchError, UnsupportedError
from ..models.configs import structure
from ..models.walks import UNetConfig, VaeConfig
from .drawing import NEWEST, NORMAL_NOISE, OLDEST, Drawing
from .encoding import Graph
from .fused import FusedDrawing
from .text import draw_text_encoder
from .unet import draw_unet
from .vae import draw_decoder, draw_encoder

Interface = Literal["optimum", "diffusers"]
"""Whose inputs and outputs: those of optimum-onnx's pipelines, or of diffusers' ``OnnxStableDiffusionPipeline``."""

_COMPUTABLE = ("F16", "BF16", "F32")
_BRAIN_CONVOLUTIONS = 22
"""The first opset whose convolutions may be computed in bf16."""

_DRAWN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
    },
    "vae": {"act_fn": ("silu", "swish")},
    "text_encoder": {"hidden_act": ("quick_gelu", "gelu")},
    "text_encoder_2": {"hidden_act": ("quick_gelu", "gelu")},
}
"""Fields that change what is computed but not which weights there are, with the values that are drawn."""

_SIZES = {"sdxl": 6, "sdxl-refiner": 5}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A graph whose weights don't lie anywhere yet.

    Attributes:
        folder: What it is called in the model's folder, such as ``vae_decoder``.
        component: Whose weights it has, such as ``vae``.
        graph: The graph, whose weights are named as within the component.
    """

    folder: str
    component: str
    graph: Graph


@dataclass(frozen=True, slots=True)
class Style:
    """How graphs are to be drawn.

    Attributes:
        opset: Of ONNX's own operators, 17 to 23; at most 21 where a graph draws noise.
        interface: Whose inputs and outputs.
        compute: What to compute in; what most weights of the component are stored in unless given.
        family: Of the model, without its variant.
        fused: Whether ONNX Runtime's own operators take the place of several of ONNX's, so that nothing else runs them.
    """

    opset: int = NEWEST
    interface: Interface = "optimum"
    compute: DType | None = None
    family: str = "sd1"
    fused: bool = False

    def __post_init__(self) -> None:
        if self.compute is not None and self.compute.name not in _COMPUTABLE:
            raise UnsupportedError(f"nothing is computed in {self.compute}", remedy="compute in fp16, bf16 or fp32")
        if type(self.opset) is not int or not OLDEST <= self.opset <= NEWEST:
            raise UnsupportedError(
                f"graphs are drawn with the opsets {OLDEST} to {NEWEST}, not {self.opset}", remedy="choose one of those"
            )


def draw(component: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor], style: Style) -> Iterator[Drawn]:
    """The graphs of one component.

    Args:
        component: ``text_encoder``, ``text_encoder_2``, ``unet`` or ``vae``.
        document: Its ``config.json``.
        tensors: Its weights by diffusers' names, of which dtypes and shapes are looked at.
        style: How.

    Raises:
        UnsupportedError: If the config tells of something that no graph is known for.
        MismatchError: If a weight is missing.
        CorruptError: If a field of the config has a value that makes no sense.
    """
    for field, drawn in _DRAWN[component].items():
        if document.get(field, drawn[0]) not in drawn:
            raise UnsupportedError(
                f"no graph is known for a {component} whose {field} is {document[field]!r}",
                remedy="only the networks of SD1, SD2, SDXL and its refiner are drawn",
            )
    compute = style.compute or _commonest(tensors)
    for folder, drawer in _drawers(component, document, style):
        inner = F32 if component == "vae" and _overflows(style, compute) else _computed(folder, style, compute)
        kind = FusedDrawing if style.fused else Drawing
        drawing = kind(folder, tensors, compute=inner, opset=_opset(folder, style))
        try:
            drawer(drawing)
        except KeyError as error:
            message = f"the {component} lacks {error.args[0]}"
            raise MismatchError(
                message, key=str(error.args[0]), remedy="see what is missing: sdsurgery verify"
            ) from error
        except (TypeError, ValueError, ArithmeticError, struct.error) as error:
            message = f"it makes no sense as the config of a {component}: {type(error).__name__}: {error}"
            file = f"{component}/config.json"
            raise CorruptError(message, file=file, remedy="download or write it again") from error
        yield Drawn(folder, component, drawing.graph())


def _overflows(style: Style, compute: DType) -> bool:
    """SDXL's VAE overflows in fp16; nothing in the weights tells the repaired one.

    Both of its graphs compute in fp32 then: of two that differ, optimum-onnx takes either's type for that of the VAE,
    by chance, and fails on fp16.
    """
    return style.compute is None and style.family.startswith("sdxl") and compute.name == "F16"


def _computed(folder: str, style: Style, compute: DType) -> DType:
    """What is computed in where convolutions don't know bf16."""
    if compute is not BF16 or folder.startswith("text_encoder") or _opset(folder, style) >= _BRAIN_CONVOLUTIONS:
        return compute
    if style.compute is None:
        return F32
    raise UnsupportedError(
        f"the {folder} can't be computed in bf16 with the operators of opset {_opset(folder, style)}",
        remedy=f"compute in fp32 or fp16, or use the opset {_BRAIN_CONVOLUTIONS} or a newer one",
    )


def _opset(folder: str, style: Style) -> int:
    """ONNX Runtime runs newer opsets but has no noise in them."""
    noisy = folder == "vae_encoder" and style.interface == "diffusers"
    return min(style.opset, NORMAL_NOISE) if noisy else style.opset


def _commonest(tensors: Mapping[str, Tensor]) -> DType:
    counts = Counter(tensor.dtype.name for tensor in tensors.values() if tensor.dtype.name in _COMPUTABLE)
    return BY_NAME[counts.most_common(1)[0][0]] if counts else F32


def _drawers(
    component: str, document: Mapping[str, Any], style: Style
) -> Iterator[tuple[str, Callable[[Drawing], None]]]:
    """Each graph's folder, and what draws it."""
    diffusers = style.interface == "diffusers"
    config = structure(component, document)
    if isinstance(config, UNetConfig):
        numbers = _SIZES.get(style.family, 6)
        yield "unet", lambda drawing: draw_unet(drawing, config, document, numbers=numbers, steps=diffusers)
    elif isinstance(config, VaeConfig):
        yield "vae_encoder", lambda drawing: draw_encoder(drawing, config, document, sampled=diffusers)
        yield "vae_decoder", lambda drawing: draw_decoder(drawing, config, document)
    else:
        projected = "CLIPTextModelWithProjection" in (document.get("architectures") or ())
        states = style.family.startswith("sdxl")
        ids = I32 if diffusers else I64
        yield (
            component,
            lambda drawing: draw_text_encoder(drawing, document, projected=projected, states=states, ids=ids),
        )
