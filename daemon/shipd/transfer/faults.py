"""Translation between what the protocol core raises and what shipd's users see, both ways.

Core errors know nothing of hosts or models; here they get the peer's name and the advice that goes with it.
"""

from shipd.errors import BY_CODE, AuthError, CastError, PeerError, ShipError, TensorMismatch, TransferFailed
from shipproto.errors import AbortCode, AuthFailed, ForeignPeer, ProtocolError, TransferError, VersionMismatch

_CODES: dict[type[ShipError], AbortCode] = {
    **{error: code for code, error in BY_CODE.items()},
    # Several codes are raised as these; this is what a side says of its own accord.
    PeerError: AbortCode.PROTOCOL,
    TransferFailed: AbortCode.INTERNAL,
    CastError: AbortCode.UNSUPPORTED,
}


def describe_opening(opening: bytes) -> str:
    """What kind of peer begins like this, in words."""
    if opening.startswith(b"HTTP/") or opening.split(b" ", 1)[0] in (
        b"GET",
        b"POST",
        b"PUT",
        b"HEAD",
        b"OPTIONS",
        b"PRI",
    ):
        return "it speaks HTTP"
    if opening[:2] == b"\x16\x03" or opening[:2] == b"\x15\x03":
        return "it speaks TLS"
    if opening.startswith(b"SSH-"):
        return "it speaks SSH"
    return f"it began with {opening[:16]!r}"


def peer_error(error: ProtocolError, peer: str) -> ShipError:
    """The error to raise when ``peer`` broke the protocol."""
    if isinstance(error, ForeignPeer):
        return PeerError(
            f"{peer} is no shipd: {describe_opening(error.opening)}. Check the host and the port.", peer=peer
        )
    if isinstance(error, AuthFailed):
        return AuthError(f"{peer}: {error}", peer=peer)
    if isinstance(error, VersionMismatch):
        return PeerError(f"{peer}: {error}", peer=peer)
    return PeerError(f"{peer} broke the protocol: {error}", peer=peer)


def remote_error(
    error: TransferError, peer: str, *, model: str | None = None, transfer_id: str | None = None
) -> ShipError:
    """The error to raise when ``peer`` aborted, or when this side found a reason to end the transfer."""
    kind = BY_CODE[error.code]
    message = str(error) or f"{peer} gave no reason ({error.code})"
    if issubclass(kind, TensorMismatch):
        listing = "".join(f"\n  {detail}" for detail in error.details)
        return TensorMismatch(
            message + listing,
            problems=error.details,
            peer=peer,
            model=model,
            transfer_id=transfer_id,
            tensor=error.tensor or None,
        )
    return kind(message, peer=peer, model=model, tensor=error.tensor or None, transfer_id=transfer_id)


def as_transfer_error(error: ShipError) -> TransferError:
    """What to tell the peer of an error on this side."""
    kind = next((base for base in type(error).__mro__ if base in _CODES), None)
    code = _CODES[kind] if kind is not None else AbortCode.INTERNAL
    details = error.problems if isinstance(error, TensorMismatch) else ()
    return TransferError(code, str(error), tensor=error.tensor or "", details=details)
