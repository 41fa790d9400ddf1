"""The first module of a network whose output differs, though the network was fed the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .metrics import compare
from .onnx_runtime import OnnxRuntime
from .probes import module_values
from .recording import Record
from .results import Stage
from .sampling import chosen
from .tolerances import Tolerance
from .torch_runtime import TorchRuntime

_AT_ONCE = 24
"""Modules that are looked at in one run."""

_ROOT = "text_model."
"""In front of a text encoder's modules, in some versions of transformers and in graphs."""


def first_module(record: Record, reference: Record, stage: Stage, tolerance: Tolerance) -> str | None:
    """Its name; ``None`` where no module differs, or none could be compared.

    Modules are looked at in the order in which torch runs them, a few at a time: whatever follows the first one that
    differs differs, too.

    Args:
        record: What the runtime did.
        reference: What the reference did.
        stage: The first stage that isn't within the tolerance.
        tolerance: It.
    """
    feed = _feed(record, reference, stage)
    bound = _bound(stage, tolerance)
    if feed is None or stage.component not in {"text_encoder", "unet", "vae_decoder", "vae_encoder"}:
        return None
    names = _in_order(record, reference, stage.component, feed)
    low, high = 0, len(names)
    found: str | None = None
    while low < high:
        stride = max(1, (high - low) // _AT_ONCE)
        places = list(range(low + stride - 1, high, stride)) or [high - 1]
        ours, theirs = (
            _outputs(each, stage.component, [names[place] for place in places], feed) for each in (record, reference)
        )
        wrong = next((place for place in places if _differs(names[place], ours, theirs, bound)), None)
        if wrong is None:
            low = places[-1] + 1
            continue
        found = names[wrong]
        low, high = max(low, wrong - stride + 1), wrong
    return found


def _differs(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float) -> bool:
    a, b = ours.get(name), theirs.get(name)
    if a is None or b is None or a.numel() != b.numel():
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


def _feed(record: Record, reference: Record, stage: Stage) -> Feed | None:
    """What the network was fed in that stage, under the names of a graph's inputs."""
    number = stage.picture
    if stage.component == "text_encoder":
        return {"input_ids": reference.tokens[number][0]}
    trace, given = reference.traces[number], reference.given[number]
    if stage.component == "unet" and trace is not None and given is not None:
        steps = {f"step {step + 1} of": step for step in chosen(len(trace.steps))}
        asked = trace.steps[next((step for told, step in steps.items() if told in stage.name), 0)]
        sizes = {"timestep": torch.tensor(asked.timestep), "encoder_hidden_states": given.states}
        return {"sample": asked.sample, **sizes, **given.added}
    if stage.component == "vae_decoder" and trace is not None:
        return {"latent_sample": trace.latents[-1] / record.facts.scaling_factor}
    return None


def _in_order(record: Record, reference: Record, component: str, feed: Feed) -> list[str]:
    """The modules that both runtimes tell of, in the order in which torch runs them."""
    sides = [each.runtime for each in (record, reference)]
    torches = [side for side in sides if isinstance(side, TorchRuntime)]
    if not torches:
        return []
    names = torches[0].order(component, feed)
    for side in sides:
        if isinstance(side, OnnxRuntime):
            known = {bare(name) for name in module_values(side.format.path / component / "model.onnx")}
            names = [name for name in names if name in known]
    return names


def bare(name: str) -> str:
    """A module's name as all versions and graphs agree on it."""
    return name.removeprefix(_ROOT)


def _outputs(record: Record, component: str, names: Sequence[str], feed: Feed) -> dict[str, Tensor]:
    runtime = record.runtime
    if isinstance(runtime, TorchRuntime):
        return runtime.outputs_of(component, names, feed)
    assert isinstance(runtime, OnnxRuntime)  # noqa: S101 - for the type checker: there are two
    values = {
        bare(name): value for name, value in module_values(runtime.format.path / component / "model.onnx").items()
    }
    with runtime.probed(component, [values[name] for name in names if name in values]) as session:
        found = session.run(feed)
    return {name: found[values[name]] for name in names if name in values}
