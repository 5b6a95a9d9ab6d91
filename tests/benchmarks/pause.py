"""How long a swap keeps holds waiting: gate closed to gate open, as the serving process reports it for real pushes.

    python -m tests.benchmarks.pause            every case
    python -m tests.benchmarks.pause copy-4k    one of them

The model is served by a process of its own. Daemon and sender are here, so that they do not share its GIL. After each
push the serving process copies as many bytes from memory to memory, in one piece: what the pause is compared with.
Every second push finds a busy Python thread there.
"""

import asyncio
import ctypes
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn

import shipd

DEADLINE: Final = 120.0
MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Case:
    """``tensors`` tensors of ``size`` bytes, swapped in ``mode`` on ``device``.

    ``floor`` and ``goal`` bound the ratio to the reference; for flip, which copies nothing, the seconds; for direct the
    share of the reference's bandwidth.
    """

    key: str
    name: str
    mode: str
    tensors: int
    size: int
    floor: float | None
    goal: float | None
    device: str = "cpu"

    @property
    def bytes(self) -> int:
        """Of one version."""
        return self.tensors * self.size


CASES: Final = (
    Case("copy-1g", "copy, 1 GiB in 64 tensors", "copy", 64, 16 * MIB, 1.3, 1.1),
    Case("copy-4k", "copy, 20,000 tensors of 4 KiB", "copy", 20_000, 4096, None, None),
    Case("flip-100", "flip, 100 tensors", "flip", 100, 4096, 0.005, 0.002),
    Case("flip-1000", "flip, 1,000 tensors", "flip", 1_000, 4096, 0.005, 0.002),
    Case("flip-10000", "flip, 10,000 tensors", "flip", 10_000, 4096, 0.005, 0.002),
    Case("cuda-copy", "copy on CUDA, 1 GiB in 64 tensors", "copy", 64, 16 * MIB, 1.3, 1.1, "cuda"),
    Case("cuda-direct", "direct on CUDA, 1 GiB in 64 tensors", "direct", 64, 16 * MIB, 0.8, 0.95, "cuda"),
)


# --- the serving process ---------------------------------------------------------------------------------------------


