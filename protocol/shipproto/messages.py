"""Every message of the protocol as a typed header, its number on the wire and the limit of its body.

How a header is spelled, and what is refused about it, is in ``headers``.
"""

from typing import Annotated, ClassVar, Final

import msgspec

from shipproto.limits import (
    DIGEST_SIZE,
    MAX_CAPABILITIES,
    MAX_DETAIL_BODY,
    MAX_DIGESTS_BODY,
    MAX_IMAGE_BYTES,
    MAX_LABEL,
    MAX_LANES,
    MAX_METADATA_ENTRIES,
    MAX_METADATA_TEXT,
    MAX_NACK,
    MAX_NAME,
    MAX_PROCESSES,
    MAX_RANGES,
    MAX_SLOTS,
    MAX_STRUCTURE_BODY,
    MAX_TENSORS,
    MAX_TEXT,
    NONCE_SIZE,
    TRANSFER_ID_SIZE,
)
from shipproto.names import LABEL_PATTERN

_U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Version = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]
_OptionalDigest = Annotated[bytes, msgspec.Meta(max_length=DIGEST_SIZE)]
_Transfer = Annotated[bytes, msgspec.Meta(min_length=TRANSFER_ID_SIZE, max_length=TRANSFER_ID_SIZE)]
_OptionalTransfer = Annotated[bytes, msgspec.Meta(max_length=TRANSFER_ID_SIZE)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_SIZE, max_length=NONCE_SIZE)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL, pattern=rf"^{LABEL_PATTERN}\Z")]
_OptionalLabel = Annotated[str, msgspec.Meta(max_length=MAX_LABEL, pattern=rf"^({LABEL_PATTERN})?\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_Word = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[ -~]*\Z")]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_NO_TIME: Final = 0.0
_Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_TEXT)],
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_TEXT)],
    ],
    msgspec.Meta(max_length=MAX_METADATA_ENTRIES),
]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all. Fields are declared in ascending order of name: that is the canonical order.

    ``body_id`` and ``body_size`` are set only where the body does not fit into the message's own payload:
    the rest follows in BODY frames.
    """

    TYPE: ClassVar[int]
    MAX_BODY: ClassVar[int] = 0
    DURATIONS: ClassVar[tuple[str, ...]] = ()
    """Fields of type float whose default is zero."""

    def __post_init__(self) -> None:
        # msgspec leaves a default out when it is the very object, which a zero from a clock or the wire is not.
        for name in self.DURATIONS:
            if not getattr(self, name):
                msgspec.structs.force_setattr(self, name, _NO_TIME)


# --- the connection ----------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First message of both sides; its frame and these fields are the same in every version, for ever."""

    TYPE = 1
    agent: _Word = ""
    auth: bool = False
    """From the accepting side: a proof of the token is required."""
    capabilities: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=MAX_CAPABILITIES)] = ()
    nonce: _Nonce
    version_max: _Version
    version_min: _Version


class Auth(Message, frozen=True, kw_only=True):
    """Proof of the token: HMAC-SHA256 over both HELLOs. The initiator proves first."""

    TYPE = 2
    proof: _Proof


class Body(Message, frozen=True, kw_only=True):
    """A further piece of the body of the message that announced ``body_id``."""

    TYPE = 3
    MAX_BODY = MAX_DETAIL_BODY
    body_id: _U32
    offset: _U63


class Nack(Message, frozen=True, kw_only=True):
    """These frames arrived damaged: send them again. Their preludes were good."""

    TYPE = 4
    sequences: Annotated[tuple[_U63, ...], msgspec.Meta(min_length=1, max_length=MAX_NACK)]


class Ping(Message, frozen=True, kw_only=True):
    """Shows that this side is alive; ``reply`` asks the other to show the same."""

    TYPE = 5
    reply: bool = False


# --- a transfer --------------------------------------------------------------------------------------------


class Offer(Message, frozen=True, kw_only=True):
    """A version for a model. Sent on every connection of the transfer, also to resume it."""

    TYPE = 16
    label: _OptionalLabel = ""
    metadata: _Metadata = msgspec.field(default_factory=dict)
    model: _Label
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_IMAGE_BYTES)]
    resumed: bool = False
    """The receiver has accepted this transfer before."""
    structure: _Digest
    tensors: Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSORS)]
    transfer: _Transfer


class StructureWanted(Message, frozen=True, kw_only=True):
    """The receiver does not know the offered structure: send it."""

    TYPE = 17
    transfer: _Transfer


