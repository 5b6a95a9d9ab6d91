"""The async client: ``async with shipd.connect("gpu-01:7447") as client``.

Nothing here runs on the caller's event loop except waiting: every conversation has a thread of its own.
"""

import asyncio
import concurrent.futures
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

from shipd.address import Address, parse_address
from shipd.bases.base import Keeper
from shipd.bases.store import kept_versions
from shipd.checkpoints.remote.fetching import Fetching
from shipd.checkpoints.source import open_source
from shipd.client.choice import Prefer
from shipd.client.options import Progress, PushOptions
from shipd.client.planning import Planner, Policy, Renames, Wishes, as_renames
from shipd.client.push import CONNECT_SECONDS
from shipd.client.questions import Questioner
from shipd.client.receipt import Receipt
from shipd.client.shipment import Shipment, What
from shipd.errors import ConnectError, OutcomeUnknown, ShipError
from shipd.matching.plan import Plan
from shipd.threads import no_thread
from shipd.transfer.lane import Lane
from shipd.transfer.waker import Waker
from shipd.units import parse_rate
from shipproto.description import POLICIES, Description
from shipproto.limits import MAX_LANES
from shipproto.messages import StatusIs, StatusRequest, VerifyIs, VerifyRequest
from shipproto.names import check_label
from shipproto.status import Status, Verification, decode_status, decode_verification

if TYPE_CHECKING:
    from shipd.checkpoints.source import Checkpoint

_T = TypeVar("_T")

