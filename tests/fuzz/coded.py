"""What is fuzzed of coded runs: a receiver with a base and codecs, and a sender with bases, by the other's frames.

As in ``targets``; with small leaves, so that a run may have several chunks.
"""

from shipproto.connection import Connection, Established
from shipproto.digests import digest_image
from shipproto.errors import ProtocolError, TransferError
from shipproto.layout import Layout
from tests.fuzz.records import framed, records
from tests.support import naive
from tests.support.coding import CODECS
from tests.support.link import Installed, Receiving, Sending, nonce, output_of
from tests.support.models import SMALL, build, contents, leaves_of, make_image, rows_of

_LEAF = 512
_TRANSFER = b"0123456789abcdef"
_STRUCTURE = build(SMALL)
_DATA = contents(_STRUCTURE)
_BEFORE = {**_DATA, "layer.0.weight": contents(_STRUCTURE, 1)["layer.0.weight"]}


def _version() -> Installed:
    layout = Layout(_STRUCTURE)
    image = make_image(layout, _BEFORE)
    digests = digest_image(layout, memoryview(image))
    return Installed("v0", digests.version_digest(), layout, image, digests, _BEFORE)


def _sending(*, shared: bool) -> Sending:
    return Sending(
        _STRUCTURE,
        _DATA,
        transfer=_TRANSFER,
        bases={_version().digest: _BEFORE} if shared else None,
        incremental=not shared,
    )


def receiver(data: bytes) -> None:
    """A sender's frames to a receiver that has the version before; the first byte says when runs are decoded."""
    if not data:
        return
    with leaves_of(_LEAF):
        before = _version()
        image = bytes(before.image)
        side = Connection(initiator=False, nonce=nonce(1), agent="here")
        receiving = Receiving(resident=_STRUCTURE, codecs=CODECS, current=before)
        try:
            for number, frame in enumerate(framed(data[1:])):
                side.receive(frame)
                for event in side.events():
                    receiving.on_event(side, event)
                while receiving.work and (number + data[0]) % 3:
                    receiving.work.popleft()()
                output_of(side)
        except (ProtocolError, TransferError):
            pass
        while receiving.work:
            receiving.work.popleft()()
        assert all(machine.decoding == 0 for machine in receiving.receivers.values())
        assert bytes(before.image) == image, "the base was written to"
        current = receiving.current
        if current is not None and current is not before:
            expected = naive.version_digest(rows_of(_STRUCTURE), current.content, _LEAF)
            assert current.digest == expected, "committed, and it is not what it says"


def feed_sender(side: Connection, sending: Sending, data: bytes) -> bool:
    """A receiver's frames to a sender, which does whatever they have it do. Whether all of them were taken."""
    try:
        for frame in framed(data):
            side.receive(frame)
            for event in side.events():
                if isinstance(event, Established):
                    sending.sender.connected(side)
                else:
                    sending.sender.receive(event)
            for _ in range(1000):
                if sending.sender.ended or not sending.step():
                    break
            else:
                raise AssertionError("a sender that never rests")
            output_of(side)
    except (ProtocolError, TransferError):
        return False
    return True


def sender(data: bytes) -> None:
    """A receiver's frames to a sender; the first byte says whether it has the base."""
    if not data:
        return
    with leaves_of(_LEAF):
        side = Connection(initiator=True, nonce=nonce(1), agent="here")
        sending = _sending(shared=bool(data[0] & 1))
        feed_sender(side, sending, data[1:])


def _conversation(*, shared: bool) -> tuple[bytes, bytes]:
    """What each side says in a whole push."""
    with leaves_of(_LEAF):
        sides = (
            Connection(initiator=True, nonce=nonce(2), agent="there"),
            Connection(initiator=False, nonce=nonce(1), agent="here"),
        )
        sending, receiving = _sending(shared=shared), Receiving(resident=_STRUCTURE, codecs=CODECS, current=_version())
        said = (bytearray(), bytearray())
        while any(side.has_output for side in sides):
            for number, side in enumerate(sides):
                said[number].extend(data := output_of(side))
                sides[1 - number].receive(data)
            for event in sides[0].events():
                if isinstance(event, Established):
                    sending.sender.connected(sides[0])
                else:
                    sending.sender.receive(event)
            for event in sides[1].events():
                receiving.on_event(sides[1], event)
            while not sending.sender.ended and sending.step():
                pass
            while receiving.work:
                receiving.work.popleft()()
    assert sending.sender.committed is not None
    return bytes(said[0]), bytes(said[1])


def _beginnings(stream: bytes) -> list[bytes]:
    ends = [frame.start + frame.size for frame in naive.frames(stream)]
    return [records(stream[:end]) for end in ends[len(ends) // 3 :: 2]]


def receiver_seeds() -> list[bytes]:
    """Pushes to a receiver that shares the base, and to one that tells what it has, as far as they went."""
    streams = [part for shared in (False, True) for part in _beginnings(_conversation(shared=shared)[0])]
    return [bytes((mode,)) + stream for mode in range(3) for stream in streams]


def sender_seeds() -> list[bytes]:
    """The answers to them, each to either kind of sender."""
    streams = [part for shared in (False, True) for part in _beginnings(_conversation(shared=shared)[1])]
    return [bytes((mode,)) + stream for mode in range(2) for stream in streams]
