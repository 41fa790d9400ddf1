"""Make a full-size checkpoint of random weights, for benchmarks and trials.

python benchmarks/make_checkpoint.py sd1 fp16 /tmp/model.safetensors
python benchmarks/make_checkpoint.py sd1 fp32 /tmp/model.ckpt --ids merged
python benchmarks/make_checkpoint.py sdxl fp16 /tmp/xl.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "fixtures"))

import synthetic

import sdsurgery as sd
from sdsurgery.dtypes import CAST_TARGETS, DType
from sdsurgery.sources import Buffer, Computed

_POOL = 1 << 22


@dataclass(frozen=True)
class _Pool:
    """Random elements that every tensor takes from another place, so that gigabytes take seconds."""

    bits: np.ndarray

    def tensor(self, number: int, dtype: DType, shape: tuple[int, ...]) -> sd.Tensor:
        nbytes = dtype.nbytes(shape)

        def produce(_: int) -> Iterator[Buffer]:
            start, left = number * 40961 % _POOL, nbytes // dtype.itemsize
            while left:
                piece = self.bits[start : start + left]
                yield memoryview(piece).cast("B")
                left, start = left - len(piece), 0

        return sd.Tensor(dtype, shape, Computed(nbytes, produce))


@click.command()
@click.argument("family", type=click.Choice(list(synthetic.FULL)))
@click.argument("dtype", type=click.Choice(["fp16", "fp32"]))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
@click.option("--ids", type=click.Choice(["right", "merged", "wrong-values", "missing"]), default="right")
@click.option("--only", help="Only the component under this prefix, without it.", metavar="PREFIX")
def main(family: str, dtype: str, output: Path, seed: int, ids: str, only: str | None) -> None:
    """Write a checkpoint of FAMILY in DTYPE to OUTPUT (.safetensors or .ckpt)."""
    target = CAST_TARGETS[dtype]
    normal = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32) * np.float32(0.04)
    pool = _Pool(normal.astype(target.to_numpy()))
    tensors = {
        key: pool.tensor(number, target, shape)
        for number, (key, shape) in enumerate(synthetic.shapes(family, synthetic.FULL[family]).items())
    }
    if only:
        tensors = {key.removeprefix(only): value for key, value in tensors.items() if key.startswith(only)}
    key = {"sd1": synthetic.SD1_IDS, "sdxl": synthetic.SDXL_IDS}.get(family)
    if key and not only and ids != "missing":
        right = np.arange(77, dtype=np.int64)[None]
        wrong = {"merged": synthetic.merged_ids(0.1, "float32"), "wrong-values": right // 2}
        tensors[key] = sd.Tensor.of(wrong.get(ids, right))
    sd.Checkpoint(tensors, {"format": "pt"}).save(output, force=True)


if __name__ == "__main__":
    main()
