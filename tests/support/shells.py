"""Small shells around the two state machines, without the I/O, the clocks and the threads.

Sending       what a client does with a Sender
Receiving     what a daemon does with its Receivers
Installed     a version that it has committed
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from shipproto.agreement import Ability
from shipproto.connection import Connection, Event, MessageArrived
from shipproto.digests import LeafDigests, digest_image
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.messages import SAME, Committed, Offer
from shipproto.outcomes import CommitRequested, ReadyToVerify, ReceiverEvent, RunToDecode, StructureArrived
from shipproto.receiver import Receiver
from shipproto.sender import Sender
from shipproto.states import ReceiverState, SenderState
from shipproto.steps import DigestChunk, SendChunk
from shipproto.structure import Structure
from tests.support.coding import DIFF, PLAIN, Undecodable, ability, decode_into, encode
from tests.support.models import make_image, read_image


class Sending:
    """What a client does with a Sender."""

    def __init__(
        self,
        structure: Structure,
        data: Mapping[str, bytes],
        *,
        transfer: bytes = b"T" * 16,
        model: str = "m",
        label: str | None = "v1",
        bases: Mapping[bytes, Mapping[str, bytes]] | None = None,
        incremental: bool = False,
        partial: bool = False,
        longest: int = 3,
    ) -> None:
        self.data = data
        self.longest = longest
        self.bases = bases or {}
        self.runs_coded = 0
        self.sender = Sender(
            transfer=transfer,
            model=model,
            structure=structure,
            label=label,
            make_label=lambda digest: digest.hex()[:8],
            bases=tuple(self.bases),
            incremental=incremental,
            partial=partial,
        )
        self._image: tuple[Layout, bytearray] | None = None

    def image(self) -> memoryview:
        """The image in the layout that rules now."""
        layout = self.sender.layout
        if self._image is None or self._image[0] is not layout:
            offered = self.sender.offered.names
            for left, right in self.sender.equal_rows:
                if self.data[offered[left]] != self.data[offered[right]]:
                    raise TransferError(AbortCode.MISMATCH, f"{offered[left]!r} and {offered[right]!r} differ")
            self._image = layout, self._image_of(self.data)
        return memoryview(self._image[1])

    def _image_of(self, data: Mapping[str, bytes]) -> bytearray:
        layout, offered = self.sender.layout, self.sender.offered.names
        rows = self.sender.source_rows.tolist()
        return make_image(
            layout, {name: data[offered[row]] for name, row in zip(layout.structure.names, rows, strict=True)}
        )

    def on_event(self, event: Event) -> None:
        """Hand an event to the machine."""
        self._guard(lambda: self.sender.receive(event))

    def step(self) -> bool:
        """Do the next thing; False where there is nothing to do."""
        before = self.sender.state
        if before is SenderState.STAGED:
            self.sender.commit()
            return True
        step = None
        if self.sender.sending and self.sender.codecs:
            self._guard(self._send_chunks)
            return True

        def do() -> None:
            nonlocal step
            step = self.sender.next_step()
            if step is not None:
                start, size = self.sender.layout.chunk(step.chunk)
                content = self.image()[start : start + size]
                if isinstance(step, SendChunk):
                    self.sender.send_chunk(step.chunk, content)
                else:
                    assert isinstance(step, DigestChunk)
                    self.sender.digest_chunk(step.chunk, content)

        self._guard(do)
        return step is not None or self.sender.state is not before

    def _send_chunks(self) -> None:
        """Chunks that follow each other, as coded as can be."""
        for same, group in groupby(self.sender.next_chunks(self.longest), key=self._digest):
            numbers = list(group)
            self._send_run(range(numbers[0], numbers[-1] + 1), same=same)

    def _digest(self, chunk: int) -> bool:
        """Whether the receiver's base has the same chunk, as far as that is known."""
        sender = self.sender
        start, size = sender.layout.chunk(chunk)
        sender.digest_chunk(chunk, self.image()[start : start + size])
        if sender.raw_only(chunk) or not sender.base:
            return False
        if sender.base in self.bases:
            return bytes(self._base()[start : start + size]) == bytes(self.image()[start : start + size])
        return sender.digests.chunk_digest(chunk) == sender.held_digest(chunk)

    def _base(self) -> memoryview:
        return memoryview(self._image_of(self.bases[self.sender.base]))

    def _send_run(self, chunks: range, *, same: bool) -> None:
        sender = self.sender
        start, end = sender.layout.span(chunks)
        content = bytes(self.image()[start:end])
        if same and SAME in sender.codecs:
            codec, payload = SAME, b""
        elif DIFF in sender.codecs and sender.base in self.bases and not sender.raw_only(chunks.start):
            codec, payload = DIFF, encode(DIFF, content, bytes(self._base()[start:end]))
        elif PLAIN in sender.codecs and not sender.raw_only(chunks.start):
            codec, payload = PLAIN, content
        else:
            for chunk in chunks:
                at, size = sender.layout.chunk(chunk)
                sender.send_chunk(chunk, self.image()[at : at + size])
            return
        self.runs_coded += 1
        sender.send_run(chunks, codec, payload)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except TransferError as error:
            self.sender.abort(error)


