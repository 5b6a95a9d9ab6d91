"""Messages of the local session: daemon and serving process, over a Unix socket."""

from typing import Annotated

import msgspec

from shipproto.limits import MAX_IMAGE_BYTES, MAX_RANGES, MAX_SLOTS, MAX_STRUCTURE_BODY
from shipproto.messages.fields import (
    NO_TIME,
    U32,
    U63,
    ClassName,
    Digest,
    Label,
    Message,
    OptionalDigest,
    OptionalLabel,
    Seconds,
    Slot,
    Text,
    TransferId,
    Word,
    sixteen_or_none,
)


class Attach(Message, frozen=True, kw_only=True):
    """A process serves this model. The body is ``resident.Resident``: its structure and non-persistent buffers."""

    TYPE = 48
    MAX_BODY = 2 * MAX_STRUCTURE_BODY
    body_id: U32 = 0
    body_size: U63 = 0
    delivered: bool = False
    """It hands versions on to something that takes tensors of any names, and cannot read them back. Its structure is
    that of the version it holds, and empty where it holds none."""
    digest: OptionalDigest = b""
    """The version it really holds, where it knows: when it attaches again."""
    label: OptionalLabel = ""
    mode: Word
    model: Label
    model_class: ClassName = ""
    """Qualified name of the resident model's class, for people."""
    pinned: bool = False
    """It copies to a device, or maps pages, ahead of time, where it is told what has arrived."""

    def flaw(self) -> str:
        return sixteen_or_none("digest", self.digest)


class Attached(Message, frozen=True, kw_only=True):
    """The session stands. The process holds the version of this label and digest, which lies in this slot.

    Both are empty, and slot and generation 0, where there is no version yet: only where ``Attach.delivered``.
    """

    TYPE = 49
    digest: OptionalDigest
    generation: U63
    label: OptionalLabel
    slot: Slot

    def flaw(self) -> str:
        if bool(self.digest) is not bool(self.label):
            return "a label without a digest, or a digest without a label"
        return sixteen_or_none("digest", self.digest)


class ImageSlot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image whose descriptor travels with the IMAGES message that lists it."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_IMAGE_BYTES)]
    slot: Slot
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
    generation: U63
    slot: Slot


class Filled(Message, frozen=True, kw_only=True):
    """Done, and the writable mapping is gone."""

    TYPE = 52
    generation: U63
    slot: Slot


class Arriving(Message, frozen=True, kw_only=True):
    """A transfer fills this slot. The body lists chunks that have arrived intact since the last such message.

    They may be copied towards the device; nothing live may be touched: the version is not verified yet.
    """

    TYPE = 53
    MAX_BODY = MAX_RANGES * 8
    body_id: U32 = 0
    body_size: U63 = 0
    generation: U63
    slot: Slot
    transfer: TransferId


class Stage(Message, frozen=True, kw_only=True):
    """The version in this slot is whole and verified: make everything ready to swap to it."""

    TYPE = 54
    digest: Digest
    generation: U63
    label: Label
    slot: Slot
    transfer: TransferId


class StageReady(Message, frozen=True, kw_only=True):
    """The process is ready, or says why it is not."""

    TYPE = 55
    DURATIONS = ("stage_seconds",)
    error: Text = ""
    generation: U63
    stage_seconds: Seconds = NO_TIME
    transfer: TransferId


class Swap(Message, frozen=True, kw_only=True):
    """Swap at the next safe point, within ``timeout`` seconds."""

    TYPE = 56
    generation: U63
    timeout: Seconds
    transfer: TransferId


class Swapped(Message, frozen=True, kw_only=True):
    """The live parameters are the new version, or ``error`` says why they are the old one."""

    TYPE = 57
    DURATIONS = ("copy_seconds", "pause_seconds", "wait_seconds")
    copy_seconds: Seconds = NO_TIME
    error: Text = ""
    fenced: bool = False
    """The process could not even keep its old version whole and has stopped serving."""
    generation: U63
    pause_seconds: Seconds = NO_TIME
    transfer: TransferId
    wait_seconds: Seconds = NO_TIME
    """The part of the pause until the last hold had ended."""


class Unstage(Message, frozen=True, kw_only=True):
    """The transfer has ended: forget what was staged or has arrived."""

    TYPE = 58
    generation: U63
    transfer: TransferId


class Release(Message, frozen=True, kw_only=True):
    """The process no longer reads this generation of this slot."""

    TYPE = 59
    generation: U63
    slot: Slot


class Evicted(Message, frozen=True, kw_only=True):
    """The process missed a deadline: its holds must stop until it has attached again."""

    TYPE = 60
    reason: Text


class DigestRequest(Message, frozen=True, kw_only=True):
    """Read the live parameters back and digest them."""

    TYPE = 61
    request: U32


class DigestIs(Message, frozen=True, kw_only=True):
    """The answer."""

    TYPE = 62
    delivered: bool = False
    """The digest is that of the version that was delivered. Nothing has been read back."""
    digest: OptionalDigest = b""
    error: Text = ""
    label: OptionalLabel = ""
    request: U32

    def flaw(self) -> str:
        return sixteen_or_none("digest", self.digest)


class Detach(Message, frozen=True, kw_only=True):
    """The process stops serving this model."""

    TYPE = 63


class LaidOut(Message, frozen=True, kw_only=True):
    """What the images that follow are laid out by; those named before are void. Only where ``Attach.delivered``.

    The body is a structure; one without tensors where no images follow, because a push has ended without effect.
    """

    TYPE = 64
    MAX_BODY = MAX_STRUCTURE_BODY
    body_id: U32 = 0
    body_size: U63 = 0
