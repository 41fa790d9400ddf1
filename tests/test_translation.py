"""Bytes that are moved and turned, against NumPy; and weights there and back, which must be the same objects again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsurgery.checkpoint import Tensor
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import UnsupportedError
from sdsurgery.models import walks
from sdsurgery.models.recognition import UNETS
from sdsurgery.models.translation import fits, to_diffusers, to_ldm
from sdsurgery.models.walks import (
    ClipConfig,
    Config,
    Link,
    OpenClipConfig,
    UNetConfig,
    VaeConfig,
    Weight,
    Width,
    links,
    symbolic,
    walk,
)
from sdsurgery.sources import (
    CHUNK,
    Buffer,
    Computed,
    Data,
    FileSlice,
    InMemory,
    Joined,
    SourceFile,
    joined,
    part_of,
    transposed,
)

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIZES = st.sampled_from([1, 2, 3, 7, 64, CHUNK])
BYTE_TYPES = sorted(name for name, dtype in BY_NAME.items() if dtype.bits % 8 == 0 and dtype.bits <= 64)


def computed(content: bytes) -> Computed:
    """Bytes that come in pieces of uneven length, as a computation may yield them."""

    def produce(size: int) -> Iterator[Buffer]:
        step = max(1, size - 1)
        for start in range(0, len(content), step):
            yield content[start : start + step]

    return Computed(len(content), produce)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> SourceFile:
    """A file of random bytes, of which the tests take slices."""
    path: Path = tmp_path_factory.mktemp("noise") / "bytes"
    path.write_bytes(os.urandom(1 << 16))
    return SourceFile(path)


@st.composite
def data(draw: st.DrawFn, noise: SourceFile, nbytes: int | None = None) -> tuple[Data, bytes]:
    """Data of any kind, and what it must give."""
    if nbytes is None:
        nbytes = draw(st.integers(0, 96))
    kind = draw(st.sampled_from(["file", "memory", "bytearray", "computed", "part", "joined"]))
    if kind == "file":
        offset = draw(st.integers(0, noise.size - nbytes))
        return FileSlice(noise, offset, nbytes), noise.read(offset, nbytes) if nbytes else b""
    content = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if kind == "part":
        before, after = draw(st.binary(max_size=9)), draw(st.binary(max_size=9))
        return part_of(computed(before + content + after), len(before), nbytes), content
    if kind == "joined":
        cut = draw(st.integers(0, nbytes))
        return joined([InMemory(content[:cut]), computed(content[cut:])]), content
    whole = InMemory(bytearray(content) if kind == "bytearray" else content)
    return (computed(content) if kind == "computed" else whole), content


def read(source: Data, size: int) -> bytes:
    pieces = [bytes(piece) for piece in source.chunks(size)]
    assert all(0 < len(piece) <= size for piece in pieces)
    assert source.nbytes == sum(map(len, pieces))
    return b"".join(pieces)


# ---------------------------------------------------------------- sources


@given(st.data(), SIZES)
def test_joined_bytes_follow_each_other(noise: SourceFile, draw: st.DataObject, size: int) -> None:
    parts = draw.draw(st.lists(data(noise), max_size=5))
    whole = joined(source for source, _ in parts)
    assert read(whole, size) == b"".join(content for _, content in parts)
    read_from = {file for source, content in parts for file in source.files if content}
    assert read_from <= set(whole.files) <= {noise}


@given(st.data(), SIZES)
def test_a_part_is_a_slice(noise: SourceFile, draw: st.DataObject, size: int) -> None:
    whole, content = draw.draw(data(noise))
    start = draw.draw(st.integers(0, len(content)))
    nbytes = draw.draw(st.integers(0, len(content) - start))
    part = part_of(whole, start, nbytes)
    assert read(part, size) == content[start : start + nbytes]
    again = draw.draw(st.integers(0, nbytes))
    assert read(part_of(part, again, nbytes - again), size) == content[start + again : start + nbytes]


@given(st.data())
def test_parts_that_follow_each_other_are_the_whole_again(noise: SourceFile, draw: st.DataObject) -> None:
    whole, _ = draw.draw(data(noise))
    cuts = sorted(draw.draw(st.lists(st.integers(0, whole.nbytes), max_size=4)))
    bounds = [0, *cuts, whole.nbytes]
    parts = [part_of(whole, start, end - start) for start, end in itertools.pairwise(bounds)]
    assert joined(parts) == whole


@given(st.data())
def test_what_was_joined_comes_apart_again(noise: SourceFile, draw: st.DataObject) -> None:
    parts = [source for source, _ in draw.draw(st.lists(data(noise), min_size=1, max_size=4))]
    whole, start = joined(parts), 0
    for part in parts:
        if part.nbytes:
            assert part_of(whole, start, part.nbytes) == part
        start += part.nbytes


@given(st.data(), SIZES, st.sampled_from(sorted(UNSIGNED)), st.integers(0, 9), st.integers(0, 9))
def test_transposed_is_what_numpy_makes_of_it(
    noise: SourceFile, draw: st.DataObject, size: int, itemsize: int, rows: int, columns: int
) -> None:
    source, content = draw.draw(data(noise, rows * columns * itemsize))
    expected = np.frombuffer(content, UNSIGNED[itemsize]).reshape(rows, columns).T.tobytes()
    turned = transposed(source, (rows, columns), itemsize)
    assert read(turned, size) == expected
    assert transposed(turned, (columns, rows), itemsize) is source
    assert turned.files == source.files


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_matrix_of_another_shape_isnt_taken_for_the_same(rows: int, columns: int) -> None:
    """Turned as if it had other sides it isn't itself again, but another order of the same elements."""
    content = bytes(range(rows * columns))
    once = transposed(InMemory(content), (rows, columns), 1)
    twice = transposed(once, (rows, columns), 1)
    expected = np.frombuffer(content, np.uint8).reshape(rows, columns).T.reshape(rows, columns).T.tobytes()
    assert read(twice, CHUNK) == expected


