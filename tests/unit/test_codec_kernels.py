"""The compiled kernels and numpy's write the same bytes, and undo what they did."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

from shipd.codecs import compiled, plane_kernels, planes_numpy
from shipd.codecs.words import key, unkey, unzigzag, zigzag
from tests.support.runs import without_numba

# Around what numpy's blocks, numba's blocks and vector registers hold.
SIZES = (0, 1, 2, 15, 16, 17, 63, 100, 4095, 4096, 4097, 16383, 16384, 16385, 40_000)


def words(size: int, kind, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(kind).max, size, dtype=kind, endpoint=True)


def every_pair() -> tuple[np.ndarray, np.ndarray]:
    """Each pattern of 16 bits against itself and against patterns at every kind of distance."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    steps = np.array([0, 1, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF], dtype=np.uint16)
    return np.tile(patterns, len(steps)), (patterns[None, :] + steps[:, None]).reshape(-1)


@pytest.fixture(scope="module")
def both():
    found = compiled.kernels()
    if found is None:
        pytest.skip("numba cannot be had here")
    return found.planes, planes_numpy


def test_keys_are_a_bijection_that_grows_with_the_float() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    keys = key(patterns)
    assert len(np.unique(keys)) == len(patterns)
    assert (unkey(keys) == patterns).all()
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    values = (finite.astype(np.uint32) << np.uint32(16)).view(np.float32)
    ordered = values[np.argsort(key(finite))]
    assert (np.diff(ordered) >= 0).all()


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_a_zigzag_difference_finds_the_word_again(kind) -> None:
    content, base = words(5000, kind), words(5000, kind, 2)
    assert (unzigzag(zigzag(content, base), base) == content).all()
    near = unkey(key(base) + np.array([0, 1, 2], dtype=np.int8).astype(kind)[np.arange(5000) % 3])
    assert zigzag(near, base).tolist() == (np.arange(5000) % 3 * 2).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_exponents(both, size: int) -> None:
    run = words(size, np.uint16)
    halves = [np.empty((2, size), dtype=np.uint8) for _ in both]
    for kernels, (exponents, rest) in zip(both, halves, strict=True):
        kernels.split_exponents(run, exponents, rest)
        merged = np.empty_like(run)
        kernels.merge_exponents(exponents, rest, merged)
        assert (merged == run).all()
    assert (halves[0] == halves[1]).all()


def test_exponents_of_every_pattern(both) -> None:
    run = np.arange(1 << 16, dtype=np.uint16)
    for kernels in both:
        exponents, rest = np.empty((2, len(run)), dtype=np.uint8)
        kernels.split_exponents(run, exponents, rest)
        assert (exponents == (run >> 7 & 0xFF)).all()
        assert (rest == (run << 1 & 0xFE | run >> 15)).all()


