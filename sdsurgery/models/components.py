"""A component as a checkpoint has it: which of its weights are there, under which keys, and which are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..checkpoint import Checkpoint, Tensor
from .walks import Config, Layout, Weight

# Position ids are a buffer of transformers' CLIP and no weight; see position_ids.py.
POSITION_IDS = "text_model.embeddings.position_ids"

SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
"""The buffers that ``ldm.models.diffusion.ddpm.DDPM`` registers; ``logvar`` sometimes beside them."""

MARKERS = frozenset({"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})
"""Tensors of no or one element that tell a loader how the model was trained."""

KNOWN_EXTRAS = ("depth_model.", "denoiser.sigmas", "scaled_fp8")
"""What published files carry beside their networks, and some loader asks for: SD2-depth's depth estimator, the noise
levels that sgm's denoiser registers, ComfyUI's mark of scaled fp8 weights."""

TRAINING_PREFIXES = ("loss.", "optimizer.", "optimizer_states.", "lr_schedulers.", "callbacks.")
"""What training leaves behind at the top of a state dict."""

EMA_PREFIX = "model_ema."
EMA_SCALARS = ("decay", "num_updates")


def ema_name(unet_name: str) -> str:
    """The name under ``model_ema.`` of a UNet weight: ldm's LitEma takes all dots out of the parameter's path."""
    return "diffusion_model" + unet_name.replace(".", "")


@dataclass(frozen=True)
class Component:
    """One part of a model in a checkpoint.

    Attributes:
        name: ``text_encoder``, ``text_encoder_2``, ``unet``, ``vae``, ``ema``, ``schedule`` or ``other``.
        prefix: What stands before the canonical names in the keys of its layout.
        keys: Canonical name to the key that holds it, for what is known and there.
        table: Canonical name to the weight as it should be.
        stray: Keys that belong to it by their prefix and that it doesn't have.
        config: What the table was made from, where it is a network.
        layout: Whose names the canonical ones are.
    """

    name: str
    prefix: str
    keys: Mapping[str, str]
    table: Mapping[str, Weight]
    stray: tuple[str, ...] = ()
    config: Config | None = None
    layout: Layout = "ldm"

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Keys that should be there and aren't."""
        return tuple(
            self.prefix + name for name, weight in self.table.items() if name not in self.keys and not weight.optional
        )

    def misshapen(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Keys whose shape is wrong, with the right one."""
        return {
            key: self.table[name].shape
            for name, key in self.keys.items()
            if name in self.table and tensors[key].shape != self.table[name].shape
        }

    def all_keys(self) -> Iterable[str]:
        """Every key of the checkpoint that belongs to it."""
        yield from self.keys.values()
        yield from self.stray

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Its known tensors by canonical name."""
        return {name: checkpoint[key] for name, key in self.keys.items()}


def schedule_component(checkpoint: Checkpoint, wrapper: str) -> Component | None:
    """The noise schedule's buffers, if any is there."""
    present = {name: wrapper + name for name in (*SCHEDULE_BUFFERS, "logvar") if wrapper + name in checkpoint}
    if not present:
        return None
    ((steps, _),) = Counter(checkpoint[key].shape for key in present.values()).most_common(1)
    table = {name: Weight(name, steps, optional=name == "logvar") for name in (*SCHEDULE_BUFFERS, "logvar")}
    return Component("schedule", wrapper, present, table)


def ema_component(checkpoint: Checkpoint, wrapper: str, unet: Component | None) -> Component | None:
    """The averaged weights, if any are there, checked against the UNet's table."""
    prefix = wrapper + EMA_PREFIX
    present = {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}
    if not present:
        return None
    weights = unet.table.values() if unet else ()
    table = {ema_name(weight.name): Weight(ema_name(weight.name), weight.shape) for weight in weights}
    table |= {name: Weight(name, (), optional=True) for name in EMA_SCALARS}
    if not unet:
        return Component("ema", prefix, present, {})
    known = {name: key for name, key in present.items() if name in table}
    return Component("ema", prefix, known, table, tuple(sorted(set(present.values()) - set(known.values()))))
