"""What a push's label means for it: nothing yet, this very version, or another one.

A label never stands for two contents, so that a push may be repeated, and none can pass for another.
"""

import asyncio
import logging
from collections.abc import Callable

from shipd.service.composing import Part
from shipd.service.host import Host
from shipd.service.models import Model, Version
from shipproto.errors import AbortCode, TransferError
from shipproto.layout import Layout
from shipproto.messages import Committed
from shipproto.receiver import Receiver

log = logging.getLogger("shipd.transfer")


class Labelled:
    """One push, by its label. ``flush`` writes what the receiver has to say. Both raise TransferError."""

    def __init__(self, host: Host, model: Model, receiver: Receiver, flush: Callable[[], None]) -> None:
        self._host = host
        self._model = model
        self._receiver = receiver
        self._flush = flush

    async def compare(self, layout: Layout, version: Version, part: Part | None, verify: asyncio.Event) -> None:
        """The label is the current version's: only the digests decide whether the content is, too. ``verify`` is set
        when the sender has told its own; ``part`` is where a partial offer belongs."""
        digests = version.slot.digests
        assert digests is not None
        if part is not None:
            digests = await self._host.work(part.current, digests)
        if digests is None or digests.layout.structure.digest != layout.structure.digest:
            raise self._conflict(version.digest)
        self._receiver.compare(digests)
        self._flush()
        await verify.wait()
        if await self._host.work(self._receiver.verify):
            raise self._conflict(version.digest)
        self._receiver.verified(())
        self._already(version)

    def decide(self, digest: bytes) -> None:
        """The version would have this digest. Its label may have come only with FINISH, and may be an earlier one's."""
        known = self._model.labels.get(self._receiver.label)
        if known is not None and known != digest:
            raise self._conflict(known)
        version = self._model.version
        if version is None or version.label != self._receiver.label:
            return
        if version.digest != digest:
            raise self._conflict(version.digest)
        self._already(version)

    def _conflict(self, digest: bytes) -> TransferError:
        return TransferError(
            AbortCode.LABEL_CONFLICT,
            f"model {self._model.name!r} already has had a version {self._receiver.label!r} with other content (digest "
            f"{digest.hex()}): choose another label",
        )

    def _already(self, version: Version) -> None:
        receiver = self._receiver
        self._model.failed = None
        log.info(
            "the version is current already",
            extra={"model": self._model.name, "transfer": receiver.transfer.hex(), "label": version.label},
        )
        receiver.committed(
            Committed(
                already=True,
                digest=receiver.digest,
                label=version.label,
                live=live_digest(receiver, version),
                transfer=receiver.transfer,
            )
        )
        self._flush()


def live_digest(receiver: Receiver, version: Version) -> bytes:
    """What COMMITTED says beside the digest of what was sent: that of all that is live, after a partial offer."""
    return version.digest if receiver.offer.partial else b""