@given(st.integers(0, 4), st.integers(0, 4))
def test_halves_that_are_neighbours_are_one_slice(noise: SourceFile, one: int, other: int) -> None:
    """So that the kernel copies them in one call."""
    both = joined([FileSlice(noise, 8, one), FileSlice(noise, 8 + one, other)])
    assert both == FileSlice(noise, 8, one + other)
    apart = joined([FileSlice(noise, 8, one), FileSlice(noise, 9 + one, other)])
    assert isinstance(apart, Joined) == (one > 0 < other)


# ---------------------------------------------------------------- one weight


@st.composite
def made_links(draw: st.DrawFn) -> Link:
    """A link of any kind with any shape."""
    how: walks.Transform = draw(st.sampled_from(["same", "squeeze", "transpose", "split"]))
    sizes = st.integers(1, 5)
    rows, columns = draw(sizes), draw(sizes)
    if how == "same":
        shape = tuple(draw(st.lists(sizes, max_size=4)))
        return Link(Weight("a", shape), (Weight("b", shape),))
    if how == "squeeze":
        return Link(Weight("a", (rows, columns, 1, 1)), (Weight("b", (rows, columns)),), how)
    if how == "transpose":
        return Link(Weight("a", (rows, columns)), (Weight("b", (columns, rows)),), how)
    rest = draw(st.sampled_from([(), (columns,)]))
    return Link(Weight("a", (3 * rows, *rest)), tuple(Weight(name, (rows, *rest)) for name in "qkv"), how)


