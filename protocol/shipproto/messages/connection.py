"""Messages of any connection: the handshake, pieces of bodies, what is to come again, signs of life."""

from typing import Annotated

import msgspec

from shipproto.limits import MAX_CAPABILITIES, MAX_DETAIL_BODY, MAX_NACK
from shipproto.messages.fields import U32, U63, Environment, Message, Nonce, Proof, ProtocolVersion, Word


class Hello(Message, frozen=True, kw_only=True):
    """First message of both sides; its frame and these fields are the same in every version, for ever."""

    TYPE = 1
    agent: Word = ""
    auth: bool = False
    """From the accepting side: a proof of the token is required."""
    capabilities: Annotated[tuple[Word, ...], msgspec.Meta(max_length=MAX_CAPABILITIES)] = ()
    environment: Environment = msgspec.field(default_factory=dict)
    """Versions of what it runs on, see ``description.ENVIRONMENT``. From an accepting side only where it asks for no
    proof: nobody else is told before they have proved who they are."""
    nonce: Nonce
    version_max: ProtocolVersion
    version_min: ProtocolVersion

    def flaw(self) -> str:
        return "version_min exceeds version_max" if self.version_min > self.version_max else ""


class Auth(Message, frozen=True, kw_only=True):
    """Proof of the token: HMAC-SHA256 over both HELLOs. The initiator proves first."""

    TYPE = 2
    proof: Proof


class Body(Message, frozen=True, kw_only=True):
    """A further piece of the body of the message that announced ``body_id``."""

    TYPE = 3
    MAX_BODY = MAX_DETAIL_BODY
    body_id: U32
    offset: U63


class Nack(Message, frozen=True, kw_only=True):
    """These frames arrived damaged: send them again. Their preludes were good."""

    TYPE = 4
    sequences: Annotated[tuple[U63, ...], msgspec.Meta(min_length=1, max_length=MAX_NACK)]


class Ping(Message, frozen=True, kw_only=True):
    """Shows that this side is alive; ``reply`` asks the other to show the same."""

    TYPE = 5
    reply: bool = False
