"""Messages of a transfer, from OFFER to COMMITTED."""

from itertools import pairwise
from typing import Annotated, Final

import msgspec

from shipproto.limits import (
    MAX_BASES,
    MAX_CODECS,
    MAX_DETAIL_BODY,
    MAX_DIGESTS_BODY,
    MAX_IMAGE_BYTES,
    MAX_LANES,
    MAX_LENT_FILES,
    MAX_NAME,
    MAX_PROCESSES,
    MAX_RANGES,
    MAX_STRUCTURE_BODY,
    MAX_TENSORS,
)
from shipproto.messages.fields import (
    NO_TIME,
    U32,
    U63,
    CodecNumber,
    Digest,
    Label,
    LaneNumber,
    Message,
    Metadata,
    OptionalDigest,
    OptionalLabel,
    OptionalTransferId,
    Seconds,
    Text,
    TransferId,
    Word,
    sixteen_or_none,
)

SAME: Final = 1
"""The codec of a run that equals the base's. The other numbers mean nothing to the protocol core."""


class Offer(Message, frozen=True, kw_only=True):
    """A version for a model. Sent on every connection of the transfer, also to resume it."""

    TYPE = 16
    bases: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_BASES)] = ()
    """Versions that the sender can make deltas from."""
    incremental: bool = False
    """The sender would rather know what the receiver holds than send what has not changed."""
    label: OptionalLabel = ""
    metadata: Metadata = msgspec.field(default_factory=dict)
    model: Label
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_IMAGE_BYTES)]
    partial: bool = False
    """Tensors of the model that are not offered keep the values of the current version."""
    resumed: bool = False
    """The receiver has accepted this transfer before."""
    structure: Digest
    tensors: Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSORS)]
    transfer: TransferId

    def flaw(self) -> str:
        return "" if any(self.transfer) else "a transfer's id is not all zeros"


class StructureWanted(Message, frozen=True, kw_only=True):
    """The receiver does not know the offered structure: send it."""

    TYPE = 17
    transfer: TransferId


class StructureIs(Message, frozen=True, kw_only=True):
    """From the sender: the offered structure. From the receiver: the one that rules, where it is another."""

    TYPE = 18
    MAX_BODY = MAX_STRUCTURE_BODY
    body_id: U32 = 0
    body_size: U63 = 0
    transfer: TransferId


class Want(Message, frozen=True, kw_only=True):
    """The chunks that the receiver lacks, as ranges, of the structure with this digest."""

    TYPE = 19
    MAX_BODY = MAX_RANGES * 8
    base: OptionalDigest = b""
    """The receiver's current version, laid out by that structure: what coded runs may build on."""
    body_id: U32 = 0
    body_size: U63 = 0
    codecs: Annotated[tuple[CodecNumber, ...], msgspec.Meta(max_length=MAX_CODECS)] = ()
    """What it decodes."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)] = 1
    """How many connections it takes chunks on, this one included."""
    speeds: Annotated[tuple[U32, ...], msgspec.Meta(max_length=MAX_CODECS)] = ()
    """How fast it decodes each of them, in MB/s of content; 0 where it does not know."""
    structure: Digest
    transfer: TransferId

    def flaw(self) -> str:
        if any(number >= following for number, following in pairwise(self.codecs)):
            return "codecs do not ascend"
        if len(self.speeds) != len(self.codecs):
            return "speeds are not those of the codecs"
        if SAME in self.codecs and not self.base:
            return f"codec {SAME} without a base"
        return sixteen_or_none("base", self.base)


class Data(Message, frozen=True, kw_only=True):
    """One chunk, whole, as it lies in the image."""

    TYPE = 20
    chunk: U32


class Progress(Message, frozen=True, kw_only=True):
    """How many chunks are held, and what the receiver is doing."""

    TYPE = 21
    held: U32
    stage: Word
    transfer: TransferId


class Finish(Message, frozen=True, kw_only=True):
    """Everything wanted was sent. The body has the digest of every tensor, in the structure's order."""

    TYPE = 22
    MAX_BODY = MAX_DIGESTS_BODY
    body_id: U32 = 0
    body_size: U63 = 0
    digest: Digest
    label: Label
    transfer: TransferId


