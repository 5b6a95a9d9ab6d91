"""Numbers and bit strings, against the obvious way to write them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.codecs import bits
from shipd.codecs.bits import MAX_NUMBER, Reader, check_padding, number_size, put_fields, put_number, put_unary
from shipd.codecs.codec import CodecError
from tests.property.strategies import examples
from tests.support import payloads

NUMBERS = (0, 1, 127, 128, 300, 16_383, 16_384, (1 << 21) - 1, 1 << 21, MAX_NUMBER)


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value: int) -> None:
    written = bytearray()
    put_number(written, value)
    assert bytes(written) == payloads.number(value)
    assert number_size(value) == len(written)
    reader = Reader(memoryview(written + b"rest"))
    assert reader.number(value) == value
    assert bytes(reader.rest()) == b"rest"
    with pytest.raises(CodecError):
        Reader(memoryview(written)).number(value - 1)
    with pytest.raises(CodecError):
        Reader(memoryview(written)[:-1]).number(value)


@pytest.mark.parametrize("written", ["8000", "ff00", "80808000", "8080808001", "ffffffff7f"])
def test_numbers_in_another_form(written: str) -> None:
    with pytest.raises(CodecError):
        Reader(memoryview(bytes.fromhex(written))).number(MAX_NUMBER)


@examples(200)
@given(st.lists(st.integers(0, 31)), st.sampled_from((1, 2, 1 << 16)))
def test_unary(values: list[int], piece: int) -> None:
    part = put_unary(np.array(values, dtype=np.uint8))
    assert part.tobytes() == payloads.bit_string([bit for value in values for bit in [0] * value + [1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "_SLICE", piece)
        assert bits.take_unary(part, len(values), 31).tolist() == values
        for count in {len(values) + 1, max(0, len(values) - 1)} - {len(values)}:
            with pytest.raises(CodecError):
                bits.take_unary(part, count, 31)
        if any(values):
            with pytest.raises(CodecError):
                bits.take_unary(part, len(values), max(values) - 1)
        with pytest.raises(CodecError):
            bits.take_unary(np.append(part, np.uint8(0)), len(values), 31)


@examples(100)
@given(st.integers(0, 23).flatmap(lambda width: st.tuples(st.just(width), st.lists(st.integers(0, (1 << width) - 1)))))
def test_fields(given_values: tuple[int, list[int]]) -> None:
    width, values = given_values
    unpacked = put_fields(np.array(values, dtype=np.uint32), width)
    assert unpacked.tolist() == [value >> bit & 1 for value in values for bit in range(width)]
    assert bits.take_fields(unpacked, len(values), width).tolist() == values


def test_padding() -> None:
    for size in range(17):
        part = payloads.bit_string([1] * size)
        check_padding(memoryview(part), size)
        if size % 8:
            for bit in range(size % 8, 8):
                with pytest.raises(CodecError):
                    check_padding(memoryview(part[:-1] + bytes((part[-1] | 1 << bit,))), size)
