"""One connection as a machine without I/O: received bytes in, events out; messages in, bytes to send out.

The shell asks where the next bytes belong, receives into exactly that memory and says how many arrived:

    view = connection.get_buffer()
    connection.buffer_updated(socket.recv_into(view))
    for event in connection.events(): ...
    socket.sendmsg(connection.take_output())

A DATA payload is received straight into the view that ``landing`` names for its chunk, usually the image
itself, and its CRC32C is computed piece by piece while the bytes are in cache; the payload of a coded run into
memory of its own. A frame whose header or payload fails its check is answered by a NACK and costs that one frame;
everything worse raises ProtocolError, after which the connection is of no more use.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from crc32c import crc32c

from shipproto.errors import (
    BadPrelude,
    ForeignPeer,
    LimitExceeded,
    LocalError,
    MalformedMessage,
    ProtocolError,
    UnexpectedMessage,
)
from shipproto.frame import FLAG_MORE, KNOWN_FLAGS, MAGIC, PRELUDE_SIZE, Buffer, Prelude, decode_prelude
from shipproto.handshake import Handshake, Step
from shipproto.headers import check_body, decode_header
from shipproto.limits import MAX_HEADER, MAX_PAYLOAD
from shipproto.messages import SAME, Abort, Auth, Body, Coded, Data, Hello, Message, Nack, Ping
from shipproto.outbox import Outbox

Landing = Callable[[Data | Coded, int], memoryview | None]
"""Given the header of a chunk or of a coded run, and its payload's size: the memory that it is received into, or None
to receive it into nothing. Raises ProtocolError where no such thing was asked for."""

Awaited = Callable[[Message, int], bool]
"""Given a message whose body comes in several frames, and the body's size: whether anybody waits for it. Where nobody
does, its pieces are received into nothing. Raises ProtocolError where it must not come now."""

_LANDS: Final = (Data, Coded)
"""Messages whose payload goes where ``landing`` says."""

_READ_AHEAD: Final = 64
"""Bytes asked for beyond a prelude: the header of a DATA frame usually arrives with it, in one call."""

_MAX_ASSEMBLIES: Final = 4
"""Bodies under way at once, each of another type: no side has two of one type to say at the same time."""


@dataclass(frozen=True, slots=True)
class Established:
    """The handshake is done. ``peer`` is the other side's HELLO."""

    peer: Hello


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """A message and its whole body."""

    message: Message
    body: Buffer


class ChunkArrived(NamedTuple):
    """A chunk is in the memory that ``landing`` named, and intact."""

    chunk: int
    content: memoryview


@dataclass(frozen=True, slots=True)
class ChunkDamaged:
    """A chunk arrived damaged; the memory that ``landing`` named has been scribbled on. A NACK is on its way.

    ``chunk`` is None where the header was damaged, so that nobody knows which it was.
    """

    chunk: int | None
    sequence: int


@dataclass(frozen=True, slots=True)
class RunArrived:
    """A coded run is in the memory that ``landing`` gave, and intact; whether it decodes is the caller's to find out.

    Where it does not, ``nack`` the sequence number.
    """

    chunks: range
    codec: int
    payload: memoryview
    sequence: int


@dataclass(frozen=True, slots=True)
class RunDamaged:
    """A coded run arrived damaged. A NACK is on its way."""

    chunks: range
    sequence: int


@dataclass(frozen=True, slots=True)
class ChunksRefused:
    """The peer received these chunks damaged, or in a run that it could not decode, and wants them again."""

    chunks: tuple[int, ...]


Event = Established | MessageArrived | ChunkArrived | ChunkDamaged | RunArrived | RunDamaged | ChunksRefused


@dataclass(slots=True)
class _Assembly:
    """A body on its way in. It takes no more memory than has arrived, whatever size was announced."""

    message: Message
    size: int
    pieces: dict[int, memoryview]


