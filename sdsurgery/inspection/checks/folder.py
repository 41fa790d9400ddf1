"""A diffusers folder against its own configs: what it lacks besides weights, and what its configs get wrong.

What the libraries do with each of these was tried with diffusers 0.42 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint
from ...containers.folders import is_lone
from ...models.components import Component
from ...models.configs import CONFIG_NAME, SCHEDULER_CONFIG_NAME, described, documents
from ...models.folder_files import INDEX_NAME, stock
from ...models.folder_repair import Lack, document_in, missing_files, tokens_in
from ...models.identify import identify
from ...models.walks import ClipConfig, Config, OpenClipConfig, UNetConfig, VaeConfig
from ...wording import listed
from ..findings import Finding
from .subject import Subject

_RULES: dict[Lack, tuple[str, str]] = {
    "config": ("config-missing", "it is missing"),
    "tokenizer": ("tokenizer", "it is missing, and no other file holds the tokenizer"),
    "tokenizer-old": ("tokenizer-old", "it is missing, and older programs read nothing else"),
    "tokenizer-length": ("tokenizer-length", "it states no model_max_length"),
}
Facts = dict[str, Any]

_MEND_IT = "put the model's own file in its place"


def configs_there(subject: Subject) -> Iterator[Finding]:
    """Whether every file is there that a pipeline needs besides weights, and says what a library accepts."""
    if subject.checkpoint.folder is None:
        return
    yield from _invalid(subject)
    if is_lone(subject.checkpoint) or subject.model.family == "unknown":
        return
    for missing in missing_files(subject.checkpoint, subject.model)[0]:
        rule, why = _RULES[missing.what]
        mend = subject.rewritten() if missing.content is not None else None
        yield from subject.finding(rule, f"{missing.name}: {missing.wrong or why}", file=missing.name, mend=mend)
    yield from _vocabularies(subject)
    index = _index(subject)
    yield from _named_and_absent(subject, index)
    yield from _pipeline_class(subject, index)
    yield from _classes(subject, index)


def _index(subject: Subject) -> Mapping[str, Any]:
    files = subject.checkpoint.folder.files if subject.checkpoint.folder else {}
    found = document_in(files[INDEX_NAME]) if INDEX_NAME in files else None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- configs


def _invalid(subject: Subject) -> Iterator[Finding]:
    """Configs that the libraries refuse, whatever the weights are."""
    stated = documents(subject.checkpoint)
    facts: Facts = {"remedy": _MEND_IT}
    for place, document in stated.items():
        file = _config_file(place)
        kind = document.get("_class_name", "")
        if not _is_class(kind):
            message = f"{file}: its _class_name is no name of a class"
            seen: Facts = {"file": file, "expected": "a name", "seen": ascii(kind)[:80]}
            yield from subject.finding("config-invalid", message, **facts, **seen)
    for name, component in subject.known.items():
        place = name if name in stated else ""
        if place in stated and component.config:
            for field, wrong in _undividing(component.config, stated[place]):
                message = f"{_config_file(place)}: {field} is {wrong[1]}, and should be {wrong[0]}"
                about: Facts = {"file": _config_file(place), "component": name, "expected": wrong[0], "seen": wrong[1]}
                yield from subject.finding("config-invalid", message, **facts, **about)


def _config_file(place: str) -> str:
    return f"{place}/{SCHEDULER_CONFIG_NAME if place == 'scheduler' else CONFIG_NAME}".lstrip("/")


def _is_class(kind: Any) -> bool:
    """Whether it is a name, or a list of them, which diffusers takes for code of one's own."""
    return isinstance(kind, str) or (isinstance(kind, list) and bool(kind) and all(isinstance(x, str) for x in kind))


