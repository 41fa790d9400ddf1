"""parity on a GPU; left out where none works, which the test command says."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import cli
from oracle_support import Bench, Case

from sdsurgery.parity.devices import why_no_gpu

pytestmark = [
    pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu())),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_all_of_it_runs_on_the_gpu(tmp_path: Path, dtype: str) -> None:
    file = Bench(tmp_path).file(Case("sd1"))
    done = cli("parity", file, "--device", "cuda", "--dtype", dtype, "--steps", "3", "--size", "64x64", "--json")
    assert done.code == 0, done.err
    assert done.json["device"]["device"] == "cuda"
    for each in done.json["formats"]:
        for ran in each["ran_on"].values():
            total = sum(ran.values())
            there = sum(count for place, count in ran.items() if "cuda" in place.lower())
            assert there > 0.8 * total, ran
