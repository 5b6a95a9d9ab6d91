"""The async client: ``async with shipd.connect("gpu-01:7447") as client``.

Nothing here runs on the caller's event loop except waiting: every conversation has a thread of its own.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

from shipd.address import Address, parse_address
from shipd.bases.base import Keeper
from shipd.bases.checkpoint import CheckpointBases
from shipd.bases.store import kept_versions
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.source import Source, open_source
from shipd.client.choice import Prefer
from shipd.client.incremental import Incremental
from shipd.client.options import Progress, PushOptions
from shipd.client.push import Push
from shipd.client.receipt import Receipt
from shipd.errors import OutcomeUnknown, ShipError
from shipd.transfer.faults import peer_error, remote_error
from shipd.transfer.lane import ConnectionLost, Lane, Waker
from shipd.units import parse_rate
from shipproto.aborts import read_abort
from shipproto.connection import MessageArrived
from shipproto.errors import LocalError, ProtocolError
from shipproto.frame import Buffer
from shipproto.limits import MAX_LANES
from shipproto.messages import Abort, Message, StatusIs, StatusRequest, VerifyIs, VerifyRequest
from shipproto.names import check_label
from shipproto.status import Status, Verification, decode_status, decode_verification

if TYPE_CHECKING:
    import torch

    Checkpoint = Mapping[str, torch.Tensor] | torch.nn.Module | str | PathLike[str]
    """What can be pushed, and be a base: a state dict, a module, or the path or URL of a checkpoint."""

log = logging.getLogger("shipd.client")

_T = TypeVar("_T")

_CONNECT_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 30.0
_COMPILE_ABOVE: Final = 1 << 30
"""Bytes of a model from which a process that keeps nothing in memory, and so pushes once, has loops compiled."""

_VERIFY_SECONDS: Final = 150.0
"""Two rounds of reading back, of a minute each: one that was under way when this client asked, and its own."""


def connect(address: str, *, token: str | bytes | None = None, keep: bool | Keeper = True) -> "Client":
    """A client of the daemon at ``address``: HOST, HOST:PORT (7447 by default), or the path of its Unix socket.

    token  the secret that the daemon asks for; it is proved, never sent
    keep   whether versions that were committed are kept in memory, so that the next push of a model over a link that
           is slower than the codecs sends only what has changed. That takes as many bytes as the model has and a
           little more, within ``shipd.kept_versions.limit``, 8 GiB for all clients of the process. Or who keeps them
           instead

    ``async with`` connects, and raises ConnectError, AuthError or PeerError where that fails. A malformed address
    raises ValueError.
    """
    target = Path(address) if "/" in address and "://" not in address else parse_address(address)
    keepers: tuple[Keeper, ...] = ()
    if keep is not False:
        keepers = (kept_versions,) if keep is True else (keep,)
    return Client(target, token.encode() if isinstance(token, str) else token, keepers)


class Client:
    """Talks to one daemon. Usable from one event loop; pushes of different models may run at once."""

    def __init__(self, address: Address | Path, token: bytes | None, keepers: Sequence[Keeper] = ()) -> None:
        """``keepers`` keep what was committed, for later pushes of this client and others."""
        self.address = address
        self._token = token
        self._keepers = tuple(keepers)
        self._lane: Lane | None = None

    async def __aenter__(self) -> Self:
        waker = Waker()
        opened: list[Lane] = []
        try:
            await _in_thread(lambda: opened.append(self._open(waker)), waker.wake)
            self._lane = opened.pop()
            self._lane.use(None)
        finally:
            for lane in opened:
                # Cancelled just as it stood.
                lane.close()
            waker.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()

    async def push(
        self,
        checkpoint: "Checkpoint",
        *,
        model: str,
        label: str | None = None,
        metadata: Mapping[str, str] | None = None,
        key: str | None = None,
        snapshot: bool = False,
        timeout: float | None = None,
        stall: float = 30.0,
        lanes: int | None = None,
        base: "Checkpoint | Literal[False] | None" = None,
        base_key: str | None = None,
        prefer: Prefer = "time",
        limit: float | str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Receipt:
        """Ship a version of ``model`` and have it swapped in.

        checkpoint   a state dict, a module, or the path or URL of a checkpoint: a file of any kind that README.md
                     lists, an index of several, or a directory with one of these. Its tensors must not change until
                     this returns; ``snapshot=True`` copies them first. A text that begins with a scheme is a URL
        label        name of the version; by default UTC time and eight digits of the digest
        key          where in the checkpoint the state dict is, such as "model.ema", where it holds several
        timeout      seconds for the whole push, None for as long as it takes
        stall        seconds without any sign of life after which the push is given up
        lanes        TCP connections to send on at once, 1 to 16; None for as many as make it faster
        base         a checkpoint of the version that the daemon has, where it is not one that was pushed from here;
                     False sends everything as it is, unchanged chunks included
        base_key     as ``key``, in the base
        prefer       "time" codes chunks where they are there sooner for it, "bytes" so that as few bytes as possible
                     travel
        limit        bytes a second to send at most, or a text such as "100Mbit" or "10MB/s"
        on_progress  called on another thread while the push runs

        Cancelling ends the push, unless its commit is under way: then the outcome is waited for and returned, as if
        nobody had cancelled. Raises ValueError for a name or a label that cannot be one, and a ShipError for everything
        else; whatever that is, the previous version serves, unless it is OutcomeUnknown.
        """
        _check_choices(prefer, lanes, base, base_key)
        options = PushOptions(
            model=check_label("model name", model),
            label=check_label("label", label) if label is not None else None,
            metadata=metadata or {},
            token=self._token,
            timeout=timeout,
            stall=stall,
            lanes=lanes,
            limit=self._check_limit(limit),
            on_progress=on_progress,
        )
        lane, self._lane = self._lane, None
        running: list[Push] = []
        cancelled = threading.Event()
        fetching = Fetching(stall=stall, timeout=timeout, on_progress=options.fetched)

        def run() -> Receipt:
            source: Source | None = None
            old: CheckpointBases | None = None
            opened = time.monotonic()
            try:
                source = open_source(checkpoint, key=key, snapshot=snapshot, fetching=fetching)
                if base is not None and base is not False:
                    old = CheckpointBases.of(base, key=base_key, fetching=fetching)
                known = self._keepers if old is None else (old, *self._keepers)
                incremental = Incremental(
                    known,
                    self._keepers,
                    named=old,
                    prefer=prefer,
                    limit=options.limit,
                    compile_above=0 if kept_versions in self._keepers else _COMPILE_ABOVE,
                )
                try:
                    running.append(
                        Push(
                            source,
                            self.address,
                            options,
                            None if base is False else incremental,
                            lane=lane,
                            opened=opened,
                        )
                    )
                except LocalError as error:
                    raise ValueError(f"this cannot be offered: {error}") from error
                if cancelled.is_set():
                    # While the source was opened, when there was nothing yet to cancel.
                    running[0].cancel()
                return running[0].run()
            finally:
                if source is not None:
                    source.close()
                if old is not None:
                    old.close()
                if lane is not None:
                    lane.close()

        def cancel() -> None:
            cancelled.set()
            if running:
                running[0].cancel()
            fetching.cancel()

        return await _in_thread(run, cancel, finished_counts=True)

    def _check_limit(self, limit: float | str | None) -> float | None:
        if limit is None:
            return None
        rate = parse_rate(limit)
        if isinstance(self.address, Path) or sys.platform != "linux":
            raise ValueError(f"limit = {limit!r}: only TCP connections can be kept to a rate, and only on Linux")
        return rate

    async def status(self, model: str | None = None) -> Status:
        """What the daemon is serving and doing: all of it, or one model."""
        return decode_status(
            await self._ask(
                StatusRequest(model=check_label("model name", model) if model else ""), StatusIs, _ANSWER_SECONDS
            )
        )

    async def verify(self, model: str) -> Verification:
        """Have every serving process of ``model`` read its live parameters back and digest them."""
        return decode_verification(
            await self._ask(VerifyRequest(model=check_label("model name", model)), VerifyIs, _VERIFY_SECONDS)
        )

    async def _ask(self, question: Message, answer: type[Message], seconds: float) -> Buffer:
        lane, self._lane = self._lane, None
        waker = Waker()
        try:
            return await _in_thread(lambda: self._ask_blocking(lane, waker, question, answer, seconds), waker.wake)
        finally:
            waker.close()

    def _ask_blocking(
        self, lane: Lane | None, waker: Waker, question: Message, answer: type[Message], seconds: float
    ) -> Buffer:
        """Over the connection that is there, if it still is; else over a new one. Questions may be asked twice."""
        if lane is not None:
            lane.use(waker)
            try:
                return ask(lane, question, answer, seconds)
            except ConnectionLost as error:
                # The daemon closes idle connections, and may have been restarted.
                log.debug("asking again over a new connection", extra={"why": str(error)})
            finally:
                lane.close()
        fresh = self._open(waker)
        try:
            return ask(fresh, question, answer, seconds)
        finally:
            fresh.close()

    def _open(self, waker: Waker | None) -> Lane:
        return Lane.open(self.address, token=self._token, timeout=_CONNECT_SECONDS, waker=waker)


def _check_choices(prefer: str, lanes: int | None, base: object, base_key: str | None) -> None:
    """Raise ValueError for what a push cannot be told."""
    if prefer not in ("time", "bytes"):
        raise ValueError(f"prefer = {prefer!r}: it is 'time' or 'bytes'")
    if base_key is not None and (base is None or base is False):
        raise ValueError(f"base_key = {base_key!r}: there is no base in which to look for it")
    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"lanes = {lanes}: a push has 1 to {MAX_LANES} connections")


def ask(lane: Lane, question: Message, answer: type[Message], seconds: float) -> Buffer:
    """Ask over an established lane and wait for the body of the answer. Raises ShipError."""
    lane.connection.send(question)
    deadline = time.monotonic() + seconds
    while True:
        for event in lane.exchange(deadline):
            if not isinstance(event, MessageArrived):
                continue
            if isinstance(event.message, Abort):
                try:
                    raise remote_error(read_abort(event.message, event.body), lane.peer)
                except ProtocolError as error:
                    raise peer_error(error, lane.peer) from error
            if isinstance(event.message, answer):
                return bytes(event.body)


async def _in_thread(work: Callable[[], _T], cancel: Callable[[], None], *, finished_counts: bool = False) -> _T:
    """Run ``work`` on a thread of its own. When the caller is cancelled, ``cancel`` it and wait for its end.

    ``finished_counts``: what was done all the same is returned, because it cannot be undone.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="shipd-client")
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel()
        while not future.done():
            # Cancelled again or not: what has begun on the thread has an end, and that is what is told.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        error = future.exception()
        if error is None and finished_counts:
            return future.result()
        if error is None:
            raise
        if isinstance(error, OutcomeUnknown) or not isinstance(error, ShipError):
            raise error from None
        raise
    finally:
        pool.shutdown(wait=False)
