"""Whether a model is whole, and nothing else is in it: container, family, components, keys."""

from __future__ import annotations

from collections.abc import Iterator

from ...checkpoint import AsideFile
from ...containers.saving import SUFFIXES
from ...models.components import EMA_SCALARS, Component
from ...models.configs import TEXT_ENCODERS
from ...models.folder_files import stock
from ...models.identify import foreign_parts
from ...models.known import latent_space, provenance_of_vae
from ...models.leftovers import training_groups, unknown_keys
from ..findings import DONOR, Finding, Mend
from .subject import Subject
from .text import is_stray_ids

_ALIKE = {"vision_model", "control_model"}
"""What stands before the names of other networks that are a text encoder's or a UNet's."""

_PICKLES = ("torch-zip", "torch-legacy")


def container(subject: Subject) -> Iterator[Finding]:
    """What kind of file it is, and what lies in it besides tensors."""
    origin = subject.checkpoint.origin
    if origin and origin.file:
        promised, found = SUFFIXES.get(subject.path.suffix.lower()), origin.container
        if promised and (promised in _PICKLES) != (found in _PICKLES):
            message = f"it is called {subject.path.suffix} and is {found}"
            facts = {"expected": promised, "seen": found}
            yield from subject.finding("container-suffix", message, mend=subject.rewritten(), **facts)
        if found in _PICKLES:
            yield from subject.finding("pickle", "the weights are a torch pickle", mend=subject.rewritten())
    for weights in subject.checkpoint.folder.weights if subject.checkpoint.folder else ():
        if weights.checkpoint.origin and weights.checkpoint.origin.container in _PICKLES:
            message = f"{weights.name} is a torch pickle"
            yield from subject.finding("pickle", message, file=weights.name, mend=subject.rewritten())
    for entry in subject.checkpoint.aside:
        if isinstance(entry, AsideFile):
            message = f"{entry.name}: {entry.what}"
            yield from subject.finding("file-unused", message, file=entry.name, mend=subject.pruned())
        else:
            message = f"{entry.name} is {entry.what}"
            mend = subject.rewritten() if subject.embedding else subject.pruned()
            yield from subject.finding("non-tensors", message, key=entry.name, mend=mend)


def family(subject: Subject) -> Iterator[Finding]:
    """Whether it is known what the model is."""
    model = subject.model
    evidence = "; ".join(model.evidence)
    foreign = foreign_parts(subject.checkpoint)
    if not model.networks or foreign or (model.family == "unknown" and subject.whole):
        remedy = "see what it holds: sdsurgery inspect"
        yield from subject.finding("family-unknown", evidence or "no tensor is in it", remedy=remedy)
    for name, found in model.networks.items():
        if not found.table:
            message, remedy = f"its {name} is of no known kind; {evidence}", "try it in the program it was made for"
            yield from subject.finding("component-unknown", message, component=name, remedy=remedy)


def components(subject: Subject) -> Iterator[Finding]:
    """Whether every component is there, and every weight of it, in its right shape."""
    for name in _expected(subject):
        if name not in subject.model.networks:
            message = f"a model of {subject.model.family} has a {name}, and this one hasn't"
            mend, remedy = (
                _given(subject, name),
                "put the component's folder from the model it was made of beside the others",
            )
            facts = {"component": name, "remedy": None if mend else remedy}
            yield from subject.finding("component-missing", message, mend=mend, **facts)
    for name, found in subject.known.items():
        mend = subject.replaced(name)
        for key in found.missing:
            yield from subject.finding("weight-missing", f"{key} is missing", key=key, component=name, mend=mend)
        for key, shape in found.misshapen(subject.checkpoint.tensors).items():
            if (shape, subject.checkpoint[key].shape) == ((), (1,)):
                continue  # torch takes one for the other, as files from before its 0.4 have it
            was, now = str(list(shape)), str(list(subject.checkpoint[key].shape))
            facts = {"key": key, "component": name, "expected": was, "seen": now}
            yield from subject.finding("weight-shape", f"{key} is {now} and should be {was}", mend=mend, **facts)


def _expected(subject: Subject) -> list[str]:
    known = subject.whole and subject.model.base_family != "unknown"
    return list(stock(subject.model.base_family)["components"]) if known else []


def _given(subject: Subject, name: str) -> Mend | None:
    """A VAE can be put in; anything else takes a model that has it, into which goes what this one has."""
    if subject.checkpoint.folder:
        return None
    if name == "vae" and "unet" in subject.known:
        return subject.command("merge-vae", DONOR)
    parts = [part for part in subject.known if part in _expected(subject)]
    if not parts:
        return None
    steps = [("replace", "--component", part, "--from", subject.named) for part in parts]
    words = [word for step in steps for word in ("+", *step)][1:]
    return Mend(("sdsurgery", "pipe", DONOR, "-o", subject.beside, *words))


