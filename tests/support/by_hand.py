"""A serving process by hand: raw frames on the daemon's Unix socket, so that a test says what is answered, and when."""

from collections.abc import Sequence
from pathlib import Path

from tests.support.hostile import Peer, attacker
from tests.support.naive import Tensor, encode_structure, pack


def attached(place: str | Path, tensors: Sequence[Tensor], model: str = "model", *, pinned: bool = False) -> Peer:
    """The first process of a model, attached; its version is all zeros. Descriptors that it is sent are dropped."""
    peer = attacker(place).greet()
    resident = {"structure": encode_structure(tensors), "transient": encode_structure(())}
    fields = {"mode": "copy", "model": model, **({"pinned": True} if pinned else {})}
    peer.message("Attach", fields, pack(resident))
    # It says where it has filled in what it was told to fill in.
    peer.send("Filled", peer.expect("Fill").fields)
    peer.expect("Attached")
    return peer
