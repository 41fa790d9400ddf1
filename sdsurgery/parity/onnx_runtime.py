"""ONNX Runtime on a folder of graphs, those of optimum-onnx's layout and those of diffusers' own pipeline."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .formats import Format
from .probes import SHAPE, module_values, with_outputs
from .runtimes import Conditioning, text_encoders

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}
_STATES = "hidden_states."


class Session:
    """One graph, loaded; its first run is profiled, to prove where its nodes ran."""

    def __init__(
        self, path: Path, device: torch.device, *, probes: Sequence[str] = (), shapes: Sequence[str] = ()
    ) -> None:
        """Load it.

        Args:
            path: The graph.
            device: Where to run it.
            probes: Values inside the graph that are to be outputs, too.
            shapes: Values inside the graph whose shapes are to be outputs.
        """
        import onnxruntime

        self.path, self.device = path, device
        self._folder = tempfile.TemporaryDirectory()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name, "profile"))
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": "0"}))
        try:
            graph: str | bytes = str(path)
            if probes or shapes:
                graph = with_outputs(path, probes, shapes=shapes)
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            self._session = onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            self._folder.cleanup()
            message = f"ONNX Runtime can't load it: {str(error)[:300]}"
            raise UnsupportedError(
                message, file=path, remedy="convert the model again, or update ONNX Runtime"
            ) from error
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.providers: dict[str, int] | None = None

    def run(self, given: Mapping[str, Tensor], *, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Run it.

        Args:
            given: By the names of the inputs; cast to what they take.
            shape: Of the only output, if it is known: then nothing leaves a GPU.
        """
        feed = {name: self._as_input(name, value) for name, value in given.items() if name in self.inputs}
        try:
            found = self._bound(feed, shape) if self.device.type == "cuda" and shape else self._copied(feed)
        except Exception as error:  # as above
            raise UnsupportedError(
                str(error)[:300], file=self.path, remedy="see what is wrong with it: verify"
            ) from error
        if self.providers is None:
            self.providers = self._profiled()
        return found

    def _as_input(self, name: str, value: Tensor) -> Tensor:
        told = self.inputs[name]
        value = value.to(self.device, _TYPES[told.type])
        return value.reshape(-1) if len(told.shape) == 1 else value.contiguous()

    def _copied(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = self._session.run(None, {name: value.cpu().numpy() for name, value in feed.items()})
        pairs = zip(self.outputs, arrays, strict=True)
        return {name: torch.from_numpy(array).to(self.device).float() for name, array in pairs}

    def _bound(self, feed: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
        import numpy as np

        (name,) = self.outputs
        kind = _TYPES[self._session.get_outputs()[0].type]
        result = torch.empty(tuple(shape), dtype=kind, device=self.device)
        binding = self._session.io_binding()
        kinds = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.int32: np.int32}
        index = self.device.index or 0
        for key, value in feed.items():
            binding.bind_input(key, "cuda", index, kinds[value.dtype], tuple(value.shape), value.data_ptr())
        binding.bind_output(name, "cuda", index, kinds[kind], tuple(shape), result.data_ptr())
        torch.cuda.synchronize(self.device)
        self._session.run_with_iobinding(binding)
        return {name: result.float()}

    def _profiled(self) -> dict[str, int]:
        """How many nodes ran on which provider."""
        place = Path(self._session.end_profiling())
        events = json.loads(place.read_text("utf-8"))
        place.unlink()
        ran = {
            event["name"]: event["args"]["provider"]
            for event in events
            if event.get("cat") == "Node" and "provider" in event.get("args", {})
        }
        return dict(sorted(Counter(ran.values()).items()))

    def close(self) -> None:
        """Let go of it."""
        if self.providers is None:
            Path(self._session.end_profiling()).unlink(missing_ok=True)
        del self._session
        self._folder.cleanup()
        gc.collect()


class OnnxRuntime:
    """A folder of graphs run by ONNX Runtime."""

    def __init__(self, given: Format, *, device: str) -> None:
        import onnxruntime

        self.format, self.device = given, torch.device(device)
        self.software = f"ONNX Runtime {onnxruntime.__version__}"
        self._ran: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def text_encoders(self) -> Iterator[OnnxTextEncoders]:
        """Load the text encoders."""
        with self._loaded(*text_encoders(self.format)) as sessions:
            yield OnnxTextEncoders(sessions)

    @contextlib.contextmanager
    def unet(self) -> Iterator[OnnxPredictor]:
        """Load the UNet."""
        with self._loaded("unet") as (session,):
            yield OnnxPredictor(session)

    @contextlib.contextmanager
    def vae(self) -> Iterator[OnnxAutoencoder]:
        """Load the VAE's two graphs."""
        with self._loaded("vae_encoder", "vae_decoder") as (encoder, decoder):
            yield OnnxAutoencoder(encoder, decoder)

    def proof(self) -> Mapping[str, Mapping[str, int]]:
        """Nodes by provider, from ONNX Runtime's profile of the first run of each graph."""
        return self._ran

    def modules(self, component: str) -> Mapping[str, str]:
        """By module, the name of the value that it gives in a graph such as ``unet`` or ``vae_decoder``."""
        return module_values(self._graph(component))

    def sizes(self, component: str, feed: Mapping[str, Tensor]) -> dict[str, int]:
        """How many values modules with weights of their own give, in the order of the graph."""
        values = self.modules(component)
        with self._probed(component, shapes=tuple(values.values())) as session:
            found = session.run(feed)
        return {name: int(found[SHAPE + value].prod()) for name, value in values.items()}

    def outputs_of(self, component: str, names: Sequence[str], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What they give."""
        values = self.modules(component)
        with self._probed(component, probes=tuple(values[name] for name in names)) as session:
            found = session.run(feed)
        return {name: found[values[name]] for name in names}

    def _graph(self, component: str) -> Path:
        return self.format.path / component / "model.onnx"

    @contextlib.contextmanager
    def _probed(self, component: str, **told: Sequence[str]) -> Iterator[Session]:
        session = Session(self._graph(component), self.device, **told)
        try:
            yield session
        finally:
            session.close()

    @contextlib.contextmanager
    def _loaded(self, *names: str) -> Iterator[list[Session]]:
        sessions: list[Session] = []
        try:
            for name in names:  # one by one, so that those before one that fails are let go of
                sessions += [Session(self._graph(name), self.device)]
            yield sessions
        finally:
            for name, session in zip(names, sessions, strict=False):
                if session.providers is not None:
                    self._ran[name] = session.providers
                session.close()


class OnnxTextEncoders:
    """The text encoders, loaded."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = sessions

    def __call__(self, ids: Sequence[Tensor]) -> Conditioning:
        """Encode token ids; SDXL's encoders give the states before their last layer."""
        found = [session.run({"input_ids": tokens}) for session, tokens in zip(self.sessions, ids, strict=True)]
        if not any(name.startswith(_STATES) for name in found[0]):
            return Conditioning(found[0]["last_hidden_state"])
        states = [each[_before_last(each)] for each in found]
        pooled = next((each["text_embeds"] for each in reversed(found) if "text_embeds" in each), None)
        return Conditioning(torch.cat(states, -1), pooled)


def _before_last(outputs: Mapping[str, Tensor]) -> str:
    numbers = sorted(int(name.removeprefix(_STATES)) for name in outputs if name.startswith(_STATES))
    return f"{_STATES}{numbers[-2]}"


class OnnxPredictor:
    """The UNet, loaded."""

    def __init__(self, session: Session) -> None:
        self.session = session
        kind = _TYPES[session.inputs["sample"].type]
        self.precision = {torch.float32: "fp32", torch.float16: "fp16"}.get(kind, "bf16")

    def __call__(self, sample: Tensor, timestep: float, given: Conditioning) -> Tensor:
        """Predict."""
        feed = {"sample": sample, "timestep": torch.tensor(timestep), "encoder_hidden_states": given.states}
        feed |= given.added
        (found,) = self.session.run(feed, shape=(sample.shape[0], 4, *sample.shape[2:])).values()
        return found


class OnnxAutoencoder:
    """The VAE, loaded."""

    def __init__(self, encoder: Session, decoder: Session) -> None:
        self.encoder, self.decoder = encoder, decoder

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        (found,) = self.decoder.run({"latent_sample": latents}).values()
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and log variance.

        Raises:
            UnsupportedError: If the graph draws its latents itself, as diffusers' ONNX pipeline wants it.
        """
        found = self.encoder.run({"sample": pixels})
        if "latent_parameters" not in found:
            raise UnsupportedError(
                "its VAE encoder draws the latents itself, and no two draws are alike", file=self.encoder.path,
                remedy="convert the model for optimum's pipelines",
            )  # fmt: skip
        return found["latent_parameters"]
