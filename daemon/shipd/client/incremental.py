"""What a push makes of earlier versions: which it offers as bases, whether coding pays on its link, what it keeps.

offers     OFFER's bases: versions that this process, a checkpoint or a cache has, where the link is worth them
begin      once WANT has said which of them the receiver has, and what it decodes
keep       once COMMITTED: the version is a base for the next push, where the link is worth it
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from shipd.bases.base import MAX_BASES, Base, Bases, Keeper
from shipd.client.choice import RAW, Chooser, Measured, Prefer
from shipd.codecs import compiled, registry
from shipd.transfer.lane import Lane
from shipproto.limits import MAX_RUN_BYTES
from shipproto.sender import Sender
from shipproto.structure import Structure

log = logging.getLogger("shipd.client")

_TRUSTED: Final = 256 * 1024
"""Bytes that the peer must have acknowledged before a rate is believed to be fast: less may pass in one burst through
whatever limits the link."""

_UNKNOWN: Final = 20e6
"""Bytes a second that a link is taken to carry at most until it has shown more."""

_UNTRIED_DECODING: Final = 5e8
"""Bytes a second that a receiver is taken to decode where it has not done so yet and cannot say."""

_KEPT_FOR: Final = 0.01
"""Density of changes of the next version that a base is kept for."""

_MANY_RUNS: Final = 8
"""Of a version whose size does not matter."""

_LIMITED: Final = 0.8
"""Share of a limit from which a rate is taken to be the limit's."""

_rates: dict[str, float] = {}
_rates_lock = threading.Lock()
"""Bytes a second that pushes of this process have reached to each address: where the next one begins."""


def untried() -> dict[int, Measured]:
    """What to expect of each codec before it has been used: on weights of bfloat16, measured; see README.md."""
    shares = {"xph": (0.0, 0.67), "gz": (0.77, 0.0003), "egr": (0.48, 0.0003), "duh": (0.3, 0.045)}
    shares |= {"f32d": (0.0, 0.33), "planes": (0.0, 0.85)}
    speeds = {"xph": 2.5e9, "gz": 5.0e9, "egr": 5.0e9, "duh": 2.0e9, "f32d": 0.9e9, "planes": 1.3e9}
    return {
        codec.number: Measured(codec.number, codec.name, speeds[codec.name], *shares[codec.name])
        for codec in registry.CODECS
    }


class OfferAgain(Exception):
    """The base that was named is the receiver's version, as its structure has it: that can be offered on another
    connection only."""