_ANSWER_SECONDS: Final = 30.0
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
        policy: Policy | None = None,
        cast: bool | None = None,
        renames: Renames | None = None,
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
        policy       what may differ: "strict" is nothing; "subset" pushes an adapter, or any part of the model;
                     "partial" leaves out what the model does not have, too. Tensors that are not sent keep their
                     values. None is what the daemon's configuration says, and strict where it says nothing
        cast         whether floating-point tensors become those of the model's dtypes before they are sent, and
                     integers where all their values fit; None is what the daemon's configuration says
        renames      names of the model by names of the checkpoint; or rules "regex=replacement", each applied by
                     re.sub to all of the checkpoint's names in turn. Prefixes such as "module." need none
        on_progress  called on another thread while the push runs

        Cancelling ends the push, unless its commit is under way: then the outcome is waited for and returned, as if
        nobody had cancelled. Raises ValueError for a name or a label that cannot be one, and a ShipError for everything
        else; whatever that is, the previous version serves, unless it is OutcomeUnknown.
        """
        _check_choices(prefer, lanes, base, base_key)
        _check_seconds(timeout, stall)
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
        what = What(
            checkpoint=checkpoint,
            key=key,
            snapshot=snapshot,
            base=base,
            base_key=base_key,
            prefer=prefer,
            wishes=_wishes(policy, cast, renames),
        )
        lane, self._lane = self._lane, None
        shipment = Shipment(what, self.address, options, self._keepers, lane)
        try:
            return await _in_thread(shipment.run, shipment.cancel, finished_counts=True)
        finally:
            shipment.close()

    async def plan(
        self,
        checkpoint: "Checkpoint",
        *,
        model: str,
        key: str | None = None,
        policy: Policy | None = None,
        cast: bool | None = None,
        renames: Renames | None = None,
    ) -> Plan | None:
        """What a push with these arguments would do with each tensor. Nothing is offered, and nothing changes.

        Where something does not fit, ``Plan.problems`` says what, and nothing is raised. None where tensors would be
        offered as they are: the daemon cannot tell what the model consists of, since nothing has been attached or
        pushed under its name yet, or its release is too old; or nothing serves the model, so that a checkpoint that
        does not fit would take its place. Raises what ``push`` raises before it offers anything, and MemoryLimit
        where the daemon may not have a version of that size.
        """
        wishes = _wishes(policy, cast, renames)
        check_label("model name", model)
        fetching = Fetching()

        def look(questioner: Questioner) -> Plan | None:
            source = open_source(checkpoint, key=key, fetching=fetching)
            try:
                planner = Planner(questioner, str(self.address), model, wishes, _ANSWER_SECONDS)
                outcome = planner.look(source)
                planner.check_size(source, outcome)
                return outcome.plan
            finally:
                source.close()

        return await self._question(look, fetching.cancel)

    async def describe(self, model: str) -> Description | None:
        """What versions of ``model`` consist of, and what serves them; None from a daemon of a release that cannot
        tell. Raises UnknownModel."""
        check_label("model name", model)
        return await self._question(
            lambda questioner: Planner(questioner, str(self.address), model, Wishes(), _ANSWER_SECONDS).describe()
        )

    def _check_limit(self, limit: float | str | None) -> float | None:
        if limit is None:
            return None
        rate = parse_rate(limit)
        if isinstance(self.address, Path) or sys.platform != "linux":
            raise ValueError(f"limit = {limit!r}: only TCP connections can be kept to a rate, and only on Linux")
        return rate

    async def status(self, model: str | None = None) -> Status:
        """What the daemon is serving and doing: all of it, or one model."""
        question = StatusRequest(model=check_label("model name", model) if model else "")
        return decode_status(await self._question(lambda asked: asked.ask(question, StatusIs, _ANSWER_SECONDS)))

    async def verify(self, model: str) -> Verification:
        """Have every serving process of ``model`` read its live parameters back and digest them."""
        question = VerifyRequest(model=check_label("model name", model))
        return decode_verification(await self._question(lambda asked: asked.ask(question, VerifyIs, _VERIFY_SECONDS)))

    async def _question(self, work: Callable[[Questioner], _T], cancel: Callable[[], None] = lambda: None) -> _T:
        """Ask on a thread, over the connection that is there, if it still is; else over a new one. Whoever cancels has
        ``cancel`` called too."""
        lane, self._lane = self._lane, None
        waker = Waker()
        questioner = Questioner(partial(self._open, waker), waker, lane)

        def wake() -> None:
            cancel()
            waker.wake()

        try:
            return await _in_thread(lambda: work(questioner), wake)
        finally:
            questioner.close()
            waker.close()

    def _open(self, waker: Waker | None) -> Lane:
        return Lane.open(self.address, token=self._token, timeout=CONNECT_SECONDS, waker=waker)


def _check_choices(prefer: str, lanes: int | None, base: object, base_key: str | None) -> None:
    """Raise ValueError for what a push cannot be told."""
    if prefer not in ("time", "bytes"):
        raise ValueError(f"prefer = {prefer!r}: it is 'time' or 'bytes'")
    if base_key is not None and (base is None or base is False):
        raise ValueError(f"base_key = {base_key!r}: there is no base in which to look for it")
    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"lanes = {lanes}: a push has 1 to {MAX_LANES} connections")


def _check_seconds(timeout: float | None, stall: float) -> None:
    """Raise ValueError for a time that is over before it begins: the daemon would be blamed for it."""
    for name, seconds in (("timeout", timeout), ("stall", stall)):
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name} = {seconds!r}: it is a number of seconds above 0")


def _wishes(policy: Policy | None, cast: bool | None, renames: Renames | None) -> Wishes:
    """Raises ValueError for what a push cannot be told."""
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: it is {', '.join(map(repr, POLICIES[:-1]))} or {POLICIES[-1]!r}")
    if cast not in (None, True, False):
        # Most texts that say no are true.
        raise ValueError(f"cast = {cast!r}: it is True, False or None")
    return Wishes(policy, cast, as_renames(renames))


async def _in_thread(work: Callable[[], _T], cancel: Callable[[], None], *, finished_counts: bool = False) -> _T:
    """Run ``work`` on a thread of its own. When the caller is cancelled, ``cancel`` it and wait for its end.

    ``finished_counts``: what was done all the same is returned, because it cannot be undone.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="shipd-client")
    try:
        future = asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError as failure:
        raise no_thread(ConnectError, "the daemon was not asked anything") from failure
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
