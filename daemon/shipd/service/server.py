"""The daemon itself: listeners, connections and which of its parts each message is for."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from shipd.codecs import compiled
from shipd.environment import environment
from shipd.errors import ConfigError
from shipd.release import AGENT
from shipd.service import questions
from shipd.service.attaching import Attaching
from shipd.service.config import RELOADABLE, Config, ModelConfig
from shipd.service.decoding import Speeds
from shipd.service.describing import Describer
from shipd.service.incoming import Incoming
from shipd.service.metrics import Metrics
from shipd.service.models import ImageStore, Model
from shipd.service.pushes import Pushes, unknown_model
from shipd.service.session import Session, SessionLost
from shipd.service.socketfile import SocketFile
from shipd.threads import start_all
from shipd.transfer.peer import Peer
from shipd.transfer.stream import StreamPeer
from shipd.transfer.unixpeer import UnixPeer
from shipproto.aborts import send_abort
from shipproto.capabilities import DESCRIBE, LEND, PARTIAL
from shipproto.connection import ChunkArrived, Connection, Established, Event, MessageArrived
from shipproto.errors import AbortCode, ProtocolError, TransferError, UnexpectedMessage
from shipproto.frame import Buffer
from shipproto.limits import NONCE_SIZE
from shipproto.messages import (
    Abort,
    Attach,
    Body,
    Coded,
    Commit,
    Data,
    Describe,
    Detach,
    DigestIs,
    Filled,
    Finish,
    Join,
    Lend,
    Message,
    Nack,
    Offer,
    Ping,
    Release,
    StageReady,
    StatusIs,
    StatusRequest,
    StructureIs,
    Swapped,
    VerifyRequest,
)
from shipproto.resident import Resident
from shipproto.status import encode

log = logging.getLogger("shipd.service")

_MAX_CONNECTIONS: Final = 512
_HANDSHAKE_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 300.0
_SWEEP_SECONDS: Final = 1.0
_WORKERS: Final = 4

FROM_SENDERS: Final = (
    *(Body, Nack, Ping, Offer, StructureIs, Data, Coded, Finish, Commit, Abort, Join),
    *(StatusRequest, VerifyRequest, Describe),
)
FROM_LOCAL_SENDERS: Final = (Lend,)
FROM_PROCESSES: Final = (Attach, Filled, StageReady, Swapped, Release, DigestIs, Detach)
"""What the daemon takes, and from whom: senders that lend files and serving processes are on the Unix socket alone."""

_T = TypeVar("_T")


class Server:
    """One daemon on the running loop. ``start``, then ``stop``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.images = ImageStore(config.memory_bytes)
        self.speeds = Speeds(lambda: self.background(lambda _: compiled.warm_up()))
        self.models: dict[str, Model] = {}
        self.port = 0
        self._token = config.read_token()
        self._attaching = Attaching(self)
        self._verifier = questions.Verifier(self.spawn)
        self._describer = Describer(self)
        self._started = time.time()
        self._draining = False
        self._peers: dict[Peer, float] = {}
        self._pushes = Pushes(self)
        self._sessions: dict[Peer, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.metrics = Metrics(self, self._peers)
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=_WORKERS, thread_name_prefix="shipd-work")
        # Apart from the others: faulting in the images of a large model takes seconds, and a verdict must not wait.
        self._slow_pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="shipd-populate")
        self._closing = False
        self._tcp: asyncio.Server | None = None
        self._unix: SocketFile | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._declare()

    def _declare(self) -> None:
        for name, config in self.config.models.items():
            if config.limit is not None:
                self.models.setdefault(name, self._model(name))

    def _model(self, name: str) -> Model:
        return Model(name, self.config.models.get(name))

    # --- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises ConfigError where that is not possible."""
        try:
            # All of them, now: work that a pool has taken and finds no thread for would be done at some later time,
            # when the image that it writes into may be another's.
            start_all(self._pool, _WORKERS)
            start_all(self._slow_pool, 1)
            await self._listen()
        except BaseException:
            self._pool.shutdown()
            self._slow_pool.shutdown()
            raise

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        address = self.config.address
        try:
            self._tcp = await loop.create_server(self._accept_tcp, address.host, address.port, reuse_address=True)
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
        self.port = self._tcp.sockets[0].getsockname()[1]
        try:
            await self.metrics.start(self.config.metrics_address)
            self._unix = SocketFile(Path(self.config.socket), self.config.socket_group)
        except BaseException:
            self._tcp.close()
            await self.metrics.stop()
            raise
        loop.add_reader(self._unix.socket.fileno(), self._accept_unix)
        self._sweep = loop.call_later(_SWEEP_SECONDS, self._sweep_silent)
        log.info(
            "listening",
            extra={
                "address": str(dataclasses.replace(address, port=self.port)),
                "port": self.port,
                "socket": self.config.socket,
                "auth": "token" if self._token else "none",
                "metrics": self.metrics.address,
            },
        )

    async def drain(self) -> None:
        """Take no new pushes and wait for those under way, at most ``drain_timeout``."""
        self._draining = True
        under_way = [push.wait() for push in self._pushes.all()]
        if under_way:
            log.info("draining", extra={"pushes": len(under_way), "timeout": self.config.drain_timeout})
            await asyncio.wait([asyncio.ensure_future(wait) for wait in under_way], timeout=self.config.drain_timeout)

    async def stop(self) -> None:
        """End everything: pushes are aborted (a commit is waited for), serving processes keep what they have."""
        self._draining = self._closing = True
        loop = asyncio.get_running_loop()
        if self._sweep is not None:
            self._sweep.cancel()
        if self._tcp is not None:
            self._tcp.close()
        if self._unix is not None:
            loop.remove_reader(self._unix.socket.fileno())
            self._unix.close()
        under_way = self._pushes.all()
        for incoming in under_way:
            incoming.fail(
                TransferError(AbortCode.SHUTTING_DOWN, "the daemon is shutting down; it may be back in a moment")
            )
        for incoming in under_way:
            await incoming.wait()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for peer in list(self._peers):
            peer.close()
        await self.metrics.stop()
        if self._tcp is not None:
            await self._tcp.wait_closed()
        # Populating is abandoned between two slices; anything else takes milliseconds. Waited for on a thread that is
        # there, since there may be no other.
        await loop.run_in_executor(self._slow_pool, functools.partial(self._pool.shutdown, cancel_futures=True))
        self._slow_pool.shutdown()
        for model in self.models.values():
            self.images.close(model)

    def reload(self, config: Config) -> list[str]:
        """Take over what can change while running. Returns the keys that would need a restart."""
        token = config.read_token()
        fixed = [
            name
            for name in config.__struct_fields__
            if name not in RELOADABLE and getattr(config, name) != getattr(self.config, name)
        ]
        keep = {name: getattr(self.config, name) for name in config.__struct_fields__ if name not in RELOADABLE}
        changed = {name: getattr(config, name) for name in RELOADABLE}
        self.config = Config(**{**keep, **changed})
        self._token = token
        self.images.budget.limit = config.memory_bytes
        for model in list(self.models.values()):
            model.config = config.models.get(model.name, ModelConfig())
            self._forget_unpushed(model)
        self._declare()
        return fixed

    @property
    def draining(self) -> bool:
        """Whether it takes no new pushes, because it is about to stop."""
        return self._draining

    # --- Host: what pushes and attaches need ---------------------------------------------------------------

    async def work(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run ``function`` on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def background(self, function: Callable[[Callable[[], bool]], object]) -> None:
        """Run ``function`` on a worker thread, some time; it is given a way to see that it should stop."""
        self._slow_pool.submit(function, lambda: self._closing)

    def lane_ended(self, received: int, resent: int) -> None:
        """A further connection of a push is gone, which took so many bytes and resent so many frames as one."""
        self.metrics.tally.lane_ended(received, resent)

    def finished(self, incoming: Incoming) -> None:
        """A push is over: remember how it ended."""
        self._pushes.ended(incoming)
        self.metrics.tally.finished(incoming)
        self._forget_unpushed(incoming.model)

    # --- connections ---------------------------------------------------------------------------------------

    def _connection(
        self, token: bytes | None, accepts: tuple[type[Message], ...], *, capabilities: tuple[str, ...] = ()
    ) -> Connection:
        connection = Connection(
            initiator=False,
            nonce=os.urandom(NONCE_SIZE),
            agent=AGENT,
            token=token,
            capabilities=(DESCRIBE, PARTIAL, *capabilities),
            environment=environment(),
        )
        connection.accepts = accepts
        return connection

    def _accept_tcp(self) -> StreamPeer:
        connection = self._connection(self._token, FROM_SENDERS)
        peer = StreamPeer(connection, self._opened, self._on_event, self._on_lost)
        connection.awaited = functools.partial(self._awaits, peer)
        return peer

    def _accept_unix(self) -> None:
        assert self._unix is not None
        try:
            sock, _address = self._unix.socket.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.warning("cannot accept a local connection", extra={"why": error.strerror})
                # Out of descriptors, most likely: they will not come back by asking again at once.
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._unix.socket.fileno())
                loop.call_later(_SWEEP_SECONDS, self._listen_again)
            return
        local = FROM_LOCAL_SENDERS if self.config.lending else ()
        connection = self._connection(
            None, FROM_SENDERS + local + FROM_PROCESSES, capabilities=(LEND,) if local else ()
        )
        peer = UnixPeer(sock, connection, self._on_event, self._on_lost)
        connection.awaited = functools.partial(self._awaits, peer)
        if not self._unix.admits(peer.uid, peer.groups):
            peer.close(f"user {peer.uid} is not in the socket's group")
            return
        self._opened(peer)

    def _listen_again(self) -> None:
        if self._unix is not None and not self._closing:
            asyncio.get_running_loop().add_reader(self._unix.socket.fileno(), self._accept_unix)

    def _opened(self, peer: Peer) -> None:
        """Count a new connection in. Senders and local processes do not compete for places."""
        alike = [other for other in self._peers if isinstance(other, UnixPeer) is isinstance(peer, UnixPeer)]
        self._peers[peer] = asyncio.get_running_loop().time()
        if len(alike) >= _MAX_CONNECTIONS:
            # Whoever has waited longest without having said who it is gives up its place, if there is one such.
            victim = next((other for other in alike if not other.connection.established), peer)
            log.warning("too many connections", extra={"peer": victim.name, "limit": _MAX_CONNECTIONS})
            victim.close()

    def _on_lost(self, peer: Peer) -> None:
        counted = self._peers.pop(peer, None) is not None
        if not (isinstance(peer, StreamPeer) and peer.detached):
            # Both lead back to the connection: its buffers would be kept until the next full collection.
            peer.connection.awaited = peer.connection.landing = None
        self._pushes.lost(peer)
        session = self._sessions.pop(peer, None)
        if counted:
            self.metrics.tally.lost(peer, session)
        if session is not None:
            self._session_lost(session)

    def _sweep_silent(self) -> None:
        """Close connections that have been silent for longer than what they are doing allows."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for peer, since in list(self._peers.items()):
            if not peer.connection.established:
                if now - since > _HANDSHAKE_SECONDS:
                    peer.close("no handshake in time")
            elif self._pushes.of(peer) is not None:
                if now - peer.last_heard > self.config.stall:
                    peer.close(f"silent for {self.config.stall:.0f} s in the middle of a transfer")
            elif peer not in self._sessions and now - peer.last_heard > _IDLE_SECONDS:
                peer.close("idle")
        self._sweep = loop.call_later(_SWEEP_SECONDS, self._sweep_silent)

    def _on_event(self, peer: Peer, event: Event) -> None:
        """Hand an event to whom it concerns. Raises ProtocolError: the connection is closed."""
        push = self._pushes.of(peer)
        if push is not None and isinstance(event, ChunkArrived):
            push.on_event(peer, event)
            return
        if isinstance(event, Established):
            return
        message = event.message if isinstance(event, MessageArrived) else None
        body: Buffer = event.body if isinstance(event, MessageArrived) else b""
        session = self._sessions.get(peer)
        if isinstance(message, Offer):
            self._pushes.offered(peer, message)
        elif isinstance(message, Join):
            self._pushes.joined(peer, message)
        elif isinstance(message, Attach) and isinstance(peer, UnixPeer) and session is None:
            self._begin_attach(peer, message, body)
        elif isinstance(message, StatusRequest | VerifyRequest | Describe):
            self._asked(peer, message)
        elif session is not None and message is not None:
            self._on_session(session, message)
        elif push is not None:
            push.on_event(peer, event)
        elif message is not None and not getattr(message, "transfer", b""):
            # With the id of a transfer, it belongs to one that has ended, and the sender has been told. What is no
            # message is a damaged header, perhaps the OFFER's own: it has been asked for again.
            raise UnexpectedMessage(f"{type(message).__name__} outside a transfer")

    def _awaits(self, peer: Peer, message: Message, size: int) -> bool:
        """Whether a large body is due from ``peer``: 64 MiB are not collected for whoever says that they will come."""
        if isinstance(message, Attach):
            return isinstance(peer, UnixPeer) and peer not in self._sessions
        incoming = self._pushes.of(peer)
        return incoming is not None and incoming.receiver.awaits(peer.connection, message, size)

    def _on_session(self, session: Session, message: Message) -> None:
        if isinstance(message, Release):
            self._release(session, message)
        elif isinstance(message, Detach):
            session.detached = True
            session.peer.close("detached")
        else:
            session.on_message(message)

    # --- serving processes ---------------------------------------------------------------------------------

    def _begin_attach(self, peer: UnixPeer, attach: Attach, body: Buffer) -> None:
        session = Session(peer, attach)
        self._sessions[peer] = session
        self.spawn(self._attach(peer, session, attach, bytes(body)))

    async def _attach(self, peer: UnixPeer, session: Session, attach: Attach, body: bytes) -> None:
        error: TransferError | None = None
        model: Model | None = None
        try:
            resident = await self.work(Resident.decode, body)
            # From here on until it is locked nothing waits: who finds a new model waits for its first version.
            model = self.models.setdefault(attach.model, self._model(attach.model))
            model.attaching += 1
            await self._attaching.attach(model, session, attach, resident)
        except TransferError as refusal:
            error = refusal
        except ProtocolError as broken:
            error = TransferError(AbortCode.PROTOCOL, str(broken))
        except TimeoutError:
            error = TransferError(AbortCode.STALLED, "the process did not answer in time")
        except SessionLost as lost:
            log.info("a process left while attaching", extra={"model": attach.model, "why": str(lost)})
        except Exception:
            log.exception("an attach failed unexpectedly", extra={"model": attach.model, "pid": session.pid})
            error = TransferError(AbortCode.INTERNAL, "the daemon failed; its log says how")
        finally:
            if model is not None:
                model.attaching -= 1
            if error is not None:
                log.warning("attach refused", extra={"model": attach.model, "pid": session.pid, "why": str(error)})
                if not peer.closed:
                    send_abort(peer.connection, b"", error)
                peer.close()
            if model is None or session not in model.sessions:
                self._session_lost(session)

    def _session_lost(self, session: Session) -> None:
        session.on_lost()
        model = self.models.get(session.model)
        if model is None:
            return
        if model.pool is not None:
            model.pool.release_all(session.number, None if session.detached else session.pid)
            model.released.set()
        if session in model.sessions:
            model.sessions.remove(session)
            log.info("a process has gone", extra={"model": model.name, "pid": session.pid})
        self._forget_unpushed(model)

    def _forget_unpushed(self, model: Model) -> None:
        """A version that came with a process goes with the last one: the next process may bring a newer."""
        if model.ruled or model.attaching or model.incoming is not None:
            return
        if model.version is None or not model.version.pushed:
            model.version = None
            self.images.close(model)
            if not model.declared and not model.sessions and not self._closing:
                self.models.pop(model.name, None)

    def _release(self, session: Session, release: Release) -> None:
        model = self.models.get(session.model)
        if model is not None and model.pool is not None:
            model.pool.release(session.number, release.slot, release.generation)
            model.released.set()

    def _asked(self, peer: Peer, question: StatusRequest | VerifyRequest | Describe) -> None:
        """Answer, at once or when it is known. Raises LimitExceeded where too many answers are owed."""
        model = self.models.get(question.model)
        if model is None and question.model:
            send_abort(peer.connection, b"", unknown_model(self.models, self.config, question.model))
        elif isinstance(question, StatusRequest):
            models = [model] if model is not None else list(self.models.values())
            peer.send(StatusIs(), encode(questions.status(models, self.images, self._started)))
        elif model is not None and isinstance(question, VerifyRequest):
            self._verifier.ask(peer, model)
        elif model is not None and isinstance(question, Describe):
            self._describer.ask(peer, model, question.structure)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that ends with the daemon at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
