"""One push, on one blocking thread: connect, offer, send, wait for the commit; and again where the line breaks."""

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from shipd.address import Address
from shipd.checkpoints.source import Source
from shipd.client.chunks import ChunkReader
from shipd.client.lanes import Outlets, Tuner, usable_cores
from shipd.client.profile import Profile
from shipd.client.receipt import Receipt
from shipd.client.sending import RUN, send_chunks
from shipd.errors import (
    ConnectError,
    Interrupted,
    OutcomeUnknown,
    PeerError,
    ShipError,
    Stalled,
    TensorChanged,
    TransferFailed,
)
from shipd.transfer.faults import as_transfer_error, peer_error, remote_error
from shipd.transfer.lane import ConnectionLost, Lane, Waker
from shipd.transfer.times import Times
from shipproto.connection import Event
from shipproto.errors import AbortCode, ProtocolError, TransferError
from shipproto.limits import MAX_LANES, TRANSFER_ID_SIZE
from shipproto.messages import Committed, Ping
from shipproto.sender import DigestChunk, SendChunk, Sender
from shipproto.states import SenderState

_CONNECT_SECONDS: Final = 10.0
_BACKOFF: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses between attempts to reconnect; the last one repeats."""
_PING_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.02
"""How often the lanes are looked after by a push that waits for the receiver."""
_LAST_LOOK_SECONDS: Final = 0.002
"""The same, where all that is left is under way on lanes."""
_SINGLE_AFTER: Final = 2
"""Connections that broke in a row after which a push does without further ones."""
_RUN_SECONDS: Final = 0.01
"""How long chunks are sent without a look at anything else."""
_MAX_BREAKS: Final = 5
"""Connections in a row that broke without a single chunk getting through: the path is broken, not unlucky."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a push stands; ``stage`` is connecting, sending, or what the daemon says it is doing."""

    stage: str
    bytes_done: int
    bytes_total: int


@dataclass(kw_only=True)
class PushOptions:
    """What can be chosen for a push. Times are seconds; None means no limit.

    ``on_progress`` is called on the push's own thread, at most some ten times a second.
    """

    model: str
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    token: bytes | None = None
    timeout: float | None = None
    stall: float = 30.0
    lanes: int | None = None
    """Connections to send on; None for as many as make it faster."""
    on_progress: Callable[[Progress], None] | None = None


