"""The same work the way people do it today, as whole processes for the benchmarks to run."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def fix(source: str, target: str) -> None:
    """Load everything, set the ids, save everything."""
    import torch
    from safetensors.torch import load_file, save_file

    if source.endswith(".safetensors"):
        state = load_file(source)
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    state[IDS] = torch.arange(77, dtype=torch.int64)[None]
    save_file(state, target, metadata={"format": "pt"})


def merge(one: str, other: str, target: str) -> None:
    """A weighted sum of all that both have but the VAE and integers: everything loaded, computed in fp32, saved."""
    import torch
    from safetensors.torch import load_file, save_file

    ours, theirs = load_file(one), load_file(other)
    for key, value in ours.items():
        if value.is_floating_point() and not key.startswith("first_stage_model."):
            ours[key] = torch.lerp(value.float(), theirs[key].float(), 0.3).to(value.dtype)
    save_file(ours, target, metadata={"format": "pt"})


def bake_lora(model: str, lora: str, names: str, target: str) -> None:
    """All loaded, each product computed in fp32 and added, all saved.

    ``names`` is a JSON file that tells the model's key by the LoRA's name.
    """
    import json

    from safetensors.torch import load_file, save_file

    state, matrices = load_file(model), load_file(lora)
    for name, key in json.loads(Path(names).read_text()).items():
        weight, down, up = state[key], matrices[f"{name}.lora_down.weight"], matrices[f"{name}.lora_up.weight"]
        delta = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
        state[key] = (weight.float() + delta * (0.8 * matrices[f"{name}.alpha"].item() / len(down))).to(weight.dtype)
    save_file(state, target, metadata={"format": "pt"})


def to_folder(source: str, config: str, target: str) -> None:
    """diffusers' own way from a single file to a folder, with a local config."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if "xl" in source else StableDiffusionPipeline
    pipeline = kind.from_single_file(source, config=config, local_files_only=True, torch_dtype=torch.float16)
    pipeline.save_pretrained(target)


def to_file(source: str, target: str) -> None:
    """The work of diffusers' conversion scripts: load the components, rename, reshape and join, save."""
    import torch
    from safetensors.torch import load_file, save_file

    import sdsurgery as sd
    from sdsurgery.models.conversion import ldm_prefix
    from sdsurgery.models.identify import identify
    from sdsurgery.models.walks import links

    opened = sd.open(source)
    model = identify(opened)
    state = {}
    for name, component in model.networks.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        weights = load_file(f"{source}/{name}/{stem}.safetensors")
        for link in links(component.config):
            parts = [weights[weight.name] for weight in link.diffusers]
            if parts:
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                whole = whole.T.contiguous() if link.how == "transpose" else whole.reshape(link.ldm.shape)
                state[ldm_prefix(model, component) + link.ldm.name] = whole
    save_file(state, target, metadata={"format": "pt"})


