"""What a version of a model must consist of, and what it is served by: the body of DESCRIPTION_IS, as typed msgpack.

Fields are only ever added, with defaults, so that an older reader understands a newer daemon.
"""

from typing import Annotated, Final

import msgspec

from shipproto.errors import MalformedMessage
from shipproto.frame import Buffer
from shipproto.limits import MAX_PROCESSES
from shipproto.messages.fields import U32, U63, ClassName, Environment, Label, OptionalDigest, OptionalLabel, Word
from shipproto.structure import Structure

ENVIRONMENT: Final = ("cuda", "platform", "python", "shipd", "torch")
"""Keys of an environment, each left out where it is not known or there is none: versions of CUDA as torch was built
for it, of Python, shipd and torch, and "linux-x86_64" for the platform. A reader ignores others."""

POLICIES: Final = ("strict", "subset", "partial")
"""What may differ between a checkpoint and the model, the least first: nothing; the checkpoint may lack tensors, which
keep their values; and it may have tensors that the model lacks, which are left out."""


class ProcessDescription(msgspec.Struct, frozen=True, kw_only=True):
    """One serving process. ``model_class`` is the qualified name of the resident model's class."""

    pid: U32
    mode: Word = ""
    model_class: ClassName = ""
    environment: Environment = {}


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    structure         encoded; empty where nothing is known of it yet, or the asker has it
    structure_digest  of it, 16 bytes; empty where nothing is known of it yet
    transient         encoded: non-persistent buffers, which a checkpoint may contain; empty for none
    delivered         versions are handed to the processes' ``load_weights``, which take any names
    version           whether there is one, so that what is not sent could keep its values
    policy, cast      what the daemon's configuration says of this model; "" and None where it says nothing
    limit             bytes that a version may have; 0 where nothing is set
    """

    model: Label
    structure: bytes = b""
    structure_digest: OptionalDigest = b""
    transient: bytes = b""
    delivered: bool = False
    version: bool = False
    label: OptionalLabel = ""
    digest: OptionalDigest = b""
    policy: Word = ""
    cast: bool | None = None
    limit: U63 = 0
    memory_limit: U63 = 0
    memory_used: U63 = 0
    environment: Environment = {}
    processes: Annotated[list[ProcessDescription], msgspec.Meta(max_length=MAX_PROCESSES)] = []

    def resident(self, known: Structure | None = None) -> Structure | None:
        """What a version must consist of; ``known`` is what the asker named. None where nothing is known of it yet.

        Raises MalformedMessage or LimitExceeded.
        """
        if self.structure:
            found = Structure.decode(self.structure)
            if found.digest != self.structure_digest:
                raise MalformedMessage("a description of another structure than it names")
            return found
        if known is not None and self.structure_digest == known.digest:
            return known
        if self.structure_digest:
            raise MalformedMessage("a description without the structure that it is of")
        return None

    def transients(self) -> Structure:
        """The non-persistent buffers. Raises MalformedMessage or LimitExceeded."""
        return Structure.decode(self.transient) if self.transient else Structure.build(())


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Description)


def encode_description(description: Description) -> bytes:
    """The body of DESCRIPTION_IS."""
    return _encoder.encode(description)


def decode_description(body: Buffer) -> Description:
    """Raises MalformedMessage."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"Description: {error}") from error
