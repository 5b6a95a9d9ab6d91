"""The codecs and their rivals at work, in a process of its own, on one thread of one core.

    python -m tests.benchmarks.codec_runs numba|numpy ROUNDS small|full FILE     writes samples to FILE, as JSON

A codec of shipd's encodes what a sender would give it: runs of whole chunks, at most 16 MiB each and so short that the
payload fits a frame. A rival gets everything at once, which is the best case for all of them. Content is applied in
place, over the base. A memcpy of as many bytes is timed before each encoding and before each application, and
coders take turns in every round: a speed is told as a share of the memcpy beside it.

Without numba the codecs do with numpy: then only they are measured, on real weights.
"""

import dataclasses
import gc
import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from shipd.codecs import compiled as loops
from shipd.codecs import registry
from shipd.codecs.codec import Codec
from shipproto.dtypes import BY_NAME
from shipproto.limits import LEAF_SIZE, MAX_PAYLOAD
from tests.benchmarks import machine
from tests.benchmarks.rivals.rival import Matrix, Rival
from tests.support import finetune, synthetic
from tests.support.finetune import Words
from tests.support.naive import Tensor

LONGEST_RUN: Final = 16 << 20
SMALL: Final = (100_000_000,)
FULL: Final = (100_000_000, 500_000_000, 2_000_000_000)
"""Bytes of the synthetic versions."""
COPIES: Final = 3
"""Of which a memcpy's time is the mean, for less than a few milliseconds tell little."""
_ROUNDS_LARGE: Final = 3

LAYERS: Final = "one warm step at LR 1e-6, layers"
ALL: Final = "one warm step at LR 1e-6, all weights"
MANY: Final = "steps 42 to 60 in one, layers"
MASTERS: Final = "one step of fp32 masters"
SYNTHETIC: Final = "synthetic step"

DELTAS: Final = ("egr", "gz", "duh", "dense_xor", "gap16", "pulse")
DENSE: Final = ("xph", "plain_zstd", "zipnn")
FLOATS: Final = ("f32d", "planes", "dense_xor", "plain_zstd")
LARGE: Final = ("egr", "gz", "xph", "dense_xor", "gap16", "pulse")
RIVALS: Final = ("dense_xor", "gap16", "pulse", "plain_zstd", "zipnn")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """Two versions, laid out as their tensors end to end, and who is measured on them."""

    name: str
    dtype: str
    before: Bytes
    after: Bytes
    tensors: Sequence[Matrix]
    coders: Sequence[str]
    rounds: int

    @property
    def density(self) -> float:
        """The share of elements that changed."""
        word = np.dtype(f"u{BY_NAME[self.dtype].itemsize}")
        return float(np.mean(self.before.view(word) != self.after.view(word)))


