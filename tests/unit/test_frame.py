"""shipproto.frame: preludes and their CRC, against the bitwise one."""

import random
import zlib

import crc32c
import pytest

from shipproto.errors import BadPrelude, ForeignPeer, LimitExceeded
from shipproto.frame import FLAG_MORE, MAGIC, PRELUDE_SIZE, Prelude, decode_prelude, encode_frame
from shipproto.limits import MAX_HEADER, MAX_PAYLOAD
from tests.support import naive

HEADER, PAYLOAD = b"\x81\xa5chunk\x07", bytes(range(100))


def prelude(**fields: int) -> bytes:
    return naive.prelude(20, HEADER, PAYLOAD, fields.pop("sequence", 3), **fields)  # type: ignore[arg-type]


def test_crc32c_is_the_bitwise_one() -> None:
    rng = random.Random(1)
    for size in (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000):
        data = rng.randbytes(size)
        assert crc32c.crc32c(data) == naive.crc32c_bitwise(data) == naive.crc32c(data)


def test_crc32c_of_rfc_3720() -> None:
    # Appendix B.4.
    assert naive.crc32c_bitwise(bytes(32)) == 0x8A9136AA
    assert naive.crc32c_bitwise(b"\xff" * 32) == 0x62A8AB43
    assert naive.crc32c_bitwise(bytes(range(32))) == 0x46DD794E
    assert crc32c.crc32c(b"123456789") == naive.crc32c_bitwise(b"123456789") == 0xE3069283
    assert crc32c.crc32c(b"") == naive.crc32c_bitwise(b"") == 0


def test_crc32c_piece_by_piece() -> None:
    assert crc32c.crc32c(PAYLOAD[40:], crc32c.crc32c(PAYLOAD[:40])) == crc32c.crc32c(PAYLOAD)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_encoded_as_the_naive_one(form) -> None:
    head = encode_frame(20, FLAG_MORE, 1 << 40, HEADER, form(PAYLOAD))
    assert head == naive.prelude(20, HEADER, PAYLOAD, 1 << 40, FLAG_MORE) + HEADER


def test_decodes_what_was_encoded() -> None:
    head = encode_frame(255, 0x80, 2**64 - 1, HEADER, b"")
    assert decode_prelude(head[:PRELUDE_SIZE], 2**64 - 1) == Prelude(
        type=255,
        flags=0x80,
        header_length=len(HEADER),
        payload_length=0,
        header_crc=crc32c.crc32c(HEADER),
        sequence=2**64 - 1,
        payload_crc=0,
    )


@pytest.mark.parametrize(("header", "payload"), [(b"", b""), (bytes(MAX_HEADER), b""), (b"", bytes(MAX_PAYLOAD))])
def test_lengths_up_to_the_limits(header: bytes, payload: bytes) -> None:
    found = decode_prelude(encode_frame(1, 0, 0, header, payload), 0)
    assert (found.header_length, found.payload_length) == (len(header), len(payload))


@pytest.mark.parametrize(("header", "payload"), [(MAX_HEADER + 1, 0), (0, MAX_PAYLOAD + 1)])
def test_refuses_to_encode_more(header: int, payload: int) -> None:
    with pytest.raises(LimitExceeded):
        encode_frame(1, 0, 0, bytes(header), bytes(payload))


@pytest.mark.parametrize("lie", [{"header_length": MAX_HEADER + 1}, {"payload_length": MAX_PAYLOAD + 1}])
def test_a_length_beyond_its_limit_is_named(lie: dict[str, int]) -> None:
    with pytest.raises(LimitExceeded, match=str(next(iter(lie.values())))):
        decode_prelude(prelude(**lie), 3)


def test_every_flipped_bit_is_found() -> None:
    raw = prelude()
    for bit in range(8 * PRELUDE_SIZE):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(BadPrelude):
            decode_prelude(damaged, 3)


def test_every_pair_of_flipped_bits_is_found() -> None:
    raw = int.from_bytes(prelude(), "big")
    rng = random.Random(2)
    for _ in range(2000):
        first, second = rng.sample(range(8 * PRELUDE_SIZE), 2)
        with pytest.raises(BadPrelude):
            decode_prelude((raw ^ 1 << first ^ 1 << second).to_bytes(PRELUDE_SIZE, "big"), 3)


def test_another_checksum_is_refused() -> None:
    raw = prelude()[:28]
    for check in (zlib.crc32(raw), zlib.adler32(raw), naive.crc32c(raw) ^ 0xFFFFFFFF):
        with pytest.raises(BadPrelude):
            decode_prelude(raw + check.to_bytes(4, "big"), 3)


@pytest.mark.parametrize("sequence", [0, 2, 4, 2**64 - 1])
def test_out_of_sequence(sequence: int) -> None:
    with pytest.raises(BadPrelude, match=f"frame {sequence} arrived where frame 3 was due"):
        decode_prelude(prelude(sequence=sequence), 3)


def test_another_magic_is_a_foreign_peer_only_in_the_first_frame() -> None:
    raw = naive.prelude(1, b"", b"", 0, magic=b"HTTP")
    with pytest.raises(ForeignPeer) as caught:
        decode_prelude(raw, 0)
    assert caught.value.opening == raw
    with pytest.raises(BadPrelude):
        decode_prelude(naive.prelude(1, b"", b"", 3, magic=b"HTTP"), 3)


def test_the_prelude_takes_32_bytes_and_begins_with_the_magic() -> None:
    assert len(prelude()) == PRELUDE_SIZE == 32
    assert prelude()[:4] == MAGIC
    assert decode_prelude(prelude() + b"more", 3).sequence == 3
