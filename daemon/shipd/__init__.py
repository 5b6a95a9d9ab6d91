"""shipd ships the next version of a PyTorch model into the processes that are serving it.

This is the whole public surface, imported only when it is used: a sender of safetensors files never loads
torch, and nothing here starts a thread at import.

    connect, Client, Receipt, Progress        the sending side; Status, Verification, Description: what it is told
    Plan                                      what becomes of a checkpoint's tensors in a model
    kept_versions                             what it keeps so that the next push sends only what has changed
    attach, Resident, Version                 the serving side
    Daemon, Config                            a daemon inside a process
    ShipError and its subclasses              everything that can go wrong, see shipd.errors
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shipd.bases.store import kept_versions as kept_versions
    from shipd.client.choice import Choice as Choice
    from shipd.client.client import Client as Client
    from shipd.client.client import connect as connect
    from shipd.client.options import Progress as Progress
    from shipd.client.receipt import CodecUse as CodecUse
    from shipd.client.receipt import Receipt as Receipt
    from shipd.errors import AttachError as AttachError
    from shipd.errors import AuthError as AuthError
    from shipd.errors import Busy as Busy
    from shipd.errors import CastError as CastError
    from shipd.errors import CheckpointError as CheckpointError
    from shipd.errors import ConfigError as ConfigError
    from shipd.errors import ConnectError as ConnectError
    from shipd.errors import Fenced as Fenced
    from shipd.errors import IntegrityError as IntegrityError
    from shipd.errors import Interrupted as Interrupted
    from shipd.errors import LabelConflict as LabelConflict
    from shipd.errors import MappingError as MappingError
    from shipd.errors import MemoryLimit as MemoryLimit
    from shipd.errors import NotReadBack as NotReadBack
    from shipd.errors import OutcomeUnknown as OutcomeUnknown
    from shipd.errors import PeerError as PeerError
    from shipd.errors import Refused as Refused
    from shipd.errors import ShipError as ShipError
    from shipd.errors import StageFailed as StageFailed
    from shipd.errors import Stalled as Stalled
    from shipd.errors import Superseded as Superseded
    from shipd.errors import SwapFailed as SwapFailed
    from shipd.errors import TensorChanged as TensorChanged
    from shipd.errors import TensorMismatch as TensorMismatch
    from shipd.errors import TransferFailed as TransferFailed
    from shipd.errors import UnknownModel as UnknownModel
    from shipd.errors import UnsupportedTensor as UnsupportedTensor
    from shipd.matching.plan import Plan as Plan
    from shipd.service.config import Config as Config
    from shipd.service.config import ModelConfig as ModelConfig
    from shipd.service.embedded import Daemon as Daemon
    from shipd.serving.resident import Resident as Resident
    from shipd.serving.resident import attach as attach
    from shipd.serving.version import Version as Version
    from shipproto.description import Description as Description
    from shipproto.status import Status as Status
    from shipproto.status import Verification as Verification

_HOMES = {
    "shipd.bases.store": ("kept_versions",),
    "shipd.client.client": ("Client", "connect"),
    "shipd.client.options": ("Progress",),
    "shipd.client.choice": ("Choice",),
    "shipd.client.receipt": ("CodecUse", "Receipt"),
    "shipd.errors": (
        *("AttachError", "AuthError", "Busy", "CastError", "CheckpointError", "ConfigError", "ConnectError", "Fenced"),
        *("IntegrityError", "Interrupted", "LabelConflict", "MappingError", "MemoryLimit", "NotReadBack"),
        *("OutcomeUnknown",),
        *("PeerError", "Refused", "ShipError", "StageFailed", "Stalled", "Superseded", "SwapFailed", "TensorChanged"),
        *("TensorMismatch", "TransferFailed", "UnknownModel", "UnsupportedTensor"),
    ),
    "shipd.matching.plan": ("Plan",),
    "shipd.service.config": ("Config", "ModelConfig"),
    "shipd.service.embedded": ("Daemon",),
    "shipd.serving.resident": ("Resident", "attach"),
    "shipd.serving.version": ("Version",),
    "shipproto.description": ("Description",),
    "shipproto.status": ("Status", "Verification"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605  the names are literals above

if not TYPE_CHECKING:
    # Hidden from the type checker, so that it still finds a wrong name.
    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'shipd' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return __all__
