"""shipproto.structure and dtypes: columns that describe a model, and everything that does not."""

import numpy as np
import pytest
import xxhash

from shipproto import dtypes, limits
from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.structure import Structure, TensorSpec
from tests.support import naive
from tests.support.golden.contents import STRUCTURES
from tests.support.models import SMALL, build, floats, rows_of
from tests.support.naive import Tensor, encode_structure

MODELS = {name: list(rows) for name, (_, rows) in STRUCTURES.items()}


@pytest.mark.parametrize("rows", MODELS.values(), ids=MODELS)
def test_the_naive_structure(rows) -> None:
    structure = build(rows)
    encoded = encode_structure(rows)
    assert structure.encoded == encoded
    assert structure.digest == xxhash.xxh3_128_digest(encoded)
    for form in (bytes, bytearray, memoryview):
        again = Structure.decode(form(encoded))
        assert again.encoded == encoded
        assert again.specs() == structure.specs()
    ordered = sorted(rows, key=lambda row: row.name)
    first = naive.roots(rows)
    assert len(structure) == len(rows)
    assert list(structure.names) == [row.name for row in ordered]
    assert structure.nbytes.tolist() == [row.nbytes for row in ordered]
    assert structure.total_bytes == sum(row.nbytes for row in rows if first[row.name] == row.name)
    for at, row in enumerate(ordered):
        assert structure.index[row.name] == at
        assert structure.shape(at) == row.shape
        assert structure.dtype(at) == row.dtype
        tied = None if first[row.name] == row.name else first[row.name]
        assert structure.spec(at) == TensorSpec(row.name, row.dtype, row.shape, tied)
    assert build(rows_of(structure)).encoded == encoded


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert build(SMALL).encoded == build(tuple(reversed(SMALL))).encoded


def test_a_group_is_tied_to_its_first_name_whatever_it_was_tied_to() -> None:
    expected = build([floats("a", 4), floats("b", 4, tied_to="a"), floats("c", 4, tied_to="a")])
    for root in "abc":
        rows = [floats(name, 4, tied_to=None if name == root else root) for name in "abc"]
        assert build(rows).encoded == expected.encoded


def test_columns_cannot_be_changed() -> None:
    for structure in (build(SMALL), Structure.decode(encode_structure(SMALL))):
        for column in (structure.dtypes, structure.ndims, structure.dims, structure.primary):
            with pytest.raises(ValueError, match="read-only"):
                column[:] = 0


def test_dtypes() -> None:
    assert {dtype.name: (dtype.code, dtype.itemsize) for dtype in dtypes.DTYPES} == naive.ITEMSIZE
    assert {dtype.code: dtype for dtype in dtypes.DTYPES} == dtypes.BY_CODE
    assert [int(size) for size in dtypes.ITEMSIZES] == [
        dtypes.BY_CODE[code].itemsize if code in dtypes.BY_CODE else 0 for code in range(256)
    ]


