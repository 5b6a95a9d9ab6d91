"""What the daemon sees of a connection, whichever kind of socket carries it."""

from typing import Protocol

from shipd.transfer.times import Times
from shipproto.connection import Connection
from shipproto.errors import ProtocolError
from shipproto.frame import Buffer
from shipproto.messages import Message


class Peer(Protocol):
    """One connection of the daemon's. Its events go to the handler it was made with."""

    connection: Connection
    name: str
    """The peer's address, or its process, for messages."""
    times: Times
    """What its work took."""
    last_heard: float
    """Loop time at which bytes last arrived."""
    error: ProtocolError | None
    """What the peer did wrong, if that is why it is being closed."""

    def send(self, message: Message, body: Buffer = b"") -> None:
        """Queue a message and write what is queued. A connection that is gone swallows it."""

    def flush(self) -> None:
        """Write what the connection has queued."""

    def hold_back(self, much: bool) -> None:
        """Take nothing more from the peer for now, or go on."""

    def close(self, reason: str = "") -> None:
        """Write what is queued and close."""

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
