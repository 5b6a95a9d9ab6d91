"""shipproto.receiver: which bodies of several frames are put together for a transfer, decided at their announcement."""

import pytest

from shipproto.errors import AbortCode, MalformedMessage, TransferError, UnexpectedMessage
from shipproto.messages import Finish, StructureIs
from tests.support.link import handshaken
from tests.support.models import leaves_of
from tests.support.pair import OTHER, TRANSFER, Pair

STRUCTURE = StructureIs(transfer=TRANSFER)
FINISH = Finish(digest=bytes(16), label="v1", transfer=TRANSFER)


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


def test_a_body_that_is_due() -> None:
    pair = Pair()
    pair.there.want_structure()
    assert pair.there.awaits(pair.right, STRUCTURE, 1 << 20)
    pair.flow()
    pair.accept()
    assert pair.there.awaits(pair.right, FINISH, 16 * len(pair.structure))


def test_a_body_that_is_due_and_has_another_size() -> None:
    pair = Pair()
    pair.accept()
    with pytest.raises(MalformedMessage, match="bytes of digests"):
        pair.there.awaits(pair.right, FINISH, 16 * len(pair.structure) + 16)


def test_a_body_that_is_not_due() -> None:
    pair = Pair()
    for message in (STRUCTURE, FINISH):
        with pytest.raises(UnexpectedMessage, match="in state OFFERED"):
            pair.there.awaits(pair.right, message, 1 << 20)


def test_a_body_that_is_somebody_elses() -> None:
    pair = Pair()
    pair.there.want_structure()
    assert not pair.there.awaits(pair.right, StructureIs(transfer=OTHER), 1 << 20)
    assert not pair.there.awaits(handshaken()[1], STRUCTURE, 1 << 20)
    pair.there.abort(TransferError(AbortCode.STALLED, "too slow"))
    assert not pair.there.awaits(pair.right, STRUCTURE, 1 << 20)
