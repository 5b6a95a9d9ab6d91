"""A sender and a receiver on two connections, moved by hand: for tests that say what each of them does and when."""

from collections.abc import Callable

from shipproto.connection import Connection, Event, MessageArrived
from shipproto.layout import Layout
from shipproto.messages import Committed, Offer
from shipproto.receiver import Receiver
from shipproto.sender import Sender
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import SendChunk
from tests.support import naive
from tests.support.link import handshaken, output_of
from tests.support.models import SMALL, build, contents, make_image, rows_of
from tests.support.naive import Tensor

TRANSFER = b"0123456789abcdef"
OTHER = b"another transfer"
PADDED = (*SMALL, Tensor("position_ids", "int64", (1, 4)))
APART = tuple(Tensor(row.name, row.dtype, row.shape) for row in SMALL)


def make_sender(rows=SMALL, label: str | None = "v1", **options) -> Sender:
    return Sender(
        transfer=TRANSFER,
        model="m",
        structure=build(rows),
        label=label,
        make_label=lambda digest: "d-" + digest.hex()[:8],
        **options,
    )


def flow(
    left: Connection, right: Connection, arrives: Callable[[bytes], object], hear: Callable[[Event], object]
) -> list[str]:
    """Move what is queued on both connections frame by frame until nothing moves. Names of what arrived.

    arrives   takes the bytes of a frame to the right
    hear      is told what comes of a frame on the left
    """
    arrived = []
    while left.has_output or right.has_output:
        for frame in naive.frames(data := output_of(left)):
            arrived.append(frame.name)
            arrives(data[frame.start : frame.start + frame.size])
        for frame in naive.frames(data := output_of(right)):
            arrived.append(frame.name)
            left.receive(data[frame.start : frame.start + frame.size])
            for event in left.events():
                hear(event)
    return arrived


class Pair:
    """A sender and a receiver on two connections; the test says what each does, ``flow`` moves the bytes."""

    def __init__(self, rows=SMALL, *, label: str | None = "v1", resident=None) -> None:
        self.sender = make_sender(rows, label)
        self.data = contents(self.sender.offered)
        self.structure = build(resident if resident is not None else rows)
        self.layout = Layout(self.structure)
        self.image = bytearray(self.layout.size)
        self.receiver: Receiver | None = None
        self.outcomes: list = []
        self.connect()

    @property
    def there(self) -> Receiver:
        assert self.receiver is not None
        return self.receiver

    @property
    def states(self) -> tuple[SenderState, ReceiverState]:
        """Where both stand."""
        return self.sender.state, self.there.state

    def connect(self) -> None:
        """A first, or a new connection, on which the sender offers."""
        self.left, self.right = handshaken()
        self.sender.connected(self.left)
        self.flow()

    def flow(self) -> list[str]:
        """Everything queued arrives, and is answered, until nothing moves. Names of what arrived."""
        return flow(self.left, self.right, self._to_receiver, self.sender.receive)

    def _to_receiver(self, data: bytes) -> None:
        self.right.receive(data)
        for event in self.right.events():
            if isinstance(event, MessageArrived) and isinstance(event.message, Offer):
                if self.receiver is None:
                    self.receiver = Receiver(event.message)
                self.receiver.connected(self.right, event.message)
            else:
                self.outcomes += self.there.receive(self.right, event)

    def accept(self) -> None:
        self.there.accept(self.layout, memoryview(self.image))
        self.flow()

    def content(self, chunk: int) -> memoryview:
        layout = self.sender.layout
        rows = self.sender.source_rows.tolist()
        names = self.sender.offered.names
        data = {name: self.data[names[row]] for name, row in zip(layout.structure.names, rows, strict=True)}
        start, size = layout.chunk(chunk)
        return memoryview(make_image(layout, data))[start : start + size]

    def send_all(self) -> None:
        """Every step that the sender has."""
        while (step := self.sender.next_step()) is not None:
            if isinstance(step, SendChunk):
                self.sender.send_chunk(step.chunk, self.content(step.chunk))
            else:
                self.sender.digest_chunk(step.chunk, self.content(step.chunk))
        self.flow()

    def to(self, state: ReceiverState) -> "Pair":
        """Bring the receiver to a state, by the book."""
        order = list(ReceiverState)
        assert state not in (ReceiverState.STRUCTURE, ReceiverState.ABORTED)
        if order.index(state) >= order.index(ReceiverState.RECEIVING):
            self.accept()
        if order.index(state) >= order.index(ReceiverState.VERIFYING):
            self.send_all()
        if order.index(state) >= order.index(ReceiverState.STAGING):
            assert self.there.verified(self.there.verify())
        if order.index(state) >= order.index(ReceiverState.STAGED):
            self.there.staged(1, 0.5)
            self.flow()
        if order.index(state) >= order.index(ReceiverState.COMMITTING):
            self.sender.commit()
            self.flow()
        if order.index(state) >= order.index(ReceiverState.COMMITTED):
            self.finish()
        assert self.there.state is state
        return self

    def finish(self) -> None:
        there = self.there
        there.committed(Committed(digest=there.digest, label=there.label, swapped=1, transfer=TRANSFER))
        self.flow()

    def finish_from_anywhere(self) -> None:
        """By the book from wherever both stand; both must end committed with the right digest."""
        if self.there.state is ReceiverState.RECEIVING:
            self.send_all()
        if self.there.state is ReceiverState.VERIFYING:
            assert self.there.verified(self.there.verify())
        if self.there.state is ReceiverState.STAGING:
            self.there.staged(1, 0.5)
            self.flow()
        if self.there.state is ReceiverState.STAGED:
            self.sender.commit()
            self.flow()
        if self.there.state is ReceiverState.COMMITTING:
            self.finish()
        assert self.there.state is ReceiverState.COMMITTED
        assert self.sender.state is SenderState.COMMITTED
        assert self.sender.committed is not None
        rows = rows_of(self.structure)
        expected = naive.version_digest(rows, {name: self.data[name] for name in self.structure.names}, 512)
        assert self.sender.committed.digest == expected == self.there.digest == self.sender.digest
