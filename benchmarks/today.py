"""The same work the way people do it today, as whole processes for the benchmarks to run."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

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
    {"fix": fix, "hash": hashes, "to-folder": to_folder, "to-file": to_file}[sys.argv[1]](*sys.argv[2:])
