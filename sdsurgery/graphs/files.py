"""Graphs as files of a folder: where their weights lie, and that they still lie there.

A weight is named by a file beside the graph, an offset and a length. With shared weights that file is the safetensors
file that diffusers reads. Whoever writes it anew moves the offsets, and nobody would notice: so a graph records the
hash of the header that it was linked to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..checkpoint import Change, Checkpoint, Tensor
from ..containers.folder_writing import Plan
from ..containers.folders import CONFIG, GRAPH, MODEL_INDEX
from ..containers.onnx import DATA, LINKS, STYLE
from ..dtypes import BY_NAME
from ..errors import UnsupportedError
from ..models.configs import NETWORKS
from ..sources import Data, InMemory, joined, part_of
from .encoding import Place
from .networks import Drawn, Interface, Style, draw

Weights = Literal["shared", "external", "embedded"]

_ALIGNMENT = 4096
"""A page: ONNX Runtime maps external tensors that begin on one."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs that a folder is to be written with; drawn of what it holds when it is planned.

    Attributes:
        style: How they are drawn.
        weights: Where the weights lie: in the safetensors files that diffusers reads, in one file of data a graph, or
            within the graphs.
        hard_links: Whether the VAE's shared weights may be one file under three names, which the onnx package refuses
            to load (ONNX Runtime doesn't); else they are copied where the file system can't share their bytes.
    """

    style: Style
    weights: Weights = "shared"
    hard_links: bool = True

    @property
    def files(self) -> Mapping[str, Data]:
        """None: they are yet to be made."""
        return {}

    def add_to(self, plan: Plan, checkpoint: Checkpoint) -> None:
        """Add the graphs to what is planned for a folder, and take out what they hold themselves.

        Raises:
            UnsupportedError: If a config or a component is one that no graph is known for, or a graph gets too large.
        """
        plan.hard_links = self.hard_links
        if self.style.interface == "diffusers":
            plan.outputs[MODEL_INDEX] = (InMemory(_runtime_index(plan, self.style)),)
        used: set[str] = set()
        for component in NETWORKS:
            prefix = component + "/"
            tensors = {key.removeprefix(prefix): tensor for key, tensor in checkpoint.items() if key.startswith(prefix)}
            if not tensors:
                continue
            document = _config(plan, component)
            for drawn in draw(component, document, tensors, self.style):
                used |= {prefix + weight.name for weight in drawn.graph.weights}
                self._add(plan, drawn, tensors)
        if self.weights != "shared":
            for name in [name for name in plan.outputs if _holds_weights(name)]:
                del plan.outputs[name]
            lost = [Change(key, "dropped", str(tensor)) for key, tensor in checkpoint.items() if key not in used]
            plan.changes = (*plan.changes, *lost)

    def _told(self) -> str:
        """What a graph says of how it was made, so that it can be made again."""
        compute = self.style.compute.name if self.style.compute else None
        told = {"weights": self.weights, "hard_links": self.hard_links, **asdict(self.style), "compute": compute}
        return json.dumps(told, sort_keys=True)

    def _add(self, plan: Plan, drawn: Drawn, tensors: Mapping[str, Tensor]) -> None:
        name = f"{drawn.folder}/{GRAPH}"
        if drawn.folder != drawn.component:
            plan.add(f"{drawn.folder}/{CONFIG}", plan.outputs[f"{drawn.component}/{CONFIG}"])
        if self.weights == "embedded":
            plan.add(name, drawn.graph.embedding(tensors, {STYLE: self._told()}))
        elif self.weights == "external":
            places, parts = laid_out(drawn, tensors)
            plan.add(name, (drawn.graph.linked(places, {STYLE: self._told()}),))
            plan.add(f"{drawn.folder}/{DATA}", parts)
        else:
            plan.add(name, (self._shared(plan, drawn),))

    def _shared(self, plan: Plan, drawn: Drawn) -> Data:
        """The graph with its weights in the component's own files, which get a second name in another folder."""
        places: dict[str, Place] = {}
        headers: dict[str, str] = {}
        for path in [path for path in plan.outputs if path.startswith(drawn.component + "/") and _holds_weights(path)]:
            file = path.rpartition("/")[2]
            if not file.endswith(".safetensors"):
                continue
            found, headers[file] = header_places(joined(plan.outputs[path]), file)
            places |= found
            if drawn.folder != drawn.component:
                plan.twice[f"{drawn.folder}/{file}"] = path
        return drawn.graph.linked(places, {STYLE: self._told(), LINKS: recorded(headers)})


def recorded(headers: Mapping[str, str]) -> str:
    """The hashes of headers, as a graph keeps them."""
    return json.dumps(dict(headers), sort_keys=True)


_RUN_BY_DIFFUSERS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


def _runtime_index(plan: Plan, style: Style) -> bytes:
    """The index of diffusers' own ONNX pipeline, which exists for SD1 and SD2."""
    if style.family.startswith("sdxl"):
        raise UnsupportedError(
            "diffusers has no ONNX pipeline for SDXL", remedy="leave the layout out: optimum's pipelines run it"
        )
    index = json.loads(b"".join(joined(plan.outputs[MODEL_INDEX]).chunks()))
    parts = {name: index[name] for name in ("scheduler", "tokenizer") if name in index}
    graphs = {name: ["diffusers", "OnnxRuntimeModel"] for name in _RUN_BY_DIFFUSERS}
    rest = {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    content = {"_class_name": "OnnxStableDiffusionPipeline", **dict(sorted({**parts, **graphs, **rest}.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def stored(told: Mapping[str, Any]) -> Graphs:
    """The graphs that tell this of themselves.

    Raises:
        UnsupportedError: If it makes no sense.
    """
    nonsense = UnsupportedError(
        "what its graphs say of how they were made makes no sense", remedy="convert the model again"
    )
    if told.get("weights") not in get_args(Weights) or told.get("interface") not in get_args(Interface):
        raise nonsense
    try:
        compute = BY_NAME[told["compute"]] if told["compute"] else None
        style = Style(told["opset"], told["interface"], compute, str(told["family"]), bool(told.get("fused")))
        return Graphs(style, told["weights"], bool(told["hard_links"]))
    except (KeyError, TypeError) as error:
        raise nonsense from error


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _config(plan: Plan, component: str) -> Mapping[str, Any]:
    name = f"{component}/{CONFIG}"
    if name not in plan.outputs:
        raise UnsupportedError(f"{name} is missing, and the graph is drawn from it", remedy="convert the model first")
    document: Mapping[str, Any] = json.loads(b"".join(joined(plan.outputs[name]).chunks()))
    return document


def header_places(file: Data, name: str) -> tuple[dict[str, Place], str]:
    """Where each tensor of a safetensors file lies, and the hash of its header."""
    length = int.from_bytes(b"".join(part_of(file, 0, 8).chunks()), "little")
    header = b"".join(part_of(file, 8, length).chunks())
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    places = {
        key: Place(name, 8 + length + begin, end - begin)
        for key, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }
    return places, hashlib.sha256(length.to_bytes(8, "little") + header).hexdigest()


def laid_out(drawn: Drawn, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Place], tuple[Data, ...]]:
    """One file of data for a graph: the weights in their order, each on a page of its own if it fills one."""
    places, parts, position = {}, [], 0
    for weight in drawn.graph.weights:
        data = tensors[weight.name].data
        gap = -position % _ALIGNMENT if data.nbytes >= _ALIGNMENT else 0
        parts += [InMemory(bytes(gap)), data] if gap else [data]
        places[weight.name] = Place(DATA, position + gap, data.nbytes)
        position += gap + data.nbytes
    return places, tuple(parts)