@dataclass
class Sample:
    """One coder in one case.

    content, payload      bytes; ``digest`` is of all payloads
    encode, apply         bytes of content a second, in each round
    encode_share, ...     the same as a share of a memcpy's speed
    """

    case: str
    coder: str
    label: str
    kernels: str
    density: float
    content: int
    payload: int
    digest: str
    encode: list[float] = field(default_factory=list)
    apply: list[float] = field(default_factory=list)
    encode_share: list[float] = field(default_factory=list)
    apply_share: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times smaller the payload is."""
        return self.content / self.payload


class Coder(Protocol):
    """What is timed."""

    label: str

    def encode(self) -> list[bytes]:
        """The payloads."""

    def apply(self, payloads: Sequence[bytes], target: memoryview) -> None:
        """Make the content of the base in ``target``."""


class Ours:
    """A codec of shipd's over runs. Raises ValueError where a single chunk's payload does not fit a frame."""

    def __init__(self, codec: Codec, case: Case) -> None:
        self.label = codec.name.upper()
        self._codec = codec
        self._dtype = BY_NAME[case.dtype].code
        self._before = case.before.data
        self._after = case.after.data
        self._runs = list(self._cut())

    def _cut(self) -> Iterator[slice]:
        at, size = 0, LONGEST_RUN
        while at < len(self._after):
            while self._payload(run := slice(at, min(at + size, len(self._after)))) is None:
                if size == LEAF_SIZE:
                    raise ValueError(f"{self.label}: the payload of a chunk does not fit a frame")
                size //= 2
            yield run
            at = run.stop

    def _payload(self, run: slice) -> bytes | None:
        base = self._before[run] if self._codec.delta else None
        return self._codec.encode(self._after[run], base, dtype=self._dtype, most=MAX_PAYLOAD)

    def encode(self) -> list[bytes]:
        """See Coder."""
        payloads = [self._payload(run) for run in self._runs]
        return [payload for payload in payloads if payload is not None]

    def apply(self, payloads: Sequence[bytes], target: memoryview) -> None:
        """See Coder."""
        for run, payload in zip(self._runs, payloads, strict=True):
            out = target[run]
            self._codec.decode(payload, out if self._codec.delta else None, out)


class Theirs:
    """A rival, over everything at once."""

    def __init__(self, rival: Rival, case: Case) -> None:
        self.label = rival.name
        self._rival = rival
        self._case = case

    def encode(self) -> list[bytes]:
        """See Coder."""
        case = self._case
        return [self._rival.encode(case.after.data, case.before.data, case.tensors)]

    def apply(self, payloads: Sequence[bytes], target: memoryview) -> None:
        """See Coder."""
        self._rival.apply(payloads[0], target, self._case.tensors)


def coder_of(name: str, case: Case) -> Coder | None:
    """By its name in one of the lists above; None where it is not installed, or not for such data."""
    if name in RIVALS:
        try:
            # What ZipNN imports decorates functions with what torch no longer recommends.
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                return Theirs(importlib.import_module(f"tests.benchmarks.rivals.{name}").RIVAL, case)
        except ImportError:
            return None
    codec = codecs().get(name)
    try:
        return Ours(codec, case) if codec is not None else None
    except ValueError:
        return None


def codecs() -> dict[str, Codec]:
    """Those of shipd, by name."""
    return dict(registry.BY_NAME)


def cases(sizes: Sequence[int], rounds: int) -> Iterator[Case]:
    """Made one by one: the largest are not to be in memory together."""
    rows = finetune.tensors()
    versions = {step: flat for step, flat in finetune.words() if step in (40, 41, 60)}
    layers = {step: finetune.part_of(rows, flat) for step, flat in versions.items()}
    chosen = layers[41][0]
    yield _words(LAYERS, chosen, layers[40][1], layers[41][1], DELTAS, rounds)
    yield _words(ALL, rows, versions[40], versions[41], (*DELTAS, *DENSE), rounds)
    yield _words(MANY, chosen, layers[41][1], layers[60][1], DELTAS, rounds)
    masters = finetune.masters()
    after = synthetic.following_masters(masters, seed=1)
    yield Case(MASTERS, "float32", masters.view(np.uint8), after.view(np.uint8), _matrices(rows), FLOATS, rounds)
    for total in sizes:
        made = synthetic.layers(total)
        before = synthetic.first(made, seed=2)
        name = f"{SYNTHETIC}, {total / 1e6:,.0f} MB"
        yield _words(name, made, before, synthetic.following(before, seed=3), LARGE, _ROUNDS_LARGE)


def _words(name: str, rows: Sequence[Tensor], before: Words, after: Words, coders: Sequence[str], rounds: int) -> Case:
    return Case(name, "bfloat16", before.view(np.uint8), after.view(np.uint8), _matrices(rows), coders, rounds)


def _matrices(rows: Sequence[Tensor]) -> list[Matrix]:
    return [(row.shape[0], math.prod(row.shape[1:])) for row in rows]


def measure(case: Case, kernels: str, names: Sequence[str]) -> list[Sample]:
    """Those of ``names`` that there are. Raises AssertionError where one gives back other bytes."""
    target = case.before.copy()
    coders: dict[str, Coder] = {}
    samples: dict[str, Sample] = {}
    density = case.density
    for name in names:
        coder = coder_of(name, case)
        if coder is None:
            continue
        # Also compiles what is compiled, and has what the first call of everything makes.
        payloads = coder.encode()
        coder.apply(payloads, target.data)
        if not np.array_equal(target, case.after):
            raise AssertionError(f"{coder.label}, {case.name}: other bytes came out than went in")
        np.copyto(target, case.before)
        digest = xxhash.xxh3_128_hexdigest(b"".join(payloads))
        size = sum(map(len, payloads))
        coders[name] = coder
        samples[name] = Sample(case.name, name, coder.label, kernels, density, len(target), size, digest)
    gc.collect()
    gc.disable()
    for _ in range(case.rounds):
        for name, coder in coders.items():
            _round(coder, case, target, samples[name])
    gc.enable()
    return list(samples.values())


def _round(coder: Coder, case: Case, target: Bytes, sample: Sample) -> None:
    reference = _copy(case, target)
    payloads: list[bytes] = []
    seconds = _timed(lambda: payloads.extend(coder.encode()))
    sample.encode.append(len(target) / seconds)
    sample.encode_share.append(reference / seconds)
    reference = _copy(case, target)
    seconds = _timed(lambda: coder.apply(payloads, target.data))
    sample.apply.append(len(target) / seconds)
    sample.apply_share.append(reference / seconds)


def _copy(case: Case, target: Bytes) -> float:
    """Seconds of a memcpy; the target is the base afterwards."""
    return sum(_timed(lambda: np.copyto(target, case.before)) for _ in range(COPIES)) / COPIES


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(kernels: str, rounds: int, sizes: Sequence[int]) -> list[Sample]:
    """All samples of this process, which is pinned to a core of its own."""
    setting = machine.settings()[0]
    machine.pin(setting.receiver[:1])
    compiled = kernels == "numba"
    if not compiled:
        # As where memory may not be made executable: importing it fails.
        sys.modules["numba"] = None  # type: ignore[assignment]  # the documented way to have an import fail
    if loops.warm_up() is not compiled:
        raise RuntimeError(f"{kernels} was to be measured: {loops.why_not() or 'numba was there'}")
    found: list[Sample] = []
    for case in cases(sizes if compiled else (), rounds):
        names = case.coders if compiled else [name for name in case.coders if name not in RIVALS]
        if compiled or case.name != MANY:
            found += measure(case, kernels, names)
    return found


if __name__ == "__main__":
    _, which, count, size, file = sys.argv
    made = run(which, int(count), FULL if size == "full" else SMALL)
    Path(file).write_text(json.dumps([dataclasses.asdict(sample) for sample in made]))
