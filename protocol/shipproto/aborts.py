"""How an error travels: the ABORT that says it, and the error that a peer's ABORT stands for."""

import msgspec

from shipproto.connection import Connection
from shipproto.errors import AbortCode, MalformedMessage, TransferError
from shipproto.frame import Buffer
from shipproto.limits import MAX_NAME, MAX_TEXT
from shipproto.messages import Abort
from shipproto.names import harmless


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
