"""Questions to a daemon, and the answers."""

from shipproto.limits import MAX_DETAIL_BODY, MAX_STRUCTURE_BODY
from shipproto.messages.fields import U32, U63, Label, Message, OptionalDigest, OptionalLabel, sixteen_or_none


class StatusRequest(Message, frozen=True, kw_only=True):
    """What is the daemon serving and doing? Empty ``model`` means all."""

    TYPE = 32
    model: OptionalLabel = ""


class StatusIs(Message, frozen=True, kw_only=True):
    """The answer; the body is ``status.Status``."""

    TYPE = 33
    MAX_BODY = MAX_DETAIL_BODY
    body_id: U32 = 0
    body_size: U63 = 0


class VerifyRequest(Message, frozen=True, kw_only=True):
    """Have every serving process of a model read its live parameters back and digest them."""

    TYPE = 34
    model: Label


class VerifyIs(Message, frozen=True, kw_only=True):
    """The answer; the body is ``status.Verification``."""

    TYPE = 35
    MAX_BODY = MAX_DETAIL_BODY
    body_id: U32 = 0
    body_size: U63 = 0


class Describe(Message, frozen=True, kw_only=True):
    """What must a version of this model consist of, and who serves it? Only to who says "describe" in HELLO."""

    TYPE = 36
    model: Label
    structure: OptionalDigest = b""
    """Digest of a structure that the asker has: where it is the model's, the answer leaves that out."""

    def flaw(self) -> str:
        return sixteen_or_none("structure", self.structure)


class DescriptionIs(Message, frozen=True, kw_only=True):
    """The answer; the body is ``description.Description``."""

    TYPE = 37
    MAX_BODY = 2 * MAX_STRUCTURE_BODY + MAX_DETAIL_BODY
    body_id: U32 = 0
    body_size: U63 = 0