class Push:
    """One push of one source to one daemon. ``run`` on any thread; ``cancel`` from any other."""

    def __init__(
        self,
        source: Source,
        address: Address | Path,
        options: PushOptions,
        *,
        lane: Lane | None = None,
        opened: float | None = None,
    ) -> None:
        """``opened`` is when the source began to be opened (time.monotonic): what the push is counted from."""
        self._began = time.monotonic() if opened is None else opened
        self.transfer = secrets.token_bytes(TRANSFER_ID_SIZE)
        self._source = source
        self._address = address
        self._options = options
        self._spare = lane
        self._connected_before = lane.open_seconds if lane is not None else 0.0
        self._sender = Sender(
            transfer=self.transfer,
            model=options.model,
            structure=source.structure,
            label=options.label,
            make_label=default_label,
            metadata=options.metadata,
        )
        self._lock = threading.Lock()
        """Held for every call of the sender, but to read and send a chunk, while there are lanes."""
        self._breaks = 0
        self._bytes_sent = 0
        self._frames_resent = 0
        self._times = Times()
        self._lanes = 1
        self._open_seconds = self._connect_seconds = self._agree_seconds = 0.0
        self._wire_wait = 0.0
        self._offered_at = self._held_at = self._committing_at = 0.0
        self._first_data: float | None = None
        self._all_held: float | None = None
        self._progress_at = 0.0
        self._commit_sent = False
        self._reached = False
        self._uncertain = False
        self._established = False
        self._pinged = 0.0
        # Last: it takes descriptors, which only run() gives back.
        self._waker = Waker()

    def cancel(self) -> None:
        """End the push, unless its commit is already under way. Any thread, also a signal handler."""
        if not self._commit_sent:
            self._waker.wake()

    def run(self) -> Receipt:
        """Push. Raises ShipError; the previous version is serving then, unless it is OutcomeUnknown."""
        deadline = float("inf") if self._options.timeout is None else time.monotonic() + self._options.timeout
        self._open_seconds = time.monotonic() - self._began
        try:
            committed = self._deliver(deadline)
        finally:
            self._waker.close()
        return self._receipt(committed, time.monotonic() - self._began)

    # --- connections ---------------------------------------------------------------------------------------

    def _deliver(self, deadline: float) -> Committed:
        """Over as many connections as it takes."""
        moved = time.monotonic()
        while True:
            held = self._sender.held
            try:
                return self._over_one_connection(deadline)
            except (ConnectError, Stalled) as error:
                if isinstance(error, ConnectError) and not isinstance(error, ConnectionLost) and not self._reached:
                    raise
                self._raise_if_over(error, deadline)
                if self._sender.held > held:
                    self._breaks, moved = 0, time.monotonic()
                # What breaks before it is established, behind a proxy whose daemon restarts, is as good as refused.
                self._breaks += isinstance(error, ConnectionLost) and (self._established or not self._reached)
                if (
                    isinstance(error, Stalled)
                    or self._breaks >= _MAX_BREAKS
                    or time.monotonic() - moved > self._options.stall
                ):
                    raise self._gave_up(error, self._breaks) from error
                self._pause(_BACKOFF[min(self._breaks, len(_BACKOFF) - 1)])
            except TransferError as error:
                if not self._sender.revive() or time.monotonic() - moved > self._options.stall:
                    raise self._failure(error) from error
                self._pause(_BACKOFF[-1])
            except ShipError as error:
                # The peer broke the protocol, or is another one now.
                raise self._outcome(error) from error

    def _over_one_connection(self, deadline: float) -> Committed:
        self._established = False
        lane = self._spare or Lane.open(
            self._address,
            token=self._options.token,
            timeout=min(_CONNECT_SECONDS, max(0.001, deadline - time.monotonic())),
            waker=self._interruptible,
        )
        self._spare = None
        self._established = True
        self._connect_seconds += lane.open_seconds
        lane.use(self._interruptible)
        self._reached = True
        # A commit that was asked for on an earlier connection may have happened, whatever is answered on this one.
        self._uncertain = self._commit_sent
        sent_before = lane.bytes_sent
        outlets = Outlets(
            self._sender,
            self._lock,
            open_lane=partial(self._open, lane.address),
            make_reader=lambda: ChunkReader(self._sender, self._source),
            stall=self._options.stall,
        )
        try:
            self._offered_at = self._held_at = time.monotonic()
            self._sender.connected(lane.connection)
            return self._converse(lane, outlets, deadline)
        except (TransferError, ShipError) as error:
            if not self._commit_sent and not isinstance(error, ConnectError):
                reason = error if isinstance(error, TransferError) else as_transfer_error(error)
                self._sender.abort(reason)
            raise
        except KeyboardInterrupt:
            self._sender.abort(TransferError(AbortCode.INTERRUPTED, "the sender was interrupted"))
            raise
        finally:
            missing = self._sender.held < self._sender.layout.chunks
            outlets.stop(discard=missing)
            lane.close(flush=True, discard=missing)
            self._bytes_sent += lane.bytes_sent - sent_before + outlets.bytes_sent
            self._frames_resent += lane.connection.frames_resent + outlets.frames_resent
            self._times.add(lane.times)
            self._times.add(outlets.times())
            self._wire_wait += outlets.times().wait
            self._lanes = max(self._lanes, 1 + outlets.lanes)

    def _open(self, where: Address | None, waker: Waker) -> Lane:
        """A lane, to the very daemon that the transfer's own connection leads to."""
        return Lane.open(where or self._address, token=self._options.token, timeout=_CONNECT_SECONDS, waker=waker)

    def _converse(self, lane: Lane, outlets: Outlets, deadline: float) -> Committed:
        sender = self._sender
        reader = ChunkReader(sender, self._source)
        layout = sender.layout
        reader.check_ties()
        tuner = self._tuner()
        while not sender.ended:
            if sender.layout is not layout:
                layout = sender.layout
                reader = ChunkReader(sender, self._source)
                reader.check_ties()
            outlets.check()
            if sender.sending:
                self._tune(tuner, lane, outlets)
            with self._lock:
                step = None if outlets.carry and sender.sending else sender.next_step()
            if isinstance(step, SendChunk):
                self._send_run(lane, outlets, reader, step.chunk, deadline)
            elif isinstance(step, DigestChunk):
                sender.digest_chunk(step.chunk, reader.read(step.chunk))
                self._keep_alive(lane)
                self._take(lane.pump())
            else:
                self._keep_alive(lane)
                if sender.state is SenderState.STAGED:
                    self._before_commit()
                    self._commit_sent = True
                    lane.use(self._interruptible)
                    outlets.stop()
                    self._committing_at = time.monotonic()
                    sender.commit()
                self._wait(lane, outlets, deadline)
            if time.monotonic() > deadline and not sender.ended:
                raise Stalled(f"the push took longer than its timeout of {self._options.timeout:.0f} s", peer=lane.peer)
            self._report(sender.stage if step is None else "sending")
        if sender.committed is None:
            assert sender.error is not None
            raise sender.error
        if sender.committed.digest != sender.digest:
            raise PeerError(f"{lane.peer} broke the protocol: it committed what was not sent", peer=lane.peer)
        return sender.committed

    def _send_run(self, lane: Lane, outlets: Outlets, reader: ChunkReader, first: int, deadline: float) -> None:
        """Send chunk ``first`` and those that follow it for a moment, with as little beside it as can be."""
        now = time.monotonic()
        until = now + _RUN_SECONDS
        if self._first_data is None:
            self._first_data = now
            self._agree_seconds = now - self._offered_at
        watch = outlets.check if outlets else None
        drain = partial(lane.drain, self._options.stall, until=deadline, watch=watch)
        chunks = range(first, first + 1)
        while chunks:
            waited = lane.times.wait
            events = send_chunks(self._sender, reader, lane, chunks, drain)
            self._wire_wait += lane.times.wait - waited
            self._take((*events, *lane.pump()))
            if time.monotonic() > until or outlets.carry:
                return
            with self._lock:
                chunks = self._sender.next_chunks(RUN)

    def _tuner(self) -> Tuner:
        """Local sockets and paths that break take one connection; what was asked for is not tried but done."""
        single = isinstance(self._address, Path) or self._breaks >= _SINGLE_AFTER
        asked = self._options.lanes
        return Tuner(
            limit=1 if single else MAX_LANES,
            cores=usable_cores(),
            lanes=1 if single else asked or 1,
            settled=single or asked is not None,
        )

    def _tune(self, tuner: Tuner, lane: Lane, outlets: Outlets) -> None:
        tuner.limit = min(tuner.limit, self._sender.lanes)
        sent = lane.bytes_sent + outlets.bytes_sent
        lanes = tuner.observe(time.monotonic(), sent, self._sender.layout.wire_bytes - sent)
        outlets.want(min(lanes, tuner.limit - tuner.apart), apart=tuner.apart)

    def _wait(self, lane: Lane, outlets: Outlets, deadline: float) -> None:
        """For what the receiver says next, and meanwhile for lanes that are still sending."""
        if not outlets:
            self._take(lane.exchange(self._wait_until(lane, deadline)))
            return
        last = self._sender.state is SenderState.SENDING and not self._sender.sending
        self._take(lane.pump(_LAST_LOOK_SECONDS if last else _LOOK_SECONDS))
        now = time.monotonic()
        if now > self._wait_until(lane, deadline):
            raise Stalled(f"{lane.peer} has not answered in time", peer=lane.peer)
        if self._sender.held < self._sender.layout.chunks and now - self._held_at > self._options.stall:
            # The daemon is alive, and what was sent does not arrive: over one of the lanes nothing comes through.
            raise ConnectionLost(f"{lane.peer} has received nothing for {self._options.stall:g} s", peer=lane.peer)

    def _take(self, events: Iterable[Event]) -> None:
        held = self._sender.held
        for event in events:
            try:
                with self._lock:
                    self._sender.receive(event)
            except ProtocolError as error:
                raise self._protocol_failure(error) from error
        if self._sender.held > held:
            self._held_at = time.monotonic()
        if self._all_held is None and self._first_data is not None and self._sender.held == self._sender.layout.chunks:
            self._all_held = time.monotonic()

    def _keep_alive(self, lane: Lane) -> None:
        """Nothing to send is no reason for the daemon to take this side for dead. It reports twice a second."""
        now = time.monotonic()
        if now - self._pinged >= _PING_SECONDS:
            self._pinged = now
            lane.connection.send(Ping())

    def _wait_until(self, lane: Lane, deadline: float) -> float:
        return min(max(lane.last_heard, lane.last_written) + self._options.stall, deadline)

    @property
    def _interruptible(self) -> Waker | None:
        """Once COMMIT may have left, nothing interrupts: whoever cancelled too late waits for the outcome."""
        return None if self._commit_sent else self._waker

    def _before_commit(self) -> None:
        """A last look at the source: what was sent must be what is there."""
        if name := self._source.changed():
            raise TensorChanged(
                f"{name} changed while it was being sent; nothing was swapped. Push again when it is at rest, or with "
                "snapshot=True",
                tensor=name,
            )

    def _pause(self, seconds: float) -> None:
        if self._commit_sent:
            time.sleep(seconds)
        elif self._waker.wait(seconds):
            raise Interrupted("interrupted while reconnecting; the previous version is serving")

    # --- errors --------------------------------------------------------------------------------------------

    def _raise_if_over(self, error: ShipError, deadline: float) -> None:
        if time.monotonic() >= deadline:
            late = Stalled(
                f"the push took longer than its timeout of {self._options.timeout:g} s",
                peer=str(self._address),
                model=self._options.model,
                transfer_id=self.transfer.hex(),
            )
            raise self._outcome(late) from error

    def _gave_up(self, error: ShipError, breaks: int) -> ShipError:
        if self._commit_sent:
            return self._outcome(error)
        if breaks >= _MAX_BREAKS:
            return TransferFailed(
                f"the connection to {self._address} broke {breaks} times without a chunk getting through; the previous "
                f"version is serving. Last: {error}",
                peer=str(self._address),
                model=self._options.model,
                transfer_id=self.transfer.hex(),
            )
        error.model, error.transfer_id = self._options.model, self.transfer.hex()
        return error

    def _outcome(self, error: ShipError) -> ShipError:
        if not self._commit_sent:
            return error
        return OutcomeUnknown(
            f"the connection to {self._address} was lost after COMMIT ({error}): the version is either live or not. "
            "Pushing it again is harmless and settles it.",
            peer=str(self._address),
            model=self._options.model,
            transfer_id=self.transfer.hex(),
        )

    def _failure(self, error: TransferError) -> ShipError:
        known = remote_error(error, str(self._address), model=self._options.model, transfer_id=self.transfer.hex())
        return self._outcome(known) if self._uncertain and error.code is not AbortCode.SWAP_FAILED else known

    def _protocol_failure(self, error: ProtocolError) -> ShipError:
        return peer_error(error, str(self._address))

    # --- accounts ------------------------------------------------------------------------------------------

    def _report(self, stage: str) -> None:
        now = time.monotonic()
        if self._options.on_progress is None or now - self._progress_at < 0.1:
            return
        self._progress_at = now
        sender = self._sender
        total = sender.layout.wire_bytes
        done = total * sender.held // max(1, sender.layout.chunks)
        self._options.on_progress(Progress(stage or "connecting", done, total))

    def _receipt(self, committed: Committed, seconds: float) -> Receipt:
        sender = self._sender
        structure = sender.layout.structure
        resent = dict.fromkeys(name for chunk in sender.chunks_resent for name in sender.layout.chunk_names(chunk))
        wire = (self._all_held or time.monotonic()) - self._first_data if self._first_data is not None else 0.0
        return Receipt(
            model=self._options.model,
            label=committed.label,
            digest=committed.digest.hex(),
            transfer_id=self.transfer.hex(),
            tensors=len(structure),
            bytes_total=structure.total_bytes,
            bytes_sent=self._bytes_sent,
            frames_resent=self._frames_resent,
            resent_tensors=tuple(resent),
            skipped=tuple(sender.skipped),
            swapped=committed.swapped,
            stale=committed.stale,
            already=committed.already,
            seconds=seconds,
            wire_seconds=wire,
            stage_seconds=sender.staged.stage_seconds if sender.staged is not None else 0.0,
            pause_seconds=committed.pause_seconds,
            profile=self._profile(committed, wire, seconds),
        )

    def _profile(self, committed: Committed, wire: float, seconds: float) -> Profile:
        return Profile(
            open=self._open_seconds,
            connect=self._connect_seconds,
            agree=self._agree_seconds,
            wire=wire,
            read=self._times.read,
            digest=self._times.digest,
            check=self._times.check,
            write=self._times.write,
            wait=self._wire_wait,
            receiver_receive=committed.receive_seconds,
            receiver_check=committed.check_seconds,
            receiver_digest=committed.digest_seconds,
            verify=committed.verify_seconds,
            stage=self._sender.staged.stage_seconds if self._sender.staged is not None else 0.0,
            commit=time.monotonic() - self._committing_at if self._committing_at else 0.0,
            pause=committed.pause_seconds or 0.0,
            hold_wait=committed.wait_seconds,
            copy=committed.copy_seconds,
            total=seconds + self._connected_before,
            lanes=self._lanes,
        )


def default_label(digest: bytes) -> str:
    """UTC time and eight hexadecimal digits of the digest: unique enough, sortable, and it says what it is."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{digest.hex()[:8]}"
