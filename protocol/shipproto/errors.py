"""What can go wrong on the wire: one exception for each way a peer can break the rules, and the codes that
an ABORT carries.

    ProtocolError            the peer broke the rules; the connection is over, the transfer may go on
    ├── ForeignPeer          what answered does not speak this protocol at all
    ├── VersionMismatch      no protocol version in common
    ├── BadPrelude           a prelude failed its check: nothing after it can be located
    ├── LimitExceeded        a length or count beyond its limit
    ├── MalformedMessage     a header or body that is not what its type promises
    ├── UnexpectedMessage    a message that the current state does not allow
    └── AuthFailed           the proof of the token is missing or wrong
    LocalError               this side misused the core: a bug in the caller, never the peer's doing
"""

import enum


class ProtocolError(Exception):
    """The peer broke the protocol. The connection cannot go on; the transfer may, on a new one."""


class ForeignPeer(ProtocolError):
    """The first bytes are not a frame. ``opening`` holds as many as had arrived, below 100."""

    def __init__(self, message: str, opening: bytes) -> None:
        super().__init__(message)
        self.opening = opening


class VersionMismatch(ProtocolError):
    """The peer speaks no version of the protocol that this side speaks."""


class BadPrelude(ProtocolError):
    """A prelude failed its CRC or is out of sequence, so the stream cannot be followed any further."""


class LimitExceeded(ProtocolError):
    """A length or count from the wire exceeds its limit in ``limits``."""


class MalformedMessage(ProtocolError):
    """A header or body passed its CRC but does not decode to what its type promises."""


class UnexpectedMessage(ProtocolError):
    """A well-formed message that the current state does not allow."""


class AuthFailed(ProtocolError):
    """The token's proof is missing or wrong, or one side wants a proof and the other has no token."""


class LocalError(Exception):
    """The caller used the core in a way that its state does not allow."""


class AbortCode(enum.StrEnum):
    """Why a transfer or a request ended. Codes are part of the wire format; they are only ever added."""

    UNKNOWN_MODEL = "unknown-model"
    BUSY = "busy"
    MISMATCH = "mismatch"
    REFUSED = "refused"
    LABEL_CONFLICT = "label-conflict"
    MEMORY_LIMIT = "memory-limit"
    UNSUPPORTED = "unsupported"
    INTEGRITY = "integrity"
    TENSOR_CHANGED = "tensor-changed"
    STALLED = "stalled"
    STAGE_FAILED = "stage-failed"
    SWAP_FAILED = "swap-failed"
    SUPERSEDED = "superseded"
    INTERRUPTED = "interrupted"
    SHUTTING_DOWN = "shutting-down"
    AUTH = "auth"
    VERSION = "version"
    PROTOCOL = "protocol"
    INTERNAL = "internal"


class TransferError(Exception):
    """A transfer has to end: either side found out why. Travels as an ABORT.

    ``tensor`` names the tensor at fault where there is one; ``details`` lists findings, one text each.
    """

    def __init__(self, code: AbortCode, message: str, *, tensor: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.tensor = tensor
        self.details = details