class Crowd(nn.Module):
    """So many tensors of one size."""

    def __init__(self, tensors: int, size: int, device: str) -> None:
        super().__init__()
        for number in range(tensors):
            self.register_buffer(f"t{number:05}", torch.zeros(size // 4, device=device))


class Reference:
    """Copying as many bytes as a version has, in one piece."""

    def __init__(self, case: Case) -> None:
        self._mode = case.mode
        self._cuda = case.device == "cuda"
        self._source = torch.ones(case.bytes, dtype=torch.uint8, device="cuda" if self._plain_device else "cpu")
        if self._cuda and not self._plain_device:
            self._source = self._source.pin_memory()
        self._target = torch.ones(case.bytes, dtype=torch.uint8, device=case.device)
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    @property
    def _plain_device(self) -> bool:
        return self._cuda and self._mode == "copy"

    def run(self) -> dict[str, float]:
        """Seconds by C's memcpy (on CUDA: by a copy on the device, or from page-locked memory), and by torch's copy."""
        if self._cuda:
            return {"plain": self._timed(self._by_torch), "torch": self._timed(self._by_torch)}
        return {"plain": self._timed(self._by_memcpy), "torch": self._timed(self._by_torch)}

    def _by_memcpy(self) -> None:
        self._memcpy(self._target.data_ptr(), self._source.data_ptr(), self._source.numel())

    def _by_torch(self) -> None:
        self._target.copy_(self._source, non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()

    @staticmethod
    def _timed(work: Any) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def serve(case: Case, socket: str) -> None:
    """Attach, and do what is asked for, one word a line, until the input ends."""
    model = Crowd(case.tensors, case.size, case.device)
    reference = Reference(case) if case.mode != "flip" else None
    resident = shipd.attach(model, "model", socket=socket, mode=case.mode)
    busy = threading.Event()

    def spin() -> None:
        while busy.is_set():
            pass

    spinning: threading.Thread | None = None
    print(json.dumps({"mode": resident.mode}), flush=True)
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        word = line.strip()
        if word == "busy":
            busy.set()
            spinning = threading.Thread(target=spin, daemon=True)
            spinning.start()
        elif word == "idle" and spinning is not None:
            busy.clear()
            spinning.join()
        elif word == "reference" and reference is not None:
            answer = reference.run()
        elif word == "verify":
            answer = {"digest": resident.verify()}
        print(json.dumps(answer), flush=True)
    busy.clear()
    resident.detach()


class Serving:
    """Such a process, as seen from here."""

    def __init__(self, case: Case, socket: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.pause", "--serve", case.key, socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=DEADLINE)

    def ask(self, word: str) -> dict[str, Any]:
        """Have it do something; its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], DEADLINE)[0]:
            self._process.kill()
            raise TimeoutError(f"the serving process has not answered in {DEADLINE:g} s")
        line = out.readline()
        if not line:
            raise RuntimeError(f"the serving process has ended with {self._process.wait()}")
        return dict(json.loads(line))


# --- measuring -------------------------------------------------------------------------------------------------------


def _random(case: Case) -> dict[str, torch.Tensor]:
    whole = torch.randint(0, 1 << 30, (case.bytes // 4,), dtype=torch.int32).view(torch.float32)
    return {f"t{number:05}": part for number, part in enumerate(whole.split(case.size // 4))}


async def _run(case: Case, rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"idle": [], "busy": [], "plain": [], "torch": []}
    with tempfile.TemporaryDirectory(prefix="shipd-") as place:
        socket = str(Path(place, "shipd.sock"))
        config = shipd.Config(listen="127.0.0.1:0", socket=socket, memory_limit=4 * case.bytes + 64 * MIB)
        async with shipd.Daemon(config) as daemon:
            with await asyncio.to_thread(Serving, case, socket) as serving:
                async with shipd.connect(f"127.0.0.1:{daemon.port}") as client:
                    versions = [_random(case), _random(case)]
                    digest = ""
                    # Two that are not counted: images are cold, and flip frees what the model came with.
                    for number in range(2 + 2 * rounds):
                        busy = number % 2 == 1
                        if busy:
                            await asyncio.to_thread(serving.ask, "busy")
                        receipt = await client.push(versions[number % 2], model="model", label=f"v{number}")
                        if busy:
                            await asyncio.to_thread(serving.ask, "idle")
                        assert (receipt.swapped, receipt.stale) == (1, ())
                        assert receipt.pause_seconds is not None
                        digest = receipt.digest
                        reference = await asyncio.to_thread(serving.ask, "reference")
                        if number < 2:
                            continue
                        figures["busy" if busy else "idle"].append(receipt.pause_seconds)
                        for name, seconds in reference.items():
                            figures[name].append(seconds)
                    verified = await asyncio.to_thread(serving.ask, "verify")
                    assert verified["digest"] == digest
    return figures


def _rows(case: Case, figures: dict[str, list[float]], rounds: int) -> list[dict[str, Any]]:
    idle, busy = statistics.median(figures["idle"]), statistics.median(figures["busy"])
    common = {"unit": "s", "rounds": rounds, "bytes": case.bytes}
    quiet: dict[str, Any] = {"name": f"pause, {case.name}", "value": idle, **common}
    if case.mode == "flip":
        quiet |= {"reference": None, "ratio": None, "floor": case.floor, "goal": case.goal}
    else:
        plain = statistics.median(figures["plain"])
        ratio = plain / idle if case.mode == "direct" else idle / plain
        quiet |= {
            "reference": plain,
            "reference_torch": statistics.median(figures["torch"]),
            "ratio": ratio,
            "floor": case.floor,
            "goal": case.goal,
        }
    beside = {
        "name": f"pause, {case.name}, beside a busy thread",
        "value": busy,
        "reference": idle,
        "ratio": busy / idle,
        "floor": 2.0,
        "goal": None,
        **common,
    }
    return [quiet, beside]


def measure(rounds: int = 5, only: str | None = None) -> list[dict[str, Any]]:
    """Rows for every case, or one; those on CUDA where there is one. Medians of ``rounds``.

    ``reference`` of a quiet row is one memcpy of as many bytes in the serving process, between the pushes (on CUDA a
    copy on the device; for direct, one from page-locked memory, and ``ratio`` the share of its bandwidth). For a busy
    row it is the quiet pause. ``floor`` and ``goal`` are of the ratio, or of the value where there is no ratio.
    """
    rows = []
    for case in CASES:
        if only not in (None, case.key) or (case.device == "cuda" and not torch.cuda.is_available()):
            continue
        rows.extend(_rows(case, asyncio.run(_run(case, rounds)), rounds))
    return rows


def main() -> None:
    """Print the rows, one JSON object a line."""
    if sys.argv[1:2] == ["--serve"]:
        serve(next(case for case in CASES if case.key == sys.argv[2]), sys.argv[3])
        return
    rounds = int(os.environ.get("ROUNDS", "5"))
    for case in CASES:
        if len(sys.argv) > 1 and case.key not in sys.argv[1:]:
            continue
        for row in measure(rounds, case.key):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
