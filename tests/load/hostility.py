"""Everything hostile that the tests know, sent to one daemon from many connections at once, round after round.

    attacks     what ``tests.support.attacks`` lists, and its structures
    vectors     every input of protocol/vectors that comes from a peer of the daemon's: all that must be refused, and
                the others too, since none of them is meant for this daemon
    mutations   of those, by the fuzzer
    bodies      64 MiB announced and sent, that nobody waits for, and all that there is for an offered structure
    lurkers     connections that say nothing, and some that say HELLO a byte at a time

Each connection must come to an end soon after it has done its worst.
"""

import contextlib
import itertools
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Self

from tests.fuzz.mutator import Mutator
from tests.support import attacks, hostile, naive
from tests.support.attacks import ATTACKS, STRUCTURES
from tests.support.hostile import Peer, attacker, frame
from tests.support.naive import LEAF
from tests.support.vectors import load, read

_LURKERS: Final = 100
_DRIPPERS: Final = 4
_PATIENCE: Final = 60.0
"""Seconds in which any connection must have ended: on a loaded machine nothing is quick."""

_LARGEST_SEED: Final = 64 * 1024

Deed = tuple[str, Callable[[Peer], object]]


def _writes(data: bytes) -> Callable[[Peer], object]:
    return lambda peer: peer.write(data)


def _structure(data: bytes) -> Callable[[Peer], object]:
    return lambda peer: attacks.offer_structure(peer, data)


def _body_for_nobody(peer: Peer) -> None:
    """As large as a body may be. The daemon receives it into nothing."""
    fields = {"body_id": 1, "body_size": 128 * LEAF, "transfer": hostile.TRANSFER}
    peer.greet().send("StructureIs", fields, bytes(LEAF), flags=naive.MORE)
    for number in range(1, 120):
        peer.send("Body", {"body_id": 1, "offset": number * LEAF}, bytes(LEAF))


def _body_asked_for(peer: Peer) -> None:
    """Most of a structure that the daemon has asked for; it must keep this while it waits for the rest."""
    attacks.asked_for_structure(peer)
    fields = {"body_id": 1, "body_size": 16 * LEAF, "transfer": hostile.TRANSFER}
    peer.send("StructureIs", fields, bytes(LEAF), flags=naive.MORE)
    for number in range(1, 15):
        peer.send("Body", {"body_id": 1, "offset": number * LEAF}, bytes(LEAF))


def peer_inputs() -> dict[str, bytes]:
    """What a peer sends in the golden vectors, by their names: whole conversations, from HELLO on."""
    return {
        f"{which} {name}": read(vector["input"])
        for which in ("reject", "accept")
        for name, vector in load(which)
        if vector["kind"] in ("connection", "receiver", "sender")
    }


def deeds(seed: int) -> Iterator[Deed]:
    """What is done, without end: everything once a round, in another order each time, and mutations between."""
    rng = random.Random(seed)
    inputs = peer_inputs()
    once: list[Deed] = [
        *((f"attack {name}", attack) for name, attack in ATTACKS.items()),
        *((f"structure {name}", _structure(data)) for name, data in STRUCTURES.items()),
        *((f"vector {name}", _writes(data)) for name, data in inputs.items()),
        *((f"flood of {name}", _flood(piece)) for name, piece in _FLOODS.items()),
        ("a body for nobody", _body_for_nobody),
        ("a body asked for", _body_asked_for),
    ]
    mutator = Mutator([data for data in inputs.values() if len(data) <= _LARGEST_SEED], seed)
    while True:
        rng.shuffle(once)
        for deed in once:
            yield deed
            yield "mutation", _writes(mutator.next())


def _flood(piece: Callable[[int], bytes]) -> Callable[[Peer], object]:
    return lambda peer: hostile.flood(peer.greet(), piece, 0.3, 8 << 20)


_FLOODS: Final[dict[str, Callable[[int], bytes]]] = {
    "questions": lambda number: frame("StatusRequest", b"\x80", b"", number + 1),
    "verifications": lambda number: frame("VerifyRequest", {"model": "victim"}, b"", number + 1),
    "pings": lambda number: frame("Ping", {"reply": True}, b"", number + 1),
    "offers": lambda number: frame(
        "Offer", hostile.offer(b"", 1, 4, transfer=(number + 1).to_bytes(16, "big")), b"", number + 1
    ),
    "damaged frames": lambda number: frame("Ping", b"\x80", b"", number + 1, header_crc=1),
}


class _Impatient(Peer):
    """Does not wait for what will not come: the victim may be busy with another attacker."""

    def expect(self, name: str) -> naive.Frame:
        while (found := self.receive()) is not None and found.name != "Abort":
            if found.name == name:
                return found
        raise ConnectionError(f"refused before {name}")


class Hostility:
    """Keeps at it from ``threads`` threads for as long as the block lasts. ``problems`` has what must not have been."""

    def __init__(self, port: int, seed: int, threads: int = 4) -> None:
        self._port = port
        self._deeds = deeds(seed)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.done = Counter[str]()
        """How often what was done."""
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, name="hostile") for _ in range(threads)]
        self._threads += [threading.Thread(target=self._drip, name="hostile, slowly") for _ in range(_DRIPPERS)]
        self._lurkers: list[Peer] = []

    def __enter__(self) -> Self:
        self._lurkers = [attacker(self._port) for _ in range(_LURKERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * _PATIENCE)
            if thread.is_alive():
                self.problems.append(f"{thread.name} does not end")
        for peer in self._lurkers:
            with peer:
                self._await_end(peer, "a connection that says nothing")

    @property
    def rounds(self) -> int:
        """How often everything has been done."""
        return min((self.done[name] for name in ATTACKS_AND_VECTORS), default=0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                name, deed = next(self._deeds)
            try:
                self._do(name, deed)
            except Exception as error:  # noqa: BLE001  the test's to judge
                self.problems.append(f"{name}: {error!r}")
            with self._lock:
                self.done[name] += 1

    def _do(self, name: str, deed: Callable[[Peer], object]) -> None:
        with _Impatient(socket.create_connection(("127.0.0.1", self._port))) as peer:
            peer.sock.settimeout(_PATIENCE)
            # It may be cut off in the middle, or refused.
            with contextlib.suppress(ConnectionError):
                deed(peer)
            peer.sock.settimeout(_PATIENCE)
            # Whatever it has done is done: a connection that ends must not be kept for ever.
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_WR)
            self._await_end(peer, name)

    def _drip(self) -> None:
        """HELLO a byte at a time: each shows life, and the deadline is for the whole."""
        drops = itertools.cycle(frame("Hello", naive.hello(bytes(32)), b"", 0))
        with attacker(self._port) as peer:
            try:
                while not self._stopping.wait(0.5):
                    peer.write(bytes((next(drops),)))
            except ConnectionError:
                return
            self._await_end(peer, "a HELLO that takes for ever")

    def _await_end(self, peer: Peer, name: str) -> None:
        peer.sock.settimeout(_PATIENCE)
        try:
            while peer.sock.recv(1 << 20):
                pass
        except TimeoutError:
            self.problems.append(f"{name}: its connection does not end")
        except ConnectionError:
            return


ATTACKS_AND_VECTORS: Final = [f"attack {name}" for name in ATTACKS] + [f"vector {name}" for name in peer_inputs()]
"""What must have been done at least once, for it to have meant anything."""