def export_unet(folder: str, target: str) -> None:
    """A UNet as an ONNX graph, by torch's legacy exporter with folding, as most published ones were made."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    arguments = (torch.randn(2, 4, 64, 64), torch.tensor(1.0), torch.randn(2, 77, unet.config.cross_attention_dim))
    names = ["sample", "timestep", "encoder_hidden_states"]
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}}
    torch.onnx.export(
        unet, arguments, target, input_names=names, output_names=["out_sample"], dynamic_axes=axes, opset_version=17,
        do_constant_folding=True, dynamo=False,
    )  # fmt: skip


def export_pipeline(folder: str, target: str) -> None:
    """All of a pipeline as ONNX graphs: loaded, traced by torch's legacy exporter, and written again."""
    import os

    import torch
    from diffusers import StableDiffusionPipeline

    class Text(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = pipe.text_encoder(ids)
            return found.last_hidden_state, found.pooler_output

    class Encoder(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return pipe.vae.quant_conv(pipe.vae.encoder(sample))

    class Decoder(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return pipe.vae.decode(sample).sample

    full = torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=full, local_files_only=True)
    latents, prompt = torch.randn(2, 4, 16, 16, dtype=full), torch.randn(2, 77, 768, dtype=full)
    parts = {
        "text_encoder": (Text, pipe.text_encoder, (torch.ones(1, 77, dtype=torch.int64),)),
        "unet": (None, pipe.unet, (latents, torch.tensor(1.0, dtype=full), prompt)),
        "vae_encoder": (Encoder, pipe.vae, (torch.randn(1, 3, 128, 128, dtype=full),)),
        "vae_decoder": (Decoder, pipe.vae, (latents[:1],)),
    }
    for name, (wrapper, module, arguments) in parts.items():
        Path(target, name).mkdir(parents=True, exist_ok=True)
        traced = module
        if wrapper:
            traced = wrapper()
            traced.network = module
        axes = {"input": {0: "batch", 2: "height", 3: "width"}} if name != "text_encoder" else {"input": {0: "batch"}}
        names = ["input", "timestep", "prompt"][: len(arguments)]
        torch.onnx.export(
            traced.eval(), arguments, f"{target}/{name}/model.onnx", input_names=names, dynamic_axes=axes,
            opset_version=17, do_constant_folding=True, dynamo=False,
        )  # fmt: skip
    os.sync()


def diff(one: str, other: str) -> None:
    """The figures of ``diff`` on two safetensors files of halves: mapped, in pieces, by two threads."""
    import json
    import struct

    import numpy as np

    def opened(path: str) -> tuple[dict, int, np.ndarray]:
        with open(path, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        return entries, 8 + length, np.memmap(path, mode="r")

    (left, start, raw), (right, begin, other_raw) = opened(one), opened(other)

    def compare(key: str) -> list[float]:
        (a, b), (c, d) = left[key]["data_offsets"], right[key]["data_offsets"]
        kind = np.float16 if left[key]["dtype"] == "F16" else np.uint8
        x, y = raw[start + a : start + b].view(kind), other_raw[begin + c : begin + d].view(kind)
        found = [0.0] * 7
        for place in range(0, x.size, 1 << 18):
            p, q = x[place : place + (1 << 18)], y[place : place + (1 << 18)]
            found[6] += np.count_nonzero(p != q)
            p, q = p.astype(np.float32), q.astype(np.float32)
            gap = p - q
            found[0] = max(found[0], np.abs(gap).max())
            found[1] += np.abs(gap).sum(dtype=np.float64)
            for slot, (u, v) in enumerate(((gap, gap), (p, p), (q, q), (p, q)), start=2):
                found[slot] += np.dot(u, v)
        return found

    with ThreadPoolExecutor(2) as pool:
        print(len(list(pool.map(compare, left))))


def digests(path: str) -> None:
    """The digests of ``manifest``, mapped: SHA-256 of the file and BLAKE3 of each tensor, in a thread each."""
    import hashlib
    import json
    import mmap
    import struct

    import blake3

    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        length = struct.unpack("<Q", view[:8])[0]
        entries = json.loads(bytes(view[8 : 8 + length]))
        entries.pop("__metadata__", None)
        start = 8 + length

        def tensors() -> int:
            places = (entry["data_offsets"] for entry in entries.values())
            return len([blake3.blake3(view[start + a : start + b]).hexdigest() for a, b in places])

        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(lambda: hashlib.sha256(view).hexdigest())
            print(pool.submit(tensors).result(), whole.result())
        view.release()


def hashes(path: str) -> None:
    """The digests of ``inspect --hash``, each in a thread over the mapped file."""
    import hashlib
    import mmap
    import struct
    import zlib

    import blake3

    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        start = 8 + struct.unpack("<Q", view[:8])[0]
        data, legacy = view[start:], view[0x100000:0x110000]
        with ThreadPoolExecutor(4) as pool:
            found = [
                pool.submit(lambda: hashlib.sha256(view).hexdigest()),
                pool.submit(lambda: hashlib.sha256(data).hexdigest()),
                pool.submit(lambda: zlib.crc32(view)),
                pool.submit(lambda: blake3.blake3(view).hexdigest()),
            ]
            print([future.result() for future in found], hashlib.sha256(legacy).hexdigest())
        legacy.release()
        data.release()
        view.release()


if __name__ == "__main__":
    scripts = {
        "fix": fix, "hash": hashes, "to-folder": to_folder, "to-file": to_file, "diff": diff, "digests": digests,
        "merge": merge, "bake-lora": bake_lora, "export-unet": export_unet, "export-pipeline": export_pipeline,
    }  # fmt: skip
    scripts[sys.argv[1]](*sys.argv[2:])
