"""The processes that are measured: forked from one that has imported torch, told what to do, and always ended.

    Worker("tests.benchmarks.peers.raw:Sender", total=10**9)     here: starts it and calls its methods
    serve()                                                      there: one object, whose methods are called

Calls and answers are JSON over a pipe. Every call has a deadline, here and there: a process in which one takes longer
prints where it stands and exits.
"""

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

CALL: Final = 60.0
"""Seconds for a call, unless told otherwise. The longest, of a gigabyte, takes two on an idle machine."""
_PRELOAD: Final = "tests.benchmarks.preload"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([_PRELOAD])


def preload(*modules: str) -> None:
    """Have workers forked with these imported, too, where they can be. Before the first Worker."""
    _context.set_forkserver_preload([_PRELOAD, *modules])


class WorkerFailed(Exception):
    """A call raised, or the process ended or said nothing in time; the message has what it last said."""


class Worker:
    """One object in a process of its own, killed at the end of the block."""

    def __init__(self, target: str, **arguments: Any) -> None:
        self.target = target
        self._log = tempfile.NamedTemporaryFile(prefix="shipd-bench-", suffix=".log")  # noqa: SIM115
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=serve, args=(target, arguments, self._log.name, theirs), daemon=True)
        self._pending: str | None = None
        self._process.start()
        theirs.close()
        self.start("ready")

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def start(self, method: str, *, deadline: float = CALL, **arguments: Any) -> None:
        """Begin a call, to go on meanwhile."""
        if self._pending == "ready":
            self.finish()
        assert self._pending is None, f"{self._pending} has not been finished"
        self._pending = method
        self._deadline = deadline
        if method != "ready":
            message = {"method": method, "arguments": arguments, "deadline": deadline}
            try:
                self._connection.send_bytes(json.dumps(message).encode())
            except OSError as error:
                raise self._failure(f"is gone: {error}") from None

    def finish(self) -> Any:
        """Wait for the call that was begun; what it returned. Raises WorkerFailed."""
        method, self._pending = self._pending, None
        # The other side gives up first, and says where it stood.
        if not self._connection.poll(self._deadline + 5.0):
            raise self._failure(f"{method} took longer than {self._deadline:.0f} s")
        try:
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._failure(f"ended in {method}") from None
        if "error" in answer:
            raise self._failure(f"{method} failed: {answer['error']}")
        return answer["result"]

    def call(self, method: str, *, deadline: float = CALL, **arguments: Any) -> Any:
        """Call a method of the object there. Raises WorkerFailed."""
        self.start(method, deadline=deadline, **arguments)
        return self.finish()

    def _failure(self, what: str) -> WorkerFailed:
        said = Path(self._log.name).read_text(errors="replace").strip()
        return WorkerFailed(f"{self.target} {what}" + (f"\n{said[-3000:]}" if said else ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(10)
        self._process.close()
        self._log.close()


def shut_down() -> None:
    """End the process that workers are forked from. The next Worker starts another."""
    from multiprocessing import forkserver

    with contextlib.suppress(Exception):
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextlib.contextmanager
def deadline_of(seconds: float) -> Iterator[None]:
    """Past it, this process prints where every thread stands, and exits: also where it hangs in C."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve(target: str, arguments: dict[str, Any], log: str, connection: Connection) -> None:
    """In the worker: make the object and call its methods until the pipe ends."""
    # Ctrl-C is for whoever started this; its end closes the pipe, and that ends this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(said, number)
    os.close(said)
    try:
        with deadline_of(CALL):
            module, _, name = target.partition(":")
            thing = getattr(importlib.import_module(module), name)(**arguments)
    except BaseException as error:  # noqa: BLE001  said to the caller
        traceback.print_exc()
        connection.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    connection.send_bytes(b'{"result": null}')
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            with deadline_of(message["deadline"]):
                answer = {"result": getattr(thing, message["method"])(**message["arguments"])}
        except BaseException as error:  # noqa: BLE001  said to the caller
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            connection.send_bytes(json.dumps(answer).encode())
        except OSError:
            os._exit(0)


def _die_with_parent() -> None:
    """Where the kernel can: its parent is the fork server, which ends with whoever started it."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
