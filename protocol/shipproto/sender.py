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
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import xxhash

from shipproto.aborts import read_abort, send_abort
from shipproto.agreement import Agreement
from shipproto.capabilities import PARTIAL
from shipproto.connection import ChunksRefused, Connection, Event, MessageArrived
from shipproto.digests import LeafDigests, version_digest
from shipproto.errors import AbortCode, LocalError, MalformedMessage, ProtocolError, TransferError, UnexpectedMessage
from shipproto.frame import Buffer
from shipproto.headers import decode_header, encode_header
from shipproto.layout import Layout
from shipproto.lent import Lent
from shipproto.limits import DIGEST_SIZE, MAX_HEADER, MAX_VERIFY_ROUNDS
from shipproto.messages import (
    Abort,
    Commit,
    Committed,
    Finish,
    Held,
    Join,
    Joined,
    Lend,
    Message,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
    Want,
)
from shipproto.outgoing import Outgoing
from shipproto.rangeset import RangeSet
from shipproto.sources import sources
from shipproto.states import SENDER_ENDED, SenderState
from shipproto.steps import DigestChunk, SendChunk
from shipproto.structure import Structure, rows_in

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
    # The receiver's structure, or HELD, may be overtaken by what follows it, where a frame of it was damaged.
    **{
        (state, StructureIs): ("_on_late_structure", None)
        for state in SenderState
        if state not in SENDER_ENDED and state is not SenderState.OFFERED
    },
    **{(state, Held): ("_on_held", None) for state in SenderState if state not in SENDER_ENDED},
    **{(state, Abort): ("_on_abort", SenderState.ABORTED) for state in SenderState if state not in SENDER_ENDED},
}
"""What is allowed when: the handler, and the state that follows (None: the handler decides)."""


