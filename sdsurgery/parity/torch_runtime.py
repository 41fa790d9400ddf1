"""diffusers and transformers in torch: folders through ``from_pretrained``, single files through ``from_single_file``.

The loader of single files is diffusers' own, so the same bytes are read by somebody else. It ignores position ids; they
are put into the text encoder as ldm and A1111's webui would, cast to int64.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptError, UnsupportedError
from .formats import Format
from .runtimes import Conditioning, bare, document, text_encoders

_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """A format run by torch."""

    def __init__(self, given: Format, *, device: str, precision: str) -> None:
        import diffusers

        self.format, self.device, self.dtype = given, torch.device(device), _PRECISIONS[precision]
        self.software = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        self._ran: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def text_encoders(self) -> Iterator[TorchTextEncoders]:
        """Load the text encoders."""
        with self._loaded(text_encoders(self.format), self._text_encoders()) as networks:
            yield TorchTextEncoders(networks, self)

    @contextlib.contextmanager
    def unet(self) -> Iterator[TorchPredictor]:
        """Load the UNet."""
        with self._loaded(["unet"], [self._component("UNet2DConditionModel", "unet")]) as (network,):
            yield TorchPredictor(network, self)

    @contextlib.contextmanager
    def vae(self) -> Iterator[TorchAutoencoder]:
        """Load the VAE."""
        with self._loaded(["vae"], [self._component("AutoencoderKL", "vae")]) as (network,):
            yield TorchAutoencoder(network, self)

    def sizes(self, component: str, feed: Mapping[str, Tensor]) -> dict[str, int]:
        """How many values modules with weights of their own give, in the order in which a run comes to them."""
        found: dict[str, int] = {}
        self._hooked(component, feed, None, lambda name, value: found.setdefault(name, value.numel()))
        return found

    def outputs_of(self, component: str, names: Sequence[str], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What they give; where the network fails, those before."""
        found: dict[str, Tensor] = {}
        with contextlib.suppress(RuntimeError, IndexError, ValueError):
            self._hooked(component, feed, set(names), lambda name, value: found.setdefault(name, value.float()))
        return found

    def _hooked(
        self, component: str, feed: Mapping[str, Tensor], names: set[str] | None, told: Callable[[str, Tensor], Any]
    ) -> None:
        """Run a network once, and tell of what its modules give."""
        with self._by_name(component) as (network, run):
            modules = {
                bare(name): module
                for name, module in network.named_modules()
                if any(True for _ in module.parameters(recurse=False))
            }
            hooks = [
                module.register_forward_hook(_telling(name, told))
                for name, module in modules.items()
                if names is None or name in names
            ]
            try:
                run(feed)
            finally:
                for hook in hooks:
                    hook.remove()

    @contextlib.contextmanager
    def _by_name(self, component: str) -> Iterator[tuple[Any, Callable[[Mapping[str, Tensor]], Any]]]:
        """A network, and how it is run on what a graph is fed."""
        if component == "unet":
            with self.unet() as predict:
                yield (
                    predict.network,
                    lambda feed: predict(
                        feed["sample"],
                        float(feed["timestep"]),
                        Conditioning(feed["encoder_hidden_states"], feed.get("text_embeds"), feed.get("time_ids")),
                    ),
                )
        elif component.startswith("text_encoder"):
            with self.text_encoders() as encode:
                network = encode.networks[text_encoders(self.format).index(component)]
                yield network, lambda feed: network(feed["input_ids"].to(self.device))
        else:
            with self.vae() as vae:
                yield (
                    vae.network,
                    lambda feed: (
                        vae.decode(feed["latent_sample"]) if component == "vae_decoder" else vae.encode(feed["sample"])
                    ),
                )

    def proof(self) -> Mapping[str, Mapping[str, int]]:
        """Weights by the device that they lay on."""
        return self._ran

    def given(self, value: Tensor) -> Tensor:
        """A tensor as a network takes it."""
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    @contextlib.contextmanager
    def _loaded(self, names: Sequence[str], networks: list[Any]) -> Iterator[list[Any]]:
        for name, network in zip(names, networks, strict=True):
            network.eval().to(self.device)
            self._ran[name] = dict(Counter(str(value.device) for value in network.parameters()))
        del network
        with torch.no_grad(), _exact():
            yield networks
        networks.clear()  # whoever made the list has it still
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _component(self, kind: str, name: str) -> Any:
        import diffusers

        loader = getattr(diffusers, kind)
        with _loading(self.format):
            if self.format.kind == "ldm":
                return loader.from_single_file(
                    str(self.format.path), config=str(self.format.configs), subfolder=name,
                    local_files_only=True, torch_dtype=self.dtype,
                )  # fmt: skip
            return loader.from_pretrained(
                str(self.format.path), subfolder=name, local_files_only=True, torch_dtype=self.dtype
            )

    def _text_encoders(self) -> list[Any]:
        names = text_encoders(self.format)
        with _loading(self.format):
            if self.format.kind == "ldm":
                found = self._of_single_file(names)
            else:
                found = [self._of_folder(name) for name in names]
        ids = self.format.position_ids
        if ids is not None and names[0] == "text_encoder":
            _put(ids, found[0], self.format)
        return found

    def _of_single_file(self, names: Sequence[str]) -> list[Any]:
        import diffusers

        index = document(self.format.configs, "model_index.json")
        loader = getattr(diffusers, index["_class_name"])
        if "from_single_file" not in dir(loader):
            loader = diffusers.StableDiffusionPipeline
        others = dict.fromkeys(
            name for name in ("unet", "vae", "scheduler", "tokenizer", "tokenizer_2") if name in index
        )
        pipe = loader.from_single_file(
            str(self.format.path),
            config=str(self.format.configs),
            local_files_only=True,
            torch_dtype=self.dtype,
            **others,
        )
        return [getattr(pipe, name) for name in names]

    def _of_folder(self, name: str) -> Any:
        import transformers

        (kind,) = document(self.format.path, f"{name}/config.json")["architectures"]
        loader = getattr(transformers, kind)
        return loader.from_pretrained(str(self.format.path), subfolder=name, local_files_only=True, dtype=self.dtype)


