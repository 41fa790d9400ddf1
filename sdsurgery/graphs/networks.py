"""Which graphs a model's folder has, drawn from its configs: text encoders, UNet, the VAE's encoder and decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnx import ModelProto

from ..checkpoint import Tensor
from ..dtypes import BY_NAME, F32, I32, I64, DType
from ..errors import MismatchError, UnsupportedError
from ..models.configs import structure
from ..models.walks import UNetConfig, VaeConfig
from .drawing import NEWEST, OLDEST, Drawing
from .text import draw_text_encoder
from .unet import draw_unet
from .vae import draw_decoder, draw_encoder

Interface = Literal["optimum", "diffusers"]
"""Whose inputs and outputs: those of optimum-onnx's pipelines, or of diffusers' ``OnnxStableDiffusionPipeline``."""

_COMPUTABLE = ("F16", "BF16", "F32")
_SIZES = {"sdxl": 6, "sdxl-refiner": 5}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A graph whose weights don't lie anywhere yet.

    Attributes:
        folder: What it is called in the model's folder, such as ``vae_decoder``.
        component: Whose weights it has, such as ``vae``.
        model: The graph.
        weights: Their names within the component.
    """

    folder: str
    component: str
    model: ModelProto
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """How graphs are to be drawn.

    Attributes:
        opset: Of ONNX's own operators, 17 to 23.
        interface: Whose inputs and outputs.
        compute: What to compute in; what most weights of the component are stored in unless given.
        family: Of the model, without its variant.
    """

    opset: int = NEWEST
    interface: Interface = "optimum"
    compute: DType | None = None
    family: str = "sd1"

    def __post_init__(self) -> None:
        if not OLDEST <= self.opset <= NEWEST:
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
    """
    compute = style.compute or _commonest(tensors)
    for folder, drawer in _drawers(component, document, style):
        inner = F32 if folder == "vae_decoder" and _overflows(style, compute) else compute
        drawing = Drawing(folder, tensors, compute=inner, opset=style.opset)
        try:
            drawer(drawing)
        except KeyError as error:
            message = f"the {component} lacks {error.args[0]}"
            raise MismatchError(
                message, key=str(error.args[0]), remedy="see what is missing: sdsurgery verify"
            ) from error
        yield Drawn(folder, component, drawing.model(), tuple(drawing.weights))


def _overflows(style: Style, compute: DType) -> bool:
    """SDXL's VAE decoder overflows in fp16; nothing in the weights tells the repaired one."""
    return style.compute is None and style.family.startswith("sdxl") and compute.name == "F16"


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
