"""Successive versions of every dtype there is, bit for bit: NaN payloads, zeros of both signs, shapes at the edges."""

import numpy as np
import pytest

from tests.support import checkpoints
from tests.support.checkpoints import LEAF, SAFETENSORS, Content, as_state_dict, assert_installed, random_bytes
from tests.support.naive import ITEMSIZE, Tensor
from tests.support.processes import address_of, push
from tests.support.successive import push_small, used

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

TORCH = [name for name in ITEMSIZE if name not in ("uint64", "uint32", "uint16", "float8_e8m0fnu", "complex32")]
ELEMENTS = 300_001
"""Of each tensor: an odd number; of one byte each they are less than a leaf, of eight several leaves."""


def zoo(dtypes, version):
    """Tensors of each dtype, whose bytes are few different ones, so that they are like weights and not like noise."""
    rows, data = [], {}
    for dtype in dtypes:
        row = Tensor(f"{dtype}.weight", dtype, (ELEMENTS,))
        words = np.frombuffer(random_bytes(dtype, row.nbytes), dtype=np.uint8) % 5
        rows.append(row)
        data[row.name] = (words % 2 if dtype == "bool" else words).tobytes()
    made = Content(tuple(rows), data)
    for at in range(version):
        made = changed(made, at)
    return made


