"""The diffusers folder: an index, and a subfolder a component with its config and its weights.

File names follow diffusers 0.42 and transformers 5.23, and what they wrote before. Nothing that the folder says is
believed: names are plain names, links stay inside, an index tells the truth about its shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import history
from ..checkpoint import Aside, AsideFile, Checkpoint, Folder, FolderGraphs, Origin, Tensor, WeightFile
from ..errors import CorruptError, HostileError, InputError, UnreadableError, UnsupportedError
from ..sources import FileSlice, SourceFile
from .safetensors import MAX_HEADER, json_object

if TYPE_CHECKING:
    from .onnx import Graph

NAME = "diffusers"
ONNX = "onnx"
GRAPH = "model.onnx"
VAE_GRAPHS = frozenset({"vae_encoder", "vae_decoder"})
"""Parts of a folder with graphs that are one component, the VAE."""

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"

_ORDER = ("unet", "text_encoder", "text_encoder_2", "vae")
_KNOWN = (*_ORDER, "tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
_WITH_WEIGHTS = {"UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"}

# A shard's variant stands before its number today and stood behind it once; the same holds for an index.
_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_WEIGHTS = re.compile(
    _STEM + r"(?:\.(?P<variant>[^.]+?))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<old>[^.]+))?\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(_STEM + r"\.(?P<format>safetensors|bin)(?:\.(?P<old>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json")
_OTHER_WEIGHTS = re.compile(
    r".*(\.(safetensors|sft|bin|ckpt|pt|pth|pkl|onnx|onnx_data|pb|msgpack|h5|ot|gguf|npz|flashpack|tflite)"
    r"|\.index(\.[^.]+)?\.json)",
    re.IGNORECASE,
)
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_SHOWN = 200
"""Letters of a name or a key that an error shows."""

_REMEDY = "download or copy it again"


@dataclass(frozen=True, slots=True)
class WeightName:
    """What the name of a file says about the weights in it.

    Attributes:
        stem: What begins it, which tells the library.
        variant: Such as ``fp16``.
        format: ``safetensors`` or ``bin``.
        index: Whether it is the index of a sharded component.
        shard: Whether it is a shard.
    """

    stem: str
    variant: str | None
    format: str
    index: bool
    shard: bool


def weight_name(name: str) -> WeightName | None:
    """What a file's name, without its folder, says; ``None`` where it is none that diffusers or transformers read."""
    found = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    if found is None or (found["variant"] and found["old"]):
        return None
    index = name.endswith(".json")
    variant = found["variant"] or found["old"]
    return WeightName(found["stem"], variant, found["format"], index, not index and found["shard"] is not None)


@dataclass(frozen=True, slots=True)
class _Component:
    """A component as the model's index names it; a lone one has no name."""

    name: str
    library: str | None = None
    kind: str | None = None

    @property
    def prefix(self) -> str:
        """What its keys and files have in front."""
        return f"{self.name}/" if self.name else ""

    def file(self, name: str) -> str:
        """A file of it, relative to the model's folder."""
        return self.prefix + name


@dataclass(slots=True)
class _Found:
    """What a folder turned out to hold."""

    files: dict[str, FileSlice] = field(default_factory=dict)
    weights: list[WeightFile] = field(default_factory=list)
    indexes: dict[str, FileSlice] = field(default_factory=dict)
    aside: list[Aside] = field(default_factory=list)
    graphs: dict[str, Graph] = field(default_factory=dict)
    variants: set[str | None] = field(default_factory=set)


