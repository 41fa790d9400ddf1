"""The first module of a network whose output differs, though the network was fed the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .metrics import compare
from .onnx_runtime import OnnxRuntime
from .recording import Record
from .results import Stage
from .runtimes import text_encoders
from .tolerances import Tolerance

_AT_ONCE = 1 << 28
"""Values that are kept of one run: a gigabyte."""


def first_module(record: Record, reference: Record, stage: Stage, tolerance: Tolerance) -> str | None:
    """Its name; ``None`` where no module differs, or none could be compared.

    Modules are looked at in the order in which torch runs them, or the graph's where both are graphs, as many at a time
    as fit into memory. All of them are, for not all that follow the first one that differs differ, too: what reads the
    prompt or the time alone doesn't.

    Args:
        record: What the runtime did.
        reference: What the reference did.
        stage: The first stage that isn't within the tolerance.
        tolerance: It.
    """
    bound = _bound(stage, tolerance)
    for network, feed in _feeds(record, reference, stage).items():
        for names in _portions(_in_order(record, reference, network, feed)):
            ours, theirs = (each.runtime.outputs_of(network, names, feed) for each in (record, reference))
            wrong = next((name for name in names if _differs(name, ours, theirs, bound)), None)
            if wrong is not None:
                return wrong if network in {stage.component, "text_encoder"} else f"{network}.{wrong}"
    return None


def _portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names whose values fit into memory together."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > _AT_ONCE:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def _differs(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float) -> bool:
    a, b = ours.get(name), theirs.get(name)
    if a is None or b is None:  # ours fails at the module, or before it
        return b is not None
    if a.numel() != b.numel() and 1 in {a.shape[0], b.shape[0]}:  # what knows the time alone is the same for all
        a, b = a[:1], b[:1]
    if a.numel() != b.numel():
        return False
    figures = compare(a.reshape(b.shape).cpu().numpy(), b.cpu().numpy())
    return not figures.finite or figures.psnr < bound


def _bound(stage: Stage, tolerance: Tolerance) -> float:
    """The least PSNR of a module's output: half-way from the tolerance to how far the whole stage is off.

    What is nearly constant loses more to rounding inside a network than at its end, and is no fault.
    """
    end = stage.figures.psnr if stage.figures and stage.figures.finite else 0.0
    return (tolerance.tensor + end) / 2


Feed = Mapping[str, Tensor]


def _feeds(record: Record, reference: Record, stage: Stage) -> Mapping[str, Feed]:
    """What the networks of that stage were fed, under the names of a graph's inputs."""
    number = stage.picture
    if stage.component == "text_encoder":
        ids = reference.tokens[number]
        return {
            name: {"input_ids": each} for name, each in zip(text_encoders(reference.runtime.format), ids, strict=True)
        }
    trace, given = reference.traces[number], reference.given[number]
    if stage.component == "unet" and trace is not None and given is not None:
        asked = trace.steps[stage.step or 0]
        sizes = {"timestep": torch.tensor(asked.timestep), "encoder_hidden_states": given.states}
        return {"unet": {"sample": asked.sample, **sizes, **given.added}}
    if stage.component == "vae_decoder" and trace is not None:
        return {"vae_decoder": {"latent_sample": trace.latents[-1] / record.facts.scaling_factor}}
    if stage.component == "vae_encoder":
        return {"vae_encoder": {"sample": reference.encoded[number]}}
    return {}


def _in_order(record: Record, reference: Record, component: str, feed: Feed) -> Mapping[str, int]:
    """The modules that both runtimes tell of, in the order in which torch runs them, and how many values they give."""
    sides = sorted((reference.runtime, record.runtime), key=lambda side: isinstance(side, OnnxRuntime))
    sizes = sides[0].sizes(component, feed)
    for side in sides:
        if isinstance(side, OnnxRuntime):
            known = side.modules(component)
            sizes = {name: size for name, size in sizes.items() if name in known}
    return sizes
