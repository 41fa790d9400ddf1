"""The comparison: every format draws the same pictures, and each of its stages is fed what the reference was fed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import progress
from ..containers import open as open_checkpoint
from ..errors import SurgeryError, UsageError
from ..inspection.fingerprints import fingerprints
from . import devices
from .formats import Format, prepare
from .locating import first_module
from .metrics import Array, Figures, compare, compare_pictures, what_is_wrong
from .onnx_runtime import OnnxPredictor, OnnxRuntime
from .recording import Record
from .results import Compared, Component, Parity, Picture, Stage
from .runtimes import Autoencoder, Conditioning, Predictor, Runtime, document, facts_of
from .sampling import Noise, Trace, chosen, noise_for, sample, scheduler_of, size_of, time_ids
from .settings import Settings
from .tokens import token_ids
from .tolerances import PROFILES, Tolerance
from .torch_runtime import TorchRuntime

T = TypeVar("T")

_COARSE = ("fp32", "fp16", "bf16")
"""From the finest to the coarsest."""

_FAILURES = (RuntimeError, IndexError, ValueError, SurgeryError)
"""What networks raise on inputs or weights that make no sense."""


def parity(paths: Sequence[Path], settings: Settings, *, reference: str | None = None, locate: bool = False) -> Parity:
    """Draw the same pictures from every format, and say how far they agree.

    Args:
        paths: Formats of one model; of a single one, the others are made.
        settings: What to draw, and how.
        reference: The kind or the path of the format that the others are held against; the diffusers folder unless
            given, or the first where there is none.
        locate: Whether to look for the first module that differs, inside the stage that does.

    Raises:
        UnsupportedError: If a format can't be run, or not on the device that was asked for.
        MismatchError: If they are of different families.
        UsageError: If the reference is none of them.
    """
    begun = time.monotonic()
    device = devices.choose(settings.device)
    precision = settings.precision if settings.precision != "auto" else "fp32" if device.device == "cpu" else "fp16"
    with tempfile.TemporaryDirectory(prefix="sdsurgery-parity-") as folder:
        formats = _in_order(prepare(paths, Path(folder), compute=precision), reference)
        height, width = size_of(formats[0].configs, settings)
        settings = replace(settings, height=height, width=width)
        records: list[Record] = []
        steps = len(formats) * len(settings.prompts) * settings.steps
        with progress.task("drawing", steps, "steps") as advance:
            for each in formats:
                runtime = _runtime(each, device.device, precision)
                run = _Run(runtime, settings, records[0] if records else None, advance)
                records.append(run.done(precision))
        coarsest = max((record.precision for record in records), key=_COARSE.index)
        profile = coarsest if settings.tolerance == "auto" else settings.tolerance
        weights = {path: _fingerprints(path) for path in {each.path for each in formats}}
        compared = [
            replace(_judged(record, records[0], PROFILES[profile]), fingerprints=weights[record.runtime.format.path])
            for record in records
        ]
        if locate:
            compared = [
                replace(each, located=_located(record, records[0], each, PROFILES[profile]))
                for record, each in zip(records, compared, strict=True)
            ]
    return Parity(settings, profile, device, tuple(compared), time.monotonic() - begun)


_SHORT = 16
"""Digits of a fingerprint."""


def _fingerprints(path: Path) -> dict[str, str]:
    """What the weights are, by component; two formats may lie in one folder and share them."""
    return {found.component: found.exact[:_SHORT] for found in fingerprints(open_checkpoint(path))}


def _located(record: Record, reference: Record, compared: Compared, tolerance: Tolerance) -> str | None:
    """The first module that differs, if the format diverges in a network."""
    stage = compared.diverges
    try:
        return first_module(record, reference, stage, tolerance) if stage else None
    except _FAILURES:  # it didn't run the first time, either
        return None


def _in_order(formats: Sequence[Format], reference: str | None) -> list[Format]:
    """The reference first."""
    wanted = reference or ("diffusers" if any(each.kind == "diffusers" for each in formats) else formats[0].kind)
    for each in formats:
        if wanted == each.kind or (each.given and Path(wanted).resolve() == each.given.resolve()):
            return [each, *(other for other in formats if other is not each)]
    raise UsageError(
        f"{wanted!r} is none of what is compared", remedy="name one of the models, or ldm, diffusers or onnx"
    )


def _runtime(each: Format, device: str, precision: str) -> Runtime:
    if each.kind == "onnx":
        return OnnxRuntime(each, device=device)
    return TorchRuntime(each, device=device, precision=precision)


class _Run:
    """One runtime at work: network after network, so that one is in memory at a time."""

    def __init__(
        self, runtime: Runtime, settings: Settings, reference: Record | None, advance: progress.Advance
    ) -> None:
        self.runtime, self.settings, self.reference, self.advance = runtime, settings, reference, advance
        self.configs = runtime.format.configs
        self.height, self.width = size_of(self.configs, settings)
        self.numbers = range(len(settings.prompts))

    def done(self, precision: str) -> Record:
        """Run all stages."""
        self.record = Record(self.runtime, facts_of(self.configs), precision)
        self._settings()
        self._tokens()
        self._text()
        self._unet()
        self._vae()
        return self.record

    def _settings(self) -> None:
        if self.reference:
            ours, theirs = self.record.facts.as_text(), self.reference.facts.as_text()
            other = [f"{key} {ours.get(key)} for {theirs.get(key)}" for key in theirs if ours.get(key) != theirs[key]]
            self._note(Stage("settings", "settings", 0, refusal="; ".join(other) or None))

    def _tokens(self) -> None:
        for number in self.numbers:
            ids = token_ids(self.configs, [self.settings.negative, self.settings.prompts[number]])
            self.record.tokens.append(ids)
            if self.reference:
                theirs = self.reference.tokens[number]
                same = len(ids) == len(theirs) and all(map(torch.equal, ids, theirs))
                self._note(Stage("tokens", "token ids", number, refusal=None if same else "other token ids"))

    def _text(self) -> None:
        numbers = time_ids(self.configs, self.height, self.width)
        with self.runtime.text_encoders() as encode:
            for number in self.numbers:
                own = self.record.tokens[number]
                forced = self.reference.tokens[number] if self.reference else own
                found = self._guarded("text_encoder", "text encoder", number, encode, forced)
                if self.reference and found is not None:
                    self._compare_text(number, found, self.reference.given[number])
                if forced is not own and not all(map(torch.equal, forced, own)):
                    found = self._guarded("text_encoder", "text encoder", number, encode, own)
                self.record.given.append(found and replace(found, time_ids=numbers))

    def _compare_text(self, number: int, found: Conditioning, theirs: Conditioning | None) -> None:
        if theirs is None:
            return
        self._note(Stage("text_encoder", "text encoder", number, _figures(found.states, theirs.states)))
        if found.pooled is not None and theirs.pooled is not None:
            figures = _figures(found.pooled, theirs.pooled)
            self._note(Stage("text_encoder", "text encoder, pooled", number, figures))

    def _unet(self) -> None:
        with self.runtime.unet() as predict:
            if isinstance(predict, OnnxPredictor):
                self.record.precision = max(self.record.precision, predict.precision, key=_COARSE.index)
            for number in self.numbers:
                if self.reference:
                    self._forced_predictions(number, predict, self.reference)
                begun = time.monotonic()
                given = self.record.given[number]
                trace = self._guarded("unet", "UNet", number, self._sampled, number, predict, given) if given else None
                self.record.traces.append(trace)
                self.record.seconds.append(time.monotonic() - begun)

    def _sampled(self, number: int, predict: Predictor, given: Conditioning) -> Trace:
        shared = self.reference.runtime.format.configs if self.reference else self.configs
        scheduler = scheduler_of(shared, self.record.facts, self.settings)

        def counted(sample: Tensor, timestep: float, given: Conditioning) -> Tensor:
            self.advance(1)
            return predict(sample, timestep, given)

        return sample(counted, given, self._noise(number), scheduler, self.settings)

    def _noise(self, number: int) -> Noise:
        channels = int(document(self.configs, "unet/config.json").get("in_channels", 4))
        return noise_for(self.settings, number, height=self.height, width=self.width, channels=channels)

    def _forced_predictions(self, number: int, predict: Predictor, reference: Record) -> None:
        trace, given = reference.traces[number], reference.given[number]
        if trace is None or given is None:
            return
        for step in chosen(len(trace.steps)):
            name = f"UNet, step {step + 1} of {len(trace.steps)}"
            asked = trace.steps[step]
            found = self._guarded("unet", name, number, predict, asked.sample, asked.timestep, given)
            if found is not None:
                self._note(Stage("unet", name, number, _figures(found, asked.predicted), step=step))

    def _vae(self) -> None:
        with self.runtime.vae() as vae:
            for number in self.numbers:
                pixels = self._noise(number).pixels
                moments = self._guarded("vae_encoder", "VAE encoder", number, vae.encode, pixels)
                self.record.encoded.append(pixels)
                self.record.moments.append(moments)
                if self.reference:
                    self._compare_vae(number, vae, moments, self.reference)
                trace, begun = self.record.traces[number], time.monotonic()
                drawn = trace and self._guarded("vae_decoder", "VAE decoder", number, self._decoded, vae, trace)
                self.record.pixels.append(drawn)
                self.record.seconds[number] += time.monotonic() - begun

    def _decoded(self, vae: Autoencoder, trace: Trace) -> Tensor:
        return vae.decode(trace.latents[-1] / self.record.facts.scaling_factor)

    def _compare_vae(self, number: int, vae: Autoencoder, moments: Tensor | None, reference: Record) -> None:
        trace, theirs = reference.traces[number], reference.pixels[number]
        if trace is not None and theirs is not None:
            found = self._guarded("vae_decoder", "VAE decoder", number, self._decoded, vae, trace)
            if found is not None:
                self._note(Stage("vae_decoder", "VAE decoder", number, _figures(found, theirs)))
        other = reference.moments[number]
        if moments is not None and other is not None:
            self._note(Stage("vae_encoder", "VAE encoder", number, _figures(moments, other)))

    def _note(self, stage: Stage) -> None:
        self.record.stages.append(stage)

    def _guarded(
        self, component: Component, name: str, number: int, work: Callable[..., T], *arguments: Any
    ) -> T | None:
        """The outcome; if there is none, that is the stage's."""
        try:
            return work(*arguments)
        except _FAILURES as error:
            self._note(Stage(component, name, number, refusal=f"it fails: {str(error)[:300]}"))
            return None


