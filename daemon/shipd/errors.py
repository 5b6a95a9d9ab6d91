"""Every error that shipd raises on purpose, each saying what happened, to whom, and what to do about it.

    ShipError
    ├── ConfigError            the configuration is wrong
    ├── ConnectError           nobody answers at that address
    ├── PeerError              what answers is no shipd, speaks another protocol version, or broke the protocol
    ├── AuthError              the token is missing or wrong
    ├── UnknownModel           the daemon has no model of that name
    ├── Busy                   another push of this model is under way, or its images are still in use
    ├── Refused                the daemon or the serving process will not take this
    │   ├── TensorMismatch     names, shapes or dtypes differ from the resident model's; all of them listed
    │   ├── UnsupportedTensor  a tensor that cannot be shipped (sparse, quantised, a subclass, …)
    │   ├── CastError          a value does not fit the dtype that the model has
    │   ├── LabelConflict      the label belongs to other content
    │   └── MemoryLimit        it would not fit the daemon's memory limit
    ├── MappingError           what is to map names to names is no rule, or no mapping file
    ├── CheckpointError        the file is truncated, foreign or unsafe, or cannot be fetched
    ├── TensorChanged          a tensor's bytes changed while it was being sent
    ├── IntegrityError         bytes kept arriving damaged, or digests differ
    ├── Stalled                nothing moved for longer than the stall deadline
    ├── TransferFailed         the push ended for a reason that fits nothing above
    │   ├── StageFailed        a serving process could not stage the version
    │   ├── SwapFailed         no serving process could swap; the old version serves
    │   └── Superseded         a newer push took this one's place
    ├── OutcomeUnknown         the connection was lost after COMMIT and could not be restored
    ├── Interrupted            the push was cancelled
    ├── AttachError            this model cannot be attached
    ├── NotReadBack            what became of a version that was delivered cannot be read back
    └── Fenced                 this process must not serve: its weights are not the committed version

``exit_code`` is what ``shipctl`` exits with; the codes are part of its contract.
"""

from typing import ClassVar

from shipproto.errors import AbortCode


class ShipError(Exception):
    """Base of all. ``peer``, ``model``, ``tensor`` and ``transfer_id`` are filled in where they are known."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        peer: str | None = None,
        model: str | None = None,
        tensor: str | None = None,
        transfer_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.peer = peer
        self.model = model
        self.tensor = tensor
        self.transfer_id = transfer_id


class ConfigError(ShipError):
    """The configuration is wrong; the message names the key."""

    exit_code = 78


class ConnectError(ShipError):
    """Nobody answers at that address."""


class PeerError(ShipError):
    """What answers is no shipd, speaks another version of the protocol, or broke it."""


class AuthError(ShipError):
    """The token is missing, wrong, or not asked for."""

    exit_code = 12


class UnknownModel(ShipError):
    """The daemon has no model of that name: nothing is attached under it and no configuration declares it."""

    exit_code = 10


class Busy(ShipError):
    """Another push of this model is under way, or its images are still in use."""

    exit_code = 11


class Refused(ShipError):
    """The daemon or the serving process will not take this."""

    exit_code = 12


class TensorMismatch(Refused):
    """The tensors differ from those of the resident model. ``problems`` lists every difference."""

    def __init__(
        self,
        message: str,
        *,
        problems: tuple[str, ...] = (),
        peer: str | None = None,
        model: str | None = None,
        tensor: str | None = None,
        transfer_id: str | None = None,
    ) -> None:
        super().__init__(message, peer=peer, model=model, tensor=tensor, transfer_id=transfer_id)
        self.problems = problems


class UnsupportedTensor(Refused):
    """A tensor that cannot be shipped: sparse, quantised, sub-byte, a subclass, or no tensor at all."""


class CastError(Refused):
    """A value does not fit the dtype that the model has; the message has tensor, place and value."""


class LabelConflict(Refused):
    """The label already stands for other content."""


class MemoryLimit(Refused):
    """It would not fit the daemon's memory limit; the message has both figures."""


class MappingError(ShipError):
    """What is to map names to names is no rule, or no mapping file; the message says how they are written."""

    exit_code = 2


class CheckpointError(ShipError):
    """The file is truncated, foreign or unsafe to read, or cannot be fetched from its URL."""


class TensorChanged(ShipError):
    """A tensor's bytes changed while it was being sent."""

    exit_code = 13


class IntegrityError(ShipError):
    """Bytes kept arriving damaged, or the digests of what was sent and what arrived differ."""

    exit_code = 13


class Stalled(ShipError):
    """Nothing moved for longer than the stall deadline."""


class TransferFailed(ShipError):
    """The push ended for a reason that no other class names."""


class StageFailed(TransferFailed):
    """A serving process could not stage the version; the old one serves."""


class SwapFailed(TransferFailed):
    """No serving process could swap; the old version serves."""


class Superseded(TransferFailed):
    """A newer push took the place of this one, which had lost its connection."""


class OutcomeUnknown(ShipError):
    """The connection was lost after COMMIT. Repeating the push is harmless and settles the question."""


class Interrupted(ShipError):
    """The push was cancelled before it was committed; the old version serves."""

    exit_code = 130


class AttachError(ShipError):
    """This model cannot be attached."""


class NotReadBack(ShipError):
    """Versions are handed to this process's ``load_weights``: what it made of one cannot be read back and digested."""


class Fenced(ShipError):
    """This process must not serve: its weights are not the committed version, or are not whole."""


BY_CODE: dict[AbortCode, type[ShipError]] = {
    AbortCode.UNKNOWN_MODEL: UnknownModel,
    AbortCode.BUSY: Busy,
    AbortCode.MISMATCH: TensorMismatch,
    AbortCode.REFUSED: Refused,
    AbortCode.LABEL_CONFLICT: LabelConflict,
    AbortCode.MEMORY_LIMIT: MemoryLimit,
    AbortCode.UNSUPPORTED: UnsupportedTensor,
    AbortCode.INTEGRITY: IntegrityError,
    AbortCode.TENSOR_CHANGED: TensorChanged,
    AbortCode.STALLED: Stalled,
    AbortCode.STAGE_FAILED: StageFailed,
    AbortCode.SWAP_FAILED: SwapFailed,
    AbortCode.SUPERSEDED: Superseded,
    AbortCode.INTERRUPTED: Interrupted,
    AbortCode.SHUTTING_DOWN: TransferFailed,
    AbortCode.AUTH: AuthError,
    AbortCode.VERSION: PeerError,
    AbortCode.PROTOCOL: PeerError,
    AbortCode.INTERNAL: TransferFailed,
}
"""The class that a peer's ABORT is raised as."""