class _Root:
    """The folder as the user named it; every file in it is opened through here."""

    def __init__(self, path: Path, read_file: Callable[[SourceFile], Checkpoint]) -> None:
        self.path = path
        self._real = Path(os.path.realpath(path))
        self._read_file = read_file

    def names(self, folder: str) -> tuple[list[str], list[str]]:
        """The folders and the files in one of its folders, sorted."""
        self._check_link(folder)
        try:
            with os.scandir(self.path / folder) as entries:
                kinds = [(entry.name, entry.is_dir()) for entry in entries]
        except OSError as error:
            raise UnreadableError(
                f"it can't be listed: {error.strerror}", file=self.path / folder, remedy="check its permissions"
            ) from error
        folders = sorted(name for name, is_folder in kinds if is_folder)
        return folders, sorted(name for name, is_folder in kinds if not is_folder)

    def _check_link(self, name: str) -> None:
        """Refuse what lies elsewhere, unless it is a blob of the Hugging Face cache that the folder is in."""
        real = Path(os.path.realpath(self.path / name))
        if real.is_relative_to(self._real):
            return
        for place, part in enumerate(self._real.parts):
            blobs = Path(*self._real.parts[:place], "blobs")
            if part == "snapshots" and real.parent == blobs and _BLOB.fullmatch(real.name):
                return
        raise HostileError(
            "it is a link that leads out of the model's folder",
            file=self.path / name,
            remedy="put the file itself in its place, if you trust it",
        )

    def source(self, name: str) -> SourceFile:
        """A file whose descriptor isn't kept, for there may be hundreds."""
        self._check_link(name)
        file = SourceFile(self.path / name)
        file.close()
        return file

    def whole(self, name: str) -> FileSlice:
        """All bytes of a file."""
        file = self.source(name)
        return FileSlice(file, 0, file.size)

    def document(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object."""
        return parsed(self.source(name))

    def checkpoint(self, name: str) -> Checkpoint:
        """A file that holds weights."""
        self._check_link(name)
        file = SourceFile(self.path / name)
        try:
            return self._read_file(file)
        finally:
            file.close()


def opener(path: Path) -> Callable[[str], SourceFile]:
    """Opens files in a folder by their names; refuses links that lead out of it."""
    return _Root(path, lambda file: Checkpoint({}, origin=Origin(NAME, file.path, file))).source


def parsed(file: SourceFile) -> dict[str, Any]:
    """The JSON object that a file holds; its descriptor is closed."""
    if file.size > MAX_HEADER:
        raise CorruptError(f"it claims to be JSON of {file.size} bytes", file=file.path, remedy=_REMEDY)
    try:
        return json_object(file, file.read(0, file.size).strip(), "it")
    finally:
        file.close()


def read(path: Path, variant: str | None, read_file: Callable[[SourceFile], Checkpoint]) -> Checkpoint:
    """Read a folder's index and the headers of its weights.

    Args:
        path: The folder.
        variant: Which weights, such as ``fp16``; a component that has none such gives its plain ones.
        read_file: Reads a single file.

    Raises:
        CorruptError: If something in it is broken, or contradicts its index.
        HostileError: If a name or a link leads out of it.
        UnsupportedError: If it is no model folder, or doesn't have the variant.
        UnreadableError: If something in it can't be opened.
    """
    root = _Root(path, read_file)
    found, graphs = _Found(), _graphs(root)
    components = _components(root, graphs)
    if graphs & VAE_GRAPHS and "vae" not in components:
        components["vae"] = _Component("vae")
    if "" not in components:
        _read_top(root, components, found)
    for component in components.values():
        _read_component(root, component, variant, found, graphs)
    _take_graphs(root, graphs, found)
    if not found.weights:
        raise UnsupportedError(
            "it is a model folder without weights that can be read", file=path, remedy="fetch the safetensors files"
        )
    if variant not in found.variants and variant is not None:
        has = ", ".join(sorted(str(name) for name in found.variants if name)) or "none"
        raise UnsupportedError(
            f"no component has the variant {variant!r}; there are: {has}", file=path, remedy="name another variant"
        )
    tensors: dict[str, Tensor] = {}
    for weights in found.weights:
        tensors |= weights.tensors
    return Checkpoint(
        tensors,
        _metadata(found.weights),
        origin=Origin(ONNX if found.graphs else NAME, path, aside=tuple(found.aside)),
        folder=Folder(found.files, tuple(found.weights), found.indexes, _stored(root, found.graphs)),
    )


def _graphs(root: _Root) -> frozenset[str]:
    """The parts of the model that have a graph, of those that are looked into."""
    parts = VAE_GRAPHS.union(_ORDER).intersection(root.names("")[0])
    return frozenset(name for name in parts if (root.path / name / GRAPH).is_file())


def _take_graphs(root: _Root, parts: Iterable[str], found: _Found) -> None:
    """Graphs that hold what nothing else does, and ours, which must fit the weights that they point into.

    Beside weights, what another program made is but another format. Nothing of ONNX is imported where no graph is.
    """
    if not parts:
        return
    from . import onnx_folders

    held = {weights.prefix for weights in found.weights}
    for part in sorted(parts):
        alone = f"{onnx_folders.component_of(part)}/" not in held
        try:
            metadata = onnx_folders.told(root.source, part)
        except InputError:
            if alone:
                raise
            continue
        if alone or onnx_folders.is_ours(metadata):
            found.graphs[part] = onnx_folders.read(root.source, part, metadata)
        if alone:
            found.weights.append(onnx_folders.weights_of(found.graphs[part], part))
    own = {*onnx_folders.files_of(root.source, found.graphs), *(found.graphs.keys() & VAE_GRAPHS)}
    found.aside = [entry for entry in found.aside if entry.name not in own]
    found.files = {name: data for name, data in found.files.items() if name not in own}
    found.weights.sort(key=lambda weights: place(weights.prefix.rstrip("/")))


def _stored(root: _Root, graphs: Mapping[str, Graph]) -> FolderGraphs | None:
    if not graphs:
        return None
    from .onnx_folders import StoredGraphs, files_of, style_of

    return StoredGraphs(style_of(graphs), files_of(root.source, graphs))


def _components(root: _Root, graphs: Collection[str]) -> dict[str, _Component]:
    """The components by name, in the order of their keys."""
    folders, files = root.names("")
    if MODEL_INDEX in files:
        named = list(_named(root, root.document(MODEL_INDEX)))
    elif CONFIG in files and any(weight_name(name) for name in files):
        config = root.document(CONFIG)
        kind = config.get("_class_name")
        is_diffusers = isinstance(kind, str)
        return {"": _Component("", "diffusers" if is_diffusers else "transformers", kind if is_diffusers else None)}
    else:
        named = [_Component(name) for name in folders if name in _KNOWN]
        if not graphs and not any(_has_weights(root, component) for component in named if component.name in _ORDER):
            raise UnsupportedError(
                f"it is a folder, but no model: there is neither {MODEL_INDEX} in it, nor {CONFIG} beside weights",
                file=root.path,
                remedy="name a diffusers folder, or a checkpoint file, such as a .safetensors",
            )
    named.sort(key=lambda component: (place(component.name), component.name))
    return {component.name: component for component in named}


def place(component: str) -> int:
    """Where a component stands among the others."""
    return _ORDER.index(component) if component in _ORDER else len(_ORDER)


def _has_weights(root: _Root, component: _Component) -> bool:
    return any(weight_name(name) for name in root.names(component.name)[1])


def _named(root: _Root, document: Mapping[str, Any]) -> Iterator[_Component]:
    """What an index says: ``"unet": ["diffusers", "UNet2DConditionModel"]``; ``[null, null]`` is left out."""
    for name, value in document.items():
        pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
        if not all(isinstance(text, str) for text in pair):
            continue
        if not is_plain(name) or name.startswith("."):
            raise HostileError(
                f"it names a component {name[:_SHOWN]!r}, which is no name of a folder",
                file=root.path / MODEL_INDEX,
                remedy="don't use it, or mend the file if you trust where it came from",
            )
        yield _Component(name, *pair)


def is_folder(container: str) -> bool:
    """Whether a container is a folder."""
    return container in {NAME, ONNX}


def is_plain(name: str) -> bool:
    """Whether a name is that of something in the same folder, on every system."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # JSON can hold what no name can
        return False
    return name not in {"", ".", ".."} and not any(letter in name for letter in "/\\:\0")


def is_lone(checkpoint: Checkpoint) -> bool:
    """Whether a folder is that of a single component, whose keys have nothing in front."""
    folder = checkpoint.folder
    return folder is not None and MODEL_INDEX not in folder.files and not any("/" in key for key in checkpoint)


def _read_top(root: _Root, components: Iterable[str], found: _Found) -> None:
    folders, files = root.names("")
    for name in files:
        if name.startswith("."):
            found.aside.append(AsideFile(name, "hidden file"))
        elif _OTHER_WEIGHTS.fullmatch(name):
            found.aside.append(AsideFile(name, "weights in a single file"))
        else:
            found.files[name] = root.whole(name)
    found.aside.extend(AsideFile(name, "folder") for name in folders if name not in set(components))


def _read_component(
    root: _Root, component: _Component, variant: str | None, found: _Found, graphs: Collection[str]
) -> None:
    if component.name in VAE_GRAPHS and component.name in graphs:
        _read_vae_config(root, component, found)
        return
    try:
        folders, files = root.names(component.name)
    except UnreadableError:
        if os.path.lexists(root.path / component.name):
            raise
        folders, files = [], []
    parts = VAE_GRAPHS | {"vae"} if component.name == "vae" else {component.name}
    has_graph = not parts.isdisjoint(graphs)
    chosen = _choose(root, component, files, variant, found) if not has_graph or _weights_in(files) else None
    taken = _read_weights(root, component, chosen, found) if chosen else set()
    for name in files:
        kind = weight_name(name)
        if name in taken:
            continue
        if name.startswith("."):
            found.aside.append(AsideFile(component.file(name), "hidden file"))
        elif kind or _OTHER_WEIGHTS.fullmatch(name):
            found.aside.append(AsideFile(component.file(name), _what(kind)))
        else:
            found.files[component.file(name)] = root.whole(component.file(name))
    found.aside.extend(AsideFile(component.file(name), "folder") for name in folders)


def _read_vae_config(root: _Root, component: _Component, found: _Found) -> None:
    """Of a part of the VAE, its config, if the VAE has none of its own; the graph is read elsewhere."""
    place = root.path / "vae" / CONFIG
    if CONFIG in root.names(component.name)[1] and not place.is_file():
        found.files.setdefault(f"vae/{CONFIG}", root.whole(component.file(CONFIG)))


def _weights_in(files: Iterable[str]) -> bool:
    return any(weight_name(name) for name in files)


def _what(kind: WeightName | None) -> str:
    if kind is None:
        return "weights in another format"
    if kind.variant:
        return f"weights of the variant {kind.variant}"
    return "the same weights as a pickle" if kind.format == "bin" else "other weights"


def _choose(root: _Root, component: _Component, files: Sequence[str], variant: str | None, found: _Found) -> str | None:
    """The file or the index to read a component's weights from, if it has any."""
    kinds = {name: kind for name in files if (kind := weight_name(name)) and not kind.shard}
    variants = {kind.variant for kind in kinds.values()}
    found.variants |= variants
    if not kinds:
        if component.kind in _WITH_WEIGHTS:
            stem = "model" if component.library == "transformers" else "diffusion_pytorch_model"
            name = component.file(f"{stem}.safetensors")
            raise CorruptError(f"{name} is missing", file=root.path, remedy=_REMEDY)
        return None
    if variant in variants:
        wanted = variant
    elif None in variants:
        wanted = None
    elif variant is None and len(variants) == 1:
        wanted = next(iter(variants))
    else:
        raise UnsupportedError(
            f"{component.name or 'it'} has only the variants {', '.join(sorted(map(str, variants)))}",
            file=root.path,
            remedy="say which one: variant=...",
        )
    transformers = component.library == "transformers"

    def rank(name: str) -> tuple[bool, bool, bool]:
        """Safetensors first, then the library's own name; transformers looks for a whole file before an index."""
        kind = kinds[name]
        foreign = (kind.stem == "diffusion_pytorch_model") == transformers
        return kind.format != "safetensors", foreign, kind.index == transformers

    return min((name for name, kind in kinds.items() if kind.variant == wanted), key=rank)


def _read_weights(root: _Root, component: _Component, chosen: str, found: _Found) -> set[str]:
    """Read a component's weights; the names of the files that they and their index lie in."""
    kind = weight_name(chosen)
    shards = {chosen: None}
    if kind and kind.index:
        weight_map = _weight_map(root, component.file(chosen))
        found.indexes[component.file(chosen)] = root.whole(component.file(chosen))
        shards = dict.fromkeys(sorted(set(weight_map.values())))
    read = {name: root.checkpoint(component.file(name)) for name in shards}
    if kind and kind.index:
        _check_shards(root, component, weight_map, read)
    for name, checkpoint in read.items():
        if not component.name and any("/" in key for key in checkpoint):
            raise UnsupportedError("a key of it holds a slash", file=root.path / name, remedy="rename it")
        found.weights.append(WeightFile(component.file(name), checkpoint, component.prefix))
        found.aside.extend(
            Aside(component.prefix + entry.name, entry.what, entry.tensors) for entry in checkpoint.aside
        )
    return {chosen, *read}


def _weight_map(root: _Root, index: str) -> dict[str, str]:
    weight_map = root.document(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError("it has no weight_map", file=root.path / index, remedy=_REMEDY)
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptError(
                "its weight_map doesn't name a file", file=root.path / index, key=key[:_SHOWN], remedy=_REMEDY
            )
        if not is_plain(name):
            raise HostileError(
                f"it names a shard {name[:_SHOWN]!r}, which is no name of a file beside it",
                file=root.path / index,
                key=key[:_SHOWN],
                remedy="don't use it, or mend the file if you trust where it came from",
            )
    return weight_map


def _check_shards(
    root: _Root, component: _Component, weight_map: Mapping[str, str], read: Mapping[str, Checkpoint]
) -> None:
    """Every tensor lies where the index says, and nowhere else."""
    for key, name in weight_map.items():
        if key not in read[name]:
            path = root.path / component.file(name)
            raise CorruptError(
                f"the index says that {key[:_SHOWN]!r} is in it, and it isn't",
                file=path,
                key=key[:_SHOWN],
                remedy=_REMEDY,
            )
    for name, checkpoint in read.items():
        for key in checkpoint:
            if weight_map.get(key) != name:
                where = f"lies in {weight_map[key]} too" if key in weight_map else "isn't in the index"
                path = root.path / component.file(name)
                raise CorruptError(f"{key[:_SHOWN]!r} {where}", file=path, key=key[:_SHOWN], remedy=_REMEDY)


def _metadata(weights: Iterable[WeightFile]) -> dict[str, str]:
    """What all files say; where they disagree, the first, but the longest history."""
    merged: dict[str, str] = {}
    for file in weights:
        theirs = file.checkpoint.metadata
        longer = len(history.recorded(theirs)) > len(history.recorded(merged))
        record = {history.METADATA_KEY: theirs[history.METADATA_KEY]} if longer else {}
        merged = {**theirs, **merged, **record}
    return merged