class Connection:
    """One side of one connection. ``nonce`` is NONCE_SIZE random bytes; the rest of what it says of itself is as in
    ``Handshake``."""

    def __init__(
        self,
        *,
        initiator: bool,
        nonce: bytes,
        agent: str,
        token: bytes | None = None,
        capabilities: Sequence[str] = (),
        landing: Landing | None = None,
    ) -> None:
        self.landing = landing
        self.accepts: tuple[type[Message], ...] | None = None
        """Messages that this side has any use for, None for all: others are refused before their bodies arrive."""
        self.awaited: Awaited | None = None
        """Which bodies of more than MAX_PAYLOAD bytes are put together, None for all of them."""
        self._handshake = Handshake(
            initiator=initiator, nonce=nonce, agent=agent, token=token, capabilities=capabilities
        )
        self._events: deque[Event] = deque()
        self._failed: ProtocolError | None = None

        # Receiving: prelude and header are gathered in _head, then the payload goes where it belongs.
        self._head = memoryview(bytearray(PRELUDE_SIZE + MAX_HEADER))
        self._have = 0
        self._expected = 0
        self._prelude: Prelude | None = None
        self._message: Message | None = None
        self._header = b""
        self._payload: memoryview | None = None
        self._received = 0
        self._crc = 0
        self._discarding = False
        self._waste: memoryview | None = None
        self._assemblies: dict[int, _Assembly] = {}

        # Frames that came intact and were of no use: all that were, and those that are still to be asked for.
        self._useless: set[int] = set()
        self._refusals: deque[int] = deque()

        self._outbox = Outbox()
        self.bytes_received = 0

        if opening := self._handshake.opening():
            self._outbox.put(opening)

    # --- state ---------------------------------------------------------------------------------------------

    @property
    def established(self) -> bool:
        """Whether the handshake is done."""
        return self._handshake.step is Step.DONE

    @property
    def peer(self) -> Hello:
        """The other side's HELLO."""
        if self._handshake.peer is None:
            raise LocalError("the handshake is not done")
        return self._handshake.peer

    @property
    def frames_resent(self) -> int:
        """Frames sent again because the peer asked for them: chunks as well as messages."""
        return self._outbox.frames_resent

    # --- receiving -----------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Where the next received bytes belong; never empty. Valid until ``buffer_updated``."""
        if self._payload is not None:
            return self._payload[self._received :]
        wanted = PRELUDE_SIZE + _READ_AHEAD
        if self._prelude is not None:
            wanted = PRELUDE_SIZE + self._prelude.header_length
        return self._head[self._have : max(wanted, self._have + 1)]

    def get_buffers(self) -> list[memoryview]:
        """The same for a scattering read: what is left of a payload, and where the next frame begins."""
        if self._payload is None:
            return [self.get_buffer()]
        return [self._payload[self._received :], self._head[: PRELUDE_SIZE + _READ_AHEAD]]

    def buffer_updated(self, count: int) -> None:
        """``count`` bytes have been received into the last ``get_buffer`` or ``get_buffers``. Raises ProtocolError."""
        if self._failed is not None:
            raise self._failed
        self.bytes_received += count
        try:
            if self._payload is not None:
                rest = len(self._payload) - self._received
                self._take_payload(min(count, rest))
                count -= rest
            if count > 0:
                self._have += count
                self._take_head()
        except ProtocolError as error:
            self._failed = error
            for message in self._handshake.last_words(error) if not self.established else ():
                self._outbox.put(message)
            raise

    def receive(self, data: Buffer) -> None:
        """Take bytes from anywhere, by copying; for tests and for callers to whom copies do not matter."""
        data = memoryview(data)
        while data:
            view = self.get_buffer()
            count = min(len(view), len(data))
            view[:count] = data[:count]
            self.buffer_updated(count)
            data = data[count:]

    def withdraw(self) -> None:
        """Take back the memory that ``landing`` gave: the rest of what is under way is received into nothing.

        To be called between ``buffer_updated`` and the next ``get_buffer``.
        """
        if isinstance(self._message, _LANDS) and self._payload is not None and not self._discarding:
            self._payload = self._nothing(len(self._payload))
            self._discarding = True

    @property
    def has_events(self) -> bool:
        """Whether ``events`` has any."""
        return bool(self._events)

    def events(self) -> Iterator[Event]:
        """The events since the last call, oldest first."""
        while self._events:
            yield self._events.popleft()

    def _take_payload(self, count: int) -> None:
        assert self._payload is not None
        if not self._discarding:
            self._crc = crc32c(self._payload[self._received : self._received + count], self._crc)
        self._received += count
        if self._received == len(self._payload):
            self._end_frame()

    def _take_head(self) -> None:
        """Parse whatever lies in _head: rest of a frame, whole small frames, the start of the next."""
        at = 0
        while True:
            available = self._have - at
            if self._prelude is None:
                if self._expected == 0 and available >= len(MAGIC) and bytes(self._head[: len(MAGIC)]) != MAGIC:
                    raise ForeignPeer("the peer does not speak the shipd protocol", bytes(self._head[: self._have]))
                if available < PRELUDE_SIZE:
                    break
                self._prelude = decode_prelude(self._head[at : at + PRELUDE_SIZE], self._expected)
                self._expected += 1
            end = PRELUDE_SIZE + self._prelude.header_length
            if available < end:
                break
            self._begin_frame(self._prelude, self._head[at + PRELUDE_SIZE : at + end])
            at += end
            assert self._payload is not None
            count = min(self._have - at, len(self._payload))
            self._payload[:count] = self._head[at : at + count]
            at += count
            self._take_payload(count)
            if self._payload is not None:
                break
        if at and at < self._have:
            # bytes(): the two ranges of the same buffer may overlap.
            self._head[: self._have - at] = bytes(self._head[at : self._have])
        self._have -= at

    def _begin_frame(self, prelude: Prelude, header: memoryview) -> None:
        self._message = None
        self._received = 0
        self._crc = 0
        self._discarding = False
        intact = crc32c(header) == prelude.header_crc
        message: Message | None = None
        if intact:
            message = self._message = decode_header(prelude.type, header)
            self._check_allowed(prelude, message)
            if not self.established:
                self._header = bytes(header)
        elif not self.established:
            raise BadPrelude("the handshake arrived damaged")
        if isinstance(message, _LANDS):
            if self.landing is None:
                raise UnexpectedMessage(f"{type(message).__name__.upper()} before anything was asked for")
            memory = self.landing(message, prelude.payload_length)
            if memory is not None and len(memory) != prelude.payload_length:
                raise LocalError("landing returned memory of another size")
            self._payload = memory
        elif intact:
            self._payload = memoryview(bytearray(prelude.payload_length))
        else:
            self._payload = None
        if self._payload is None:
            self._discarding = True
            self._payload = self._nothing(prelude.payload_length)

    def _nothing(self, size: int) -> memoryview:
        if self._waste is None:
            self._waste = memoryview(bytearray(MAX_PAYLOAD))
        return self._waste[:size]

    def _check_allowed(self, prelude: Prelude, message: Message) -> None:
        if prelude.flags & ~KNOWN_FLAGS:
            raise MalformedMessage(f"{type(message).__name__} with unknown flags {prelude.flags:#x}")
        if not self.established:
            if prelude.payload_length or prelude.flags:
                raise UnexpectedMessage(f"{type(message).__name__} with a payload before the handshake is done")
            if not isinstance(message, Hello | Auth | Abort):
                raise UnexpectedMessage(f"{type(message).__name__} before the handshake is done")
            return
        if self.accepts is not None and not isinstance(message, self.accepts):
            raise UnexpectedMessage(f"{type(message).__name__} is not for this side")
        if isinstance(message, Data | Body):
            if prelude.flags or not prelude.payload_length:
                raise MalformedMessage(f"{type(message).__name__} needs a payload and takes no flags")
            return
        if isinstance(message, Coded):
            if prelude.flags or (message.codec == SAME) is bool(prelude.payload_length):
                raise MalformedMessage(f"Coded takes no flags, and a payload exactly where the codec is not {SAME}")
            return
        announced = getattr(message, "body_size", 0)
        more = bool(prelude.flags & FLAG_MORE)
        # There is one way to cut a body: full payloads, and a last one that may be shorter.
        cut = announced > MAX_PAYLOAD == prelude.payload_length
        if more != cut or bool(announced) != more or bool(getattr(message, "body_id", 0)) != more:
            raise MalformedMessage(f"{type(message).__name__} announces its body inconsistently")
        check_body(message, announced or prelude.payload_length)

    def _end_frame(self) -> None:
        prelude, message, payload = self._prelude, self._message, self._payload
        assert prelude is not None and payload is not None
        self._prelude = self._message = self._payload = None
        if message is None or (not self._discarding and self._crc != prelude.payload_crc):
            if not self.established:
                raise BadPrelude("the handshake arrived damaged")
            if isinstance(message, Coded):
                self._events.append(RunDamaged(_chunks(message), prelude.sequence))
            elif message is None or isinstance(message, Data):
                self._events.append(ChunkDamaged(message.chunk if message is not None else None, prelude.sequence))
            self.send(Nack(sequences=(prelude.sequence,)))
            return
        if isinstance(message, Data):
            if not self._discarding:
                self._events.append(ChunkArrived(message.chunk, payload))
            return
        if isinstance(message, Coded):
            if not self._discarding:
                self._events.append(RunArrived(_chunks(message), message.codec, payload, prelude.sequence))
            return
        if not self.established:
            for reply in self._handshake.receive(message, self._header):
                self._outbox.put(reply)
            if self._handshake.step is Step.DONE:
                self._events.append(Established(self.peer))
            return
        self._dispatch(message, payload, prelude)

    def _dispatch(self, message: Message, payload: memoryview, prelude: Prelude) -> None:
        if isinstance(message, Nack):
            if chunks := self._outbox.resend(message):
                self._events.append(ChunksRefused(tuple(chunks)))
        elif isinstance(message, Ping):
            if message.reply:
                self.send(Ping())
        elif isinstance(message, Body):
            self._take_piece(message, payload)
        elif prelude.flags & FLAG_MORE:
            if len(self._assemblies) >= _MAX_ASSEMBLIES:
                raise LimitExceeded(f"more than {_MAX_ASSEMBLIES} bodies at once")
            body_id: int = message.body_id  # type: ignore[attr-defined]  # _check_allowed saw body_size beside it
            size: int = message.body_size  # type: ignore[attr-defined]
            if body_id in self._assemblies:
                raise MalformedMessage(f"body {body_id} is announced twice")
            if any(type(under_way.message) is type(message) for under_way in self._assemblies.values()):
                raise LimitExceeded(f"{type(message).__name__} announces a body while that of another is under way")
            if self.awaited is not None and not self.awaited(message, size):
                return
            self._assemblies[body_id] = _Assembly(message, size, {0: payload})
        elif isinstance(message, Hello | Auth):
            raise UnexpectedMessage(f"{type(message).__name__} after the handshake")
        else:
            self._events.append(MessageArrived(message, payload))

    def _take_piece(self, piece: Body, payload: memoryview) -> None:
        assembly = self._assemblies.get(piece.body_id)
        if assembly is None:
            # Its message was damaged and is on its way again, with every piece.
            return
        at, beyond = divmod(piece.offset, MAX_PAYLOAD)
        if beyond or not at or len(payload) != min(MAX_PAYLOAD, assembly.size - piece.offset):
            raise MalformedMessage(
                f"a piece of {len(payload)} bytes at {piece.offset} does not fit a body of {assembly.size}"
            )
        assembly.pieces[at] = payload
        if len(assembly.pieces) == -(-assembly.size // MAX_PAYLOAD):
            del self._assemblies[piece.body_id]
            body = b"".join(assembly.pieces[number] for number in sorted(assembly.pieces))
            self._events.append(MessageArrived(assembly.message, memoryview(body)))

    # --- sending -------------------------------------------------------------------------------------------

    def send(self, message: Message, body: Buffer = b"") -> None:
        """Queue a message. A body of more than MAX_PAYLOAD bytes is split over BODY frames."""
        if not self.established:
            raise LocalError(f"{type(message).__name__} before the handshake is done")
        self._outbox.put(message, body)

    def send_data(self, chunk: int, content: memoryview, crc: int | None = None) -> None:
        """Queue a chunk. ``content`` is not copied and must not change until it has been written; ``crc`` is its
        CRC32C, where that is known already."""
        self._outbox.put_chunk(chunk, content, crc)

    def send_coded(self, chunks: range, codec: int, payload: Buffer, crc: int | None = None) -> None:
        """Queue a run of chunks that follow each other, as ``codec`` says it. ``payload`` and ``crc`` as in
        ``send_data``."""
        if not chunks or chunks.step != 1 or (codec == SAME) is bool(len(payload)):
            raise LocalError(f"no coded run: codec {codec}, {len(payload)} bytes, chunks {chunks}")
        self._outbox.put_run(Coded(chunk=chunks.start, chunks=len(chunks), codec=codec), payload, crc)

    def nack(self, sequence: int) -> None:
        """The frame of this number arrived intact and is of no use, as a run that does not decode: ask for its chunks
        again, once. On any thread: it leaves with what is queued next, or is taken next."""
        if not 0 <= sequence < self._expected or sequence in self._useless:
            raise LocalError(f"frame {sequence} has not arrived, or was asked for already")
        self._useless.add(sequence)
        self._refusals.append(sequence)

    def take_output(self) -> list[Buffer]:
        """Everything queued, in order, for one gathering write; the queue is empty afterwards."""
        while self._refusals:
            self._outbox.put(Nack(sequences=(self._refusals.popleft(),)))
        return self._outbox.take()

    @property
    def has_output(self) -> bool:
        """Whether anything is queued."""
        return bool(self._outbox or self._refusals)


def _chunks(run: Coded) -> range:
    return range(run.chunk, run.chunk + run.chunks)
