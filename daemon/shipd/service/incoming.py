"""One push as the daemon lives it: from the OFFER to the swap in every serving process, or to its end.

    settle the structure -> take a slot -> receive -> verify -> stage everywhere -> (COMMIT) -> swap everywhere

A part of a version is received elsewhere, and put into the slot with the rest once it has been verified: ``composing``.

The task runs through these steps; connections of the sender come and go meanwhile. Until a process has
swapped, every way out leaves the previous version serving. Once the sender has asked for the commit, nothing
interrupts it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from shipd.images.slots import Slot, SlotPool
from shipd.service.composing import Composing
from shipd.service.decoding import Decoding, Ground, Target
from shipd.service.host import Host
from shipd.service.labels import Labelled, live_digest
from shipd.service.lanes import Lanes
from shipd.service.lending import Lending
from shipd.service.models import Model, Version
from shipd.service.rollout import Outcome, Rollout
from shipd.service.settling import Settling
from shipd.service.vacancy import take_slot
from shipd.transfer.lent_files import LentFiles
from shipd.transfer.peer import Peer
from shipd.transfer.stream import StreamPeer
from shipd.transfer.times import Times
from shipd.transfer.unixpeer import UnixPeer
from shipproto.connection import Connection, Event, MessageArrived
from shipproto.digests import LeafDigests
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import MAX_TEXT
from shipproto.messages import Committed, Join, Offer
from shipproto.names import harmless
from shipproto.outcomes import (
    ChunkHeld,
    CommitRequested,
    FilesLent,
    ReadyToVerify,
    ReceiverEvent,
    RunToDecode,
    StructureArrived,
    TransferAborted,
)
from shipproto.receiver import Receiver
from shipproto.states import ReceiverState
from shipproto.status import FailedPush

log = logging.getLogger("shipd.transfer")

_REPORT_SECONDS: Final = 0.5
"""How often the sender hears from a daemon that waits for serving processes, or that receives over a thin link."""

_STANDSTILL: Final = 20
"""Stall deadlines that a sender may let pass without sending a chunk while it shows that it is alive: digesting a
large checkpoint from a slow disk takes that long."""

_COMMIT_SECONDS: Final = 600.0
"""How long a staged version waits for COMMIT: its sender may be staging on many hosts before any of them swaps."""


class Incoming:
    """One push of one version into one model."""

    def __init__(self, host: Host, model: Model, peer: Peer, offer: Offer) -> None:
        self.model = model
        self.receiver = Receiver(offer)
        self.peer: Peer | None = None
        self.peer_name = peer.name
        self.committing = False
        self.began = time.monotonic()
        self.stage_seconds: float | None = None
        """How long the serving processes took to make ready; None where there are none, or it has not come to that."""
        self._host = host
        self._times = Times()
        """What the work of connections that have been replaced took."""
        self._verify_seconds = 0.0
        self._slot: Slot | None = None
        self._pool: SlotPool | None = None
        self._composing: Composing | None = None
        """Of a partial push, once it has been found to fit."""
        self._settling = Settling(host, model, self.receiver, self.flush)
        self._labelled = Labelled(host, model, self.receiver, self.flush)
        self._decoding = Decoding(
            host.work, host.speeds, took=self._took, refused=self._not_decoded, hold_back=self._hold_back
        )
        self._lending = Lending(host.config.stall, took=self._took, dropped=self._not_read, failed=self.fail)
        self._lanes = Lanes(self.receiver, self._on_event, self.flush, host.lane_ended, self._decoding.admit)
        self._verify = asyncio.Event()
        self._commit_requested = asyncio.Event()
        self._reason: TransferError | None = None
        self._started = False
        """A task that is cancelled before it has begun would never clean up."""
        self._rollout: Rollout | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._moved = asyncio.get_running_loop().time()
        self._task = asyncio.get_running_loop().create_task(self._run(offer), name=f"push to {model.name}")
        # At once: what the sender does next, leaving included, may be read before the task first runs.
        self.connected(peer, offer)

    @property
    def has_own_images(self) -> bool:
        """Whether it fills images of its own layout, so that nothing can attach before it is over."""
        return self._pool is not None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of content that coded runs stood for, unchanged ones included."""
        return self._decoding.decoded_bytes

    @property
    def transfer_id(self) -> str:
        """The transfer's id in hexadecimal."""
        return self.receiver.transfer.hex()

    # --- the sender's connections --------------------------------------------------------------------------

    def connected(self, peer: Peer, offer: Offer) -> None:
        """The sender is here, for the first time or again."""
        self._moved = asyncio.get_running_loop().time()
        # Before anything is ended for it.
        self.receiver.check_offer(offer)
        self._lanes.stop()
        self.receiver.connected(peer.connection, offer)
        if isinstance(peer, UnixPeer):
            peer.takes_fds = self._host.config.lending
        previous, self.peer = self.peer, peer
        self.peer_name = peer.name
        if previous is not None and previous is not peer:
            self._times.add(previous.times)
            previous.close("the sender opened another connection")
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self.flush()

    def disconnected(self, peer: Peer) -> None:
        """A connection of the sender's is gone, and its lanes with it."""
        if self.peer is peer:
            self._lanes.stop()
        self.receiver.disconnected(peer.connection)
        if self.peer is not peer:
            return
        self.peer = None
        self._times.add(peer.times)
        if not self.receiver.ended:
            window = self._host.config.resume_window
            log.info(
                "the sender is gone",
                extra={**self._context(), "held": len(self.receiver.held), "resume_window": window},
            )
            self._expiry = asyncio.get_running_loop().call_later(window, self._expire)

    def joined(self, peer: StreamPeer, join: Join) -> None:
        """The sender opens a further connection. Raises TransferError where that is not wanted."""
        self._lanes.join(peer, join, self._host.config.stall)

    def on_event(self, peer: Peer, event: Event) -> None:
        """Take an event of one of the sender's connections. Raises ProtocolError."""
        self._on_event(peer.connection, event)
        if isinstance(event, MessageArrived):
            # FINISH, perhaps: what lanes have kept to themselves may be all that was missing.
            self._lanes.take()

    def _on_event(self, connection: Connection, event: Event) -> None:
        self._note(self.receiver.receive(connection, event))

    def _note(self, outcomes: list[ReceiverEvent]) -> None:
        for outcome in outcomes:
            self._moved = asyncio.get_running_loop().time()
            if isinstance(outcome, ChunkHeld):
                if self._rollout is not None and self._composing is None:
                    self._rollout.arrived(outcome.chunk, last=self.receiver.complete)
            elif isinstance(outcome, StructureArrived):
                self._settling.arrived(outcome.encoded)
            elif isinstance(outcome, RunToDecode):
                self._decoding.submit(outcome)
            elif isinstance(outcome, FilesLent):
                self._read_lent(outcome)
            elif isinstance(outcome, ReadyToVerify):
                self._verify.set()
            elif isinstance(outcome, CommitRequested):
                self.committing = True
                self._commit_requested.set()
            elif isinstance(outcome, TransferAborted):
                self.fail(outcome.error)

    def _took(self, run: RunToDecode) -> None:
        self._note(self.receiver.decoded(run))
        self.flush()

    def _not_decoded(self, run: RunToDecode) -> None:
        self.receiver.undecodable(run)
        self.flush()

    def _read_lent(self, outcome: FilesLent) -> None:
        assert self._slot is not None and isinstance(self.peer, UnixPeer)
        files = LentFiles(outcome.lent, self.peer.take_fds(outcome.files))
        image = self._slot.memory.view if self._composing is None else self._composing.image
        self._lending.begin(files, self.receiver.lend(outcome.lent), image, self.receiver.digests)

    def _not_read(self, run: RunToDecode) -> None:
        self.receiver.undecodable(run)

    def _hold_back(self, much: bool) -> None:
        if self.peer is not None:
            self.peer.hold_back(much)

    def flush(self) -> None:
        """Write what the receiver has to say."""
        if self.peer is not None:
            self.peer.flush()

    def fail(self, reason: TransferError) -> None:
        """End the push, unless it is being committed."""
        if not self.committing and not self._task.done():
            self._reason = self._reason or reason
            if self._started:
                self._task.cancel()

    async def wait(self) -> None:
        """Until the push is over."""
        await asyncio.wait({self._task})

    def _expire(self) -> None:
        window = self._host.config.resume_window
        self.fail(TransferError(AbortCode.STALLED, f"the sender did not come back within {window:.0f} s"))

    # --- the push ------------------------------------------------------------------------------------------

    async def _run(self, offer: Offer) -> None:
        self._started = True
        reporter = asyncio.get_running_loop().create_task(self._keep_reporting())
        try:
            if self._reason is not None:
                raise self._reason
            log.info(
                "push offered",
                extra={**self._context(), "label": offer.label, "bytes": offer.nbytes, "resumed": offer.resumed},
            )
            part = await self._settling.part(offer) if offer.partial else None
            layout = part.offered if part is not None else await self._settling.layout(offer)
            version = self.model.version
            if version is not None and offer.label == version.label:
                await self._labelled.compare(layout, version, part, self._verify)
                return
            if part is not None:
                self._composing = Composing(self._host, self.model, part)
            pool, own = await self._settling.pool(part.resident if part is not None else layout)
            self._pool = pool if own else None
            slot, evicted = await take_slot(self._host.images, self.model, pool, self._host.config.stage_timeout)
            self._slot = slot
            rollout = self._rollout = Rollout(self._host.config, self.model, pool, slot, self.receiver.transfer)
            rollout.left += evicted
            self._accept(pool, slot)
            await self._receive()
            await self._lending.rest()
            digests, digest = await self._made()
            self._labelled.decide(digest)
            if self.receiver.ended:
                return
            if self._composing is not None and version is not None:
                await self._composing.compose(version.slot, slot, digests)
            async with self.model.lock:
                seconds = await rollout.stage(self.receiver.label, digest)
            self.stage_seconds = seconds if rollout.ready else None
            self.receiver.staged(len(rollout.ready), seconds)
            self.flush()
            await self._await_commit()
            async with self.model.lock:
                self._commit(slot, digests, digest, await rollout.swap(self.receiver.label, digest))
        except TransferError as error:
            self._abort(error)
        except asyncio.CancelledError:
            self._abort(self._reason or TransferError(AbortCode.SHUTTING_DOWN, "the daemon is shutting down"))
        except Exception:
            log.exception("a push failed unexpectedly", extra=self._context())
            self._abort(TransferError(AbortCode.INTERNAL, "the daemon failed; its log says how"))
        finally:
            reporter.cancel()
            await self._decoding.end()
            await self._lending.end()
            await self._clean_up()

    def _accept(self, pool: SlotPool, slot: Slot) -> None:
        """Take chunks into ``slot``, or of a partial push elsewhere; coded ones as far as there is a version that they
        can build on."""
        layout, image, before, composing = pool.layout, slot.memory.view, slot.before, self._composing
        if composing is not None:
            layout, image, before = composing.part.offered, composing.image, None
        ability, ground = None, None
        if self._host.config.incremental:
            version = self.model.version
            alike = composing is None and pool is self.model.pool
            if version is not None and alike and version.slot.digests is not None:
                ground = Ground(version.digest, version.slot.memory.view, version.slot.digests)
            ability = self._host.speeds.ability(ground)
        receiver = self.receiver
        receiver.accept(layout, image, lanes=self._lane_limit(), ability=ability)
        self._decoding.begin(Target(layout, image, receiver.digests, before, receiver.touched), ground)
        self.flush()

    def _lane_limit(self) -> int:
        """Over the Unix socket, one connection is as fast as any number."""
        return self._host.config.max_lanes if isinstance(self.peer, StreamPeer) else 1

    async def _receive(self) -> None:
        """Until everything has arrived and its digests are the sender's."""
        while True:
            await self._verify.wait()
            self._verify.clear()
            started = time.monotonic()
            differing = await self._host.work(self.receiver.verify)
            self._verify_seconds += time.monotonic() - started
            if self.receiver.verified(differing):
                return
            log.warning("tensors arrived with other digests and were asked for again", extra=self._context())
            self.flush()

    async def _made(self) -> tuple[LeafDigests, bytes]:
        """Digests of the version that has arrived, or that comes of what has and the current one."""
        if self._composing is None:
            return self.receiver.digests, self.receiver.digest
        version = self.model.version
        assert version is not None and version.slot.digests is not None
        return await self._composing.digests(version.slot.digests, self.receiver.digests)

    # --- the commit ----------------------------------------------------------------------------------------

    async def _await_commit(self) -> None:
        try:
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self._commit_requested.wait()
        except TimeoutError:
            raise TransferError(
                AbortCode.STALLED, f"staged, but the sender asked for no commit within {_COMMIT_SECONDS:.0f} s"
            ) from None

    def _commit(self, slot: Slot, digests: LeafDigests, digest: bytes, outcome: Outcome) -> None:
        """The version is the current one: in the books, in the log, and to the sender."""
        version = Version(self.receiver.label, digest, slot, pushed=True, metadata=self.receiver.offer.metadata)
        self._install(version, digests)
        for session in outcome.swapped:
            session.serves(version.label, version.digest)
        for session, why in outcome.stale:
            session.evict(why)
        stale = tuple(str(session.pid) for session, _why in outcome.stale)
        log.info(
            "committed",
            extra={
                **self._context(),
                "label": version.label,
                "digest": version.digest.hex(),
                "swapped": len(outcome.swapped),
                "stale": ",".join(stale),
                "damaged": self.receiver.chunks_damaged,
            },
        )
        spent = self._lanes.times()
        spent.add(self._times)
        spent.add(self._lending.times)
        if self.peer is not None:
            spent.add(self.peer.times)
        self.receiver.committed(
            Committed(
                check_seconds=spent.check,
                copy_seconds=outcome.copy_seconds,
                decode_seconds=self._decoding.seconds,
                digest=self.receiver.digest,
                digest_seconds=spent.digest,
                label=version.label,
                live=live_digest(self.receiver, version),
                pause_seconds=outcome.pause_seconds,
                receive_seconds=spent.receive,
                stale=stale,
                swapped=len(outcome.swapped),
                transfer=self.receiver.transfer,
                verify_seconds=self._verify_seconds,
                wait_seconds=outcome.wait_seconds,
            )
        )
        self.flush()

    def _install(self, version: Version, digests: LeafDigests) -> None:
        """``version`` is the current one from here on."""
        old = self.model.pool
        if self._pool is not None:
            self.model.pool = self._pool
            self._pool = None
            if old is not None:
                self._host.images.free_pool(old)
        assert self.model.pool is not None
        self.model.pool.commit(version.slot, digests)
        self.model.failed = None
        self.model.becomes(version)
        self._slot = None

    # --- ends ----------------------------------------------------------------------------------------------

    async def _keep_reporting(self) -> None:
        """Tell the sender, while it waits for serving processes or for a slot, that it is not forgotten.

        Also while it waits for what it has written to arrive: megabytes may lie in the kernel's buffers, which a thin
        link takes longer to carry than a sender waits for a sign of life.
        """
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            await asyncio.sleep(_REPORT_SECONDS)
            if self.receiver.state is ReceiverState.RECEIVING:
                limit = _STANDSTILL * self._host.config.stall
                if loop.time() - self._moved > limit:
                    self.fail(TransferError(AbortCode.STALLED, f"nothing but signs of life for {limit:.0f} s"))
            arriving = self._lending.reading or (self.peer is not None and self.peer.last_heard >= since)
            if arriving or self.receiver.state is not ReceiverState.RECEIVING:
                self.receiver.report(self.receiver.state.name.lower())
                self.flush()

    def _abort(self, error: TransferError) -> None:
        log.warning("push ended without effect", extra={**self._context(), "code": str(error.code), "why": str(error)})
        self.model.failed = FailedPush(
            transfer_id=self.transfer_id,
            peer=self.peer_name,
            reason=harmless(str(error), MAX_TEXT),
            label=self.receiver.label,
            at=time.time(),
        )
        self.receiver.abort(error)
        self.flush()

    async def _clean_up(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        try:
            self._lanes.stop()
            if self._composing is not None:
                await self._composing.end()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Images and the model's place, whatever else went wrong."""
        slot, self._slot = self._slot, None
        images, own = self._host.images, self._pool
        self._pool = None
        if slot is not None:
            pool = own or self.model.pool
            assert pool is not None
            pool.discard(slot)
            if self._rollout is not None:
                self._rollout.cancel()
        # What a thread that hangs still reads must go into memory that nobody is given again.
        if self._composing is not None:
            self._once_read(self._composing.free)
        elif own is not None:
            self._once_read(partial(images.free_pool, own))
        elif slot is not None and self._lending.reading:
            slot.unfinished = True
            self._once_read(partial(images.finished, self.model, slot, slot.memory))
        self.model.incoming = None
        self._host.finished(self)

    def _once_read(self, act: Callable[[], None]) -> None:
        """Now, or where a read of a lent file hangs, when it has ended."""
        if self._lending.reading:
            self._lending.left = act
        else:
            act()

    def _context(self) -> dict[str, object]:
        return {"model": self.model.name, "transfer": self.transfer_id, "peer": self.peer_name}