def _telling(name: str, told: Callable[[str, Tensor], Any]) -> Callable[[Any, Any, Tensor], None]:
    """A hook that leaves what a module gives as it is."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
        told(name, output)

    return hook


def _put(ids: Sequence[int], encoder: Any, given: Format) -> None:
    """Have an encoder look its positions up as the file's ids say."""
    text = getattr(encoder, "text_model", encoder)
    count = text.embeddings.position_ids.shape[-1]
    if len(ids) != count:
        raise CorruptError(
            f"it has {len(ids)} position ids, and its text encoder {count} positions",
            file=given.given or given.path,
            remedy="mend them: sdsurgery fix-clip",
        )
    text.embeddings.position_ids = torch.tensor(ids, dtype=torch.int64)[None]


class TorchTextEncoders:
    """The text encoders, loaded."""

    def __init__(self, networks: Sequence[Any], runtime: TorchRuntime) -> None:
        self.networks, self._runtime = networks, runtime

    def __call__(self, ids: Sequence[Tensor]) -> Conditioning:
        """Encode token ids; SDXL's encoders give the states before their last layer."""
        if len(self.networks) == 1 and not hasattr(self.networks[0], "text_projection"):
            found = self.networks[0](ids[0].to(self._runtime.device))
            return Conditioning(found.last_hidden_state.float())
        states, pooled = [], None
        for network, tokens in zip(self.networks, ids, strict=True):
            found = network(tokens.to(self._runtime.device), output_hidden_states=True)
            states.append(found.hidden_states[-2].float())
            pooled = found[0].float() if hasattr(network, "text_projection") else pooled
        return Conditioning(torch.cat(states, -1), pooled)


class TorchPredictor:
    """The UNet, loaded."""

    def __init__(self, network: Any, runtime: TorchRuntime) -> None:
        self.network, self._runtime = network, runtime

    def __call__(self, sample: Tensor, timestep: float, given: Conditioning) -> Tensor:
        """Predict."""
        conditions = {name: self._runtime.given(value) for name, value in given.added.items()} or None
        found = self.network(
            self._runtime.given(sample), timestep, self._runtime.given(given.states), added_cond_kwargs=conditions
        )
        predicted: Tensor = found.sample.float()
        return predicted


class TorchAutoencoder:
    """The VAE, loaded."""

    def __init__(self, network: Any, runtime: TorchRuntime) -> None:
        self.network, self._runtime = network, runtime

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        pixels: Tensor = self.network.decode(self._runtime.given(latents)).sample.float()
        return pixels

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and log variance."""
        found: Tensor = self.network.encode(self._runtime.given(pixels)).latent_dist.parameters.float()
        return found


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Without TF32, on the GPUs that would use it."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


@contextlib.contextmanager
def _loading(given: Format) -> Iterator[None]:
    """Load a network; whatever its library raises is the format's fault."""
    try:
        with _quiet():
            yield
    except Exception as error:  # the libraries' exceptions have no common base
        raise UnsupportedError(
            f"diffusers can't load it: {str(error)[:300]}", file=given.given or given.path,
            remedy="see what is wrong with it: sdsurgery verify",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loaders talk of what is new and what is old; a user of parity hears what parity found."""
    import diffusers
    import transformers

    levels = diffusers.logging.get_verbosity(), transformers.logging.get_verbosity()
    diffusers.logging.set_verbosity(logging.ERROR)
    transformers.logging.set_verbosity(logging.ERROR)
    bars = [library for library in (diffusers, transformers) if library.logging.is_progress_bar_enabled()]
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.logging.set_verbosity(levels[0])
        transformers.logging.set_verbosity(levels[1])
        for library in bars:
            library.logging.enable_progress_bar()
