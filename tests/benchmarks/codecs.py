"""How small a step becomes and how fast, by every codec and by what others do, on one core.

The measuring is done by codec_runs, in two processes one after the other: with numba and without. Both have to make the
same payloads. What is said here is the payload alone; what a whole push sends is a matter of the benchmarks of pushes.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.codec_runs import ALL, LAYERS, MASTERS, RIVALS, SYNTHETIC, Sample
from tests.benchmarks.machine import ROOT
from tests.benchmarks.rows import Row, median, spread

SIZES: Final[dict[tuple[str, str], float]] = {
    (LAYERS, "egr"): 420.0,
    (LAYERS, "gz"): 260.0,
    (ALL, "xph"): 1.5,
    (MASTERS, "f32d"): 3.1,
}
"""How many times smaller the payload has to be."""

SMALLER: Final = (("egr", "pulse", 3.5), ("egr", "dense_xor", 3.0), ("egr", "gap16", 2.0))
"""On the layers: whose payload has to be how many times smaller than whose."""

SPEEDS: Final[dict[tuple[str, str, str], float]] = {
    ("numba", "egr", "encode"): 0.10,
    ("numba", "egr", "apply"): 0.15,
    ("numba", "gz", "encode"): 0.2,
    ("numba", "gz", "apply"): 0.2,
    ("numpy", "egr", "encode"): 0.015,
    ("numpy", "egr", "apply"): 0.015,
}
"""The share of a memcpy's speed that has to be reached."""

FASTER: Final = (("xph", "zipnn", 2.5),)
"""On all weights: who has to be how many times faster than whom, both ways."""

TIMED: Final[dict[str, Sequence[str]]] = {
    LAYERS: ("egr", "gz", "duh", "dense_xor", "gap16", "pulse"),
    ALL: ("xph", "plain_zstd", "zipnn"),
    MASTERS: ("f32d", "planes"),
}
"""Whose speed is told, and on what; of synthetic steps it is that of the codecs."""

DEADLINES: Final = {"small": 300.0, "full": 1500.0}

_ACTIONS: Final = ("encode", "apply")


def measure(rounds: int, full: bool = False, say: Callable[[str], None] = lambda _: None) -> list[Row]:
    """All rows. ``full``: synthetic versions of up to 2 GB."""
    samples: list[Sample] = []
    for kernels in ("numba", "numpy"):
        say(f"codecs, {kernels}")
        samples += _run(kernels, rounds, "full" if full else "small")
    return table(samples)


def _run(kernels: str, rounds: int, size: str) -> list[Sample]:
    with tempfile.TemporaryDirectory(prefix="shipd-bench-") as directory:
        file = Path(directory) / "samples.json"
        command = [sys.executable, "-m", "tests.benchmarks.codec_runs", kernels, str(rounds), size, str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINES[size])
        if done.returncode:
            raise RuntimeError(f"the codecs ended with {done.returncode}\n{done.stderr[-3000:]}")
        return [Sample(**values) for values in json.loads(file.read_text())]


def table(samples: Sequence[Sample]) -> list[Row]:
    """The rows: payloads case by case, who is smaller than whom, speeds, who is faster than whom.

    Raises AssertionError where two ways to run a codec make different payloads.
    """
    found = {(one.case, one.coder, one.kernels): one for one in samples}
    for one in samples:
        if (other := found.get((one.case, one.coder, "numba"))) is not None and other.digest != one.digest:
            raise AssertionError(f"{one.label}, {one.case}: numpy and numba make different payloads")
    compiled = [one for one in samples if one.kernels == "numba"]
    timed = [one for one in samples if one.coder in TIMED.get(one.case, ())]
    timed += [one for one in samples if one.case.startswith(SYNTHETIC) and one.coder not in RIVALS]
    return [
        *(_size(one) for one in compiled),
        *_smaller({one.coder: one for one in compiled if one.case == LAYERS}),
        *(_speed(one, action) for one in timed for action in _ACTIONS),
        *_faster({one.coder: one for one in compiled if one.case == ALL}),
    ]


def _size(one: Sample) -> Row:
    return Row(
        name=f"{one.label}, {one.case}",
        value=one.ratio,
        unit="x",
        floor=SIZES.get((one.case, one.coder)),
        better="higher",
        bounds="value",
        note=f"{100 * one.density:.3g} % changed",
        details={"content": one.content, "payload": one.payload, "density": one.density},
    )


def _smaller(samples: Mapping[str, Sample]) -> Iterator[Row]:
    for ours, theirs, floor in SMALLER:
        if ours in samples and theirs in samples:
            one, other = samples[ours], samples[theirs]
            yield Row(
                name=f"{one.label}, {LAYERS}",
                value=one.ratio,
                unit="x",
                reference=other.label,
                ratio=other.payload / one.payload,
                floor=floor,
                better="higher",
            )


def _speed(one: Sample, action: str) -> Row:
    speeds, shares = _measured(one, action)
    return Row(
        name=_doing(one, action),
        value=speeds,
        unit="GB/s",
        reference="memcpy",
        ratio=median(shares),
        floor=SPEEDS.get((one.kernels, one.coder, action)),
        better="higher",
        spread=spread(shares),
    )


def _faster(samples: Mapping[str, Sample]) -> Iterator[Row]:
    for ours, theirs, floor in FASTER:
        if ours not in samples or theirs not in samples:
            continue
        one, other = samples[ours], samples[theirs]
        for action in _ACTIONS:
            speed, shares = _measured(one, action)
            # Through the memcpy beside each, which is what makes two moments comparable.
            ratios = [mine / its for mine, its in zip(shares, _measured(other, action)[1], strict=True)]
            yield Row(
                name=_doing(one, action),
                value=speed,
                unit="GB/s",
                reference=other.label,
                ratio=median(ratios),
                floor=floor,
                better="higher",
                spread=spread(ratios),
            )


def _measured(one: Sample, action: str) -> tuple[float | None, list[float]]:
    """The median speed in GB/s, and the shares of a memcpy's speed."""
    speeds, shares = (one.encode, one.encode_share) if action == "encode" else (one.apply, one.apply_share)
    return median(speed / 1e9 for speed in speeds), shares


def _doing(one: Sample, action: str) -> str:
    where = f", {one.case}" if one.case.startswith(SYNTHETIC) else ""
    return f"{one.label}{'' if one.kernels == 'numba' else ' without numba'}, {action}{where}"