@dataclass
class Installed:
    """A version that a Receiving side has committed."""

    label: str
    digest: bytes
    layout: Layout
    image: bytearray
    digests: LeafDigests
    content: dict[str, bytes]
    """The bytes of every tensor at the moment of the commit."""


@dataclass
class Receiving:
    """What a daemon does with its Receivers. Everything that takes time waits in ``work``."""

    resident: Structure | None = None
    """The model's structure; None takes whatever is offered."""
    transient: Structure | None = None
    """Tensors that may be offered and are left out."""
    current: Installed | None = None
    receivers: dict[bytes, Receiver] = field(default_factory=dict)
    connections: dict[Connection, Receiver] = field(default_factory=dict)
    work: deque[Callable[[], None]] = field(default_factory=deque)
    commits: int = 0
    tamper: Callable[[Receiver, memoryview], None] | None = None
    """Called with the image just before it is verified: memory that went bad."""
    codecs: Mapping[int, int] = field(default_factory=dict)
    """What it decodes, as tests.support.coding does, or says that it does."""
    spoil: Callable[[RunToDecode], bool] | None = None
    """Whether this run does not decode."""
    composed: dict[bytes, Installed] = field(default_factory=dict)
    """By transfer: what a part and the version before it make."""
    images: dict[bytes, tuple[Layout, memoryview]] = field(default_factory=dict)
    """By transfer, also after its end: a run may still be being decoded into it."""

    def on_event(self, connection: Connection, event: Event) -> None:
        """Take an event of a connection. Raises ProtocolError."""
        if isinstance(event, MessageArrived) and isinstance(event.message, Offer):
            self._offered(connection, event.message)
            return
        receiver = self.connections.get(connection)
        if receiver is not None:
            for outcome in receiver.receive(connection, event):
                self._on_outcome(receiver, outcome)

    def do_next(self) -> None:
        """The oldest piece of work."""
        self.work.popleft()()

    def gone(self, connection: Connection) -> None:
        """A connection has been lost."""
        receiver = self.connections.pop(connection, None)
        if receiver is not None:
            receiver.disconnected(connection)

    def _offered(self, connection: Connection, offer: Offer) -> None:
        receiver = self.receivers.get(offer.transfer)
        known = receiver is not None
        if receiver is None:
            receiver = self.receivers[offer.transfer] = Receiver(offer)
        self.connections[connection] = receiver
        receiver.connected(connection, offer)
        if known:
            return
        if offer.partial and self.current is None:
            receiver.abort(TransferError(AbortCode.REFUSED, "there is nothing to keep"))
        elif self.resident is not None and self.resident.digest == offer.structure:
            self.work.append(lambda: self._accept(receiver, Layout(self.resident or Structure.build(()))))
        else:
            receiver.want_structure()

    def _accept(self, receiver: Receiver, layout: Layout) -> None:
        if receiver.state is not ReceiverState.OFFERED:
            return
        current = self.current
        if current is not None and current.label == receiver.offer.label:
            held = memoryview(make_image(layout, {name: current.content[name] for name in layout.structure.names}))
            receiver.compare(digest_image(layout, held))
        else:
            image = memoryview(bytearray(layout.size))
            self.images[receiver.transfer] = layout, image
            receiver.accept(layout, image, ability=self._ability(layout))

    def _ability(self, layout: Layout) -> Ability | None:
        """The current version is a base where it is laid out alike."""
        current = self.current
        if not self.codecs:
            return None
        if current is None or current.layout.structure.digest != layout.structure.digest:
            return ability(codecs=self.codecs)
        return ability(current.digest, current.digests, self.codecs)

    def _decode(self, receiver: Receiver, run: RunToDecode) -> None:
        """Whatever has become of the transfer; its image is there until all of its runs are decoded."""
        current = self.current
        layout, image = self.images[receiver.transfer]
        try:
            if self.spoil is not None and self.spoil(run):
                start, end = layout.span(run.chunks)
                image[start:end] = bytes([0x5A]) * (end - start)
                raise Undecodable("spoilt")
            decode_into(run, layout, image, memoryview(current.image) if current is not None else None)
        except Undecodable:
            receiver.undecodable(run)
        else:
            for outcome in receiver.decoded(run):
                self._on_outcome(receiver, outcome)

    def _on_outcome(self, receiver: Receiver, outcome: ReceiverEvent) -> None:
        if isinstance(outcome, RunToDecode):
            self.work.append(lambda: self._decode(receiver, outcome))
        elif isinstance(outcome, StructureArrived):
            self.work.append(lambda: self._settle(receiver, outcome.encoded))
        elif isinstance(outcome, ReadyToVerify):
            self.work.append(lambda: self._verify(receiver))
        elif isinstance(outcome, CommitRequested):
            self.work.append(lambda: self._commit(receiver))

    def _settle(self, receiver: Receiver, encoded: bytes) -> None:
        resident = self.resident
        try:
            offered = receiver.decode_structure(encoded)
        except TransferError as error:
            receiver.abort(error)
            return
        if resident is None:
            self._accept(receiver, Layout(offered))
            return
        allowed = self.transient.index if self.transient is not None else {}
        rows = {(spec.name, spec.dtype, spec.shape) for spec in offered.specs()}
        if receiver.offer.partial:
            odd = rows - {(spec.name, spec.dtype, spec.shape) for spec in resident.specs()}
            if odd or not rows:
                receiver.abort(TransferError(AbortCode.MISMATCH, "this is no part of the model"))
            else:
                self._accept(receiver, Layout(offered))
            return
        roots = {spec.name: spec.tied_to or spec.name for spec in resident.specs()}
        reached = {roots[spec.name] for spec in resident.specs() if (spec.name, spec.dtype, spec.shape) in rows}
        missing = [name for name, root in roots.items() if root not in reached]
        unexpected = [name for name in offered.names if name not in resident.index and name not in allowed]
        if missing or unexpected:
            details = (*(f"missing {name}" for name in missing), *(f"unexpected {name}" for name in unexpected))
            receiver.abort(TransferError(AbortCode.MISMATCH, "the model has other tensors", details=details))
        else:
            self._accept(receiver, Layout(resident))

    def _verify(self, receiver: Receiver) -> None:
        if receiver.state is not ReceiverState.VERIFYING:
            return
        intake = receiver._reception.books
        if self.tamper is not None and intake.image is not None:
            self.tamper(receiver, intake.image)
            intake.digests = digest_image(intake.layout, intake.image)
        try:
            differing = receiver.verify()
            current = self.current
            if intake.image is None:
                assert current is not None
                if differing:
                    raise TransferError(AbortCode.LABEL_CONFLICT, f"{current.label!r} is taken")
                receiver.verified(())
                live = current.digest if receiver.offer.partial else b""
                receiver.committed(
                    Committed(
                        already=True,
                        digest=receiver.digest,
                        label=current.label,
                        live=live,
                        transfer=receiver.transfer,
                    )
                )
            elif receiver.verified(differing):
                if receiver.offer.partial:
                    self._compose(receiver)
                self.work.append(lambda: self._stage(receiver))
        except TransferError as error:
            receiver.abort(error)

    def _stage(self, receiver: Receiver) -> None:
        if receiver.state is ReceiverState.STAGING:
            receiver.staged(1, 0.25)

    def _commit(self, receiver: Receiver) -> None:
        intake = receiver._reception.books
        layout, image = intake.layout, intake.image
        assert image is not None
        kept = image.obj
        assert isinstance(kept, bytearray)
        partial = receiver.offer.partial
        self.current = (
            self.composed.pop(receiver.transfer)
            if partial
            else Installed(receiver.label, receiver.digest, layout, kept, receiver.digests, read_image(layout, kept))
        )
        self.commits += 1
        receiver.committed(
            Committed(
                digest=receiver.digest,
                label=receiver.label,
                live=self.current.digest if partial else b"",
                swapped=1,
                transfer=receiver.transfer,
            )
        )

    def _compose(self, receiver: Receiver) -> None:
        """The current version, with what has been received in place of what it had. Raises TransferError."""
        current, resident = self.current, self.resident
        assert current is not None
        assert resident is not None
        layout, image = self.images[receiver.transfer]
        roots = {spec.name: spec.tied_to or spec.name for spec in resident.specs()}
        new: dict[str, bytes] = {}
        for name, received in read_image(layout, image).items():
            if new.setdefault(roots[name], received) != received:
                raise TransferError(AbortCode.MISMATCH, f"{name!r} is tied, and differs", tensor=name)
        content = {name: new.get(roots[name], kept) for name, kept in current.content.items()}
        whole = make_image(current.layout, content)
        digests = digest_image(current.layout, memoryview(whole))
        self.composed[receiver.transfer] = Installed(
            receiver.label, digests.version_digest(), current.layout, whole, digests, content
        )