# --- what cannot be built ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ([floats("x", 1), floats("x", 1)], MalformedMessage, "'x' appears twice"),
        ([Tensor("x", "float32", (1,), "y")], MalformedMessage, "'x' is tied to 'y', which does not exist"),
        ([floats("x", 1, tied_to="x")], MalformedMessage, "itself tied"),
        (
            [floats("a", 1, tied_to="b"), floats("b", 1, tied_to="c"), floats("c", 1)],
            MalformedMessage,
            "'a' is tied to 'b', which is itself tied",
        ),
        ([floats("a", 1, tied_to="b"), floats("b", 1, tied_to="a")], MalformedMessage, "itself tied"),
        ([floats("a", 1), floats("b", 2, tied_to="a")], MalformedMessage, "'b' is tied to 'a' but differs"),
        ([floats("a", 2, 1), floats("b", 1, 2, tied_to="a")], MalformedMessage, "'b' is tied to 'a' but differs"),
        ([floats("a", 1), floats("b", tied_to="a")], MalformedMessage, "'b' is tied to 'a' but differs"),
        ([floats("a", 1), Tensor("b", "int32", (1,), "a")], MalformedMessage, "'b' is tied to 'a' but differs"),
        ([floats("x", -1)], LimitExceeded, r"'x' has shape \[-1\]"),
        ([floats("x", (1 << 42) + 1)], LimitExceeded, "'x' has shape"),
        ([floats("x", *(1,) * 33)], LimitExceeded, "'x' has 33 dimensions"),
        ([floats("x", 1 << 41)], LimitExceeded, "'x' has more than"),
        ([floats("a"), floats("x", *(1 << 42,) * 32)], LimitExceeded, "'x' has more than"),
        ([Tensor(f"t{at}", "uint8", (1 << 42,)) for at in range(5)], LimitExceeded, "bytes in all"),
        ([floats("")], LimitExceeded, "0 characters"),
        ([floats("x" * 513)], LimitExceeded, "513 characters"),
        ([floats("a\x1b[2J")], MalformedMessage, "control character"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(rows, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(rows)


def test_dtypes_that_cannot_be_shipped() -> None:
    for name in ("quint8", "int4", "float33", "", "torch.float32"):
        with pytest.raises(MalformedMessage, match="'x' has dtype"):
            Structure.build([TensorSpec("x", name, ())])


CONTROLS = (
    *range(0x20),
    *range(0x7F, 0xA0),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    0xD800,
    0xDBFF,
    0xDC00,
    0xDFFF,
)


@pytest.mark.parametrize("character", CONTROLS)
def test_characters_that_no_name_may_have(character: int) -> None:
    with pytest.raises(MalformedMessage, match="control character"):
        build([floats("a"), floats(f"b{chr(character)}c")])


def test_names_may_have_everything_else() -> None:
    for name in (" ", "a b", "ä", "\U0001f600", "../../etc/passwd", "x" * 512, "\u00a0", "\ufffd"):
        assert Structure.decode(build([floats(name)]).encoded).names == (name,)


def test_columns_that_differ_in_length() -> None:
    def columns(**changed) -> Structure:
        given = {
            "names": ("a", "b"),
            "dtypes": np.full(2, 2, np.uint8),
            "ndims": np.ones(2, np.uint8),
            "dims": np.ones(2, np.int64),
            "primary": np.arange(2),
        }
        return Structure(**{**given, **changed})

    columns()
    for changed in (
        {"names": ("a",)},
        {"dtypes": np.full(3, 2, np.uint8)},
        {"ndims": np.ones(1, np.uint8)},
        {"dims": np.ones(3, np.int64)},
        {"primary": np.arange(1)},
    ):
        with pytest.raises(MalformedMessage, match="differ in length"):
            columns(**changed)
    for primary in ([1, 1], [-1, 1], [0, 2]):
        with pytest.raises(MalformedMessage, match="sorts before"):
            columns(primary=np.array(primary))
    with pytest.raises(LimitExceeded, match="outside"):
        columns(dims=np.array([1, -1]))
    with pytest.raises(MalformedMessage, match="names must be sorted"):
        columns(names=("b", "a"))


# --- what cannot be decoded: the vectors have the list; here what is too large for a file, or about cost ----------


def test_a_body_beyond_its_limit_is_not_looked_at() -> None:
    with pytest.raises(LimitExceeded, match=str(limits.MAX_STRUCTURE_BODY + 1)):
        Structure.decode(bytes(limits.MAX_STRUCTURE_BODY + 1))


def test_too_many_tensors() -> None:
    count = limits.MAX_TENSORS + 1
    columns = {"dims": b"", "dtypes": bytes(count), "names": [""] * count, "ndims": bytes(count), "ties": b""}
    with pytest.raises(MalformedMessage):
        Structure.decode(naive.pack(columns))
    with pytest.raises(LimitExceeded, match=str(count)):
        Structure(
            names=("",) * count,
            dtypes=np.zeros(count, np.uint8),
            ndims=np.zeros(count, np.uint8),
            dims=np.zeros(0, np.int64),
            primary=np.arange(count),
        )


def test_a_column_that_promises_more_than_it_has_is_cheap() -> None:
    good = encode_structure([floats("a", 4)])
    for lie in (b"\xc6\xff\xff\xff\xff", b"\xc6\x03\xff\xff\xff"):
        with pytest.raises(MalformedMessage):
            Structure.decode(good.replace(b"\xc4\x08", lie))


def test_ties_are_checked_as_columns() -> None:
    """Twenty thousand tied tensors; one of them differs, in the middle, in a dimension that is not the first."""
    rows = [Tensor(f"t{at:05}", "uint8", (2, at % 7), None if at < 7 else f"t{at % 7:05}") for at in range(20_000)]
    structure = build(rows)
    assert structure.primary.tolist() == [at % 7 for at in range(20_000)]
    body = bytearray(structure.encoded)
    at = body.index(np.array([2, 0, 2, 1], "<u8").tobytes())
    body[at + 12_345 * 16 + 8] ^= 4
    with pytest.raises(MalformedMessage, match="'t12345' is tied to"):
        Structure.decode(body)
