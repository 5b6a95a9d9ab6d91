"""What two sides agree on before chunks travel: the base that both know, and the codecs that the receiver decodes.

    OFFER   the bases that the sender has, and whether it would rather know what the receiver holds
    WANT    the one of them that the receiver has, or another, whose chunks' digests it tells in HELD; its codecs

It holds for one connection and the lanes beside it; on the next one it is agreed anew.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shipproto.digests import LeafDigests
from shipproto.errors import MalformedMessage
from shipproto.limits import DIGEST_SIZE, MAX_DIGESTS_BODY
from shipproto.messages import SAME, Offer, Want


@dataclass(frozen=True, slots=True)
class Agreement:
    """What coded runs may be, on one connection; nothing, by default.

    base    the version that they build on; empty where there is none
    codecs  what the receiver decodes, and how fast, in MB/s of content; 0 where it does not know
    told    the receiver alone has the base, and tells the digests of its chunks
    """

    base: bytes = b""
    codecs: Mapping[int, int] = field(default_factory=dict)
    told: bool = False

    @classmethod
    def on(cls, want: Want, offer: Offer) -> "Agreement":
        """What ``want`` says in answer to ``offer``. Raises MalformedMessage where that is no answer to it."""
        told = bool(want.base) and want.base not in offer.bases
        if told and not offer.incremental:
            raise MalformedMessage("WANT names a base that was not offered")
        return cls(want.base, dict(zip(want.codecs, want.speeds, strict=True)), told)


@dataclass(frozen=True, slots=True)
class Ability:
    """What a receiver could agree on; nothing, by default.

    base     digest of its current version, laid out by the ruling structure; empty where that is not so
    digests  the leaf digests of that version
    codecs   as in ``Agreement``, SAME among them
    deltas   those of them, but for SAME, that need the base
    """

    base: bytes = b""
    digests: LeafDigests | None = None
    codecs: Mapping[int, int] = field(default_factory=dict)
    deltas: Collection[int] = ()

    def answer(self, offer: Offer) -> Agreement:
        """What is said to ``offer``. What the sender could make no use of is not."""
        shared = self.base in offer.bases
        told = not shared and offer.incremental and SAME in self.codecs and self._can_tell()
        useless = {*(() if shared else self.deltas), *(() if shared or told else (SAME,))}
        codecs = {number: self.codecs[number] for number in sorted(self.codecs) if number not in useless}
        return Agreement(self.base if codecs and (shared or told) else b"", codecs, told)

    def _can_tell(self) -> bool:
        digests = self.digests
        return bool(self.base) and digests is not None and digests.layout.chunks * DIGEST_SIZE <= MAX_DIGESTS_BODY