class StructureIs(Message, frozen=True, kw_only=True):
    """From the sender: the offered structure. From the receiver: the one that rules, where it is another."""

    TYPE = 18
    MAX_BODY = MAX_STRUCTURE_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0
    transfer: _Transfer


class Want(Message, frozen=True, kw_only=True):
    """The chunks that the receiver lacks, as ranges, of the structure with this digest.

    ``lanes`` is how many connections it takes DATA on, this one included.
    """

    TYPE = 19
    MAX_BODY = MAX_RANGES * 8
    body_id: _U32 = 0
    body_size: _U63 = 0
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)] = 1
    structure: _Digest
    transfer: _Transfer


class Data(Message, frozen=True, kw_only=True):
    """One chunk, whole, as it lies in the image."""

    TYPE = 20
    chunk: _U32


class Progress(Message, frozen=True, kw_only=True):
    """How many chunks are held, and what the receiver is doing."""

    TYPE = 21
    held: _U32
    stage: _Word
    transfer: _Transfer


class Finish(Message, frozen=True, kw_only=True):
    """Everything wanted was sent. The body has the digest of every tensor, in the structure's order."""

    TYPE = 22
    MAX_BODY = MAX_DIGESTS_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0
    digest: _Digest
    label: _Label
    transfer: _Transfer


class Staged(Message, frozen=True, kw_only=True):
    """The version is verified and every serving process is ready to swap to it."""

    TYPE = 23
    DURATIONS = ("stage_seconds",)
    processes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESSES)]
    stage_seconds: _Seconds = _NO_TIME
    transfer: _Transfer


class Commit(Message, frozen=True, kw_only=True):
    """Swap."""

    TYPE = 24
    transfer: _Transfer


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
    check_seconds: _Seconds = _NO_TIME
    copy_seconds: _Seconds = _NO_TIME
    digest: _Digest
    digest_seconds: _Seconds = _NO_TIME
    label: _Label
    pause_seconds: _Seconds | None = None
    """The longest pause of any serving process; None where nothing is attached."""
    receive_seconds: _Seconds = _NO_TIME
    stale: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=MAX_PROCESSES)] = ()
    swapped: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROCESSES)] = 0
    transfer: _Transfer
    verify_seconds: _Seconds = _NO_TIME
    wait_seconds: _Seconds = _NO_TIME


class Abort(Message, frozen=True, kw_only=True):
    """The transfer, or the request, has ended without effect. The body may list details, one text each."""

    TYPE = 26
    MAX_BODY = MAX_DETAIL_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0
    code: _Word
    message: _Text = ""
    tensor: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    transfer: _OptionalTransfer = b""


class Join(Message, frozen=True, kw_only=True):
    """This connection is a further lane of a transfer that is being received on another one."""

    TYPE = 27
    lane: Annotated[int, msgspec.Meta(ge=1, lt=MAX_LANES)]
    transfer: _Transfer


class Joined(Message, frozen=True, kw_only=True):
    """DATA of the transfer is taken on this connection."""

    TYPE = 28
    lane: Annotated[int, msgspec.Meta(ge=1, lt=MAX_LANES)]
    transfer: _Transfer


# --- questions ---------------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True, kw_only=True):
    """What is the daemon serving and doing? Empty ``model`` means all."""

    TYPE = 32
    model: _OptionalLabel = ""


class StatusIs(Message, frozen=True, kw_only=True):
    """The answer; the body is ``status.Status``."""

    TYPE = 33
    MAX_BODY = MAX_DETAIL_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0


class VerifyRequest(Message, frozen=True, kw_only=True):
    """Have every serving process of a model read its live parameters back and digest them."""

    TYPE = 34
    model: _Label


class VerifyIs(Message, frozen=True, kw_only=True):
    """The answer; the body is ``status.Verification``."""

    TYPE = 35
    MAX_BODY = MAX_DETAIL_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0


# --- the local session: daemon and serving process, over a Unix socket -------------------------------------


class Attach(Message, frozen=True, kw_only=True):
    """A process serves this model. The body is ``resident.Resident``: its structure and non-persistent buffers."""

    TYPE = 48
    MAX_BODY = 2 * MAX_STRUCTURE_BODY
    body_id: _U32 = 0
    body_size: _U63 = 0
    digest: _OptionalDigest = b""
    """The version it really holds, where it knows: when it attaches again."""
    label: _OptionalLabel = ""
    mode: _Word
    model: _Label
    pinned: bool = False
    """It copies to a device, and ahead of time where it is told what has arrived."""


