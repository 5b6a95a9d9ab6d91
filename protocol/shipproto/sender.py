"""The sending side of a transfer, as a machine: which chunk goes next, and what an answer means.

                    WANT                 all sent               STAGED           commit()             COMMITTED
    OFFERED ------------------> SENDING ----------> FINISHING ----------> STAGED ---------> COMMITTING ------> COMMITTED
       ^  \\______________________ ^____________________/ WANT: some tensors have to go again
       |   STAGED, COMMITTED: the receiver had already come that far
    connected(): the same, from every state, on every new connection

    ABORT, from every state -> ABORTED

The transfer outlives its connections: each new one starts with an OFFER, and the receiver answers from
where it stands. The machine does no I/O and reads no tensor: the shell asks for the ``next_step``, reads
the chunk and hands it to ``send_chunk``.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shipproto.connection import ChunksRefused, Connection, Event, MessageArrived
from shipproto.digests import LeafDigests, version_digest
from shipproto.errors import AbortCode, LocalError, MalformedMessage, ProtocolError, TransferError, UnexpectedMessage
from shipproto.frame import Buffer
from shipproto.headers import decode_header, encode_header
from shipproto.layout import Layout
from shipproto.limits import MAX_CHUNK_ATTEMPTS, MAX_HEADER, MAX_NAME, MAX_TEXT, MAX_VERIFY_ROUNDS
from shipproto.messages import (
    Abort,
    Commit,
    Committed,
    Finish,
    Join,
    Joined,
    Message,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
    Want,
)
from shipproto.names import harmless
from shipproto.rangeset import RangeSet
from shipproto.states import SENDER_ENDED, SenderState
from shipproto.structure import Structure, alike, rows_in


class SendChunk(NamedTuple):
    """Read this chunk and pass it to ``send_chunk``."""

    chunk: int


class DigestChunk(NamedTuple):
    """The receiver holds this chunk already: read it and pass it to ``digest_chunk`` only."""

    chunk: int


_Handler = str
_TRANSITIONS: Final[Mapping[tuple[SenderState, type[Message]], tuple[_Handler, SenderState | None]]] = {
    (SenderState.OFFERED, StructureWanted): ("_on_structure_wanted", None),
    (SenderState.OFFERED, StructureIs): ("_on_structure", None),
    (SenderState.OFFERED, Want): ("_on_want", None),
    (SenderState.OFFERED, Staged): ("_on_staged", SenderState.STAGED),
    (SenderState.OFFERED, Committed): ("_on_committed", SenderState.COMMITTED),
    (SenderState.OFFERED, Progress): ("_on_progress", None),
    (SenderState.SENDING, Progress): ("_on_progress", None),
    (SenderState.FINISHING, Progress): ("_on_progress", None),
    (SenderState.FINISHING, Want): ("_on_want", None),
    (SenderState.FINISHING, Staged): ("_on_staged", SenderState.STAGED),
    (SenderState.FINISHING, Committed): ("_on_committed", SenderState.COMMITTED),
    (SenderState.STAGED, Progress): ("_on_progress", None),
    (SenderState.COMMITTING, Progress): ("_on_progress", None),
    (SenderState.COMMITTING, Committed): ("_on_committed", SenderState.COMMITTED),
    # The receiver's structure may be overtaken by what follows it, where a frame of it was damaged.
    **{
        (state, StructureIs): ("_on_late_structure", None)
        for state in SenderState
        if state not in SENDER_ENDED and state is not SenderState.OFFERED
    },
    **{(state, Abort): ("_on_abort", SenderState.ABORTED) for state in SenderState if state not in SENDER_ENDED},
}
"""What is allowed when: the handler, and the state that follows (None: the handler decides)."""


class Sender:
    """One version on its way to one receiver.

    structure    what is offered
    label        the version's label, or None: then ``make_label`` is given the version digest and returns one
    transfer     TRANSFER_ID_SIZE bytes that name the transfer, across connections and after its end

    Raises LocalError where what it is to say would not be a valid message.
    """

    def __init__(
        self,
        *,
        transfer: bytes,
        model: str,
        structure: Structure,
        label: str | None,
        make_label: Callable[[bytes], str],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.transfer = transfer
        self.model = model
        self.label = label
        self.offered = structure
        self.state = SenderState.OFFERED
        self.committed: Committed | None = None
        self.staged: Staged | None = None
        self.error: TransferError | None = None
        self.digest = b""
        """The version's digest, once everything has been read."""
        self.held = 0
        """Chunks that the receiver holds, as it last said."""
        self.stage = ""
        self.lanes = 1
        """Connections that the receiver takes DATA on."""
        self.chunks_resent = Counter[int]()
        """How often each chunk went again because it had arrived damaged."""
        self._make_label = make_label
        self._metadata = dict(metadata or {})
        self._accepted = False
        self._connection: Connection | None = None
        self._early_want: tuple[Want, bytes] | None = None
        self._pending = RangeSet()
        # Chunks that were handed out to be read, digested and sent.
        self._out: set[int] = set()
        self._structure_sent = False
        self._rounds = 0
        self._adopt(structure)
        _check_own(self._offer())

    def _adopt(self, structure: Structure) -> None:
        """Send in this structure: the offered one, or the receiver's."""
        # First of all, so that a receiver cannot have a layout made of more than was offered.
        self.source_rows, self.equal_rows = sources(self.offered, structure)
        self.layout = Layout.of(structure)
        self.digests = LeafDigests(self.layout)
        self._unknown = iter(range(self.layout.chunks))

    # --- what the shell does -------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the transfer is over, one way or the other."""
        return self.state in SENDER_ENDED

    @property
    def sending(self) -> bool:
        """Whether chunks are waiting to be handed out."""
        return self.state in (SenderState.SENDING, SenderState.FINISHING) and bool(self._pending)

    @property
    def skipped(self) -> list[str]:
        """Offered tensors that the receiver's structure has no place for and that were not sent."""
        offered = self.offered.names
        missing = rows_in(offered, self.layout.structure) < 0
        return [offered[row] for row in np.flatnonzero(missing).tolist()]

    def connected(self, connection: Connection) -> None:
        """A connection to the receiver is established: offer, or offer again."""
        if self.ended:
            raise LocalError("the transfer is over")
        self._connection = connection
        self._early_want = None
        self._structure_sent = False
        self._pending = RangeSet()
        self._out.clear()
        self.lanes = 1
        self.state = SenderState.OFFERED
        connection.send(self._offer())

    def _offer(self) -> Offer:
        return Offer(
            label=self.label or "",
            metadata=self._metadata,
            model=self.model,
            nbytes=self.offered.total_bytes,
            resumed=self._accepted,
            structure=self.offered.digest,
            tensors=len(self.offered),
            transfer=self.transfer,
        )

    def next_step(self) -> SendChunk | DigestChunk | None:
        """What to do now; None means wait for the receiver. Queues FINISH once everything has been sent."""
        if self.state not in (SenderState.SENDING, SenderState.FINISHING):
            return None
        if self._pending:
            return SendChunk(self.next_chunks(1)[0])
        if self.state is SenderState.SENDING and not self._out:
            if not self.digests.complete:
                return DigestChunk(self._next_unknown())
            self._finish()
        return None

    def next_chunks(self, most: int) -> range:
        """Chunks to send, on the transfer's own connection or a lane, that follow each other and are all of large
        tensors or all packed. None of them: then nothing is to be sent at the moment."""
        if self.state not in (SenderState.SENDING, SenderState.FINISHING):
            return range(0)
        chunks = self._pending.pop_run(most, self.layout.large_chunks)
        self._out.update(chunks)
        return chunks

    def _next_unknown(self) -> int:
        for chunk in self._unknown:
            if not self.digests.knows(chunk):
                return chunk
        # A step was asked for before the one before it was done.
        self._unknown = iter(range(self.layout.chunks))
        return self._next_unknown()

    def send_chunk(self, chunk: int, content: memoryview) -> None:
        """Digest a chunk and queue its frame. Raises TransferError if a tensor's bytes have changed."""
        self.digest_chunk(chunk, content)
        self._require().send_data(chunk, content)
        self.sent(range(chunk, chunk + 1))

    def digest_chunk(self, chunk: int, content: memoryview) -> None:
        """Digest a chunk, whether it travels or not. On any thread, each for the chunks that were handed out to it.

        Raises TransferError if a tensor's bytes have changed.
        """
        self._check_unchanged(self.digests.record(chunk, content))

    def digested(self, chunks: range, digests: list[bytes]) -> None:
        """Take the ``leaf_digest`` of each of these chunks, all of large tensors. On any thread, as ``digest_chunk``.

        Raises TransferError if a tensor's bytes have changed.
        """
        self._check_unchanged(self.digests.note(chunks.start, chunks.stop, b"".join(digests)))

    def sent(self, chunks: range) -> None:
        """Chunks that were handed out have been digested, and are queued on some connection. On any thread."""
        self._out.difference_update(chunks)

    def _check_unchanged(self, changed: int | None) -> None:
        if changed is not None:
            name = self.layout.structure.names[changed]
            raise TransferError(
                AbortCode.TENSOR_CHANGED, f"tensor {name!r} changed while it was being sent", tensor=name
            )

    def commit(self) -> None:
        """The version is staged: have it swapped in."""
        if self.state is not SenderState.STAGED:
            raise LocalError(f"commit in state {self.state.name}")
        self.state = SenderState.COMMITTING
        self._require().send(Commit(transfer=self.transfer))

    def revive(self) -> bool:
        """Whether an aborted transfer may be offered again: the receiver had taken it, and was restarted.

        Until its serving processes have come back it does not know the model.
        """
        passing = (AbortCode.SHUTTING_DOWN, AbortCode.UNKNOWN_MODEL)
        if self.state is SenderState.ABORTED and self._accepted and self.error and self.error.code in passing:
            self.state = SenderState.OFFERED
            self.error = None
            return True
        return False

    def abort(self, error: TransferError) -> None:
        """End the transfer from this side and tell the receiver, if it can be told."""
        if self.ended:
            return
        self.state = SenderState.ABORTED
        self.error = error
        if self._connection is not None:
            send_abort(self._connection, self.transfer, error)

    def receive(self, event: Event) -> None:
        """Take an event of the current connection.

        Raises UnexpectedMessage or MalformedMessage (the connection is broken) or TransferError (the
        transfer is).
        """
        if self.ended:
            return
        if isinstance(event, ChunksRefused):
            self._refused(event.chunks)
        elif isinstance(event, MessageArrived):
            message = event.message
            if getattr(message, "transfer", b"") not in (self.transfer, b""):
                return
            handler, state = _TRANSITIONS.get((self.state, type(message)), ("", None))
            if not handler:
                raise UnexpectedMessage(f"{type(message).__name__} in state {self.state.name}")
            getattr(self, handler)(message, event.body)
            self.state = state or self.state

    def join(self, lane: Connection, number: int) -> None:
        """Ask the receiver to take chunks on this connection as well."""
        lane.send(Join(lane=number, transfer=self.transfer))

    def receive_on_lane(self, event: Event) -> bool:
        """Take an event of a lane. Whether it says that the receiver takes chunks there.

        Raises TransferError where it does not, or the transfer is broken; UnexpectedMessage where the lane is.
        """
        if isinstance(event, ChunksRefused):
            self._refused(event.chunks)
        elif isinstance(event, MessageArrived):
            if isinstance(event.message, Joined) and event.message.transfer == self.transfer:
                return True
            if isinstance(event.message, Abort):
                raise read_abort(event.message, event.body)
            raise UnexpectedMessage(f"{type(event.message).__name__} on a lane")
        return False

    # --- what the receiver says ----------------------------------------------------------------------------

    def _on_structure_wanted(self, _message: StructureWanted, _body: Buffer) -> None:
        if self._structure_sent:
            raise UnexpectedMessage("the structure was asked for twice")
        self._structure_sent = True
        self._require().send(StructureIs(transfer=self.transfer), self.offered.encoded)

    def _on_late_structure(self, _message: StructureIs, body: Buffer) -> None:
        if xxhash.xxh3_128_digest(body) != self.layout.structure.digest:
            raise UnexpectedMessage(f"another structure in state {self.state.name}")

    def _on_structure(self, _message: StructureIs, body: Buffer) -> None:
        if xxhash.xxh3_128_digest(body) != self.layout.structure.digest:
            self._adopt(Structure.decode(body))
        if self._early_want is not None:
            self._on_want(*self._early_want)

    def _on_want(self, want: Want, body: Buffer) -> None:
        if self.state is SenderState.FINISHING:
            self._rounds += 1
            if want.structure != self.layout.structure.digest:
                raise MalformedMessage("WANT names another structure than before")
            if self._rounds >= MAX_VERIFY_ROUNDS:
                raise TransferError(AbortCode.INTEGRITY, f"the receiver found other digests {self._rounds} times")
        if want.structure != self.layout.structure.digest:
            if want.structure == self.offered.digest:
                self._adopt(self.offered)
            else:
                # The structure that rules is still under way: a piece of it was damaged and comes again.
                self._early_want = (want, bytes(body))
                return
        self._early_want = None
        self._accepted = True
        self.lanes = want.lanes
        self._pending = RangeSet.decode(body, self.layout.chunks)
        self.held = self.layout.chunks - len(self._pending)
        self.state = SenderState.SENDING

    def _on_progress(self, progress: Progress, _body: Buffer) -> None:
        self.held = max(self.held, min(progress.held, self.layout.chunks))
        self.stage = progress.stage

    def _on_staged(self, staged: Staged, _body: Buffer) -> None:
        self.staged = staged

    def _on_committed(self, committed: Committed, _body: Buffer) -> None:
        if self.digest and committed.digest != self.digest:
            raise TransferError(
                AbortCode.INTEGRITY,
                f"the receiver has committed digest {committed.digest.hex()} where {self.digest.hex()} was sent",
            )
        self.committed = committed

    def _on_abort(self, abort: Abort, body: Buffer) -> None:
        self.error = read_abort(abort, body)

    def _refused(self, chunks: tuple[int, ...]) -> None:
        for chunk in chunks:
            self.chunks_resent[chunk] += 1
            self._pending.add(chunk)
            if self.chunks_resent[chunk] >= MAX_CHUNK_ATTEMPTS:
                names = self.layout.chunk_names(chunk)
                raise TransferError(
                    AbortCode.INTEGRITY,
                    f"chunk {chunk} ({_listing(names)}) arrived damaged {MAX_CHUNK_ATTEMPTS} times",
                    tensor=names[0],
                )

    def _finish(self) -> None:
        tensor_digests = self.digests.tensor_digests()
        digest = version_digest(self.layout, tensor_digests)
        if self.label is None:
            self.label = self._make_label(digest)
        self.state = SenderState.FINISHING
        self.digest = digest
        finish = Finish(digest=digest, label=self.label, transfer=self.transfer)
        _check_own(finish)
        self._require().send(finish, tensor_digests.tobytes())

    def _require(self) -> Connection:
        if self._connection is None:
            raise LocalError("there is no connection")
        return self._connection


