"""What runs in a serving process: the nursery that it is forked from, and what it can be asked to do.

    Readers    threads that ask the model without a pause
    Program    what a serving process can be asked to do
    main       the nursery: ``python -m tests.support.program DOOR``

The other end, a serving process as a test sees it, is in tests.support.serving_process.
"""

import asyncio
import contextlib
import copy
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import nn

import shipd
from tests.support.exact import Exact, ask, fingerprint, question, right_answer
from tests.support.processes import DEADLINE

PACE: Final = 0.006
"""Seconds that readers leave to others between two answers."""


class Readers:
    """Threads that ask without a pause, each in its style, and keep which answers were given under which label.

    hold      two forwards inside one ``hold()``, the second without hooks
    forward   forwards that only the default hooks guard
    tasks     four asyncio tasks, each with two forwards inside ``async with hold()`` and a switch between them
    """

    def __init__(self, model: nn.Module, resident: "shipd.Resident", kind: str, styles: Sequence[str]) -> None:
        self._model = model
        self._resident = resident
        self._question = question(kind)
        self._stopping = threading.Event()
        self.answers = 0
        self.fenced = 0
        self.given: dict[str, set[str]] = {}
        self.seen: list[list[str]] = []
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(style,), name=style) for style in styles]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all of them."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _run(self, style: str) -> None:
        seen: list[str] = []
        self.seen.append(seen)
        try:
            with torch.inference_mode():
                if style == "tasks":
                    asyncio.run(self._tasks(seen))
                # Two cores have to do for the readers and everything that they read.
                while not self._stopping.wait(PACE):
                    with self._fences(seen):
                        self._held(seen) if style == "hold" else self._note(
                            "", fingerprint(self._model(self._question))
                        )
        except BaseException:  # noqa: BLE001  reported to the test
            self.errors.append(traceback.format_exc())

    @contextlib.contextmanager
    def _fences(self, seen: list[str]) -> Iterator[None]:
        try:
            yield
        except shipd.Fenced:
            self.fenced += 1
            self._see(seen, "fenced")

    def _held(self, seen: list[str]) -> None:
        with self._resident.hold() as version:
            self._see(seen, version.label)
            self._note(version.label, fingerprint(self._model(self._question)))
            self._note(version.label, fingerprint(self._model.forward(self._question)))

    async def _tasks(self, seen: list[str]) -> None:
        async def read() -> None:
            while not self._stopping.is_set():
                with self._fences(seen):
                    async with self._resident.hold() as version:
                        self._see(seen, version.label)
                        self._note(version.label, fingerprint(self._model.forward(self._question)))
                        await asyncio.sleep(0)
                        self._note(version.label, fingerprint(self._model.forward(self._question)))
                await asyncio.sleep(PACE)

        await asyncio.gather(*(read() for _ in range(4)))

    def _see(self, seen: list[str], label: str) -> None:
        if not seen or seen[-1] != label:
            seen.append(label)

    def _note(self, label: str, answer: str) -> None:
        self.answers += 1
        self.given.setdefault(label, set()).add(answer)


