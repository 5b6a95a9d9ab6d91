"""shipproto.messages: every header in its one spelling, and nothing else."""

from collections.abc import Sequence
from typing import Any

import msgpack
import msgspec
import pytest

from shipproto import limits, messages
from shipproto.errors import AbortCode, LimitExceeded, MalformedMessage
from shipproto.headers import check_body, decode_header, encode_header
from shipproto.messages import (
    BY_TYPE,
    MESSAGES,
    Abort,
    Attach,
    Commit,
    Data,
    DigestIs,
    Finish,
    Hello,
    Message,
    Nack,
    Offer,
    Ping,
    Staged,
    Swapped,
    Want,
)
from tests.support import naive
from tests.support.golden.book import DIGEST, OFFER, THEIRS, TRANSFER
from tests.support.golden.messages import MESSAGES as GOLDEN

HANDSHAKE = (("Hello", THEIRS, b""), ("Auth", {"proof": bytes(32)}, b""))
TRANSPORT: Sequence[tuple[str, dict, bytes]] = (
    ("Body", {"body_id": 1, "offset": 524288}, b""),
    ("Nack", {"sequences": [0, (1 << 63) - 1]}, b""),
    ("Ping", {}, b""),
    ("Ping", {"reply": True}, b""),
    ("Data", {"chunk": 0xFFFFFFFF}, b""),
    ("Coded", {"chunk": 0, "chunks": 1, "codec": 1}, b""),
    ("Coded", {"chunk": 0xFFFFFFFF, "chunks": 0xFFFFFFFF, "codec": 255}, b""),
)
ALL = (*HANDSHAKE, *TRANSPORT, *GOLDEN)
IDS = [f"{name}-{at}" for at, (name, _, _) in enumerate(ALL)]


def test_the_numbers_of_all_messages() -> None:
    assert {message.__name__: message.TYPE for message in MESSAGES} == naive.TYPES
    assert list(BY_TYPE) == sorted(naive.TYPES.values())
    assert {name for name, _, _ in ALL} == set(naive.TYPES), "each is tried here"


def test_fields_are_declared_in_their_order_on_the_wire() -> None:
    structs: tuple[type[msgspec.Struct], ...] = (*MESSAGES, messages.ImageSlot)
    for message in structs:
        assert list(message.__struct_fields__) == sorted(message.__struct_fields__), message.__name__


def test_nothing_outgrows_a_header() -> None:
    """The largest ASCII header of every message fits, but for metadata, which says so."""
    for message in MESSAGES:
        size = 0
        for field in msgspec.structs.fields(message):
            size += len(field.name) + 1 + _largest(msgspec.inspect.type_info(field.type))
        if message is not Offer:
            assert size <= limits.MAX_HEADER, message.__name__


def _largest(info) -> int:
    if isinstance(info, msgspec.inspect.StrType | msgspec.inspect.BytesType):
        assert info.max_length is not None, "every text has a limit"
        return 3 + info.max_length
    if isinstance(info, msgspec.inspect.VarTupleType):
        assert info.max_length is not None, "every list has a limit"
        return 3 + info.max_length * _largest(info.item_type)
    if isinstance(info, msgspec.inspect.DictType):
        assert info.max_length is not None
        return 3 + info.max_length * (_largest(info.key_type) + _largest(info.value_type))
    if isinstance(info, msgspec.inspect.UnionType):
        return max(_largest(member) for member in info.types)
    if isinstance(info, msgspec.inspect.StructType):
        return 1 + sum(len(field.name) + 1 + _largest(field.type) for field in info.fields)
    assert isinstance(
        info,
        msgspec.inspect.IntType | msgspec.inspect.FloatType | msgspec.inspect.BoolType | msgspec.inspect.NoneType,
    )
    if isinstance(info, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        assert info.ge is not None, "every number has a range"
        assert info.le is not None or info.lt is not None
    return 9


@pytest.mark.parametrize(("name", "fields", "body"), ALL, ids=IDS)
def test_encoded_as_the_naive_one(name, fields, body) -> None:
    kind = naive.TYPES[name]
    raw = naive.pack(fields)
    for form in (bytes, bytearray, memoryview):
        message = decode_header(kind, form(raw))
        assert type(message) is BY_TYPE[kind]
        assert encode_header(message) == raw
        assert decode_header(kind, encode_header(message)) == message
        check_body(message, len(body))


JUNK: Sequence[Any] = (
    None, True, -1, 0, 1, 16, 64, 65, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 32, 1 << 44, (1 << 44) + 1, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, 0.0, -0.0, 1.5, -1.5, float("nan"), float("inf"), 1e9, 1.1e9,
    "", "x", "x" * 64, "x" * 65, "x" * 128, "x" * 129, "x" * 2048, "x" * 2049, "x y", "x\n", "/", "..",
    b"", b"x", bytes(15), bytes(16), bytes(17), bytes(32), [], [1], [-1], ["x"], ["x" * 65], [b"x"], [[]], [None] * 300,
    {}, {"x": "y"}, {"x": 1}, {"x": "y" * 257}, {f"{at}": "" for at in range(33)}, {"size": 1, "slot": 1},
    [{"size": 1, "slot": 1}], [{"size": 1, "slot": 16}],
)  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "body"), ALL, ids=IDS)
def test_junk_in_every_field_is_refused_or_means_what_it_says(name, fields, body) -> None:
    kind = naive.TYPES[name]
    refused = 0
    known = BY_TYPE[kind].__struct_fields__
    for key in known:
        for junk in JUNK:
            raw = naive.pack({**fields, key: junk})
            try:
                message = decode_header(kind, raw)
            except MalformedMessage:
                refused += 1
            else:
                assert encode_header(message) == raw, (key, junk)
    assert refused >= len(known) * len(JUNK) // 2