def as_diffusers(link: Link, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """What NumPy makes of an ldm weight."""
    if link.how == "split":
        return np.split(array, 3)
    if link.how == "squeeze":
        return [array[:, :, 0, 0]]
    return [array.T] if link.how == "transpose" else [array]


@given(st.data(), made_links(), st.sampled_from(BYTE_TYPES), SIZES)
def test_a_weight_becomes_what_numpy_makes_of_it(
    noise: SourceFile, draw: st.DataObject, link: Link, name: str, size: int
) -> None:
    dtype = BY_NAME[name]
    source, content = draw.draw(data(noise, dtype.nbytes(link.ldm.shape)))
    tensor = Tensor(dtype, link.ldm.shape, source)
    made = to_diffusers(link, tensor)
    expected = as_diffusers(link, np.frombuffer(content, UNSIGNED[dtype.itemsize]).reshape(link.ldm.shape))
    assert [part.dtype for part in made] == [dtype] * len(made)
    assert [part.shape for part in made] == [part.shape for part in link.diffusers]
    assert [part.shape for part in made] == [array.shape for array in expected]
    assert [read(part.data, size) for part in made] == [array.tobytes() for array in expected]
    # The same tensor again, not merely an equal one: the sidecar tells by this what needn't be kept.
    back = to_ldm(link, made)
    assert back == tensor
    assert (back.dtype.name, back.data) == (name, source)


@given(st.data(), made_links(), st.sampled_from(BYTE_TYPES))
def test_the_other_way_round_too(noise: SourceFile, draw: st.DataObject, link: Link, name: str) -> None:
    dtype = BY_NAME[name]
    shapes = [part.shape for part in link.diffusers]
    drawn = [draw.draw(data(noise, dtype.nbytes(shape))) for shape in shapes]
    parts = tuple(Tensor(dtype, shape, source) for shape, (source, _) in zip(shapes, drawn, strict=True))
    whole = to_ldm(link, parts)
    assert (whole.dtype, whole.shape, whole.nbytes) == (dtype, link.ldm.shape, dtype.nbytes(link.ldm.shape))
    again = to_diffusers(link, whole)
    assert again == parts
    assert [part.tobytes() for part in again] == [content for _, content in drawn]


@given(made_links())
def test_a_weight_without_a_place_becomes_nothing(link: Link) -> None:
    tensor = Tensor(BY_NAME["U8"], link.ldm.shape, InMemory(bytes(BY_NAME["U8"].nbytes(link.ldm.shape))))
    assert to_diffusers(Link(link.ldm, (), link.how), tensor) == ()


@given(made_links())
def test_only_a_convolution_of_one_by_one_passes_for_a_linear_layer(link: Link) -> None:
    def has(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        nbytes = BY_NAME["U8"].nbytes(shape)
        return fits(link, Tensor(BY_NAME["U8"], shape, InMemory(bytes(nbytes))), wanted)

    ours, theirs = link.ldm.shape, link.diffusers[0].shape
    assert has(ours, ours)
    assert has(theirs, theirs)
    assert has(ours, theirs) == has(theirs, ours) == (link.how == "squeeze" or ours == theirs)
    assert not has((*ours, 7), ours)


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "C128"])
def test_elements_that_cant_be_turned_are_refused(name: str) -> None:
    """Four and six bits lie across bytes; and no file of weights has complex numbers in a projection."""
    dtype = BY_NAME[name]
    link = Link(Weight("text_projection", (8, 4)), (Weight("text_projection.weight", (4, 8)),), "transpose")
    tensor = Tensor(dtype, (8, 4), InMemory(bytes(dtype.nbytes((8, 4)))))
    with pytest.raises(UnsupportedError, match=name):
        to_diffusers(link, tensor)


def test_elements_that_share_a_byte_arent_torn_apart() -> None:
    dtype = BY_NAME["F4"]
    link = Link(Weight("in", (6,)), tuple(Weight(name, (2,)) for name in "qkv"), "split")
    tensor = Tensor(dtype, (6,), InMemory(b"abc"))
    assert [part.tobytes() for part in to_diffusers(link, tensor)] == [b"a", b"b", b"c"]
    odd = Link(Weight("in", (18,)), tuple(Weight(name, (3, 1)) for name in "qkvxyz"), "split")
    with pytest.raises(UnsupportedError, match="F4"):
        to_diffusers(odd, Tensor(dtype, (18,), InMemory(bytes(9))))


# ---------------------------------------------------------------- every weight


