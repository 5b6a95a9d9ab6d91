"""The way of chunks from their source into the kernel: the innermost loop of a push, on whichever thread sends.

Between two chunks of half a megabyte nothing of what Python needs is left in the core's caches, so every object that
is touched here costs more than it seems to: this is why runs of chunks go through one function, and why it looks as it
does.
"""

import time
from collections.abc import Callable
from typing import Final

from shipd.client.chunks import ChunkReader
from shipd.transfer.lane import ConnectionLost, Lane
from shipproto.connection import Event
from shipproto.digests import digest_and_crc
from shipproto.messages import SAME
from shipproto.sender import Sender

RUN: Final = 8
"""Chunks that are sent between two looks at what the receiver says: 4 MiB."""


def send_chunks(
    sender: Sender, reader: ChunkReader, lane: Lane, chunks: range, drain: Callable[[], list[Event]]
) -> list[Event]:
    """Read, digest, frame and write a run of chunks that were handed out for ``lane``; what arrived meanwhile.

    Of chunks that the receiver has told to have in its version already, only that is sent.

    ``drain`` waits until what is queued on the lane is written. What the work took is added to the lane's times.
    Raises TransferError if a tensor's bytes have changed, and what ``drain`` raises.
    """
    clock, read, queue, transmit, lends = (
        time.monotonic,
        reader.read,
        lane.connection.send_data,
        lane.transmit,
        reader.lends,
    )
    large = chunks.start < sender.layout.large_chunks
    told = sender.agreed.told and not sender.raw_only(chunks.start)
    same: range = range(0)
    digests: list[bytes] = []
    events: list[Event] = []
    reading = digesting = checking = writing = 0.0
    now = clock()
    try:
        for chunk in chunks:
            content = read(chunk)
            have = clock()
            crc = None
            if large:
                digest, crc = digest_and_crc(content)
                digests.append(digest)
            else:
                sender.digest_chunk(chunk, content)
            digested = clock()
            if told and sender.held_digest(chunk) == (digests[-1] if large else sender.digests.chunk_digest(chunk)):
                reading += have - now
                digesting += digested - have
                now = digested
                lane.bytes_unchanged += len(content)
                same = range(same.start if same else chunk, chunk + 1)
                continue
            if same:
                lane.connection.send_coded(same, SAME, b"")
                same = range(0)
            queue(chunk, content, crc)
            framed = clock()
            # What is not lent may be a buffer that the next chunk is read into: until then the kernel must have it all.
            if lends(content) and transmit(content):
                then = clock()
                writing += then - framed
            else:
                events += drain()
                then = clock()
            reading += have - now
            digesting += digested - have
            checking += framed - digested
            now = then
        if same:
            lane.connection.send_coded(same, SAME, b"")
            events += drain()
    except ConnectionLost as lost:
        lost.heard = (*events, *lost.heard)
        raise
    if large:
        sender.digested(chunks, digests)
    sender.sent(chunks)
    times = lane.times
    times.read += reading
    times.digest += digesting
    times.check += checking
    times.write += writing
    return events
