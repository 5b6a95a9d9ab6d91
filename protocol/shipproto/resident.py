"""What a serving process says of its model when it attaches: the body of ATTACH."""

from typing import Final

import msgspec

from shipproto.errors import MalformedMessage
from shipproto.frame import Buffer
from shipproto.structure import Structure


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    structure: bytes
    transient: bytes


_decoder: Final = msgspec.msgpack.Decoder(_Wire)


class Resident:
    """The tensors that a version must have, and those that it may have but that are never shipped.

    structure   the model's state_dict()
    transient   its non-persistent buffers: a checkpoint written elsewhere may contain them
    """

    def __init__(self, structure: Structure, transient: Structure) -> None:
        self.structure = structure
        self.transient = transient

    def encode(self) -> bytes:
        """The body of ATTACH."""
        return msgspec.msgpack.encode(_Wire(structure=self.structure.encoded, transient=self.transient.encoded))

    @classmethod
    def decode(cls, body: Buffer) -> "Resident":
        """Raises MalformedMessage or LimitExceeded."""
        try:
            wire = _decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedMessage(f"Attach: {error}") from error
        return cls(Structure.decode(wire.structure), Structure.decode(wire.transient))