def changed(version, seed):
    """A few bytes of each tensor are others; of bool, 0 and 1 change places."""
    data = {}
    for row in version.rows:
        octets = np.frombuffer(version.data[row.name], dtype=np.uint8).copy()
        places = np.random.default_rng([seed, len(row.name)]).integers(0, max(len(octets), 1), len(octets) // 500)
        octets[places] ^= 1
        data[row.name] = octets.tobytes()
    return Content(version.rows, data)


@pytest.mark.parametrize("dtype", TORCH)
def test_each_dtype_by_itself(daemon, dtype):
    versions = [zoo([dtype], at) for at in range(4)]
    for at, version in enumerate(versions):
        receipt = push_small(address_of(daemon), as_state_dict(version), label=f"v{at}")
        assert receipt.digest == version.digest
        assert_installed(daemon, version, label=f"v{at}")
        if at:
            assert receipt.base == versions[at - 1].digest
            assert receipt.bytes_sent < version.nbytes / 8


def test_all_of_them_at_once_and_in_any_order_of_versions(daemon):
    versions = [zoo(TORCH, at) for at in range(3)]
    for at, number in enumerate((0, 1, 2, 0, 2, 1, 1)):
        push_small(address_of(daemon), as_state_dict(versions[number]), label=f"{at}")
        assert_installed(daemon, versions[number], label=f"{at}")


@pytest.mark.parametrize("prefer", ["time", "bytes"])
def test_edges(daemon, tmp_path, prefer):
    """Empty, 0-dim, of one byte, and a byte more and less than a chunk; what shares a chunk is of several dtypes."""
    before = checkpoints.edge_cases()
    push(address_of(daemon), checkpoints.write_safetensors(tmp_path / "v0", before), label="v0", prefer=prefer)
    for at in range(3):
        after = changed(before, at)
        path = checkpoints.write_safetensors(tmp_path / f"v{at + 1}", after)
        receipt = push(address_of(daemon), path, label=f"v{at + 1}", prefer=prefer)
        if prefer == "bytes":
            assert receipt.base == before.digest
            assert receipt.bytes_sent < after.nbytes / 8
        assert_installed(daemon, after, label=f"v{at + 1}")
        before = after
    assert set(SAFETENSORS) <= {row.dtype for row in before.rows}


@pytest.mark.parametrize("rows", [
    (Tensor("empty", "bfloat16", (0,)),),
    (Tensor("scalar", "bfloat16", ()),),
    (Tensor("byte", "uint8", (1,)),),
    (Tensor("a", "bfloat16", (3, 0)), Tensor("b", "float32", ()), Tensor("c", "int64", (0,))),
])  # fmt: skip
def test_next_to_nothing(daemon, rows):
    """A version of a few bytes, or of none."""
    for at in range(3):
        version = checkpoints.content(rows, at)
        receipt = push_small(address_of(daemon), as_state_dict(version), label=f"v{at}")
        assert receipt.digest == version.digest
        assert_installed(daemon, version, label=f"v{at}")


SPECIAL = {
    "bfloat16": (np.uint16, 7),
    "float16": (np.uint16, 10),
    "float32": (np.uint32, 23),
    "float64": (np.uint64, 52),
}
"""The word of each float, and the bits of its mantissa."""


def special_words(dtype):
    """Zeros of both signs, infinities, quiet and signalling NaNs with payloads, denormals, the largest and smallest."""
    kind, mantissa = SPECIAL[dtype]
    bits = np.dtype(kind).itemsize * 8
    infinite = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    positive = [0, 1, (1 << mantissa) - 1, 1 << mantissa, infinite - 1, infinite, infinite + 1]
    positive += [infinite | 1 << (mantissa - 1), (1 << (bits - 1)) - 1, 1 << (bits - 2)]
    return np.array([word | sign for word in positive for sign in (0, 1 << (bits - 1))], dtype=kind)


@pytest.mark.parametrize("dtype", SPECIAL)
def test_every_kind_of_number_becomes_every_other(daemon, dtype):
    """In the first version one after the other, in the next every one in the place of another."""
    words = special_words(dtype)
    count = len(words)
    rows = (Tensor("weight", dtype, (count * 20_000,)),)
    for at in range(count + 1):
        # Between special ones lie ordinary ones, which stay.
        made = np.full((20_000, count), words[3], dtype=words.dtype)
        made[:: 200 + at] = np.roll(words, at)
        version = Content(rows, {"weight": made.tobytes()})
        receipt = push_small(address_of(daemon), as_state_dict(version), label=f"v{at}")
        assert receipt.digest == version.digest
        assert_installed(daemon, version, label=f"v{at}")


def test_all_patterns_of_16_bits_and_all_steps_between_some(daemon):
    rows = (Tensor("weight", "bfloat16", (1 << 20,)),)
    every = np.arange(1 << 16, dtype=np.uint16)
    for at, step in enumerate((0, 1, 0x7FFF, 0x8000, 0xFFFF, 12345)):
        version = Content(rows, {"weight": np.tile(every + np.uint16(step), 16).tobytes()})
        push_small(address_of(daemon), as_state_dict(version), label=f"v{at}")
        assert_installed(daemon, version, label=f"v{at}")


def test_tied_tensors_are_changed_once(daemon):
    """What is applied twice would be undone, or done twice."""
    tied = (
        Tensor("embed.weight", "bfloat16", (700, 1000)),
        Tensor("head.weight", "bfloat16", (700, 1000), "embed.weight"),
        Tensor("a.bias", "float32", (100,)),
        Tensor("b.bias", "float32", (100,), "a.bias"),
    )
    before = checkpoints.content(tied)
    push_small(address_of(daemon), as_state_dict(before), label="v0")
    for at in range(3):
        one = np.frombuffer(before.data["embed.weight"], dtype="<u2").copy()
        one[at::5000] ^= 3
        two = np.frombuffer(before.data["a.bias"], dtype="<u4").copy()
        two[at] ^= 1 << 22
        data = dict.fromkeys(("embed.weight", "head.weight"), one.tobytes())
        data |= dict.fromkeys(("a.bias", "b.bias"), two.tobytes())
        after = Content(tied, data)
        receipt = push_small(address_of(daemon), as_state_dict(after), label=f"v{at + 1}")
        assert receipt.base == before.digest
        assert receipt.bytes_sent < 6000
        assert_installed(daemon, after, label=f"v{at + 1}")
        before = after


def test_tensors_that_lie_in_other_orders_in_memory(daemon):
    """Transposed, sliced and expanded ones are sent as they are laid out in the image."""
    version = checkpoints.content([Tensor("a", "bfloat16", (600, 800)), Tensor("b", "bfloat16", (600, 800))])
    push_small(address_of(daemon), as_state_dict(version), label="v0")
    state = {name: tensor.t().contiguous().t() for name, tensor in as_state_dict(version).items()}
    state["a"].view(dtype=state["a"].dtype)[5, 7] += 1
    assert not state["a"].is_contiguous()
    receipt = push_small(address_of(daemon), state, label="v1")
    assert receipt.bytes_sent < 1000
    assert "egr" in used(receipt)
    as_it_lies = {name: tensor.contiguous() for name, tensor in state.items()}
    receipt = push_small(address_of(daemon), as_it_lies, label="v2")
    assert set(used(receipt)) == {"same"}


def test_many_small_tensors_of_several_dtypes_between_large_ones(daemon):
    """Runs end where dtypes change, and cross chunks that are packed."""
    rows = [Tensor(f"large.{at}", "bfloat16", (LEAF,)) for at in range(3)]
    rows += [Tensor(f"small.{at:04}", ("float32", "bfloat16", "int64")[at % 3], (at % 300,)) for at in range(3000)]
    before = checkpoints.content(rows)
    push_small(address_of(daemon), as_state_dict(before), label="v0")
    for at in range(3):
        after = changed(before, at)
        receipt = push_small(address_of(daemon), as_state_dict(after), label=f"v{at + 1}")
        assert receipt.base == before.digest
        assert receipt.bytes_sent < after.nbytes / 8
        assert_installed(daemon, after, label=f"v{at + 1}")
        before = after
