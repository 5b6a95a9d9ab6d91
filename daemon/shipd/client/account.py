"""The figures of one push: what was written and how long everything took, over all its connections."""

import time
from dataclasses import dataclass, field
from typing import Final

from shipd.client.incremental import Incremental
from shipd.client.planning import Outcome
from shipd.client.profile import Profile
from shipd.client.receipt import CodecUse, Receipt
from shipd.codecs import registry
from shipd.transfer.times import Times
from shipd.units import count_tensors
from shipproto.messages import Committed
from shipproto.sender import Sender

_TELLING: Final = 1 << 20
"""Bytes below which how long they took says nothing of the link."""

_WITHOUT_BASE: Final = frozenset((registry.RAW, registry.BY_NAME["xph"].number))
"""What is made from the content alone, also where there is a base."""


@dataclass(slots=True)
class Account:
    """Belongs to the push's thread. Moments are of time.monotonic, and None until they have come; the rest is seconds.

    began             when the source began to be opened
    connected_before  what opening a connection took that was there before the push
    """

    began: float
    connected_before: float = 0.0
    bytes_sent: int = 0
    bytes_unchanged: int = 0
    bytes_lent: int = 0
    frames_resent: int = 0
    lanes: int = 1
    times: Times = field(default_factory=Times)
    open: float = 0.0
    plan: float = 0.0
    connect: float = 0.0
    agree: float = 0.0
    wire_wait: float = 0.0
    first_data: float | None = None
    all_held: float | None = None
    committing: float | None = None
    committed: float | None = None
    codecs: dict[str, CodecUse] = field(default_factory=dict)
    base: bytes = b""

    def coded(self, codec: int, size: int, payload: int, base: bytes) -> None:
        """``size`` bytes of content were sent as a payload of so many bytes, made by whoever had this ``base``."""
        if codec not in _WITHOUT_BASE:
            # What comes again as it is, or to a daemon that was restarted, does not make it unused.
            self.base = base or self.base
        if codec == registry.SAME:
            self.bytes_unchanged += size
        name = registry.NAMES[codec]
        use = self.codecs.get(name, CodecUse(name, 0, 0, 0))
        self.codecs[name] = CodecUse(name, use.runs + 1, use.content_bytes + size, use.payload_bytes + payload)

    def sending(self, offered: float) -> None:
        """Chunks are about to be written, on a connection on which the version was ``offered`` at that moment."""
        if self.first_data is None:
            self.first_data = time.monotonic()
            self.agree = self.first_data - offered

    def heard(self, sender: Sender) -> None:
        """The receiver has said something."""
        if self.all_held is None and self.first_data is not None and sender.held == sender.layout.chunks:
            self.all_held = time.monotonic()

    @property
    def rate(self) -> float:
        """Bytes a second that went over the wire; 0 where there was nothing to measure."""
        if self.first_data is None or self.all_held is None or self.all_held <= self.first_data:
            return 0.0
        if self.bytes_sent < _TELLING:
            return 0.0
        return self.bytes_sent / (self.all_held - self.first_data)

    def receipt(
        self, sender: Sender, model: str, committed: Committed, incremental: Incremental, outcome: Outcome
    ) -> Receipt:
        """What the push came to, now that it is over."""
        ended = self.committed or time.monotonic()
        seconds = ended - self.began
        structure = sender.layout.structure
        plan = outcome.plan
        resent = dict.fromkeys(name for chunk in sender.chunks_resent for name in sender.layout.chunk_names(chunk))
        wire = (self.all_held or time.monotonic()) - self.first_data if self.first_data is not None else 0.0
        return Receipt(
            model=model,
            label=committed.label,
            digest=committed.digest.hex(),
            live_digest=(committed.live or committed.digest).hex(),
            transfer_id=sender.transfer.hex(),
            tensors=len(structure),
            bytes_total=structure.total_bytes,
            bytes_sent=self.bytes_sent,
            bytes_unchanged=self.bytes_unchanged,
            bytes_lent=self.bytes_lent,
            frames_resent=self.frames_resent,
            resent_tensors=tuple(resent),
            policy=outcome.rules.policy,
            skipped=(*(plan.skipped if plan is not None else ()), *sender.skipped),
            renamed=plan.how if plan is not None else (),
            cast=tuple(
                f"{given} -> {wanted} ({count_tensors(cast.tensors)})" for (given, wanted), cast in plan.casts.items()
            )
            if plan is not None
            else (),
            kept=plan.kept if plan is not None else (),
            ignored=plan.ignored if plan is not None else (),
            swapped=committed.swapped,
            stale=committed.stale,
            already=committed.already,
            seconds=seconds,
            wire_seconds=wire,
            stage_seconds=sender.staged.stage_seconds if sender.staged is not None else 0.0,
            pause_seconds=committed.pause_seconds,
            base=self.base.hex(),
            base_unused=incremental.unused,
            codecs=tuple(self.codecs.values()),
            choices=tuple(incremental.chooser.taken) if incremental.chooser is not None else (),
            not_kept=tuple(incremental.kept),
            keep_seconds=incremental.keep_seconds,
            profile=self._profile(sender, committed, wire, seconds, ended),
        )

    def _profile(self, sender: Sender, committed: Committed, wire: float, seconds: float, ended: float) -> Profile:
        return Profile(
            open=self.open,
            plan=self.plan,
            connect=self.connect,
            agree=self.agree,
            wire=wire,
            read=self.times.read,
            encode=self.times.encode,
            digest=self.times.digest,
            check=self.times.check,
            write=self.times.write,
            wait=self.wire_wait,
            receiver_receive=committed.receive_seconds,
            receiver_check=committed.check_seconds,
            receiver_digest=committed.digest_seconds,
            receiver_decode=committed.decode_seconds,
            verify=committed.verify_seconds,
            stage=sender.staged.stage_seconds if sender.staged is not None else 0.0,
            commit=ended - self.committing if self.committing is not None else 0.0,
            pause=committed.pause_seconds or 0.0,
            hold_wait=committed.wait_seconds,
            copy=committed.copy_seconds,
            total=seconds + self.connected_before,
            lanes=self.lanes,
        )
