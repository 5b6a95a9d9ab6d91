"""A link of limited rate between two hosts of its own: two network namespaces, joined by veth, with tbf each way.

    with ThinLink(10 * MBIT) as link:
        with link.receiver.entered():
            daemon = ShipdProcess(directory, listen=f"{link.receiver.address}:0", ...)
        with link.sender.entered():
            push(f"{link.receiver.address}:{daemon.port}", ...)
        link.set_rate(100 * MBIT)

Needs Linux, root, and ip, tc and unshare: see ``why_not``.

The namespaces have no names. Each lives as long as a process in it: a ``cat`` that reads from a pipe of this process,
and so ends with it, however that ends. The cable lives in them, so nothing of it is ever seen from outside, any number
of links may be beside one another with the same names and addresses, and nothing is left even after a SIGKILL.

tbf holds bytes back until the rate allows them. Its ``burst`` is what may pass at once after a silence: it has to be
small, or a delta of 100 KB would be sent for nothing in large part, and at least a packet, or nothing passes. It is two
packets, or what the rate gives in a millisecond where that is more, so that the clock which refills it need not be
finer. ``latency`` is how long a packet may queue before it is dropped: 50 ms, a small router's buffer. Less would
starve TCP, more would hide a sender that fills every buffer it finds.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

MBIT: Final = 1_000_000
"""Bits in a second."""

LATENCY_MS: Final = 50
PACKET: Final = 1514
"""Bytes of the largest packet on the cable, its Ethernet header included."""

_CABLE: Final = "cable"
# 198.18.0.0/15 is set apart for measuring devices (RFC 2544): nothing on the way ever has such an address.
_SENDER: Final = "198.18.0.1"
_RECEIVER: Final = "198.18.0.2"
_NETMASK: Final = 30
_SECONDS: Final = 10.0
_CLONE_NEWNET: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class NoThinLink(Exception):
    """There can be none here; the message says why."""


def why_not() -> str | None:
    """Why there can be no thin link here; None where there can."""
    try:
        with ThinLink(10 * MBIT):
            return None
    except NoThinLink as error:
        return str(error)


class Host:
    """One end: a network namespace with an address, and nothing else of its own."""

    def __init__(self, address: str) -> None:
        self.address = address
        command = ["unshare", "--net", "cat"]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        # What comes back has been through cat, so the namespace is there.
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(b"\n")
            self._keeper.stdin.flush()
        if not self._keeper.stdout.readline():
            assert self._keeper.stderr is not None
            why = self._keeper.stderr.read().decode(errors="replace").strip()
            self.close()
            raise NoThinLink(f"no network namespace: {why}")
        self.namespace = Path(f"/proc/{self._keeper.pid}/ns/net")
        self.inode = self.namespace.stat().st_ino

    @property
    def pid(self) -> int:
        """Of a process in the namespace."""
        return self._keeper.pid

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts meanwhile, is on this host. Files and processes stay those of all."""
        with open("/proc/thread-self/ns/net", "rb") as home:  # noqa: PTH123  a link that cannot be resolved
            enter(self.namespace)
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def run(self, command: Sequence[str], *, timeout: float = _SECONDS) -> str:
        """Run a command here to its end; what it printed. Raises NoThinLink where it fails."""
        try:
            with self.entered():
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except OSError as error:
            raise NoThinLink(f"{command[0]}: {error.strerror}") from error
        if done.returncode:
            raise NoThinLink(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def rate(self) -> float:
        """Bits in a second that this end sends at most, as the kernel says it; 0 where nothing holds it back."""
        queues: list[dict[str, Any]] = json.loads(self.run(["tc", "-j", "qdisc", "show", "dev", _CABLE]))
        return 8.0 * sum(queue["options"]["rate"] for queue in queues if queue["kind"] == "tbf")

    def processes(self) -> list[int]:
        """Those whose first thread is here."""
        return processes_in(self.inode)

    def close(self) -> None:
        """End whatever is still here. Once the last of it has ended, the kernel takes the rest away."""
        if hasattr(self, "inode"):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._keeper.kill()
        # Not wait() alone: what it still says would fill a pipe that nobody reads.
        self._keeper.communicate()


class ThinLink:
    """Two hosts and the cable between them, until the end of the block. Raises NoThinLink where there can be none."""

    def __init__(self, rate: int) -> None:
        for tool in ("ip", "tc", "unshare"):
            if shutil.which(tool) is None:
                raise NoThinLink(f"there is no {tool} here")
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NoThinLink("needs Linux, and root")
        with contextlib.ExitStack() as made:
            self.sender = Host(_SENDER)
            made.callback(self.sender.close)
            self.receiver = Host(_RECEIVER)
            made.callback(self.receiver.close)
            far = ("peer", "name", _CABLE, "netns", str(self.receiver.pid))
            self.sender.run(["ip", "link", "add", _CABLE, "type", "veth", *far])
            for host in (self.sender, self.receiver):
                host.run(["ip", "address", "add", f"{host.address}/{_NETMASK}", "dev", _CABLE])
                for device in ("lo", _CABLE):
                    host.run(["ip", "link", "set", device, "up"])
            self.set_rate(rate)
            self._made = made.pop_all()

    def set_rate(self, rate: int) -> None:
        """Bits in a second, each way, from now on."""
        burst = max(2 * PACKET, rate // 8 // 1000)
        limits = ("rate", f"{rate}bit", "burst", f"{burst}b", "latency", f"{LATENCY_MS}ms")
        for host in (self.sender, self.receiver):
            host.run(["tc", "qdisc", "replace", "dev", _CABLE, "root", "tbf", *limits])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()


def enter(namespace: Path) -> None:
    """Put this thread, and what it starts from now on, into a network namespace. Raises NoThinLink."""
    with namespace.open("rb") as file:
        _set_namespace(file.fileno())


def processes_in(inode: int) -> list[int]:
    """Processes, other than this one, whose first thread is in the network namespace of that inode."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # Gone, or a zombie.
            with contextlib.suppress(OSError):
                if (entry / "ns" / "net").stat().st_ino == inode:
                    found.append(int(entry.name))
    return found


def wait_until_empty(inode: int, seconds: float = _SECONDS) -> None:
    """Until no process is in that namespace any more. Raises TimeoutError."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while left := processes_in(inode):
        if time.monotonic() > end:
            raise TimeoutError(f"still there: {left}")
        pause.wait(0.01)


def _set_namespace(descriptor: int) -> None:
    # os.setns is new in Python 3.12.
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NoThinLink(f"cannot enter a network namespace: {os.strerror(number)}")
