"""Which weight of a model a LoRA's name means.

kohya's names lost the difference between dots and underscores, so none is taken apart here: every name that any of the
conventions has for a module of the model at hand is made from the walk over it, and looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..checkpoint import Checkpoint
from ..errors import MismatchError
from ..merging.matching import MERGED
from ..merging.ratios import Place, places
from ..models.components import Component
from ..models.identify import Model
from ..models.walks import Link, UNetConfig, Weight, links

ADAPTED = MERGED
"""The components that LoRAs are made for."""

KOHYA_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
"""What kohya's names begin with; a lone text encoder's have no number, and some tools give it one."""

PEFT_PREFIX = "base_model.model."
"""What PEFT's names begin with; which component they are of, they don't say."""

_TEXT_LEVEL = "text_model."
_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
"""What diffusers once called an attention's projections in its LoRA files, by what the modules are called."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a parameter of a module lies in a model.

    Attributes:
        key: The tensor that holds it.
        shape: Its own shape, diffusers'.
        place: What a user may call it.
        first: The first of its rows, where ldm keeps it in one tensor with others.
        turned: Whether the tensor holds it transposed.
    """

    key: str
    shape: tuple[int, ...]
    place: Place
    first: int = 0
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """A layer of a model.

    Attributes:
        component: Whose it is.
        name: Diffusers' name of it.
        ldm: ldm's, where that has the layer as it is.
        spots: Where its ``weight`` and its ``bias`` lie; those that the checkpoint has.
    """

    component: str
    name: str
    ldm: str | None
    spots: Mapping[str, Spot]


@dataclass
class Names:
    """Every name that a LoRA may have for a module of a model.

    Attributes:
        modules: All modules, in the order of the walk.
    """

    modules: list[Module] = field(default_factory=list)
    _full: dict[str, Module] = field(default_factory=dict)
    _bare: dict[str, dict[str, Module]] = field(default_factory=dict)

    def of(self, name: str) -> list[Module]:
        """The modules that a name may mean: none, one, or one in each text encoder where it doesn't say which."""
        name = name.removeprefix(PEFT_PREFIX)
        found = self._full.get(name)
        return [found] if found else list(self._bare.get(name, {}).values())

    def add(self, module: Module) -> None:
        """Take a module in under all its names.

        Raises:
            ValueError: If one of them means another module already.
        """
        self.modules.append(module)
        for name in _dotted(module):
            for full in (f"{module.component}.{name}", *_flat(module.component, name)):
                _put(self._full, full, module)
            _put(self._bare.setdefault(name, {}), module.component, module)
        if module.ldm and module.component == "unet":  # what ComfyUI calls a UNet's weights
            _put(self._full, f"diffusion_model.{module.ldm}", module)


def _put(table: dict[str, Module], name: str, module: Module) -> None:
    if table.setdefault(name, module) is not module:
        raise ValueError(f"two modules are called {name}: {table[name].name} and {module.name}")


def _flat(component: str, name: str) -> Iterator[str]:
    """A name as kohya writes it."""
    return (prefix + name.replace(".", "_") for prefix in KOHYA_PREFIXES[component])


def _dotted(module: Module) -> list[str]:
    """The names of a module with dots, within its component."""
    names = {module.name, module.ldm or module.name}
    for own, old in _OLD_ATTENTION.items():
        parent = module.name.removesuffix(f".{own}")
        if parent != module.name and parent.rstrip("12").endswith("attn"):
            names.add(f"{parent}.{old}")
    # transformers 5.6 took this level out of CLIPTextModel, and with it out of what PEFT writes.
    return sorted(names | {name.removeprefix(_TEXT_LEVEL) for name in names})


def names_in(checkpoint: Checkpoint, model: Model) -> Names:
    """Every name for every module of a model's UNet and text encoders.

    Raises:
        MismatchError: If the checkpoint has none of these.
    """
    parts = [found for name in ADAPTED if (found := model.components.get(name)) and found.config is not None]
    if not parts:
        there = ", ".join(model.components) or "nothing that is known"
        raise MismatchError(
            f"it has no text encoder or UNet that a LoRA could be made for: {there}", file=checkpoint.path,
            remedy="name a model, or see what it holds: sdsurgery inspect",
        )  # fmt: skip
    names = Names()
    for part in parts:
        for module in _modules(checkpoint, part):
            names.add(module)
    return names


def _modules(checkpoint: Checkpoint, part: Component) -> Iterator[Module]:
    assert part.config is not None  # noqa: S101 - for the type checker: names_in chose those that have one
    linked = [(link, place) for link in links(part.config) for place in range(len(link.diffusers))]
    where = places(part.name, {link.diffusers[place].name: [link.diffusers[place].name] for link, place in linked})
    ldm: dict[str, str] = {}
    spots: dict[str, dict[str, Spot]] = {}
    for link, index in linked:
        weight = link.diffusers[index]
        module, _, parameter = weight.name.rpartition(".")
        found = spots.setdefault(module, {})
        theirs = link.ldm.name.removesuffix(f".{parameter}")
        if link.how in {"same", "squeeze"} and theirs != link.ldm.name:
            ldm[module] = theirs
        spot = _spot(part, link, index, where[weight.name])
        if spot and checkpoint[spot.key].numel == _numel(part, link, weight):
            found[parameter] = spot
    for name, found in spots.items():
        yield Module(part.name, name, ldm.get(name), found)


def _spot(part: Component, link: Link, index: int, place: Place) -> Spot | None:
    """Where a weight of diffusers' lies in a checkpoint of either layout, if it does."""
    weight = link.diffusers[index]
    key = part.keys.get(weight.name if part.layout == "diffusers" else link.ldm.name)
    if key is None:
        return None
    spot = Spot(key, weight.shape, replace(place, key=key))
    if part.layout == "diffusers" or link.how in {"same", "squeeze"}:
        return spot
    if link.how == "transpose":
        return replace(spot, turned=True)
    return replace(spot, first=index * weight.shape[0])


def _numel(part: Component, link: Link, weight: Weight) -> int:
    """Elements of the tensor that holds a weight."""
    count = 1
    for size in weight.shape if part.layout == "diffusers" else link.ldm.shape:
        count *= size
    return count


def every_place(names: Names) -> list[Place]:
    """Where all the weights are that a LoRA could change."""
    return [spot.place for module in names.modules for spot in module.spots.values()]


def kohya_name(module: Module, model: Model) -> str:
    """What kohya's trainer calls a module: by ldm's names in SDXL's UNet, by diffusers' everywhere else."""
    if module.component == "unet":
        config = model.components["unet"].config
        vector = isinstance(config, UNetConfig) and config.vector
        name = (module.ldm if vector else None) or module.name
        return f"lora_unet_{name.replace('.', '_')}"
    several = "text_encoder_2" in model.components or model.base_family.startswith("sdxl")
    prefix = KOHYA_PREFIXES[module.component][-1 if several else 0]
    return prefix + module.name.replace(".", "_")