def _undividing(config: Config, document: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The fields by which widths must be divisible and aren't, with what they should be, and what they are."""
    if isinstance(config, UNetConfig):
        yield from _heads_of_unet(config, document)
    if isinstance(config, UNetConfig | VaeConfig):
        groups = document.get("norm_num_groups", 32)
        if any(width % groups for width in config.channels):
            yield "norm_num_groups", (f"a divisor of {listed(config.channels, 8)}", str(groups))
    else:
        heads = document.get("num_attention_heads", 8)
        if config.width % heads:
            yield "num_attention_heads", (f"a divisor of {config.width}", str(heads))


def _heads_of_unet(config: UNetConfig, document: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """A UNet states its heads as ``attention_head_dim``; diffusers refuses the field that is called after them."""
    if document.get("num_attention_heads") is not None:
        yield "num_attention_heads", ("null", ascii(document["num_attention_heads"])[:80])
    heads = document.get("attention_head_dim", 8)
    every = heads if isinstance(heads, list | tuple) else [heads] * len(config.channels)
    last = len(config.channels) - 1
    for level, (width, count) in enumerate(zip(config.channels, every, strict=True)):
        attends = config.depths[level] or level == last  # the last level's are the middle's
        if attends and width % count:
            yield "attention_head_dim", (f"a divisor of {width}", str(count))
            return


# ---------------------------------------------------------------- tokens


def _vocabularies(subject: Subject) -> Iterator[Finding]:
    """Whether each text encoder has as many tokens as its tokenizer."""
    for name, component in subject.known.items():
        part = name.replace("text_encoder", "tokenizer")
        if not isinstance(component.config, ClipConfig | OpenClipConfig):
            continue
        count, embedded = tokens_in(subject.checkpoint, part), component.config.vocabulary
        if count is not None and count != embedded:
            message = f"the {name} has {embedded:,} tokens, and its {part} {count:,}"
            facts: Facts = {"component": name, "expected": str(embedded), "seen": str(count)}
            yield from subject.finding("tokenizer-vocabulary", message, **facts)


# ---------------------------------------------------------------- the index

_XL_FAMILIES = ("sdxl", "sdxl-refiner")
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"})
"""The last two are what transformers itself takes for any ``tokenizer.json``."""


def _pair(value: Any) -> tuple[str, str] | None:
    """Library and class, where it is a pair of names."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
        return value[0], value[1]
    return None


def _named_and_absent(subject: Subject, index: Mapping[str, Any]) -> Iterator[Finding]:
    """Parts that the pipeline would load, and of which nothing lies in the folder."""
    folder = subject.checkpoint.folder
    there = {name.partition("/")[0] for name in folder.files if "/" in name} if folder else set()
    weighed = {file.name.partition("/")[0] for file in folder.weights} if folder else set()
    top = folder.files if folder else {}
    for name in (*stock(subject.model.base_family)["components"], *_further_parts(subject, index)):
        pair = _pair(index.get(name))
        if pair is None or name in weighed or (name in there and name not in _WITH_WEIGHTS):
            continue
        if name == "feature_extractor" and "preprocessor_config.json" in top:
            continue  # where there is no such folder, the libraries look beside the index
        what = "no weights lie in it" if name in there else "there is no such folder"
        facts: Facts = {"file": name, "expected": " ".join(pair), "seen": "nothing"}
        remedy = f"fetch the {name}, or write [null, null] for it if the model is to go without"
        message = f"{INDEX_NAME} names {name}, and {what}"
        yield from subject.finding("index-missing", message, remedy=remedy, **facts)


_WITH_WEIGHTS = {"safety_checker", "image_encoder", "depth_estimator", "controlnet"}


def _further_parts(subject: Subject, index: Mapping[str, Any]) -> Iterator[str]:
    """What the pipelines of Stable Diffusion load besides; what a pipeline doesn't know it doesn't load."""
    kind = str(index.get("_class_name"))
    depth = "Depth2Img" in kind
    yield "feature_extractor"
    if depth:
        yield "depth_estimator"
    elif subject.model.base_family not in _XL_FAMILIES:
        yield "safety_checker"
    if not depth:
        yield "image_encoder"
    if "ControlNet" in kind:
        yield "controlnet"


def _pipeline_class(subject: Subject, index: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the pipeline is one of the model's family, as far as its name tells."""
    if not index:
        return
    kind, family = index.get("_class_name"), subject.model.base_family
    files = subject.checkpoint.folder.files if subject.checkpoint.folder else {}
    own = isinstance(kind, list) and bool(kind) and f"{kind[0]}.py" in files
    xl = family in _XL_FAMILIES
    expected = (stock(family)["pipelines"].get(_variant(subject)) or stock(family)["pipelines"][""])["class"]
    facts: Facts = {
        "file": INDEX_NAME,
        "expected": expected,
        "seen": ascii(kind)[:80],
        "remedy": f"write {expected} there",
    }
    if not isinstance(kind, str) and not own:
        yield from subject.finding("index-class", f"{INDEX_NAME}: its _class_name is no name of a class", **facts)
    elif isinstance(kind, str) and (xl < ("XL" in kind) or (xl and "StableDiffusion" in kind and "XL" not in kind)):
        message = f"{INDEX_NAME}: its pipeline is {kind}, and the model {subject.model.family}"
        yield from subject.finding("index-class", message, **facts | {"seen": kind})


def _variant(subject: Subject) -> str:
    return subject.model.family.removeprefix(subject.model.base_family)


def _classes(subject: Subject, index: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether each part is of the class that such weights are loaded by."""
    parts = [*stock(subject.model.base_family)["components"], *stock(subject.model.base_family)["tokenizers"]]
    for name in (*parts, "scheduler"):
        value = index.get(name, [None, None])
        pair = _pair(value)
        if pair is None and value != [None, None]:
            message = f"{INDEX_NAME}: what it says of {name} is no library and class"
            facts: Facts = {
                "file": INDEX_NAME,
                "expected": "[library, class] or [null, null]",
                "seen": ascii(value)[:80],
            }
            yield from subject.finding("index-class", message, remedy=_MEND_IT, **facts)
        elif pair and pair[0] in {"diffusers", "transformers"} and name in {*subject.known, *parts[-2:], "scheduler"}:
            yield from _class_of(subject, name, *pair)
    yield from _configs_classes(subject, index)


_RUNTIME = ("diffusers", "OnnxRuntimeModel")
"""What diffusers' own ONNX pipeline loads its graphs with."""


def _class_of(subject: Subject, name: str, library: str, kind: str) -> Iterator[Finding]:
    plain = kind.removeprefix("FlashPack")
    folder = subject.checkpoint.folder
    if (library, kind) == _RUNTIME and folder and folder.graphs:
        return
    if name == "scheduler":
        if library != "diffusers" or not kind.endswith("Scheduler"):
            where: Facts = {"file": INDEX_NAME, "expected": "a scheduler of diffusers", "seen": f"{library} {kind}"}
            message = f"{INDEX_NAME}: its scheduler is {library}'s {kind}, which is none"
            yield from subject.finding("config-invalid", message, remedy=_MEND_IT, **where)
        return
    wanted, known = _loaders(name, subject.known.get(name))
    if not known or (library == wanted and plain in known):
        return
    expected = f"{wanted} {known[0]}"
    facts: Facts = {"file": INDEX_NAME, "expected": expected, "seen": f"{library} {kind}", "component": name}
    message = f"{INDEX_NAME}: its {name} is loaded by {library}'s {kind}, and its weights are of another class"
    remedy = f"write {known[0]} there"
    yield from subject.finding("index-class", message, remedy=remedy, **facts)


def _loaders(name: str, component: Component | None) -> tuple[str, list[str]]:
    """The library and the classes that load a part as it is; none where what it is isn't known."""
    if name.startswith("tokenizer"):
        return "transformers", sorted(_TOKENIZERS)
    config = component.config if component else None
    if isinstance(config, UNetConfig):
        return "diffusers", ["UNet2DConditionModel"]
    if isinstance(config, VaeConfig):
        return "diffusers", ["AutoencoderKL"]
    if config is None:
        return "transformers", []
    if name == "text_encoder_2":
        return "transformers", ["CLIPTextModelWithProjection"]
    projected = isinstance(config, ClipConfig) and config.projected
    return "transformers", ["CLIPTextModel", *(["CLIPTextModelWithProjection"] if projected else [])]


def _configs_classes(subject: Subject, index: Mapping[str, Any]) -> Iterator[Finding]:
    """Configs that name another class than their part's: a pipeline goes by its index, other programs by the config."""
    stated = documents(subject.checkpoint)
    for name, component in subject.known.items():
        if name in stated:
            listed_there = stated[name].get("architectures")
            first = listed_there[0] if isinstance(listed_there, list) and listed_there else None
            kind = stated[name].get("_class_name", first)
            library, known = _loaders(name, component)
            known += ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"] if library == "transformers" else []
            if isinstance(kind, str) and kind not in known:
                yield from _other_class(subject, _config_file(name), known[0], kind)
    pair, kind = _pair(index.get("scheduler")), stated.get("scheduler", {}).get("_class_name")
    if pair and isinstance(kind, str) and pair[0] == "diffusers" and pair[1].endswith("Scheduler") and kind != pair[1]:
        yield from _other_class(subject, _config_file("scheduler"), pair[1], kind)


def _other_class(subject: Subject, file: str, expected: str, seen: str) -> Iterator[Finding]:
    facts: Facts = {"file": file, "expected": expected, "seen": seen, "remedy": f"write {expected} there"}
    yield from subject.finding("index-class", f"{file}: it is of a {seen}, and should be of a {expected}", **facts)


# ---------------------------------------------------------------- configs against weights


def contradicting(subject: Subject) -> dict[str, Finding]:
    """Components whose weights are whole by themselves, but not what their config says; with what to say of it."""
    found: dict[str, Finding] = {}
    stated = documents(subject.checkpoint)
    for name, component in subject.known.items():
        place = name if name in stated else ""
        wrong = component.missing or component.misshapen(subject.checkpoint.tensors) or component.stray
        if place not in stated or not wrong:
            continue
        file = f"{place}/{CONFIG_NAME}".lstrip("/")
        alone = _without(subject.checkpoint, file)
        other = identify(alone).components.get(name)
        if other is None or not other.table or other.missing or other.stray or other.misshapen(alone.tensors):
            continue
        says = described(component.config) if component.config else {}
        has = described(other.config) if other.config else {}
        fields = [field for field in has if has[field] != says.get(field)]
        if not _matters(component, fields):
            continue
        message = f"{file} states another {listed(fields, 8)} than the weights have"
        facts: Facts = {
            "component": name,
            "expected": ", ".join(f"{field} {has[field]}" for field in fields),
            "seen": ", ".join(f"{field} {says.get(field)}" for field in fields),
            "remedy": "put the model's own config in its place, or remove it and convert the folder, which writes one",
        }
        for finding in subject.finding("config-contradicts", message, mend=None, file=file, **facts):
            found[name] = finding
    return found


def _matters(component: Component, fields: list[str]) -> bool:
    """Whether weights beyond what the config says show that it is wrong; a projection that nothing uses doesn't."""
    return not component.stray or bool(component.missing) or not set(fields) <= {"projection_dim"}


def _without(checkpoint: Checkpoint, file: str) -> Checkpoint:
    """The same folder without one of its files."""
    assert checkpoint.folder is not None  # noqa: S101 - for the type checker: configs lie in folders
    files = {name: data for name, data in checkpoint.folder.files.items() if name != file}
    return replace(checkpoint, folder=replace(checkpoint.folder, files=files))