class Attached(Message, frozen=True, kw_only=True):
    """The session stands. The process holds the version of this label and digest, which lies in this slot."""

    TYPE = 49
    digest: _Digest
    generation: _U63
    label: _Label
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]


class ImageSlot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image whose descriptor travels with the IMAGES message that lists it."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_IMAGE_BYTES)]
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
    writable: bool = False


class Images(Message, frozen=True, kw_only=True):
    """Descriptors of images, in the order of ``slots``, as SCM_RIGHTS with this message's first byte.

    A slot that was known before has new memory, or is no longer to be written.
    """

    TYPE = 50
    slots: Annotated[tuple[ImageSlot, ...], msgspec.Meta(max_length=MAX_SLOTS)]


class Fill(Message, frozen=True, kw_only=True):
    """Write the live parameters into this slot: it becomes the first version."""

    TYPE = 51
    generation: _U63
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]


class Filled(Message, frozen=True, kw_only=True):
    """Done, and the writable mapping is gone."""

    TYPE = 52
    generation: _U63
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]


class Arriving(Message, frozen=True, kw_only=True):
    """A transfer fills this slot. The body lists chunks that have arrived intact since the last such message.

    They may be copied towards the device; nothing live may be touched: the version is not verified yet.
    """

    TYPE = 53
    MAX_BODY = MAX_RANGES * 8
    body_id: _U32 = 0
    body_size: _U63 = 0
    generation: _U63
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
    transfer: _Transfer


class Stage(Message, frozen=True, kw_only=True):
    """The version in this slot is whole and verified: make everything ready to swap to it."""

    TYPE = 54
    digest: _Digest
    generation: _U63
    label: _Label
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
    transfer: _Transfer


class StageReady(Message, frozen=True, kw_only=True):
    """The process is ready, or says why it is not."""

    TYPE = 55
    DURATIONS = ("stage_seconds",)
    error: _Text = ""
    generation: _U63
    stage_seconds: _Seconds = _NO_TIME
    transfer: _Transfer


class Swap(Message, frozen=True, kw_only=True):
    """Swap at the next safe point, within ``timeout`` seconds."""

    TYPE = 56
    generation: _U63
    timeout: _Seconds
    transfer: _Transfer


class Swapped(Message, frozen=True, kw_only=True):
    """The live parameters are the new version, or ``error`` says why they are the old one."""

    TYPE = 57
    DURATIONS = ("copy_seconds", "pause_seconds", "wait_seconds")
    copy_seconds: _Seconds = _NO_TIME
    error: _Text = ""
    fenced: bool = False
    """The process could not even keep its old version whole and has stopped serving."""
    generation: _U63
    pause_seconds: _Seconds = _NO_TIME
    transfer: _Transfer
    wait_seconds: _Seconds = _NO_TIME
    """The part of the pause until the last hold had ended."""


class Unstage(Message, frozen=True, kw_only=True):
    """The transfer has ended: forget what was staged or has arrived."""

    TYPE = 58
    generation: _U63
    transfer: _Transfer


class Release(Message, frozen=True, kw_only=True):
    """The process no longer reads this generation of this slot."""

    TYPE = 59
    generation: _U63
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]


class Evicted(Message, frozen=True, kw_only=True):
    """The process missed a deadline: its holds must stop until it has attached again."""

    TYPE = 60
    reason: _Text


class DigestRequest(Message, frozen=True, kw_only=True):
    """Read the live parameters back and digest them."""

    TYPE = 61
    request: _U32


class DigestIs(Message, frozen=True, kw_only=True):
    """The answer."""

    TYPE = 62
    digest: _OptionalDigest = b""
    error: _Text = ""
    label: _OptionalLabel = ""
    request: _U32


class Detach(Message, frozen=True, kw_only=True):
    """The process stops serving this model."""

    TYPE = 63


MESSAGES: Final[tuple[type[Message], ...]] = tuple(
    sorted(
        (
            *(Hello, Auth, Body, Nack, Ping),
            *(Offer, StructureWanted, StructureIs, Want, Data, Progress, Finish, Staged, Commit, Committed, Abort),
            *(Join, Joined),
            *(StatusRequest, StatusIs, VerifyRequest, VerifyIs),
            *(Attach, Attached, Images, Fill, Filled, Arriving, Stage, StageReady, Swap, Swapped, Unstage),
            *(Release, Evicted, DigestRequest, DigestIs, Detach),
        ),
        key=lambda message: message.TYPE,
    )
)
BY_TYPE: Final = {message.TYPE: message for message in MESSAGES}