class Sender:
    """One version on its way to one receiver.

    structure    what is offered
    label        the version's label, or None: then ``make_label`` is given the version digest and returns one
    transfer     TRANSFER_ID_SIZE bytes that name the transfer, across connections and after its end
    bases        digests of the versions that deltas can be made from, at most MAX_BASES; may be replaced between
                 connections
    incremental  the receiver is to tell what it holds where none of those is its current version
    partial      what is not offered of the receiver's model keeps the values of its current version

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
        bases: Sequence[bytes] = (),
        incremental: bool = False,
        partial: bool = False,
    ) -> None:
        self.transfer = transfer
        self.model = model
        self.label = label
        self.offered = structure
        self.bases = tuple(bases)
        self.incremental = incremental
        self.partial = partial
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
        """Connections that the receiver takes chunks on."""
        self.agreed = Agreement()
        """What coded runs may be."""
        self._make_label = make_label
        self._metadata = dict(metadata or {})
        self._accepted = False
        self._connection: Connection | None = None
        self._early_want: tuple[Want, bytes] | None = None
        self._held_digests = b""
        self._structure_sent = False
        self._rounds = 0
        self._adopt(structure)
        self._latest_offer = self._offer()
        _check_own(self._latest_offer)

    def _adopt(self, structure: Structure) -> None:
        """Send in this structure: the offered one, or the receiver's."""
        # First of all, so that a receiver cannot have a layout made of more than was offered.
        self.source_rows, self.equal_rows = sources(self.offered, structure)
        self.layout = Layout.of(structure)
        self.digests = LeafDigests(self.layout)
        self._outgoing = Outgoing(self.layout)

    # --- what the shell does -------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the transfer is over, one way or the other."""
        return self.state in SENDER_ENDED

    @property
    def sending(self) -> bool:
        """Whether chunks are waiting to be handed out."""
        return self.state in (SenderState.SENDING, SenderState.FINISHING) and bool(self._outgoing.wanted)

    @property
    def waiting(self) -> int:
        """How many chunks are waiting to be handed out."""
        return len(self._outgoing.wanted)

    @property
    def skipped(self) -> list[str]:
        """Offered tensors that the receiver's structure has no place for and that were not sent."""
        offered = self.offered.names
        missing = rows_in(offered, self.layout.structure) < 0
        return [offered[row] for row in np.flatnonzero(missing).tolist()]

    @property
    def chunks_resent(self) -> Counter[int]:
        """How often each chunk went again because it had arrived damaged, or could not be decoded."""
        return self._outgoing.refused

    @property
    def base(self) -> bytes:
        """The version that coded runs build on: one of ``bases``, or another, of which this side knows no more than
        ``held_digest`` says; empty where there is none."""
        return self.agreed.base

    @property
    def codecs(self) -> Mapping[int, int]:
        """What the receiver decodes on this connection, and how fast, in MB/s of content; 0 where it does not know."""
        return self.agreed.codecs

    @property
    def live(self) -> bytes:
        """Version digest of what is live since the commit: after a partial offer of more than was sent."""
        return b"" if self.committed is None else self.committed.live or self.committed.digest

    def held_digest(self, chunk: int) -> bytes | None:
        """The digest (``LeafDigests.chunk_digest``) of this chunk of ``base``, where the receiver has told it."""
        return self._held_digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE] or None

    def raw_only(self, chunk: int) -> bool:
        """Whether the chunk must travel as DATA. Of a run that ``next_chunks`` hands out all must, or none."""
        return not self.agreed.codecs or chunk in self._outgoing.refused

    def connected(self, connection: Connection) -> None:
        """A connection to the receiver is established: offer, or offer again.

        Raises TransferError where the offer is partial and the receiver takes none.
        """
        if self.ended:
            raise LocalError("the transfer is over")
        if self.partial and PARTIAL not in connection.peer.capabilities:
            raise TransferError(
                AbortCode.REFUSED,
                f"{connection.peer.agent or 'the receiver'} is of a release that takes only whole versions: update it, "
                "or push all tensors of the model",
            )
        self._connection = connection
        self._early_want = None
        self._structure_sent = False
        self._outgoing.restart()
        self.lanes = 1
        self.agreed = Agreement()
        self._held_digests = b""
        self.state = SenderState.OFFERED
        self._latest_offer = self._offer()
        connection.send(self._latest_offer)

    def _offer(self) -> Offer:
        return Offer(
            bases=self.bases,
            incremental=self.incremental,
            label=self.label or "",
            metadata=self._metadata,
            model=self.model,
            nbytes=self.offered.total_bytes,
            partial=self.partial,
            resumed=self._accepted,
            structure=self.offered.digest,
            tensors=len(self.offered),
            transfer=self.transfer,
        )

    def next_step(self) -> SendChunk | DigestChunk | None:
        """What to do now; None means wait for the receiver. Queues FINISH once everything has been sent."""
        if self.state not in (SenderState.SENDING, SenderState.FINISHING):
            return None
        if self._outgoing.wanted:
            return SendChunk(self.next_chunks(1)[0])
        if self.state is SenderState.SENDING and not self._outgoing.out:
            if not self.digests.complete:
                return DigestChunk(self._outgoing.next_undigested(self.digests))
            self._finish()
        return None

    def next_chunks(self, most: int) -> range:
        """Chunks to send, on the transfer's own connection or a lane, that follow each other, and are all of large
        tensors or all packed, all ``raw_only`` or none. None of them: then nothing is to be sent at the moment."""
        if self.state not in (SenderState.SENDING, SenderState.FINISHING):
            return range(0)
        return self._outgoing.hand_out(most)

    def send_chunk(self, chunk: int, content: memoryview) -> None:
        """Digest a chunk and queue its frame. Raises TransferError if a tensor's bytes have changed."""
        self.digest_chunk(chunk, content)
        self._require().send_data(chunk, content)
        self.sent(range(chunk, chunk + 1))

    def send_run(self, chunks: range, codec: int, payload: Buffer) -> None:
        """Queue a coded run of chunks that were handed out, are not ``raw_only``, and have been digested.

        On a lane that is ``Connection.send_coded``, and then ``sent``.
        """
        if codec not in self.agreed.codecs:
            raise LocalError(f"the receiver did not ask for codec {codec}")
        self._require().send_coded(chunks, codec, payload)
        self.sent(chunks)

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
        self._outgoing.sent(chunks)

    def lend(self, lent: Lent, files: int) -> None:
        """Have the receiver read what is wanted of these chunks from so many files, whose descriptors the shell sends
        beside the message's first byte: they are not handed out any more, and have to be digested all the same."""
        if self.state is not SenderState.SENDING:
            raise LocalError(f"lend in state {self.state.name}")
        for chunks in lent.runs(self.layout.chunks):
            self._outgoing.wanted.discard(chunks.start, chunks.stop)
        self._require().send(Lend(files=files, transfer=self.transfer), lent.encode())

    def put_back(self, chunks: range) -> None:
        """Chunks that were handed out are not sent after all: they are handed out again."""
        self._outgoing.put_back(chunks)

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
            self._outgoing.come_back(event.chunks)
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
            self._outgoing.come_back(event.chunks)
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
            if self.partial:
                raise UnexpectedMessage("another structure for a partial offer")
            self._adopt(Structure.decode(body))
        if self._early_want is not None:
            self._on_want(*self._early_want)

    def _on_held(self, _held: Held, body: Buffer) -> None:
        if not self.incremental:
            raise UnexpectedMessage("HELD that was not offered to be heard")
        self._held_digests = bytes(body)
        if self.state is not SenderState.OFFERED:
            # Before WANT the layout is not known for certain.
            self._check_held()

    def _check_held(self) -> None:
        if len(self._held_digests) not in (0, self.layout.chunks * DIGEST_SIZE):
            raise MalformedMessage(f"HELD of {len(self._held_digests)} bytes for {self.layout.chunks} chunks")

    def _on_want(self, want: Want, body: Buffer) -> None:
        again = self.state is SenderState.FINISHING
        if again:
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
        # What is asked for again travels as it is, whatever WANT says.
        agreed = Agreement() if again else Agreement.on(want, self._latest_offer)
        wanted = RangeSet.decode(body, self.layout.chunks)
        self._check_held()
        self._early_want = None
        self._accepted = True
        self.lanes = want.lanes
        self.agreed = agreed
        self._outgoing.wanted = wanted
        self.held = self.layout.chunks - len(wanted)
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
        if self.partial and not committed.live:
            raise TransferError(
                AbortCode.INTEGRITY, "the receiver has committed a part of a version as if it were a whole one"
            )
        self.committed = committed

    def _on_abort(self, abort: Abort, body: Buffer) -> None:
        self.error = read_abort(abort, body)

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


def _check_own(message: Message) -> None:
    try:
        header = encode_header(message)
        decode_header(message.TYPE, header)
    except (ProtocolError, UnicodeEncodeError) as error:
        raise LocalError(f"not a valid message: {error}") from error
    if len(header) > MAX_HEADER:
        raise LocalError(f"{type(message).__name__} needs {len(header)} bytes; at most {MAX_HEADER} fit")