def sources(offered: Structure, wanted: Structure) -> tuple[npt.NDArray[np.int64], list[tuple[int, int]]]:
    """For each wanted row the offered row that has its bytes, and pairs of offered rows that must be equal.

    The wanted structure may lack offered tensors (non-persistent buffers) and may tie what was offered
    apart; it can contain nothing that was not offered. Raises MalformedMessage otherwise.
    """
    if wanted is offered:
        return np.arange(len(offered), dtype=np.int64), []
    rows = rows_in(wanted.names, offered)
    there = np.flatnonzero(rows >= 0)
    same = alike(wanted, there, offered, rows[there])
    if not bool(same.all()):
        name = wanted.names[int(there[np.argmin(same)])]
        raise MalformedMessage(f"the receiver wants tensor {name!r} with another dtype or shape than was offered")
    # Of each group of the wanted structure: the bytes that the first offered tensor of the group has.
    groups, roots = wanted.primary[there], offered.primary[rows[there]]
    firsts, first = np.unique(groups, return_index=True)
    chosen = np.full(len(wanted), -1, dtype=np.int64)
    chosen[firsts] = roots[first]
    differs = np.flatnonzero(chosen[groups] != roots)
    equal = list(zip(chosen[groups[differs]].tolist(), roots[differs].tolist(), strict=True))
    absent = np.flatnonzero(rows < 0)
    rows[absent] = chosen[wanted.primary[absent]]
    if not bool((rows >= 0).all()):
        name = wanted.names[int(np.argmin(rows))]
        raise MalformedMessage(f"the receiver wants tensor {name!r}, which was not offered")
    return rows, equal