class Staged(Message, frozen=True, kw_only=True):
    """The version is verified and every serving process is ready to swap to it."""

    TYPE = 23
    DURATIONS = ("stage_seconds",)
    processes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESSES)]
    stage_seconds: Seconds = NO_TIME
    transfer: TransferId


class Commit(Message, frozen=True, kw_only=True):
    """Swap."""

    TYPE = 24
    transfer: TransferId


class Committed(Message, frozen=True, kw_only=True):
    """The version is the current one. ``stale`` names the processes that could not follow and are fenced.

    Where the receiver's time went: in receiving, checking and digesting, over all connections; in decoding; in
    verifying; and in the process that paused longest, in waiting for the last hold and in copying.
    """

    TYPE = 25
    DURATIONS = (
        "check_seconds",
        "copy_seconds",
        "decode_seconds",
        "digest_seconds",
        "receive_seconds",
        "verify_seconds",
        "wait_seconds",
    )
    already: bool = False
    """It had been the current version before this push."""
    check_seconds: Seconds = NO_TIME
    copy_seconds: Seconds = NO_TIME
    decode_seconds: Seconds = NO_TIME
    digest: Digest
    digest_seconds: Seconds = NO_TIME
    label: Label
    live: OptionalDigest = b""
    """Version digest of all that is live, where that is more than what was sent: after a partial offer."""
    pause_seconds: Seconds | None = None
    """The longest pause of any serving process; None where nothing is attached."""
    receive_seconds: Seconds = NO_TIME
    stale: Annotated[tuple[Word, ...], msgspec.Meta(max_length=MAX_PROCESSES)] = ()
    swapped: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESSES)] = 0
    transfer: TransferId
    verify_seconds: Seconds = NO_TIME
    wait_seconds: Seconds = NO_TIME

    def flaw(self) -> str:
        return sixteen_or_none("live", self.live)


class Abort(Message, frozen=True, kw_only=True):
    """The transfer, or the request, has ended without effect. The body may list details, one text each."""

    TYPE = 26
    MAX_BODY = MAX_DETAIL_BODY
    body_id: U32 = 0
    body_size: U63 = 0
    code: Word
    message: Text = ""
    tensor: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    transfer: OptionalTransferId = b""

    def flaw(self) -> str:
        return sixteen_or_none("transfer", self.transfer)


class Join(Message, frozen=True, kw_only=True):
    """This connection is a further lane of a transfer that is being received on another one."""

    TYPE = 27
    lane: LaneNumber
    transfer: TransferId


class Joined(Message, frozen=True, kw_only=True):
    """DATA of the transfer is taken on this connection."""

    TYPE = 28
    lane: LaneNumber
    transfer: TransferId


class Coded(Message, frozen=True, kw_only=True):
    """A run of chunks as a codec says it: with SAME nothing more, else the codec's payload."""

    TYPE = 29
    chunk: U32
    chunks: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFF)]
    codec: CodecNumber


class Held(Message, frozen=True, kw_only=True):
    """The digests of the base's chunks, one after the other, for a sender that does not have the base."""

    TYPE = 30
    MAX_BODY = MAX_DIGESTS_BODY
    body_id: U32 = 0
    body_size: U63 = 0
    transfer: TransferId


class Lend(Message, frozen=True, kw_only=True):
    """So many open files, whose descriptors come with this message's first byte, and where in them the version's bytes
    lie: the receiver reads them itself. Only over a Unix socket, to who says "lend" in HELLO. The body is a
    ``lent.Lent``."""

    TYPE = 31
    MAX_BODY = MAX_TENSORS * 9
    body_id: U32 = 0
    body_size: U63 = 0
    files: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENT_FILES)]
    transfer: TransferId
