"""What a receiver tells its shell: what has come of the bytes that arrived, in the past tense."""

from dataclasses import dataclass
from typing import NamedTuple

from shipproto.connection import Connection
from shipproto.errors import TransferError
from shipproto.lent import Lent


@dataclass(frozen=True, slots=True)
class StructureArrived:
    """The offered structure, still encoded, and with the digest that was offered.

    The shell has it decoded by ``decode_structure``, on any thread, and then accepts or refuses.
    """

    encoded: bytes


class ChunkHeld(NamedTuple):
    """A chunk is in its place, intact and digested."""

    chunk: int


@dataclass(frozen=True, eq=False, slots=True)
class RunToDecode:
    """A coded run has arrived intact, and its chunks are its own: nothing else writes to them.

    The shell decodes ``payload`` into the image, from the start of the first chunk to the end of the last
    (``Layout.span``), on any thread, and then calls ``decoded`` or ``undecodable``, whatever has become of the transfer
    and its connections meanwhile. Until then the image is not to be given back.
    """

    chunks: range
    codec: int
    payload: memoryview
    connection: Connection
    sequence: int


@dataclass(frozen=True, slots=True)
class FilesLent:
    """The sender has lent so many open files, which hold chunks as ``lent`` says.

    The shell takes the descriptors, has ``Receiver.lend`` say what is to be read, checks the files' sizes
    (``Lent.ends``), reads the chunks into the image, and says ``decoded`` of each run that is there. Where one cannot
    be read the transfer is over, and ``undecodable`` says that nothing reads into the image for it any more.
    """

    files: int
    lent: Lent


@dataclass(frozen=True, slots=True)
class ReadyToVerify:
    """Everything is held and the sender's digests are known; the shell calls ``verify``, on any thread."""


@dataclass(frozen=True, slots=True)
class CommitRequested:
    """The sender wants the staged version swapped in."""


@dataclass(frozen=True, slots=True)
class TransferAborted:
    """The sender ended the transfer."""

    error: TransferError


ReceiverEvent = (
    StructureArrived | ChunkHeld | RunToDecode | FilesLent | ReadyToVerify | CommitRequested | TransferAborted
)
