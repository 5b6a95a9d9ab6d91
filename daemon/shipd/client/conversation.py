"""A push over one connection, from the OFFER to COMMITTED or to the connection's end: what to do next, step by step."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from shipd.checkpoints.source import Source
from shipd.checkpoints.waiting import while_waiting
from shipd.client.account import Account
from shipd.client.chunks import ChunkReader
from shipd.client.coded import CodedRuns
from shipd.client.incremental import Incremental
from shipd.client.lanes import Outlets, Tuner, usable_cores
from shipd.client.lending import Loan
from shipd.client.options import Progress, PushOptions
from shipd.client.sending import RUN, send_chunks
from shipd.errors import PeerError, Stalled, TensorChanged
from shipd.transfer.lane import ConnectionLost, Lane
from shipproto.connection import Event
from shipproto.errors import ProtocolError
from shipproto.limits import MAX_LANES
from shipproto.messages import Committed, Ping
from shipproto.sender import Sender
from shipproto.states import SenderState
from shipproto.steps import DigestChunk, SendChunk

_PING_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.02
"""How often the lanes are looked after by a push that waits for the receiver."""
_LAST_LOOK_SECONDS: Final = 0.002
"""The same, where all that is left is under way on lanes."""
_RUN_SECONDS: Final = 0.01
"""How long chunks are sent without a look at anything else."""
_REPORT_SECONDS: Final = 0.1


class Conversation:
    """One connection's worth of a push. Everything happens on the thread that calls ``run``.

    single      whether to do without further connections
    lend        whether the source's files may be lent, to a daemon that takes them
    committing  called when COMMIT is about to leave: from then on nothing may interrupt
    """

    def __init__(
        self,
        sender: Sender,
        source: Source,
        lane: Lane,
        outlets: Outlets,
        options: PushOptions,
        account: Account,
        incremental: Incremental,
        *,
        single: bool,
        lend: bool,
        committing: Callable[[], None],
    ) -> None:
        self._sender = sender
        self._source = source
        self._lane = lane
        self._outlets = outlets
        self._options = options
        self._account = account
        self._single = single
        self._lend = lend
        self._loan: Loan | None = None
        self._committing = committing
        self._coded = CodedRuns(sender, source, lane, outlets, incremental, account, options.stall)
        self._offered_at = self._held_at = self._acted = time.monotonic()
        self._pinged = self._reported = 0.0

    def run(self, deadline: float) -> Committed:
        """Offer the version and see it committed. Raises ShipError; TransferError where the transfer is over."""
        try:
            with while_waiting(self._show_life):
                return self._run(deadline)
        except ConnectionLost as lost:
            self._take(lost.heard)
            if self._sender.error is None:
                raise
            # It said why before it closed.
            raise self._sender.error from lost
        finally:
            self._coded.stop()
            if self._loan is not None:
                self._loan.close()

    def _run(self, deadline: float) -> Committed:
        sender, lane, outlets = self._sender, self._lane, self._outlets
        sender.connected(lane.connection)
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
            if self._lend and sender.sending and sender.state is SenderState.SENDING:
                self._offer_loan()
            if self._coded.active:
                self._send_coded(deadline)
                self._past(deadline)
                self._report("sending")
                continue
            if sender.sending:
                self._tune(tuner)
            with outlets.lock:
                step = None if outlets.carry and sender.sending else sender.next_step()
            if isinstance(step, SendChunk):
                self._send_run(reader, step.chunk, deadline)
            elif isinstance(step, DigestChunk):
                if self._loan is None or not self._loan.digest(lane):
                    sender.digest_chunk(step.chunk, reader.read(step.chunk))
                self._keep_alive()
                self._take(lane.pump())
                self._acted = time.monotonic()
            else:
                self._keep_alive()
                if sender.state is SenderState.STAGED:
                    self._commit()
                self._wait(deadline)
            self._past(deadline)
            self._report(sender.stage if step is None else "sending")
        if sender.committed is None:
            assert sender.error is not None
            raise sender.error
        if sender.committed.digest != sender.digest:
            raise PeerError(f"{lane.peer} broke the protocol: it committed what was not sent", peer=lane.peer)
        return sender.committed

    def _past(self, deadline: float) -> None:
        if time.monotonic() > deadline and not self._sender.ended:
            raise Stalled(
                f"the push took longer than its timeout of {self._options.timeout:.0f} s", peer=self._lane.peer
            )

    # --- sending -------------------------------------------------------------------------------------------

    def _send_run(self, reader: ChunkReader, first: int, deadline: float) -> None:
        """Send chunk ``first`` and those that follow it for a moment, with as little beside it as can be."""
        lane, outlets = self._lane, self._outlets
        until = time.monotonic() + _RUN_SECONDS
        self._account.sending(self._offered_at)
        watch = outlets.check if outlets else None
        drain = partial(lane.drain, self._options.stall, until=deadline, watch=watch)
        chunks = range(first, first + 1)
        while chunks:
            waited = lane.times.wait
            events = send_chunks(self._sender, reader, lane, chunks, drain)
            self._account.wire_wait += lane.times.wait - waited
            self._take(events)
            self._take(lane.pump())
            self._acted = time.monotonic()
            if self._acted > until or outlets.carry:
                return
            with outlets.lock:
                chunks = self._sender.next_chunks(RUN)

    def _offer_loan(self) -> None:
        """WANT has come for the first time on this connection: what the daemon can read itself need not travel."""
        self._lend = False
        self._loan = Loan.of(self._sender, self._source, self._lane)
        if self._loan is not None:
            self._account.bytes_lent += self._loan.bytes
            self._account.sending(self._offered_at)
            # At once: the daemon reads while this side does.
            self._take(self._lane.pump())

    def _send_coded(self, deadline: float) -> None:
        """Send the next coded run, or wait a moment for it."""
        if not self._coded.beginning:
            self._account.sending(self._offered_at)
        self._keep_alive()
        drain = partial(self._lane.drain, self._options.stall, until=deadline, watch=self._outlets.check)
        self._take(self._coded.step(drain))
        self._take(self._lane.pump())
        self._acted = time.monotonic()

    def _tuner(self) -> Tuner:
        """Paths that break take one connection; what was asked for is not tried but done."""
        asked = self._options.lanes
        return Tuner(
            limit=1 if self._single else MAX_LANES,
            cores=usable_cores(),
            lanes=1 if self._single else asked or 1,
            settled=self._single or asked is not None,
        )

    def _tune(self, tuner: Tuner) -> None:
        tuner.limit = min(tuner.limit, self._sender.lanes)
        sent = self._lane.bytes_sent + self._outlets.bytes_sent
        lanes = tuner.observe(time.monotonic(), sent, self._sender.layout.wire_bytes - sent)
        self._outlets.want(min(lanes, tuner.limit - tuner.apart), apart=tuner.apart)

    # --- waiting -------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        self._before_commit()
        self._committing()
        self._outlets.stop()
        self._account.committing = time.monotonic()
        self._sender.commit()
        self._acted = time.monotonic()

    def _before_commit(self) -> None:
        """A last look at the source: what was sent must be what is there."""
        if name := self._source.changed():
            raise TensorChanged(
                f"{name} changed while it was being sent; nothing was swapped. Push again when it is at rest, or with "
                "snapshot=True",
                tensor=name,
            )

    def _wait(self, deadline: float) -> None:
        """For what the receiver says next, and meanwhile for lanes that are still sending."""
        sender, lane = self._sender, self._lane
        # A ping is no question: whatever else was written last is what the answer is waited for.
        until = min(max(lane.last_heard, self._acted) + self._options.stall, deadline)
        patience = _PING_SECONDS
        if self._outlets:
            last = sender.state is SenderState.SENDING and not sender.sending
            patience = _LAST_LOOK_SECONDS if last else _LOOK_SECONDS
        heard = lane.last_heard
        self._take(lane.pump(max(0.0, min(patience, until - time.monotonic()))))
        now = time.monotonic()
        if now > until and lane.last_heard == heard:
            raise Stalled(f"{lane.peer} has not answered in time", peer=lane.peer)
        if self._outlets and sender.held < sender.layout.chunks and now - self._held_at > self._options.stall:
            # The daemon is alive, and what was sent does not arrive: over one of the lanes nothing comes through.
            raise ConnectionLost(f"{lane.peer} has received nothing for {self._options.stall:g} s", peer=lane.peer)

    def _take(self, events: Iterable[Event]) -> None:
        held = self._sender.held
        for event in events:
            try:
                with self._outlets.lock:
                    self._sender.receive(event)
            except ProtocolError as error:
                raise self._lane.fault(error) from error
        if self._sender.held > held:
            self._held_at = time.monotonic()
        self._account.heard(self._sender)

    def _keep_alive(self) -> None:
        """Nothing to send is no reason for the daemon to take this side for dead. It reports twice a second."""
        now = time.monotonic()
        if now - self._pinged >= _PING_SECONDS:
            self._pinged = now
            self._lane.connection.send(Ping())

    def _show_life(self) -> None:
        """While the source makes this side wait. Raises TransferError where the daemon has ended the transfer."""
        self._keep_alive()
        self._take(self._lane.pump())
        if self._sender.error is not None:
            raise self._sender.error
        self._report("sending")

    def _report(self, stage: str) -> None:
        now = time.monotonic()
        if self._options.on_progress is None or now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        total = self._sender.layout.wire_bytes
        done = total * self._sender.held // max(1, self._sender.layout.chunks)
        sent = self._account.bytes_sent + self._lane.bytes_sent + self._outlets.bytes_sent
        self._options.on_progress(Progress(stage or "connecting", done, total, sent))