@pytest.mark.parametrize(("name", "fields", "body"), ALL, ids=IDS)
def test_missing_fields_cut_headers_and_bytes_behind(name, fields, body) -> None:
    kind = naive.TYPES[name]
    raw = naive.pack(fields)
    for field in msgspec.structs.fields(BY_TYPE[kind]):
        if field.required:
            with pytest.raises(MalformedMessage, match=field.name):
                decode_header(kind, naive.pack({key: value for key, value in fields.items() if key != field.name}))
    for cut in range(len(raw)):
        with pytest.raises(MalformedMessage):
            decode_header(kind, raw[:cut])
    for behind in (b"\0", b"\x80", b"\xc0", raw):
        with pytest.raises(MalformedMessage):
            decode_header(kind, raw + behind)


@pytest.mark.parametrize(("name", "fields", "body"), ALL, ids=IDS)
def test_unknown_fields(name, fields, body) -> None:
    kind = naive.TYPES[name]
    message = decode_header(kind, naive.pack(fields))
    values = (None, 1, -1, 1.5, "x", b"x", [1, {"y": [2]}], {"k": {"k": {1: {b"": None}}}})
    for key in ("A", "aa", "zz", "~", "é"):
        for value in values:
            assert decode_header(kind, naive.pack({**fields, key: value})) == message
    many = {**fields, **{f"new{at:03}": at for at in range(300)}}
    assert decode_header(kind, naive.pack(many)) == message
    for key in ("!", "!a", "!!"):
        with pytest.raises(MalformedMessage, match=f"critical field '{key}'"):
            decode_header(kind, naive.pack({**fields, key: None}))


@pytest.mark.parametrize(("name", "fields", "body"), ALL, ids=IDS)
def test_another_spelling_is_refused(name, fields, body) -> None:
    """The same map with one thing said at more length than needed, or in another order."""
    kind = naive.TYPES[name]
    raw = naive.pack(fields)
    count = len(fields)
    spellings = [
        b"\xde" + count.to_bytes(2, "big") + raw[1:],
        b"\xdf" + count.to_bytes(4, "big") + raw[1:],
    ]
    pairs = [msgpack.packb(key) + msgpack.packb(value) for key, value in sorted(fields.items())]
    longer = [b"\xd9" + bytes((len(key.encode()),)) + key.encode() for key in sorted(fields)]
    for at, key in enumerate(sorted(fields)):
        spelt = pairs.copy()
        spelt[at] = longer[at] + msgpack.packb(fields[key])
        spellings.append(raw[:1] + b"".join(spelt))
        if isinstance(fields[key], int) and not isinstance(fields[key], bool) and fields[key] < 1 << 63:
            spelt[at] = msgpack.packb(key) + b"\xd3" + fields[key].to_bytes(8, "big")
            spellings.append(raw[:1] + b"".join(spelt))
    if count > 1:
        spellings.append(raw[:1] + b"".join(reversed(pairs)))
    if count:
        spellings.append(bytes((raw[0] + 1,)) + pairs[0] + b"".join(pairs))
    for spelling in spellings:
        with pytest.raises(MalformedMessage):
            decode_header(kind, spelling)
    # The same together with a field of a later release.
    for at in range(len(pairs)):
        spelt = [*pairs, msgpack.packb("zz") + b"\x01"]
        spelt[at] = longer[at] + pairs[at][1 + len(longer[at]) - 2 :]
        with pytest.raises(MalformedMessage):
            decode_header(kind, bytes((raw[0] + 1,)) + b"".join(spelt))