def keys(subject: Subject) -> Iterator[Finding]:
    """Names that nobody expects: wrapped, twice, unknown, or of another dialect."""
    model = subject.model
    if model.wrapper:
        message = f"all keys begin with {model.wrapper!r}"
        lone = next(iter(model.networks)) if len(model.networks) == 1 else None
        mend = subject.command("extract", "--component", lone) if lone else None
        texts = any(name in subject.known for name in TEXT_ENCODERS)
        mend = subject.command("fix-clip", safe=True) if texts else mend
        yield from subject.finding("key-wrapped", message, seen=model.wrapper, mend=mend)
    for name in TEXT_ENCODERS:
        found = model.components.get(name)
        odd = [key for local, key in found.keys.items() if key != found.prefix + local] if found and found.table else []
        if found and odd:
            right = found.prefix + next(local for local, key in found.keys.items() if key == odd[0])
            message = f"{len(odd)} keys of the {name} lack their 'text_model.', such as {odd[0]}"
            facts = {"component": name, "expected": right, "seen": odd[0]}
            mend = subject.command("fix-clip", safe=True)
            yield from subject.finding("key-dialect", message, key=odd[0], mend=mend, **facts)
    mend = subject.pruned("--unknown")
    for key in unknown_keys(subject.checkpoint, model):
        owner = subject.strays.get(key, "other")
        if is_stray_ids(owner, key):
            continue  # see text.py
        twin = _twin(key, model.networks)
        rule = "key-duplicate" if twin else "key-unknown"
        message = f"{key} is {twin} under another name" if twin else f"{key} is nothing that {model.family} has"
        yield from subject.finding(rule, message, key=key, component=owner, expected=twin, mend=mend)


def _twin(key: str, networks: dict[str, Component]) -> str | None:
    """The key of the weight that a stray one is called like, but for what stands before it."""
    segments = key.split(".")
    if _ALIKE & set(segments):
        return None
    for found in networks.values():
        for start in range(min(5, len(segments))):
            rest = ".".join(segments[start:])
            for name in (rest, "text_model." + rest):
                if name in found.keys and name.count("."):
                    return found.keys[name]
    return None


def leftovers(subject: Subject) -> Iterator[Finding]:
    """What training left behind, and whether its EMA weights are whole."""
    ema = subject.model.components.get("ema")
    averaged = [name for name in ema.keys if name not in EMA_SCALARS] if ema else []
    unet = subject.model.components.get("unet")
    if ema and averaged and unet and unet.table:
        faults = len(ema.missing) + len(ema.misshapen(subject.checkpoint.tensors))
        if faults:
            message = f"{faults} of {len(unet.table)} EMA weights are missing or of another shape"
            yield from subject.finding("ema-incomplete", message, component="ema", mend=subject.pruned(drop=["ema"]))
    for group, found in training_groups(subject.checkpoint, subject.model):
        if not found or group == "schedule" or (group == "ema" and not averaged):
            continue
        nbytes = sum(subject.checkpoint[key].nbytes for key in found)
        message = f"{group}: {len(found)} tensors, {nbytes:,} bytes"
        yield from subject.finding("leftovers", message, component=group, mend=subject.pruned(drop=[group]))


def vae(subject: Subject) -> Iterator[Finding]:
    """Whether the VAE is of the model's family, as far as can be told."""
    found = subject.model.components.get("vae")
    wanted = latent_space(subject.model.base_family)
    if found is None or wanted is None:
        return
    origin = provenance_of_vae(subject.checkpoint, subject.model)
    seen = latent_space(origin.family)
    if seen is not None and seen != wanted:
        message = f"the VAE is of {origin.family}, and the model of {subject.model.base_family}: {origin.why}"
        facts = {"component": "vae", "expected": wanted, "seen": seen}
        yield from subject.finding("vae-family", message, mend=subject.replaced("vae"), **facts)
    halves = sum(subject.checkpoint[key].dtype.name == "F16" for key in found.keys.values())
    if wanted == "sdxl" and 2 * halves > len(found.keys):
        message = "the VAE is in fp16: unless it is sdxl-vae-fp16-fix, it must be computed in fp32"
        mend = subject.command("cast", "fp32", "--component", "vae")
        yield from subject.finding("vae-half", message, component="vae", seen="F16", mend=mend)
