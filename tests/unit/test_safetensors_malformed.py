import json

import pytest
import safetensors

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError, UnsupportedTensor
from tests.support.safetensors_files import F32, entry, packed


def deep(levels):
    return '{"w":' + "[" * levels + "]" * levels + "}"


MALFORMED = {
    "short": (b"\x08\0\0", "has only 3 bytes: its save or download was interrupted"),
    "only a length": (packed("", length=100), "has only 8 bytes: its save"),
    "header cut short": (
        packed(b'{"w"', length=900),
        "is truncated: its header alone needs 908 bytes and the file has 12",
    ),
    "header beyond the format": (packed(b"{", length=100_000_001), "header of 100000001 bytes by its own account"),
    "header beyond everything": (packed(b"{}", length=(1 << 48) - 1), "a header of 281474976710655 bytes"),
    "length that is text": (b"abcdefgh{}", "neither safetensors nor torch.save"),
    "header without a brace": (packed(b" {}"), "neither safetensors nor torch.save"),
    "header of a list": (packed(b"[]"), "neither safetensors nor torch.save"),
    "length without a header": (packed("", b"{}" + bytes(20), length=0), "header that does not begin with '{'"),
    "header without an end": (packed(b'{"w":'), "header that is not valid JSON"),
    "header with a tail": (packed(b"{} {}"), "header that is not valid JSON.*Extra data"),
    "header not UTF-8": (packed(b'{"\xff":1}'), "header that is not valid JSON.*utf-8"),
    "header nested deeply": (packed(deep(100_000)), "header that is not valid JSON.*recursion"),
    "header with NaN": (packed('{"w":NaN}'), "header that is not valid JSON.*NaN is no number"),
    "header with a long number": (packed('{"w":' + "1" * 5000 + "}"), "header that is not valid JSON"),
    "header of brackets": (
        packed('{"w":[' + "[]," * 4_200_000 + "[]]}"),
        "more than 1048576 tensors, or of something else",
    ),
    "name twice": (
        packed(f'{{"w":{json.dumps(F32)},"w":{json.dumps(F32)}}}', bytes(24)),
        "has 'w' twice in its header",
    ),
    "field twice": (
        packed('{"w":{"dtype":"F32","dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}', bytes(24)),
        "has 'dtype' twice in its header",
    ),
    "metadata twice": (packed('{"__metadata__":{},"__metadata__":{}}'), "has '__metadata__' twice"),
    "metadata a list": (packed({"__metadata__": ["a"]}), "__metadata__ that is not an object of texts"),
    "metadata of numbers": (packed({"__metadata__": {"epoch": 3}}), "__metadata__ that is not an object of texts"),
    "entry a number": (packed({"w": 7}), "tensor 'w' must be described by dtype, shape and data_offsets, not by a int"),
    "entry empty": (packed({"w": {}}), "tensor 'w' must be described .* not by nothing"),
    "entry without dtype": (
        packed({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "described by .* not by 'shape', 'data_offsets'",
    ),
    "entry with more": (packed({"w": F32 | {"stride": [3, 1]}}, bytes(24)), "described by .* 'stride'"),
    "dtype a number": (packed({"w": F32 | {"dtype": 4}}, bytes(24)), "tensor 'w' has a dtype that is not a text"),
    "shape a text": (packed({"w": F32 | {"shape": "2,3"}}, bytes(24)), "tensor 'w' has a shape that is not a list"),
    "shape negative": (
        packed({"w": entry(shape=(-2, -3))}, bytes(24)),
        "tensor 'w' has a shape that is not a list of sizes",
    ),
    "shape fractional": (packed({"w": entry(shape=(2.0, 3))}, bytes(24)), "has a shape that is not a list of sizes"),
    "shape of bools": (packed({"w": entry(shape=(True,), offsets=(0, 4))}, bytes(4)), "has a shape that is not a list"),
    "shape huge": (packed({"w": entry(shape=(2**70, 0), offsets=(0, 0))}), "sizes from 0 to 4398046511104"),
    "shape overflowing": (
        packed({"w": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
        "F32 \\[4294967296, 4294967296\\] needs 73786976294838206464 bytes and its data_offsets give it 0",
    ),
    "shape long": (packed({"w": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)), "has 33 dimensions; at most 32"),
    "shape longer": (packed({"w": entry(shape=(1,) * 9999, offsets=(0, 4))}, bytes(4)), "has 9999 dimensions"),
    "offsets a number": (
        packed({"w": F32 | {"data_offsets": 24}}, bytes(24)),
        "data_offsets that are not two ascending",
    ),
    "offsets three": (packed({"w": entry(offsets=(0, 12, 24))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets reversed": (packed({"w": entry(offsets=(24, 0))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets negative": (packed({"w": entry(offsets=(-24, 0))}, bytes(24)), "data_offsets that are not two ascending"),
    "offsets huge": (packed({"w": entry(offsets=(2**64, 2**64 + 24))}, bytes(24)), "data_offsets that are not two"),
    "too few bytes": (
        packed({"w": entry(offsets=(0, 20))}, bytes(20)),
        "needs 24 bytes and its data_offsets give it 20",
    ),
    "too many bytes": (
        packed({"w": entry(offsets=(0, 28))}, bytes(28)),
        "needs 24 bytes and its data_offsets give it 28",
    ),
    "overlap": (
        packed({"a": entry(), "b": entry(offsets=(20, 44))}, bytes(44)),
        "tensors 'a' and 'b' overlap \\(the second begins at byte 20 of the data, before byte 24\\)",
    ),
    "same place": (packed({"a": entry(), "b": entry()}, bytes(24)), "tensors 'a' and 'b' overlap"),
    "empty inside another": (
        packed({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, bytes(24)),
        "tensors 'a' and 'b' overlap",
    ),
    "hole at the beginning": (
        packed({"a": entry(offsets=(8, 32))}, bytes(32)),
        "bytes 0 to 8 of the data, before tensor 'a', belong to no tensor",
    ),
    "hole in the middle": (
        packed({"a": entry(), "b": entry(offsets=(32, 56))}, bytes(56)),
        "bytes 24 to 32 of the data, before tensor 'b', belong to no tensor",
    ),
    "data cut short": (
        packed({"w": F32}, bytes(23)),
        "is truncated: its header describes 97 bytes and the file has 96",
    ),
    "data gone": (packed({"w": F32}), "is truncated: its header describes 97 bytes and the file has 73"),
    "data and more": (packed({"w": F32}, bytes(30)), "has 6 bytes more than the 97 that its header describes"),
    "no tensors and data": (packed({}, bytes(6)), "has 6 bytes more than the 10 that its header describes"),
    "name empty": (packed({"": F32}, bytes(24)), "tensor '' has a name that is not a text of 1 to 512 characters"),
    "name long": (packed({"n" * 513: F32}, bytes(24)), "has a name that is not a text of 1 to 512"),
    "name a surrogate": (packed('{"\\ud800":' + json.dumps(F32) + "}", bytes(24)), "has a name that is not a text"),
    "name with a newline": (packed({"a\nb": F32}, bytes(24)), "a tensor's name contains the control character"),
    "name with an escape": (packed({"a\x1b[2J": F32}, bytes(24)), "a tensor's name contains the control character"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, case):
    raw, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    told = str(caught.value)
    assert repr(str(path)) in told
    assert told.isprintable()
    assert len(told) < 600


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("F4", "tensor 'w' is F4, whose elements are less than a byte"),
        ("F6_E2M3", "is F6_E2M3, whose elements are less than a byte"),
        ("F6_E3M2", "is F6_E3M2, whose elements are less than a byte"),
        ("C128", "tensor 'w' has the dtype 'C128', which is not supported"),
        ("f32", "has the dtype 'f32'"),
        ("x" * 10_000, "has the dtype 'xxxx"),
    ],
)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"w": entry(dtype=dtype)}, bytes(24)))
    with pytest.raises(UnsupportedTensor, match=message) as caught:
        open_source(path)
    assert caught.value.tensor == "w"
    assert len(str(caught.value)) < 600


def test_all_but_a_few_are_refused_by_the_reference_implementation_too(tmp_path):
    stricter = {
        # Forbidden by the format and read by its implementation all the same.
        "header without a brace", "name twice", "field twice", "metadata twice",
        # What the protocol, a terminal or this process's memory would not take.
        "header of brackets", "entry with more", "shape huge", "shape long", "shape longer",
        "name empty", "name long", "name with a newline", "name with an escape",
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    accepted = set()
    for case, (raw, _) in MALFORMED.items():
        path.write_bytes(raw)
        try:
            with safetensors.safe_open(path, "np"):
                accepted.add(case)
        except safetensors.SafetensorError:
            pass
    assert accepted <= stricter
