"""What a connection sends: its frames in their order, what is kept of them, and what goes again when the peer asks.

Of a chunk, or a coded run of them, only the numbers are kept: the bytes are read again from where they came from. Of
any other frame everything is kept for a while.
"""

import dataclasses
from collections import OrderedDict, deque
from dataclasses import dataclass

from shipproto.errors import LimitExceeded, UnexpectedMessage
from shipproto.frame import FLAG_MORE, Buffer, encode_frame
from shipproto.headers import check_body, decode_header, encode_data_header, encode_header
from shipproto.limits import MAX_CHUNK_ATTEMPTS, MAX_PAYLOAD, RETAINED_CONTROL_FRAMES
from shipproto.messages import BY_TYPE, Body, Coded, Data, Message, Nack


@dataclass(slots=True)
class _Retained:
    """A control frame that the peer may ask for again."""

    kind: int
    flags: int
    header: bytes
    payload: Buffer
    attempts: int = 1


class Outbox:
    """One side's frames of one connection, numbered from 0."""

    def __init__(self) -> None:
        self.frames_resent = 0
        self._output: list[Buffer] = []
        self._sequence = 0
        self._next_body = 1
        self._control: OrderedDict[int, _Retained] = OrderedDict()
        # Pieces of bodies that went again unasked: the peer may still ask for them by their old numbers.
        self._moved: deque[int] = deque(maxlen=RETAINED_CONTROL_FRAMES)
        self._chunks_of: dict[int, range | int] = {}

    def __bool__(self) -> bool:
        """Whether anything is queued."""
        return bool(self._output)

    def take(self) -> list[Buffer]:
        """Everything queued, in order; the queue is empty afterwards."""
        output, self._output = self._output, []
        return output

    def put(self, message: Message, body: Buffer = b"") -> None:
        """Queue a message. A body of more than MAX_PAYLOAD bytes is split over BODY frames."""
        check_body(message, len(body))
        if len(body) <= MAX_PAYLOAD:
            self._put_frame(_Retained(message.TYPE, 0, encode_header(message), body))
            return
        content = memoryview(body)
        body_id = self._next_body
        self._next_body += 1
        announced = type(message)(**{**_fields(message), "body_id": body_id, "body_size": len(content)})
        self._put_frame(_Retained(message.TYPE, FLAG_MORE, encode_header(announced), content[:MAX_PAYLOAD]))
        for offset in range(MAX_PAYLOAD, len(content), MAX_PAYLOAD):
            piece = encode_header(Body(body_id=body_id, offset=offset))
            self._put_frame(_Retained(Body.TYPE, 0, piece, content[offset : offset + MAX_PAYLOAD]))

    def put_chunk(self, chunk: int, content: memoryview, crc: int | None) -> None:
        """Queue a chunk, which is not copied; ``crc`` is its CRC32C, where that is known already."""
        sequence = self._sequence
        head = encode_frame(Data.TYPE, 0, sequence, encode_data_header(chunk), content, crc)
        self._sequence += 1
        self._chunks_of[sequence] = chunk
        self._output += (head, content)

    def put_run(self, run: Coded, payload: Buffer, crc: int | None) -> None:
        """Queue a coded run, as ``put_chunk``."""
        sequence = self._sequence
        self._output.append(encode_frame(Coded.TYPE, 0, sequence, encode_header(run), payload, crc))
        self._sequence += 1
        self._chunks_of[sequence] = range(run.chunk, run.chunk + run.chunks)
        if len(payload):
            self._output.append(payload)

    def resend(self, nack: Nack) -> list[int]:
        """Queue again what the peer asks for, and return the chunks, which are the caller's to send again.

        Raises UnexpectedMessage for what was not sent lately, LimitExceeded for what keeps arriving damaged.
        """
        chunks: list[int] = []
        for sequence in nack.sequences:
            if sequence in self._chunks_of:
                sent = self._chunks_of.pop(sequence)
                chunks += (sent,) if isinstance(sent, int) else sent
            elif sequence in self._control:
                self._resend_control(sequence)
            elif sequence in self._moved:
                self._moved.remove(sequence)
                continue
            else:
                raise UnexpectedMessage(f"the peer asks for frame {sequence}, which it has not been sent lately")
            self.frames_resent += 1
        return chunks

    def _put_frame(self, frame: _Retained) -> None:
        sequence = self._sequence
        head = encode_frame(frame.kind, frame.flags, sequence, frame.header, frame.payload)
        self._sequence += 1
        self._control[sequence] = frame
        if len(self._control) > RETAINED_CONTROL_FRAMES:
            self._control.popitem(last=False)
        self._output.append(head)
        if len(frame.payload):
            self._output.append(frame.payload)

    def _resend_control(self, sequence: int) -> None:
        frame = self._control.pop(sequence)
        if frame.attempts >= MAX_CHUNK_ATTEMPTS:
            name = BY_TYPE[frame.kind].__name__
            raise LimitExceeded(f"{name} arrived damaged at the peer {MAX_CHUNK_ATTEMPTS} times")
        self._put_frame(dataclasses.replace(frame, attempts=frame.attempts + 1))
        if not frame.flags & FLAG_MORE:
            return
        # The peer could not know what the pieces that followed belonged to, and has dropped them.
        body_id = decode_header(frame.kind, frame.header).body_id  # type: ignore[attr-defined]
        for other, piece in list(self._control.items()):
            if piece.kind == Body.TYPE:
                body = decode_header(piece.kind, piece.header)
                if isinstance(body, Body) and body.body_id == body_id:
                    del self._control[other]
                    self._moved.append(other)
                    self._put_frame(piece)


def _fields(message: Message) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__struct_fields__}