class Program:
    """What a serving process can be asked to do. Everything but ``forward_until_interrupted`` answers at once."""

    def __init__(self) -> None:
        self.models: dict[str, Exact] = {}
        self.residents: dict[str, shipd.Resident] = {}
        self.kinds: dict[str, str] = {}
        self._initial: dict[str, int] = {}
        self._readers: dict[str, Readers] = {}
        self._holds: dict[str, tuple[threading.Thread, threading.Event, list[str]]] = {}
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    # --- attaching -----------------------------------------------------------------------------------------

    def attach(
        self, place: str, name: str = "model", kind: str = "small", version: int = 0, keep: bool = True, **options: Any
    ) -> str:
        """Make a model and attach it. With ``keep=False`` nobody but shipd refers to the resident."""
        self.models[name] = Exact(version, kind)
        self.kinds[name] = kind
        self._initial[name] = version
        resident = shipd.attach(self.models[name], name, socket=place, **options)
        if keep:
            self.residents[name] = resident
        return resident.label

    def detach(self, name: str = "model") -> None:
        self.residents[name].detach()

    def reattach(self, place: str, name: str = "model", **options: Any) -> str:
        """Attach the model that was detached."""
        self.residents[name] = shipd.attach(self.models[name], name, socket=place, **options)
        return self.residents[name].label

    def label(self, name: str = "model") -> str:
        return self.residents[name].label

    def stale(self, name: str = "model") -> str | None:
        return self.residents[name].stale

    def connected(self, name: str = "model") -> bool:
        return self.residents[name].connected

    def digest(self, name: str = "model") -> str:
        return self.residents[name].digest

    def verify(self, name: str = "model") -> str:
        return self.residents[name].verify()

    def await_label(self, label: str, name: str = "model") -> None:
        """Until this version is being served, and the daemon is there."""
        resident = self.residents[name]
        end = time.monotonic() + DEADLINE
        while resident.label != label or resident.stale is not None or not resident.connected:
            assert time.monotonic() < end, f"{resident!r} {resident.stale or ''} does not come to {label!r}"
            threading.Event().wait(0.005)

    # --- reading -------------------------------------------------------------------------------------------

    def answer(self, name: str = "model") -> str:
        """One answer, through the hooks."""
        return ask(self.models[name], self.kinds[name])

    def read(self, styles: Sequence[str], name: str = "model") -> None:
        """Start readers."""
        self._readers[name] = Readers(self.models[name], self.residents[name], self.kinds[name], styles)

    def answers(self, name: str = "model") -> int:
        """How many they have given."""
        return self._readers[name].answers

    def fenced(self, name: str = "model") -> int:
        """How often they were refused."""
        return self._readers[name].fenced

    def read_stop(self, name: str = "model") -> dict[str, Any]:
        """Stop them: how many answers, what was wrong with them, and which labels each thread saw in turn."""
        readers = self._readers.pop(name)
        readers.stop()
        kind = self.kinds[name]

        def version_of(label: str) -> int:
            return self._initial[name] if label == "initial" else int(label.removeprefix("v"))

        labels = {label for label in readers.given if label}
        wrong = [
            f"{label}: {answer}"
            for label in labels
            for answer in readers.given[label]
            if answer != right_answer(version_of(label), kind)
        ]
        # Without a hold the label is not known: every whole version up to the last one will do.
        last = max([self._initial[name], version_of(self.residents[name].label), *map(version_of, labels)])
        loose = readers.given.get("", set())
        if loose:
            loose = loose - {right_answer(version, kind) for version in range(self._initial[name], last + 1)}
        served = [[label for label in seen if label != "fenced"] for seen in readers.seen]
        backwards = [seen for seen in served if sorted(seen, key=version_of) != seen]
        return {
            "answers": readers.answers,
            "wrong": wrong + [f"no version: {answer}" for answer in loose],
            "backwards": backwards,
            "seen": readers.seen,
            "fenced": readers.fenced,
            "errors": readers.errors,
            "labels": sorted(labels, key=version_of),
        }

    def hold(self, thread: str, name: str = "model") -> str:
        """Have a thread hold until it is told to let go; the label that it sees."""
        entered: list[str] = []
        inside, leave = threading.Event(), threading.Event()
        resident, model, kind = self.residents[name], self.models[name], self.kinds[name]

        def run() -> None:
            with resident.hold() as version:
                entered.extend((version.label, ask(model, kind)))
                inside.set()
                leave.wait(DEADLINE)
                entered.append(ask(model, kind))

        running = threading.Thread(target=run, name=thread)
        running.start()
        assert inside.wait(DEADLINE)
        self._holds[thread] = running, leave, entered
        return entered[0]

    def let_go(self, thread: str) -> bool:
        """End it; whether the first and the last answer were those of one version, the one that it saw."""
        running, leave, entered = self._holds.pop(thread)
        leave.set()
        running.join(DEADLINE)
        return entered[1] == entered[2]

    def forward_until_interrupted(self, name: str = "model") -> str:
        """On the main thread. What interrupted it."""
        try:
            while True:
                ask(self.models[name], self.kinds[name])
        except KeyboardInterrupt as error:
            return type(error).__name__

    # --- what users do to models ---------------------------------------------------------------------------

    def keep_tensors(self, name: str = "model") -> None:
        """Slices of every parameter, as some cache of the user's might, and what they hold now."""
        for parameter in self.models[name].parameters():
            kept = parameter.detach()[1:]
            self._kept.append((kept, kept.clone()))

    def kept_are_whole(self) -> bool:
        """Whether they still hold that."""
        return bool(self._kept) and all(torch.equal(kept, before) for kept, before in self._kept)

    def drop_tensors(self) -> None:
        self._kept.clear()

    def scribble(self, name: str = "model") -> None:
        """Change one element of one live parameter."""
        self.models[name].layer(1).bias.data[0] += 1

    def half(self, name: str = "model") -> None:
        self.models[name].half()

    def copy_answers(self, name: str = "model") -> str:
        """What a deep copy answers."""
        return ask(copy.deepcopy(self.models[name]), self.kinds[name])

    # --- the process itself --------------------------------------------------------------------------------

    def fork(self) -> int:
        """Fork; the child comes to the nursery's door like any other process."""
        pid = os.fork()
        if not pid:
            _serve(self)
        return pid

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def images(self) -> int:
        """Mappings of images."""
        return Path("/proc/self/maps").read_bytes().count(b"/memfd:")

    def sockets(self) -> int:
        """Sockets that are open."""
        found = 0
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")  # noqa: PTH115
        return found


def _serve(program: object) -> NoReturn:
    """Answer until the other end is gone. Never returns."""
    # torch replaces its thread pool at the first use after a fork, and two threads that are first at once can find none
    # ("Invalid thread pool!", two of five forks with four threads): here there is only one.
    torch.set_num_threads(1)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.connect(sys.argv[1])
        with door.makefile("rw") as talk:
            print(json.dumps({"pid": os.getpid()}), file=talk, flush=True)
            for line in talk:
                what, arguments, options = json.loads(line)
                answer: dict[str, Any] = {}
                try:
                    answer["answer"] = getattr(program, what)(*arguments, **options)
                except BaseException as error:  # noqa: BLE001  the test's to judge
                    answer |= {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
                    answer["details"] = list(getattr(error, "problems", ()))
                print(json.dumps(answer), file=talk, flush=True)
    except BaseException:  # noqa: BLE001  nothing else of the process that was forked may run
        traceback.print_exc()
    os._exit(0)


def main() -> None:
    """The nursery: forks one process for every line, and reaps them. The line names the class of what it can do."""
    # With it comes torch's compiler, which takes longest.
    importlib.import_module("shipd.serving.resident")
    torch.set_num_threads(1)
    # What a program does to run for the first time is not to happen in every child.
    ask(Exact(0))
    # Threads that never sleep take turns of 5 ms; eight readers would make every swap wait for 40.
    sys.setswitchinterval(0.0002)
    # An exception of shipd's own threads must not pass for a warning.
    warnings.simplefilter("error")
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    assert threading.active_count() == 1
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            module, _, name = line.strip().rpartition(".")
            _serve(getattr(importlib.import_module(module), name)() if module else Program())


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()
