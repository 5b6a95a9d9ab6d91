"""What a daemon says about itself: the bodies of STATUS and VERIFY answers, as typed msgpack.

Fields are only ever added, with defaults, so that an older reader understands a newer daemon.
"""

from typing import Final

import msgspec

from shipproto.errors import MalformedMessage
from shipproto.frame import Buffer


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One serving process. ``state``: serving, staging, swapping, attaching or stale.

    ``model_class`` is the qualified name of the resident model's class, ``environment`` versions of what the process
    runs on (``description.ENVIRONMENT``), as it said itself.
    """

    pid: int
    state: str
    mode: str = ""
    label: str = ""
    digest: str = ""
    attached_seconds: float = 0.0
    pinned: bool = False
    model_class: str = ""
    environment: dict[str, str] = {}


class TransferStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A push that is under way."""

    transfer_id: str
    peer: str
    stage: str
    label: str = ""
    bytes_held: int = 0
    bytes_total: int = 0
    connected: bool = True


class FailedPush(msgspec.Struct, frozen=True, kw_only=True):
    """The latest push of a model, if it ended without effect. ``at`` is Unix time."""

    transfer_id: str
    peer: str
    reason: str
    label: str = ""
    at: float = 0.0


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model. ``digest`` is hexadecimal; both it and ``label`` are empty before the first version."""

    name: str
    label: str = ""
    digest: str = ""
    tensors: int = 0
    bytes: int = 0
    image_bytes: int = 0
    committed_at: float = 0.0
    """Unix time of the last commit; 0 for a version that came with an attached process."""
    metadata: dict[str, str] = {}
    """What its sender said of the version."""
    processes: list[ProcessStatus] = []
    transfer: TransferStatus | None = None
    failed: FailedPush | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon and its models."""

    agent: str
    pid: int
    uptime_seconds: float
    memory_used: int
    memory_limit: int
    codecs: str = ""
    """What decodes coded runs: "compiled", or "numpy" and why; empty before there have been any."""
    models: list[ModelStatus] = []


class ProcessVerification(msgspec.Struct, frozen=True, kw_only=True):
    """What one process read back from its live parameters.

    ``delivered``: it cannot read back. ``digest`` is that of the version that was handed to its ``load_weights``.
    """

    pid: int
    label: str = ""
    digest: str = ""
    matches: bool = False
    error: str = ""
    delivered: bool = False


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What the committed version is, and what every process really serves."""

    model: str
    label: str
    digest: str
    processes: list[ProcessVerification] = []

    @property
    def matches(self) -> bool:
        """Whether every process serves what is committed."""
        return all(process.matches for process in self.processes)


_encoder: Final = msgspec.msgpack.Encoder()
_status: Final = msgspec.msgpack.Decoder(Status)
_verification: Final = msgspec.msgpack.Decoder(Verification)


def encode(answer: Status | Verification) -> bytes:
    """The body of an answer."""
    return _encoder.encode(answer)


def decode_status(body: Buffer) -> Status:
    """Raises MalformedMessage."""
    try:
        return _status.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"Status: {error}") from error


def decode_verification(body: Buffer) -> Verification:
    """Raises MalformedMessage."""
    try:
        return _verification.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"Verification: {error}") from error