def _check_own(message: Message) -> None:
    try:
        header = encode_header(message)
        decode_header(message.TYPE, header)
    except (ProtocolError, UnicodeEncodeError) as error:
        raise LocalError(f"not a valid message: {error}") from error
    if len(header) > MAX_HEADER:
        raise LocalError(f"{type(message).__name__} needs {len(header)} bytes; at most {MAX_HEADER} fit")


def send_abort(connection: Connection, transfer: bytes, error: TransferError) -> None:
    """Queue the ABORT that says what ``error`` says. A list of details that is too long loses its end."""
    details = [harmless(detail) for detail in error.details]
    body = msgspec.msgpack.encode(details) if details else b""
    while len(body) > Abort.MAX_BODY:
        details = [*details[: (len(details) - 1) // 2], "and more"]
        body = msgspec.msgpack.encode(details)
    abort = Abort(
        code=error.code,
        message=harmless(str(error), MAX_TEXT),
        tensor=harmless(error.tensor, MAX_NAME),
        transfer=transfer,
    )
    connection.send(abort, body)


def read_abort(abort: Abort, body: Buffer) -> TransferError:
    """The error that a peer's ABORT stands for. An unknown code, from a later release, reads as internal."""
    try:
        code = AbortCode(abort.code)
    except ValueError:
        code = AbortCode.INTERNAL
    try:
        details = msgspec.msgpack.decode(body, type=list[str]) if len(body) else []
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"Abort: {error}") from error
    return TransferError(
        code,
        harmless(abort.message),
        tensor=harmless(abort.tensor),
        details=tuple(harmless(detail) for detail in details),
    )


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
