"""The first exchange on every connection: versions, and a proof that both sides know the token.

    initiator                              acceptor
      HELLO(nonce)            ->
                              <-           HELLO(nonce, auth)
      AUTH(proof)             ->                                  only where HELLO.auth is set
                              <-           AUTH(proof)

A proof is HMAC-SHA256(token, role + SHA-256(initiator's HELLO) + SHA-256(acceptor's HELLO)), so the token
never travels, a recorded proof is worth nothing on another connection, and what the HELLOs say cannot be
altered unnoticed. Who connects proves first: nobody gets a proof to guess at by merely connecting.
HMAC: RFC 2104.
"""

import enum
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from shipproto.errors import AbortCode, AuthFailed, UnexpectedMessage, VersionMismatch
from shipproto.headers import encode_header
from shipproto.limits import NONCE_SIZE, PROTOCOL_VERSION
from shipproto.messages import Abort, Auth, Hello, Message

_INITIATOR: Final = b"shipd initiator\x00"
_ACCEPTOR: Final = b"shipd acceptor\x00\x00"


class Step(enum.Enum):
    """Where a side is in the exchange."""

    EXPECT_HELLO = enum.auto()
    EXPECT_AUTH = enum.auto()
    DONE = enum.auto()


class Handshake:
    """One side of the exchange. Feed it messages; it returns what to send back.

    token         None means that this side has none: an acceptor then asks for no proof
    capabilities  optional abilities of this side
    """

    def __init__(
        self, *, initiator: bool, nonce: bytes, agent: str, token: bytes | None, capabilities: Sequence[str] = ()
    ) -> None:
        if len(nonce) != NONCE_SIZE:
            raise ValueError(f"a nonce has {NONCE_SIZE} bytes")
        self.initiator = initiator
        self.step = Step.EXPECT_HELLO
        self.peer: Hello | None = None
        self._token = token
        self._own = Hello(
            agent=agent,
            auth=not initiator and token is not None,
            capabilities=tuple(capabilities),
            nonce=nonce,
            version_max=PROTOCOL_VERSION,
            version_min=PROTOCOL_VERSION,
        )
        self._transcript = b""

    def opening(self) -> Hello | None:
        """What this side sends before it has heard anything."""
        return self._own if self.initiator else None

    def receive(self, message: Message, header: bytes) -> list[Message]:
        """Take the peer's next message, and its header as it arrived, and return the replies.

        Raises VersionMismatch, AuthFailed or UnexpectedMessage; ``last_words`` has what to send before closing.
        """
        if isinstance(message, Hello) and self.step is Step.EXPECT_HELLO:
            return self._hello(message, header)
        if isinstance(message, Auth) and self.step is Step.EXPECT_AUTH:
            return self._auth(message)
        if isinstance(message, Abort) and self.initiator:
            if message.code == AbortCode.AUTH:
                raise AuthFailed(message.message)
            if message.code == AbortCode.VERSION:
                raise VersionMismatch(message.message)
        raise UnexpectedMessage(f"{type(message).__name__} in the middle of the handshake")

    def last_words(self, error: Exception) -> list[Message]:
        """What an acceptor tells the peer before it closes the connection because of ``error``."""
        if self.initiator:
            return []
        if isinstance(error, VersionMismatch):
            return [self._own, Abort(code=AbortCode.VERSION, message=str(error))]
        if isinstance(error, AuthFailed):
            return [Abort(code=AbortCode.AUTH, message=str(error))]
        return []

    def _hello(self, hello: Hello, header: bytes) -> list[Message]:
        if not hello.version_min <= PROTOCOL_VERSION <= hello.version_max:
            theirs = f"{hello.version_min} to {hello.version_max}"
            older = hello.version_max < PROTOCOL_VERSION
            raise VersionMismatch(
                f"{hello.agent or 'the peer'} speaks protocol {theirs}, this side {PROTOCOL_VERSION}: "
                f"update {'the other side' if older else 'this side'}"
            )
        self.peer = hello
        # The peer's as it arrived: a later release may say things there that this one does not know.
        own = encode_header(self._own)
        both = (own, header) if self.initiator else (header, own)
        self._transcript = b"".join(hashlib.sha256(side).digest() for side in both)
        if not self.initiator:
            self.step = Step.EXPECT_AUTH if self._own.auth else Step.DONE
            return [self._own]
        if hello.auth and self._token is None:
            raise AuthFailed("the daemon asks for a token and none was given")
        if not hello.auth and self._token is not None:
            raise AuthFailed(
                "a token was given but the daemon asks for none, so it cannot prove who it is; "
                "give no token if that is as it should be"
            )
        if not hello.auth:
            self.step = Step.DONE
            return []
        self.step = Step.EXPECT_AUTH
        return [Auth(proof=self._proof(_INITIATOR))]

    def _auth(self, auth: Auth) -> list[Message]:
        expected = self._proof(_ACCEPTOR if self.initiator else _INITIATOR)
        if not hmac.compare_digest(auth.proof, expected):
            raise AuthFailed("the token is wrong")
        self.step = Step.DONE
        return [] if self.initiator else [Auth(proof=self._proof(_ACCEPTOR))]

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._token or b"", role + self._transcript, "sha256")