def test_depth() -> None:
    for depth, fine in ((1, True), (15, True), (16, False), (17, False), (900, False), (16_000, False)):
        for opening in (b"\x91", b"\x81\x01"):
            raw = b"\x81\xa1a" + opening * min(depth, 16_000 // len(opening)) + b"\xc0"
            if fine:
                assert decode_header(5, raw) == Ping()
            else:
                with pytest.raises(MalformedMessage):
                    decode_header(5, raw)


def test_wide_headers_are_quick() -> None:
    assert decode_header(5, b"\x81\xa1a\xdc\x3f\x00" + b"\x90" * 0x3F00) == Ping()
    assert decode_header(5, b"\x81\xa1a\xdc\x3f\x00" + b"\x80" * 0x3F00) == Ping()


def test_an_unknown_type() -> None:
    for kind in set(range(256)) - set(naive.TYPES.values()):
        with pytest.raises(MalformedMessage, match=str(kind)):
            decode_header(kind, b"\x80")


def test_versions_that_cross() -> None:
    with pytest.raises(MalformedMessage, match="version_min"):
        decode_header(Hello.TYPE, naive.pack({**THEIRS, "version_min": 2}))


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (Abort, {"code": "busy"}, "transfer"),
        (Attach, {"mode": "copy", "model": "m"}, "digest"),
        (DigestIs, {"request": 1}, "digest"),
    ],
)
def test_sixteen_bytes_or_none(kind: type[Message], fields: dict, key: str) -> None:
    assert getattr(decode_header(kind.TYPE, naive.pack({**fields, key: DIGEST})), key) == DIGEST
    assert getattr(decode_header(kind.TYPE, naive.pack(fields)), key) == b""
    for size in (1, 3, 15, 17):
        with pytest.raises(MalformedMessage):
            decode_header(kind.TYPE, naive.pack({**fields, key: bytes(size)}))


def test_a_duration_of_nothing_has_one_spelling() -> None:
    """Found by the vectors: msgspec leaves out a default only where it is the very object."""
    zero = sum((0.5, -0.5))
    for nothing in (0.0, -0.0, zero):
        assert encode_header(Staged(processes=0, stage_seconds=nothing, transfer=TRANSFER)) == naive.pack(
            {"processes": 0, "transfer": TRANSFER}
        )
        swapped = Swapped(copy_seconds=nothing, generation=1, pause_seconds=nothing, transfer=TRANSFER)
        assert encode_header(swapped) == naive.pack({"generation": 1, "transfer": TRANSFER})
    assert encode_header(Staged(processes=0, stage_seconds=0.5, transfer=TRANSFER)) == naive.pack(
        {"processes": 0, "stage_seconds": 0.5, "transfer": TRANSFER}
    )


def test_what_a_label_may_be() -> None:
    for label in ("a", "_", "9", "step-1200", "v1.0:rc+2@x", "a" * 128, "20260101T000000Z-0011aabb"):
        decode_header(Offer.TYPE, naive.pack({**OFFER, "label": label, "model": label}))
    for label in (".a", "-a", "/", "a/b", "a b", "ä", "a\n", "\n", "a\0", "٣", "a" * 129, "..", ":", "@", "+"):
        with pytest.raises(MalformedMessage):
            decode_header(Offer.TYPE, naive.pack({**OFFER, "label": label}))
        with pytest.raises(MalformedMessage):
            decode_header(Offer.TYPE, naive.pack({**OFFER, "model": label}))


def test_metadata_is_bounded() -> None:
    full = {f"{at:0256}": "x" * 256 for at in range(31)}
    assert decode_header(Offer.TYPE, naive.pack({**OFFER, "metadata": full})).metadata == full  # type: ignore[attr-defined]
    order = {"b": "1", "a": "2"}
    decoded = decode_header(Offer.TYPE, naive.pack({**OFFER, "metadata": order}))
    assert encode_header(decoded) == naive.pack({**OFFER, "metadata": order}), "metadata keeps its order"


def test_body_limits() -> None:
    assert Want.MAX_BODY == limits.MAX_RANGES * 8
    assert Finish.MAX_BODY == limits.MAX_TENSORS * 16
    assert Commit.MAX_BODY == 0
    for message in (Commit(transfer=TRANSFER), Ping(), Data(chunk=0), Nack(sequences=(1,))):
        check_body(message, 0)
        with pytest.raises(LimitExceeded, match=type(message).__name__):
            check_body(message, 1)
    want = Want(structure=DIGEST, transfer=TRANSFER)
    check_body(want, limits.MAX_RANGES * 8)
    with pytest.raises(LimitExceeded):
        check_body(want, limits.MAX_RANGES * 8 + 1)


def test_abort_codes_are_words() -> None:
    for code in AbortCode:
        assert decode_header(Abort.TYPE, encode_header(Abort(code=code))).code == code  # type: ignore[attr-defined]
