"""What a peer has said before it closed a connection is heard, whatever was being written meanwhile."""

import socket

import pytest

from shipd.transfer.lane import ConnectionLost, Lane
from shipproto.aborts import send_abort
from shipproto.connection import MessageArrived
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import LEAF_SIZE
from shipproto.messages import Abort
from tests.support.link import handshaken, output_of
from tests.support.pair import TRANSFER


def test_whoever_loses_a_connection_in_the_middle_of_writing_is_told_what_came_before() -> None:
    left, right = handshaken()
    here, there = socket.socketpair()
    lane = Lane(here, "a daemon", connection=left)
    send_abort(right, TRANSFER, TransferError(AbortCode.BUSY, "another push is under way"))
    there.sendall(output_of(right))
    # More than both buffers take: it is still being written when the end of the stream is found.
    for chunk in range(16):
        left.send_data(chunk, memoryview(bytes(LEAF_SIZE)))
    there.shutdown(socket.SHUT_WR)
    with here, there:
        with pytest.raises(ConnectionLost) as lost:
            lane.drain(60.0)
        lane.close()
    assert [type(event.message) for event in lost.value.heard if isinstance(event, MessageArrived)] == [Abort]