def _figures(found: Tensor, theirs: Tensor) -> Figures:
    return compare(found.cpu().numpy(), theirs.cpu().numpy())


def _judged(record: Record, reference: Record, tolerance: Tolerance) -> Compared:
    stages = [
        replace(stage, refusal=tolerance.refusal(stage.figures)) if stage.figures else stage for stage in record.stages
    ]
    is_reference = record is reference
    pictures = tuple(_picture(number, record, reference, tolerance) for number in range(len(record.pixels)))
    return Compared(
        record.runtime.format, record.runtime.software, record.precision, tuple(stages), pictures,
        tuple(record.seconds), record.runtime.proof(), is_reference,
    )  # fmt: skip


def _picture(number: int, record: Record, reference: Record, tolerance: Tolerance) -> Picture:
    pixels = _as_picture(record.pixels[number])
    if pixels is None:
        return Picture(number, None, refusal="it couldn't be drawn")
    wrong = what_is_wrong(pixels)
    if wrong or record is reference:
        return Picture(number, pixels, refusal=wrong)
    theirs = _as_picture(reference.pixels[number])
    if theirs is None or what_is_wrong(theirs):
        return Picture(number, pixels, refusal="the reference has no picture to compare it with")
    figures = compare_pictures(pixels, theirs)
    curve = tuple(_curve(record.traces[number], reference.traces[number]))
    return Picture(number, pixels, figures, curve, tolerance.refusal_of_picture(figures))


def _as_picture(pixels: Tensor | None) -> Array | None:
    if pixels is None:
        return None
    shown: Array = (pixels[0].permute(1, 2, 0).cpu().double().numpy() + 1) / 2
    return np.where(np.isinf(shown), np.nan, shown).clip(0, 1)


def _curve(trace: Trace | None, other: Trace | None) -> Iterator[float]:
    if trace is None or other is None:
        return
    for ours, theirs in zip(trace.latents, other.latents, strict=False):
        yield _figures(ours, theirs).relative_l2
