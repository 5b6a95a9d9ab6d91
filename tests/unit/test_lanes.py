"""A transfer over several connections, as the two machines see it: joining, sharing chunks, losing a lane."""

import pytest

from shipproto.connection import ChunkArrived, Connection, Event, MessageArrived
from shipproto.errors import AbortCode, TransferError, UnexpectedMessage
from shipproto.messages import Abort, Data, Join, Joined, Ping, Progress
from shipproto.states import ReceiverState
from shipproto.steps import SendChunk
from tests.support.link import handshaken, output_of
from tests.support.models import leaves_of
from tests.support.pair import OTHER, TRANSFER, Pair, flow


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


class Lane:
    """A further connection of a pair, moved by hand like the first one."""

    def __init__(self, pair: Pair, number: int = 1) -> None:
        self.pair = pair
        self.left, self.right = handshaken()
        self.joined = False
        self.left.send(Join(lane=number, transfer=TRANSFER))
        self.flow()

    def flow(self) -> list[str]:
        """Everything queued arrives, and is answered, until nothing moves. Names of what arrived."""

        def hear(event: Event) -> None:
            self.joined |= self.pair.sender.receive_on_lane(event)

        return flow(self.left, self.right, self.to_receiver, hear)

    def to_receiver(self, data: bytes) -> None:
        """Bytes arrive, and what comes of them is told as a shell does it."""
        there = self.pair.there
        self.right.receive(data)
        for event in self.right.events():
            if isinstance(event, MessageArrived) and isinstance(event.message, Join):
                there.joined(self.right, event.message)
                continue
            there.take_on_thread(self.right, event)
            self.pair.outcomes += there.receive(self.right, event)

    def send(self, chunk: int) -> None:
        content = self.pair.content(chunk)
        self.pair.sender.digest_chunk(chunk, content)
        self.left.send_data(chunk, content)
        self.pair.sender.sent(range(chunk, chunk + 1))


def receiving(lanes: int = 4) -> Pair:
    pair = Pair()
    pair.there.accept(pair.layout, memoryview(pair.image), lanes=lanes)
    pair.flow()
    return pair


def next_chunk(pair: Pair) -> int:
    (chunk,) = pair.sender.next_chunks(1)
    return chunk


def test_the_receiver_says_how_many_connections_it_takes() -> None:
    assert receiving(lanes=4).sender.lanes == 4
    assert receiving(lanes=1).sender.lanes == 1


def test_chunks_travel_on_every_connection_and_make_one_version() -> None:
    pair = receiving()
    lanes = [Lane(pair, number) for number in (1, 2, 3)]
    assert all(lane.joined for lane in lanes)
    used = 0
    while chunks := pair.sender.next_chunks(1):
        lanes[used % 3].send(chunks[0])
        used += 1
        if isinstance(step := pair.sender.next_step(), SendChunk):
            pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    assert used >= 3
    for lane in lanes:
        assert set(lane.flow()) == {"Data"}
    pair.send_all()
    assert pair.there.state is ReceiverState.VERIFYING
    pair.finish_from_anywhere()


def test_nothing_is_finished_while_a_chunk_is_out() -> None:
    pair = receiving()
    lane = Lane(pair)
    chunk = next_chunk(pair)
    while isinstance(step := pair.sender.next_step(), SendChunk):
        pair.sender.send_chunk(step.chunk, pair.content(step.chunk))
    assert step is None
    assert pair.sender.state.name == "SENDING", "a lane is still reading a chunk"
    lane.send(chunk)
    assert pair.sender.next_step() is None
    assert pair.sender.state.name == "FINISHING"
    # FINISH overtakes the chunk, which the lane brings later.
    pair.flow()
    assert pair.there.state is ReceiverState.RECEIVING
    lane.flow()
    pair.finish_from_anywhere()


def test_a_chunk_belongs_to_the_connection_that_brings_it_first() -> None:
    pair = receiving()
    lane = Lane(pair)
    chunk = next_chunk(pair)
    content = bytes(pair.content(chunk))
    lane.send(chunk)
    half = output_of(lane.left)
    lane.right.receive(half[:100])
    pair.left.send_data(chunk, memoryview(bytes(len(content))))
    pair.flow()
    assert chunk not in pair.there.held, "the other connection's is thrown away"
    lane.to_receiver(half[100:])
    assert chunk in pair.there.held
    start, size = pair.layout.chunk(chunk)
    assert pair.image[start : start + size] == content
    pair.send_all()
    pair.finish_from_anywhere()


def test_a_lane_that_goes_away_takes_what_was_arriving_with_it() -> None:
    pair = receiving()
    lane = Lane(pair)
    first, second = next_chunk(pair), next_chunk(pair)
    lane.send(first)
    lane.flow()
    lane.send(second)
    lane.right.receive(output_of(lane.left)[:-1])
    pair.there.parted(lane.right)
    assert first in pair.there.held
    # The sender starts over, and what it sends instead lands although the lane had begun with it.
    pair.connect()
    pair.send_all()
    assert pair.there.state is ReceiverState.VERIFYING
    pair.finish_from_anywhere()