@pytest.mark.parametrize("low", [0, 1, 117, 241])
@pytest.mark.parametrize("size", [*SIZES, None])
def test_exponent_codes(both, size: int | None, low: int) -> None:
    run = np.arange(1 << 16, dtype=np.uint16) if size is None else words(size, np.uint16)
    run[::3] = run[::3] & 0x80FF | (low + 3) << 7
    exponents = (run >> 7).astype(np.uint8)
    near = (exponents >= low) & (exponents < low + 15)
    for kernels in both:
        groups = np.zeros(-(-len(run) // 8), dtype=np.uint64)
        codes, rest, merged = groups.view(np.uint8), np.empty(len(run), dtype=np.uint8), np.empty_like(run)
        kernels.split_exponent_codes(run, low, codes, rest)
        assert (codes[: len(run)] == np.where(near, exponents - np.uint8(low), 15)).all()
        assert (rest == (run << 1 & 0xFE | run >> 15)).all()
        beyond = np.empty(len(run), dtype=np.uint8)
        beyond = beyond[: kernels.gather_exponents(run, groups, beyond)]
        assert beyond.tolist() == exponents[~near].tolist()
        kernels.merge_exponent_codes(codes, low, rest, merged)
        assert (merged[near] == run[near]).all()
        kernels.correct_exponents(groups, beyond, merged)
        assert (merged == run).all()


@pytest.mark.parametrize("size", [*SIZES, None])
def test_steps(both, size: int | None) -> None:
    run, base = every_pair() if size is None else (words(size, np.uint16), words(size, np.uint16, 2))
    expected = zigzag(run, base)
    for kernels in both:
        codes = np.empty(len(run), dtype=np.uint8)
        assert kernels.split_steps(run, base, codes) == (min(expected.max(), 15) if len(run) else 0)
        assert (codes == np.minimum(expected, 15)).all()
        applied = base.copy()
        kernels.apply_steps(np.minimum(expected, 255).astype(np.uint8), applied)
        small = expected <= 255
        assert (applied[small] == run[small]).all()


@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_steps_beyond_15(both, size: int, share: float) -> None:
    run, base = words(size, np.uint16), words(size, np.uint16, 2)
    near = np.random.default_rng(3).random(size) >= share
    base[near] = run[near]
    expected = zigzag(run, base)
    groups = np.zeros(-(-size // 8), dtype=np.uint64)
    codes = groups.view(np.uint8)
    for kernels in both:
        kernels.split_steps(run, base, codes)
        beyond = np.empty(size, dtype=np.uint16)
        beyond = beyond[: kernels.gather_steps(run, base, groups, beyond)]
        assert beyond.tolist() == expected[expected >= 15].tolist()
        applied = base.copy()
        kernels.apply_steps(codes, applied)
        kernels.correct_steps(groups, beyond, applied)
        assert (applied == run).all()


@pytest.mark.parametrize("size", SIZES)
def test_pairs(both, size: int) -> None:
    codes = words(2 * size, np.uint8) & np.uint8(15)
    for kernels in both:
        pairs, parted = np.empty(size, dtype=np.uint8), np.empty_like(codes)
        kernels.pair_codes(codes.view(np.uint16), pairs)
        assert (pairs == codes[::2] + 16 * codes[1::2]).all()
        kernels.part_codes(pairs, parted.view(np.uint16))
        assert (parted == codes).all()


@pytest.mark.parametrize("size", SIZES)
def test_differences(both, size: int) -> None:
    run, base = words(size, np.uint32), words(size, np.uint32, 2)
    base[::3] = run[::3] + np.uint32(1)
    expected = zigzag(run, base)
    for kernels in both:
        planes = np.empty((4, size), dtype=np.uint8)
        kernels.split_differences(run, base, planes)
        assert (planes == expected.view(np.uint8).reshape(size, 4).T).all()
        applied = base.copy()
        kernels.apply_differences(*planes, applied)
        assert (applied == run).all()


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("size", SIZES)
def test_words(both, kind, size: int) -> None:
    run, base = words(size, kind), words(size, kind, 2)
    for kernels in both:
        planes = np.empty((run.itemsize, size), dtype=np.uint8)
        kernels.split_words(run, planes)
        assert (planes == run.view(np.uint8).reshape(size, run.itemsize).T).all()
        target = base.copy()
        kernels.xor_planes(planes, target)
        assert (target == run ^ base).all()


def test_both_offer_every_kernel(both) -> None:
    names = [name for name, _ in inspect.getmembers(plane_kernels.PlaneKernels, inspect.isfunction) if name[0] != "_"]
    assert len(names) == 16
    for kernels in both:
        assert all(callable(getattr(kernels, name)) for name in names)


def test_which_kernels_are_taken(both) -> None:
    run = np.frombuffer(bytes(9), dtype=np.uint8)
    assert plane_kernels.plane_kernels(run[:8].view(np.uint16)) is both[0]
    assert plane_kernels.plane_kernels(run[1:9].view(np.uint32)) is both[1], "no compiled kernel takes such words"
    with without_numba():
        assert plane_kernels.plane_kernels(run[:8].view(np.uint16)) is both[1]


def test_numba_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, shipd.codecs.registry as registry\n"
        "assert 'numba' not in sys.modules and 'llvmlite' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_numba_that_cannot_be_imported_is_done_without(error: str) -> None:
    code = (
        "import builtins, sys\n"
        "imported = builtins.__import__\n"
        "def without(name, *arguments, **named):\n"
        f"    if name.partition('.')[0] == 'numba': raise {error}('not here')\n"
        "    return imported(name, *arguments, **named)\n"
        "builtins.__import__ = without\n"
        "from shipd.codecs.xph import XPH\n"
        "payload = XPH.encode(bytes(1000), None, dtype=4, most=1000)\n"
        "out = bytearray(b'x' * 1000)\n"
        "XPH.decode(payload, None, memoryview(out))\n"
        "assert out == bytes(1000) and 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
