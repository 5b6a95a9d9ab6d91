"""What messages are made of: their common base, and the types of fields with their bounds."""

from typing import Annotated, ClassVar, Final

import msgspec

from shipproto.limits import (
    DIGEST_SIZE,
    MAX_CLASS_NAME,
    MAX_ENVIRONMENT,
    MAX_LABEL,
    MAX_LANES,
    MAX_METADATA_ENTRIES,
    MAX_METADATA_TEXT,
    MAX_SLOTS,
    MAX_TEXT,
    NONCE_SIZE,
    TRANSFER_ID_SIZE,
)
from shipproto.names import LABEL_PATTERN

U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
ProtocolVersion = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]
OptionalDigest = Annotated[bytes, msgspec.Meta(max_length=DIGEST_SIZE)]
TransferId = Annotated[bytes, msgspec.Meta(min_length=TRANSFER_ID_SIZE, max_length=TRANSFER_ID_SIZE)]
OptionalTransferId = Annotated[bytes, msgspec.Meta(max_length=TRANSFER_ID_SIZE)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_SIZE, max_length=NONCE_SIZE)]
Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL, pattern=rf"^{LABEL_PATTERN}\Z")]
OptionalLabel = Annotated[str, msgspec.Meta(max_length=MAX_LABEL, pattern=rf"^({LABEL_PATTERN})?\Z")]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Word = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[ -~]*\Z")]
ClassName = Annotated[str, msgspec.Meta(max_length=MAX_CLASS_NAME, pattern=r"^[ -~]*\Z")]
Environment = Annotated[dict[Word, Word], msgspec.Meta(max_length=MAX_ENVIRONMENT)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
NO_TIME: Final = 0.0
Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_TEXT)],
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_TEXT)],
    ],
    msgspec.Meta(max_length=MAX_METADATA_ENTRIES),
]
CodecNumber = Annotated[int, msgspec.Meta(ge=1, le=255)]
Slot = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
LaneNumber = Annotated[int, msgspec.Meta(ge=1, lt=MAX_LANES)]
"""A further connection's; the transfer's own has none."""


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
                msgspec.structs.force_setattr(self, name, NO_TIME)

    def flaw(self) -> str:
        """What is wrong with it although each field is what it should be; empty where nothing is."""
        return ""


def sixteen_or_none(field: str, value: bytes) -> str:
    """The flaw of a field that may be left empty, and else has 16 bytes."""
    return "" if len(value) in (0, DIGEST_SIZE) else f"{field} has neither {DIGEST_SIZE} bytes nor none"