def test_what_was_digested_and_not_told_before_a_lane_went_is_digested_anew() -> None:
    pair = receiving()
    lane = Lane(pair)
    chunk = next_chunk(pair)
    other = bytearray(pair.content(chunk))
    other[0] ^= 1
    lane.left.send_data(chunk, memoryview(other))
    lane.right.receive(output_of(lane.left))
    (event,) = lane.right.events()
    assert isinstance(event, ChunkArrived)
    pair.there.take_on_thread(lane.right, event)
    pair.there.parted(lane.right)
    assert pair.there.receive(lane.right, event) == [], "nobody listens to it any more"
    pair.connect()
    pair.send_all()
    assert pair.there.verify() == ()
    pair.finish_from_anywhere()


def test_a_new_offer_ends_every_lane() -> None:
    pair = receiving()
    lane = Lane(pair)
    chunk = next_chunk(pair)
    lane.send(chunk)
    data = output_of(lane.left)
    lane.right.receive(data[:200])
    pair.connect()
    lane.to_receiver(data[200:])
    assert chunk not in pair.there.held
    pair.send_all()
    pair.finish_from_anywhere()


def test_a_damaged_chunk_is_asked_for_on_its_lane_and_may_come_on_any() -> None:
    pair = receiving()
    lane = Lane(pair)
    chunk = next_chunk(pair)
    lane.send(chunk)
    data = bytearray(output_of(lane.left))
    data[-1] ^= 1
    lane.to_receiver(bytes(data))
    assert lane.flow() == ["Nack"]
    assert lane.left.frames_resent == 1
    assert pair.sender.chunks_resent[chunk] == 1
    assert pair.there.chunks_damaged == 1
    pair.send_all()
    assert chunk in pair.there.held
    pair.finish_from_anywhere()


@pytest.mark.parametrize(("lane", "why"), [(4, "lane 4 of 4"), (1, "has joined")])
def test_a_lane_that_is_not_wanted_is_refused(lane: int, why: str) -> None:
    pair = receiving(lanes=4)
    Lane(pair, 1)
    _left, right = handshaken()
    with pytest.raises(TransferError, match=why) as caught:
        pair.there.joined(right, Join(lane=lane, transfer=TRANSFER))
    assert caught.value.code is AbortCode.PROTOCOL
    assert right.landing is None


@pytest.mark.parametrize(
    "state", [state for state in ReceiverState if state.name in ("VERIFYING", "STAGED", "COMMITTED")]
)
def test_nothing_joins_a_transfer_that_receives_nothing(state: ReceiverState) -> None:
    pair = Pair().to(state)
    _left, right = handshaken()
    with pytest.raises(TransferError, match=state.name.lower()):
        pair.there.joined(right, Join(lane=1, transfer=TRANSFER))


def test_nothing_joins_a_transfer_whose_sender_is_gone() -> None:
    pair = receiving()
    pair.there.disconnected(pair.right)
    _left, right = handshaken()
    with pytest.raises(TransferError, match="receiving"):
        pair.there.joined(right, Join(lane=1, transfer=TRANSFER))


def test_a_lane_carries_chunks_and_nothing_else() -> None:
    pair = receiving()
    lane = Lane(pair)
    lane.left.send(Progress(held=0, stage="", transfer=TRANSFER))
    with pytest.raises(UnexpectedMessage, match="Progress on a lane"):
        lane.flow()
    lane.right.send(Progress(held=0, stage="", transfer=TRANSFER))
    lane.left.receive(output_of(lane.right))
    with pytest.raises(UnexpectedMessage, match="Progress on a lane"):
        pair.sender.receive_on_lane(next(iter(lane.left.events())))


def test_a_connection_that_never_joined_lands_nothing() -> None:
    pair = receiving()
    left, right = handshaken()
    right.landing = None
    left.send_data(0, pair.content(0))
    with pytest.raises(UnexpectedMessage, match="DATA before"):
        right.receive(output_of(left))
    stranger, _ = handshaken()
    assert pair.there._reception._land(stranger, Data(chunk=0), pair.layout.chunk(0)[1]) is None


def test_a_refusal_is_raised_and_another_transfers_answer_is_none() -> None:
    pair = receiving()
    lane = Lane(pair)
    abort = MessageArrived(Abort(code="protocol", message="no more lanes", transfer=TRANSFER), b"")
    with pytest.raises(TransferError, match="no more lanes"):
        pair.sender.receive_on_lane(abort)
    lane.left.send(Ping(reply=True))
    assert lane.flow() == ["Ping", "Ping"]
    with pytest.raises(UnexpectedMessage, match="Joined"):
        pair.sender.receive_on_lane(MessageArrived(Joined(lane=1, transfer=OTHER), b""))


def test_lanes_have_no_say_once_nothing_is_to_be_sent() -> None:
    pair = Pair()
    assert not pair.sender.next_chunks(8), "nothing is wanted yet"
    pair.accept()
    pair.send_all()
    assert not pair.sender.next_chunks(8)
    connection: Connection = pair.right
    pair.there.parted(connection)
    pair.finish_from_anywhere()
