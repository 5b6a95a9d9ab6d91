"""Messages of a transfer, from OFFER to COMMITTED."""

from typing import Annotated

import msgspec

from shipproto.limits import (
    MAX_DETAIL_BODY,
    MAX_DIGESTS_BODY,
    MAX_IMAGE_BYTES,
    MAX_LANES,
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
    Digest,
    Label,
    LaneNumber,
    Message,
    Metadata,
    OptionalLabel,
    OptionalTransferId,
    Seconds,
    Text,
    TransferId,
    Word,
    sixteen_or_none,
)


class Offer(Message, frozen=True, kw_only=True):
    """A version for a model. Sent on every connection of the transfer, also to resume it."""

    TYPE = 16
    label: OptionalLabel = ""
    metadata: Metadata = msgspec.field(default_factory=dict)
    model: Label
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_IMAGE_BYTES)]
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
    """The chunks that the receiver lacks, as ranges, of the structure with this digest.

    ``lanes`` is how many connections it takes DATA on, this one included.
    """

    TYPE = 19
    MAX_BODY = MAX_RANGES * 8
    body_id: U32 = 0
    body_size: U63 = 0
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)] = 1
    structure: Digest
    transfer: TransferId


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

    Where the receiver's time went: in receiving, checking and digesting, over all connections; in verifying; and in the
    process that paused longest, in waiting for the last hold and in copying.
    """

    TYPE = 25
    DURATIONS = (
        "check_seconds",
        "copy_seconds",
        "digest_seconds",
        "receive_seconds",
        "verify_seconds",
        "wait_seconds",
    )
    already: bool = False
    """It had been the current version before this push."""
    check_seconds: Seconds = NO_TIME
    copy_seconds: Seconds = NO_TIME
    digest: Digest
    digest_seconds: Seconds = NO_TIME
    label: Label
    pause_seconds: Seconds | None = None
    """The longest pause of any serving process; None where nothing is attached."""
    receive_seconds: Seconds = NO_TIME
    stale: Annotated[tuple[Word, ...], msgspec.Meta(max_length=MAX_PROCESSES)] = ()
    swapped: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESSES)] = 0
    transfer: TransferId
    verify_seconds: Seconds = NO_TIME
    wait_seconds: Seconds = NO_TIME


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
