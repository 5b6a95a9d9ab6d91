"""An established acceptor, and streams of frames that it expects next: for tests of one Connection."""

from shipproto.connection import Connection
from shipproto.messages import Commit
from tests.support import naive
from tests.support.link import feed, nonce
from tests.support.naive import Stream

TRANSFER = bytes(16)
COMMIT = Commit(transfer=TRANSFER)


def acceptor(**options) -> Connection:
    """An established acceptor that expects frame 1 and whose HELLO has been taken."""
    connection = Connection(initiator=False, nonce=nonce(1), agent="here", **options)
    feed(connection, bytes(greeted().data))
    return connection


def greeted() -> Stream:
    return Stream().add("Hello", naive.hello(nonce(2), "there"))


def after_hello() -> Stream:
    return Stream(sequence=1)