def numbers(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


@st.composite
def unets(draw: st.DrawFn) -> UNetConfig:
    depths = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    middle = depths[-1] or draw(numbers(2))
    return UNetConfig(
        depths=depths,
        middle=middle,
        linear=draw(st.booleans()),
        vector=draw(st.booleans()),
        residual=draw(numbers(3)),
        channels=tuple(draw(st.lists(numbers(6), min_size=len(depths), max_size=len(depths)))),
        inputs=draw(numbers(9)),
        outputs=draw(numbers(8)),
        time=draw(numbers(9)),
        context=draw(numbers(9)),
        conditions=draw(numbers(9)),
    )


VAES = st.builds(
    VaeConfig,
    residual=numbers(3),
    channels=st.lists(numbers(8), min_size=1, max_size=5).map(tuple),
    pixels=numbers(4),
    latent=numbers(16),
)
CLIPS = st.builds(
    ClipConfig, layers=numbers(14), projected=st.booleans(), width=numbers(9), inner=numbers(9),
    vocabulary=numbers(9), positions=numbers(9), projection=numbers(9),
)  # fmt: skip
OPEN_CLIPS = st.builds(
    OpenClipConfig, layers=numbers(14), penultimate=st.booleans(), width=numbers(9), inner=numbers(9),
    vocabulary=numbers(9), positions=numbers(9), projection=numbers(9),
)  # fmt: skip

PUBLISHED = [
    pytest.param(config, id=f"{family}-{prefix.strip('.')}")
    for family, widths in synthetic.FULL.items()
    for prefix, config in synthetic.configs(family, widths).items()
]


def assert_one_to_one(config: Config) -> None:
    """Each name once in each layout, elements neither made nor lost, and shapes that the transforms explain."""
    found = links(config)
    for layout in ("ldm", "diffusers"):
        names = [weight.name for weight in walk(config, layout)]
        assert len(names) == len(set(names))
        # Prefix-free as whole segments: no name is a folder of another.
        assert not {name.rpartition(".")[0] for name in names} & set(names)
    for link in found:
        sizes = [int(np.prod(part.shape)) for part in link.diffusers]
        assert not sizes or sum(sizes) == int(np.prod(link.ldm.shape))
        assert len(sizes) in ({3} if link.how == "split" else {0, 1})
        assert link.diffusers or link.ldm.optional or link.ldm.name in {"logit_scale", "text_projection"}


def assert_same_names(config: Config) -> None:
    """Symbols for the widths give every name that numbers give, and only skips of the widths' own more."""
    for layout in ("ldm", "diffusers"):
        symbols = {weight.name: weight for weight in walk(symbolic(config), layout)}
        assert all(isinstance(size, int | Width) for weight in symbols.values() for size in weight.shape)
        known = {weight.name: weight for weight in walk(config, layout)}
        more = symbols.keys() - known.keys()
        assert known.keys() <= symbols.keys()
        assert all(any(part in name for part in ("skip_connection", "shortcut")) for name in more)
        assert all(len(symbols[name].shape) == len(weight.shape) for name, weight in known.items())


@pytest.mark.parametrize("config", PUBLISHED)
def test_the_map_of_a_published_model_is_one_to_one(config: Config) -> None:
    assert_one_to_one(config)
    assert_same_names(config)


@settings(max_examples=60)
@given(st.one_of(unets(), VAES, CLIPS, OPEN_CLIPS))
def test_the_map_of_any_model_is_one_to_one(config: Config) -> None:
    assert_one_to_one(config)
    assert_same_names(config)


@settings(max_examples=25)
@given(st.one_of(unets(), VAES, CLIPS, OPEN_CLIPS), st.sampled_from(["F16", "BF16", "F32", "F64", "F8_E4M3"]))
def test_all_weights_there_and_back_are_the_same_objects(config: Config, name: str) -> None:
    dtype = BY_NAME[name]
    for link in links(config):
        tensor = Tensor(dtype, link.ldm.shape, computed(bytes(dtype.nbytes(link.ldm.shape))))
        made = to_diffusers(link, tensor)
        if made:
            assert to_ldm(link, made).data is tensor.data
            assert to_ldm(link, made) == tensor


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_walk_that_uses_a_name_twice_is_refused(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def colliding(config: VaeConfig) -> Iterator[Link]:
        names = {"ldm": ("same", "same"), "diffusers": ("one", "other")}
        for ours, theirs in zip(*(names if layout == "ldm" else dict(reversed(names.items()))).values(), strict=True):
            yield Link(Weight(ours, (config.latent,)), (Weight(theirs, (config.latent,)),))

    table: Mapping[type[Any], Any] = {**walks._WALKS, VaeConfig: colliding}
    monkeypatch.setattr(walks, "_WALKS", table)
    with pytest.raises(ValueError, match="same"):
        links(VaeConfig(latent=9871))  # widths that no other test has, for the map is remembered


def test_every_familys_unet_is_covered() -> None:
    assert UNETS.keys() == synthetic.FULL.keys()