class Incremental:
    """Of one push.

    known    who knows bases, the likeliest first
    keepers  who keeps the version once it is committed
    named    the one of ``known`` that was asked for by name: it is told why it was of no use
    prefer   "time" or "bytes"
    limit    bytes a second that may be sent; None for as many as there is room for
    compile_above  bytes of a model from which having the codecs' loops compiled, or loaded, pays: half a second of a
                   process that ends with this push
    """

    def __init__(
        self,
        known: Sequence[Bases] = (),
        keepers: Sequence[Keeper] = (),
        *,
        named: Bases | None = None,
        prefer: Prefer = "time",
        limit: float | None = None,
        compile_above: int = 0,
    ) -> None:
        self.prefer = prefer
        self.base: Base | None = None
        self.chooser: Chooser | None = None
        self.kept: list[str] = []
        """Why the version was not kept, by each that did not."""
        self.keep_seconds = 0.0
        self.unused = ""
        """Why the base that was named is of no use, as the end of a sentence; empty where it is, or none was."""
        self._named = named
        self._named_digests: tuple[bytes, ...] = ()
        self._ruling: Structure | None = None
        """The receiver's structure, once it has turned out to be another than the offered one."""
        self._known = known
        self._keepers = keepers
        self._limit = limit
        self._compile_above = compile_above
        self._measured = untried()
        self._where = ""
        self._local = False
        self._coding = False
        """Whether the receiver takes coded runs at all."""
        self._plain = False
        """Whether the bytes as they are have turned out to be sooner there."""

    # --- before and during the conversation ----------------------------------------------------------------

    def offers(self, lane: Lane, sender: Sender) -> tuple[bytes, ...]:
        """Digests of versions that may serve as bases on this connection: none where no delta would be made anyway."""
        self._where, self._local = lane.peer, lane.local
        if not self._worth():
            return ()
        found: list[bytes] = []
        for bases in self._known:
            named = bases is self._named
            digests = bases.digests(sender.model, self._ruling if named and self._ruling else sender.offered)
            found += digests
            if bases is self._named:
                self._named_digests = digests
        if found and sender.offered.total_bytes > self._compile_above:
            # For this push, and others. Until it is done numpy does the work.
            with contextlib.suppress(RuntimeError):
                # No thread to be had, and numpy goes on doing it.
                threading.Thread(target=compiled.warm_up, name="shipd compiler", daemon=True).start()
        return tuple(dict.fromkeys(found))[:MAX_BASES]

    @staticmethod
    def reads_base(sender: Sender) -> bool:
        """Whether ``begin`` has a base to open, which may take as long as reading all of it from a disk."""
        return bool(sender.base) and sender.base in sender.bases

    def begin(self, sender: Sender, encoders: int) -> bool:
        """The receiver has said what it takes. Whether coded runs are to be sent at all."""
        self.end()
        self._coding = False
        if not (sender.incremental and sender.codecs) or (
            self._local and self.prefer == "time" and self._limit is None
        ):
            return False
        if self._named is not None:
            self._offer_again_in(sender.layout.structure, sender)
            self.unused = self._why_unused(sender)
        if self.reads_base(sender):
            opened = (bases.open(sender.model, sender.layout, sender.base) for bases in self._known)
            self.base = next((base for base in opened if base is not None), None)
        decoding = {number: speed * 1e6 or _UNTRIED_DECODING for number, speed in sender.codecs.items()}
        taken = self.chooser.taken if self.chooser is not None else []
        self.chooser = Chooser(self._measured, decoding, encoders, self.prefer, taken)
        # Where the link is known to be fast, not even the first run is read for nothing.
        known = _rates.get(self._where)
        fast = known is not None and not self._faster_coded(min(self._limit or float("inf"), known), decoding)
        self._plain = fast and self.prefer == "time"
        self._coding = True
        return True

    def _offer_again_in(self, structure: Structure, sender: Sender) -> None:
        """The receiver's structure rules, and may lack tensors of the checkpoints, or tie some: then a checkpoint has
        another digest than was offered for it. Raises OfferAgain where it is the receiver's version after all.
        """
        assert self._named is not None
        if self._ruling is None and sender.agreed.told and structure.digest != sender.offered.digest:
            self._ruling = structure
            if sender.base in self._named.digests(sender.model, structure):
                raise OfferAgain

    def _why_unused(self, sender: Sender) -> str:
        if not self._named_digests:
            return "its tensors are not those of the checkpoint"
        if sender.base in self._named_digests:
            return ""
        return "it is not the version that the daemon has"

    def link(self, lane: Lane) -> float:
        """Bytes a second that coding has to reckon with: what the link has shown, as far as that is to be believed."""
        limit = self._limit or float("inf")
        rate = lane.rate()
        if rate is not None and rate.acknowledged >= _TRUSTED and not rate.at_least:
            self._remember(rate.rate)
            return min(limit, rate.rate)
        known = _rates.get(self._where)
        if known is not None:
            return min(limit, known)
        return min(limit, _UNKNOWN if rate is None else min(rate.rate, _UNKNOWN))

    def plain(self, link: float) -> bool:
        """The bytes of a run are to travel as they are, over a link that carries so many a second. Whether those of all
        that follow are, too: where that is because of the link, and not of this run."""
        if self.prefer == "bytes" or (self.chooser is not None and self._faster_coded(link, self.chooser.decoding)):
            return False
        self._plain = True
        return True

    @property
    def coding_pays(self) -> bool:
        """Whether runs are to be coded, as far as is known by now."""
        return self._coding and not self._plain

    def reconsider(self, rate: float) -> None:
        """``rate`` bytes a second are sent as they are: perhaps coding would be faster after all."""
        if self._coding and self.chooser is not None:
            self._remember(rate)
            self._plain = not self._faster_coded(rate, self.chooser.decoding)

    def _faster_coded(self, rate: float, decoding: Mapping[int, float]) -> bool:
        """Whether a version that differs a little is there sooner as a delta, at so many bytes a second."""
        trial = Chooser(self._measured, decoding)
        choice = trial.choose(MAX_RUN_BYTES, decoding, link=rate, density=_KEPT_FOR, runs=_MANY_RUNS)
        return choice.codec.number != RAW

    def _remember(self, rate: float) -> None:
        if self._limit is not None and rate > _LIMITED * self._limit:
            # That is the limit, and not what the link carries where there is none.
            return
        with _rates_lock:
            _rates[self._where] = rate

    def end(self) -> None:
        """Nothing reads the base any more."""
        if self.base is not None:
            self.base.close()
            self.base = None

    # --- afterwards ----------------------------------------------------------------------------------------

    def keep(self, sender: Sender, read_chunk: Callable[[int], memoryview], rate: float) -> None:
        """The version is committed; ``rate`` bytes a second were sent of it. Never fails a push."""
        if rate and self._where not in _rates:
            self._remember(rate)
        if not self._worth() or not sender.digests.complete:
            return
        began = time.monotonic()
        for keeper in self._keepers:
            try:
                why = keeper.keep(sender.model, sender.digests, read_chunk)
            except Exception as error:  # noqa: BLE001 - what is committed is committed, whatever a keeper comes to
                why = f"{type(error).__name__}: {error}"
            if why is not None:
                self.kept.append(why)
                log.info("the version is not kept for the next push", extra={"why": why})
        self.keep_seconds = time.monotonic() - began

    def _worth(self) -> bool:
        """Whether a base makes pushes to there faster, or fewer bytes are wanted anyway."""
        if self.prefer == "bytes":
            return True
        if self._local and self._limit is None:
            return False
        rate = min(self._limit or float("inf"), _rates.get(self._where, _UNKNOWN))
        return self._faster_coded(rate, dict.fromkeys(self._measured, _UNTRIED_DECODING))
