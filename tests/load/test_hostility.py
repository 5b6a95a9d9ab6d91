"""Hostile inputs of every kind while large pushes run: all pushes commit, and the daemon stays as small as it was."""

import threading
from typing import Self

import pytest

from tests.load.census import Census
from tests.load.hostility import ATTACKS_AND_VECTORS, Hostility
from tests.support import checkpoints
from tests.support.checkpoints import MIB
from tests.support.processes import DEADLINE, Shipctl, ShipdProcess, status
from tests.support.proxy import until

PUSHES = 3
SEED = 20260301
WORKERS = 4
"""Threads of libuv's pool, which start when they are first needed."""


class Watch:
    """The most that a daemon has at any moment of the block, looked at twenty times a second."""

    def __init__(self, daemon: ShipdProcess) -> None:
        self._daemon = daemon
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self.most = 0

    def _run(self) -> None:
        while not self._stopping.wait(0.05):
            now = Census.of(self._daemon.pid)
            self.most = max(self.most, now.private + now.file)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE)


# On a machine that others want, too, half a minute may be many.
@pytest.mark.timeout(600)
def test_hostile_inputs_while_large_pushes_run(start_shipd, tmp_path):
    daemon: ShipdProcess = start_shipd(
        # Nobody comes back for a push of the victim, and neither it nor the end of the daemon waits for that.
        models={"model": "1GiB", "victim": "64MiB"}, stall=5, resume_window=1, drain_timeout=5
    )  # fmt: skip
    content = checkpoints.large(200)
    path = checkpoints.write_safetensors(tmp_path / "large.safetensors", content)
    digest = content.digest

    def push(label: str) -> None:
        with Shipctl("push", path, "--to", daemon.address, "--model", "model", "--label", label, "--json") as pushing:
            assert pushing.wait(4 * DEADLINE) == 0, pushing.describe()
            receipt = pushing.answer
        assert (receipt["label"], receipt["digest"]) == (label, digest)
        assert receipt["frames_resent"] == 0

    push("before")
    before = Census.of(daemon.pid)
    with Watch(daemon) as watch, Hostility(daemon.port, SEED) as hostility:
        for number in range(PUSHES):
            push(f"v{number}")
        missing = [name for name in ATTACKS_AND_VECTORS if not hostility.done[name]]
        until(lambda: all(hostility.done[name] for name in missing), "everything has been done", 4 * DEADLINE)
        push("last")
    assert not hostility.problems
    # 64 MiB of bodies may be announced and sent at a time, and 8 of them asked for; and what allocators keep.
    grown = watch.most - before.private - before.file
    assert grown < 40 * MIB, f"the daemon grew by {grown / MIB:.0f} MiB"

    def sockets() -> int:
        return Census.of(daemon.pid).descriptors["socket"]

    until(lambda: sockets() <= before.descriptors["socket"], "every connection has ended")
    until(lambda: Census.of(daemon.pid).threads <= before.threads + WORKERS, "no threads are left but its own")
    victim, model = sorted(status(daemon.address).models, key=lambda each: each.name, reverse=True)
    assert (victim.name, victim.digest, victim.image_bytes) == ("victim", "", 0)
    assert (model.label, model.digest) == ("last", digest)
    assert not [line for line in daemon.err.splitlines() if "unexpectedly" in line or "Traceback" in line]
    assert daemon.terminate() == 0
