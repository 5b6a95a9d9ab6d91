"""shipproto.status and resident: bodies that are typed msgpack."""

import msgpack
import msgspec
import pytest

from shipproto.errors import LimitExceeded, MalformedMessage
from shipproto.resident import Resident
from shipproto.status import (
    ModelStatus,
    ProcessStatus,
    ProcessVerification,
    Status,
    TransferStatus,
    Verification,
    decode_status,
    decode_verification,
    encode,
)
from tests.support import naive
from tests.support.models import SMALL, build, floats

STATUS = Status(
    agent="shipd",
    pid=1,
    uptime_seconds=1.5,
    memory_used=1 << 30,
    memory_limit=1 << 40,
    models=[
        ModelStatus(name="idle"),
        ModelStatus(
            name="busy",
            label="v1",
            digest="00" * 16,
            tensors=3,
            bytes=100,
            image_bytes=4096,
            committed_at=1.7e9,
            processes=[ProcessStatus(pid=7, state="serving"), ProcessStatus(pid=8, state="stale", pinned=True)],
            transfer=TransferStatus(transfer_id="ab", peer="[::1]:9", stage="receiving", bytes_held=1, bytes_total=2),
        ),
    ],
)
VERIFICATION = Verification(
    model="m",
    label="v1",
    digest="00" * 16,
    processes=[ProcessVerification(pid=7, error="gone"), ProcessVerification(pid=8, matches=True)],
)
DEEP = b"\x81\xa1a" + b"\x91" * 100_000


def test_there_and_back() -> None:
    assert decode_status(encode(STATUS)) == STATUS
    assert decode_status(memoryview(encode(STATUS))) == STATUS
    assert decode_verification(encode(VERIFICATION)) == VERIFICATION
    small = Status(agent="", pid=0, uptime_seconds=0.0, memory_used=0, memory_limit=0)
    assert decode_status(encode(small)) == small


def test_a_verification_matches_where_every_process_does() -> None:
    assert not VERIFICATION.matches
    assert msgspec.structs.replace(VERIFICATION, processes=VERIFICATION.processes[1:]).matches
    assert msgspec.structs.replace(VERIFICATION, processes=[]).matches, "nobody serves anything else"


def test_fields_of_a_later_release_are_ignored() -> None:
    said = msgspec.to_builtins(STATUS)
    said["weather"] = {"deep": [1]}
    said["models"][1]["colour"] = None
    said["models"][1]["processes"][0]["shoe"] = 1.5
    assert decode_status(msgpack.packb(said)) == STATUS


def test_fields_of_an_earlier_release_have_defaults() -> None:
    said = {
        "agent": "x",
        "pid": 1,
        "uptime_seconds": 2.0,
        "memory_used": 3,
        "memory_limit": 4,
        "models": [{"name": "m"}],
    }
    (model,) = decode_status(msgpack.packb(said)).models
    assert model == ModelStatus(name="m")
    assert model.processes is not ModelStatus(name="n").processes


@pytest.mark.parametrize("decode", [decode_status, decode_verification])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\xc1",
        b"\x80",
        b"\x81\xa1a",
        b"\x81\xa5agent\xa1\xff",
        DEEP,
        encode(STATUS)[:-1],
        encode(STATUS) + b"\0",
    ],
)
def test_anything_else_is_malformed(decode, body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(body)


def test_wrong_types() -> None:
    said = msgspec.to_builtins(STATUS)
    for key, value in said.items():
        wrong = {**said, key: {"x": 1} if not isinstance(value, dict) else 1}
        with pytest.raises(MalformedMessage, match=key):
            decode_status(msgpack.packb(wrong))
    whole = encode(STATUS)
    for cut in range(len(whole)):
        with pytest.raises(MalformedMessage):
            decode_status(whole[:cut])


# --- what a process says when it attaches ------------------------------------------------------------------------


def test_resident_there_and_back() -> None:
    transient = [floats("buffer", 3), floats("ids")]
    resident = Resident(build(SMALL), build(transient))
    body = resident.encode()
    assert body == naive.pack(
        {"structure": naive.encode_structure(SMALL), "transient": naive.encode_structure(transient)}
    )
    again = Resident.decode(body)
    assert again.structure.encoded == resident.structure.encoded
    assert again.transient.encoded == resident.transient.encoded
    assert again.encode() == body


def test_resident_that_is_none() -> None:
    good = {"structure": naive.encode_structure(SMALL), "transient": naive.encode_structure(())}
    Resident.decode(naive.pack(good))
    Resident.decode(naive.pack({**good, "zz": 1}))
    for bad in (
        {},
        {"structure": good["structure"]},
        {**good, "structure": "x"},
        {**good, "structure": b""},
        {**good, "transient": good["transient"] + b"\0"},
        {**good, "transient": None},
    ):
        with pytest.raises(MalformedMessage):
            Resident.decode(naive.pack(bad))
    for raw in (b"", b"\xc1", b"\x90", naive.pack(good) + b"\0", DEEP):
        with pytest.raises(MalformedMessage):
            Resident.decode(raw)
    huge = {
        **good,
        "structure": naive.encode_structure([floats("x", 4)]).replace((4).to_bytes(8, "little"), b"\xff" * 8),
    }
    with pytest.raises(LimitExceeded):
        Resident.decode(naive.pack(huge))
