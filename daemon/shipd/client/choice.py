"""Which codec brings a run to the receiver soonest, or in the fewest bytes: arithmetic over what was measured.

Encoding, the link and decoding work at the same time on different runs, so n runs take as long as the slowest of the
three takes for all of them, and the other two once. What goes in is measured: the link's rate, this side's speeds as
it encodes, the receiver's as it said in WANT, and the density of changes in a sample of the run. What a codec makes of
a run is guessed from the density until it has been tried, and from what it made of the last run afterwards.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Prefer = Literal["time", "bytes"]

RAW: Final = 0
"""Stands for sending the bytes as they are, which is no codec."""

_RAW_RATE: Final = 3e9
"""Bytes a second that one core reads, digests and sends, and another receives: what a link must exceed for nothing but
the cores to count."""

_TOLD: Final = 64
"""Changes of mind that are remembered."""

_MOST_BY_WORD: Final = 4.0
"""Words of payload that one changed word takes at most: itself, and where it is. What looks like more comes of a sample
that has missed most changes, and would keep a codec from being tried where the next sample misses none."""

_SMOOTHING: Final = 0.5
"""Weight of the latest measurement in a running average: speeds drift, and a codec's first run is a cold one."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a codec is expected to do with a run.

    share    payload bytes by byte of the run
    encode   bytes of the run a second, on all cores that encode
    decode   the same for the receiver
    """

    number: int
    name: str
    share: float
    encode: float
    decode: float

    def seconds(self, size: int, link: float, runs: int) -> float:
        """Until ``runs`` runs of ``size`` bytes have been decoded over a link of ``link`` bytes a second; per run."""
        stages = (size / self.encode, size * self.share / link, size / self.decode)
        return max(stages) + (sum(stages) - max(stages)) / max(runs, 1)


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision and what it rests on, for ``--explain``. ``link`` is bytes a second, ``density`` a share of words."""

    codec: Prospect
    size: int
    link: float
    density: float | None
    seconds: float
    others: tuple[tuple[str, float, int], ...]
    """What else was possible: name, expected seconds, expected bytes."""


@dataclass(slots=True)
class Measured:
    """One codec here: how fast it is, and what it makes of a run. Updated as it is used.

    share_at   guess of the payload's share for a density of changes, until there is a measurement
    """

    number: int
    name: str
    encode: float
    share_of_density: float = 0.0
    share_at_least: float = 1.0
    """The share is ``share_at_least + share_of_density * density``."""
    tried: int = 0

    def share(self, density: float | None) -> float:
        """Expected payload bytes by byte of a run with this density of changes; None: it is no delta."""
        return self.share_at_least + self.share_of_density * (density or 0.0)

    def learn(self, size: int, payload: int, seconds: float, density: float | None) -> None:
        """``size`` bytes with this density became ``payload`` bytes in ``seconds``."""
        weight = _SMOOTHING if self.tried else 1.0
        self.tried += 1
        if seconds > 0:
            self.encode += weight * (size / seconds - self.encode)
        share = payload / size
        if density and self.share_of_density:
            by_word = min(max(0.0, share - self.share_at_least) / density, _MOST_BY_WORD)
            self.share_of_density += weight * (by_word - self.share_of_density)
        else:
            self.share_at_least += weight * (share - self.share_at_least)


@dataclass(slots=True)
class Chooser:
    """Decides run by run. Pure, but for what it is told; not for several threads at once.

    encoders   threads that encode at the same time
    decoding   the receiver's speeds in bytes a second, by codec; only these can be chosen
    prefer     "time": soonest there; "bytes": the smallest
    """

    codecs: Mapping[int, Measured]
    decoding: Mapping[int, float]
    encoders: int = 1
    prefer: Prefer = "time"
    taken: list[Choice] = field(default_factory=list)
    """Choices other than the one before, and the first, for whoever wants to know why."""

    def choose(self, size: int, candidates: Iterable[int], *, link: float, density: float | None, runs: int) -> Choice:
        """The codec for a run of ``size`` bytes; RAW where none is better, or where there is none.

        candidates   codecs that can take this run: its word's size fits, and there is a base where one is needed
        link         bytes a second; infinite where it is not what limits
        density      share of changed words in a sample; None without a base
        runs         how many runs like this one are still to be sent, itself included
        """
        prospects = [Prospect(RAW, "raw", 1.0, _RAW_RATE, _RAW_RATE)]
        for number in candidates:
            if number in self.decoding and number in self.codecs:
                known = self.codecs[number]
                prospects.append(
                    Prospect(
                        number,
                        known.name,
                        min(1.0, known.share(density)),
                        known.encode * self.encoders,
                        max(1.0, self.decoding[number]),
                    )
                )
        times = [(prospect.seconds(size, link, runs), prospect) for prospect in prospects]
        if self.prefer == "bytes":
            # What is expected may be of other weights than these: only the attempt shows that none is shorter than RAW.
            best = min(times[1:] or times, key=lambda pair: (pair[1].share, pair[0]))
        else:
            best = min(times, key=lambda pair: pair[0])
        others = tuple(
            (prospect.name, seconds, math.ceil(size * prospect.share))
            for seconds, prospect in times
            if prospect is not best[1]
        )
        choice = Choice(best[1], size, link, density, best[0], others)
        if len(self.taken) < _TOLD and (not self.taken or self.taken[-1].codec.number != choice.codec.number):
            self.taken.append(choice)
        return choice
