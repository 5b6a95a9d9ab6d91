"""Questions to a daemon, and the answers."""

from shipproto.limits import MAX_DETAIL_BODY
from shipproto.messages.fields import U32, U63, Label, Message, OptionalLabel


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
