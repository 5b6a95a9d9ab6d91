"""What a sender asks its shell to do next."""

from typing import NamedTuple


class SendChunk(NamedTuple):
    """Read this chunk and pass it to ``Sender.send_chunk``."""

    chunk: int


class DigestChunk(NamedTuple):
    """The receiver holds this chunk already: read it and pass it to ``Sender.digest_chunk`` only."""

    chunk: int
