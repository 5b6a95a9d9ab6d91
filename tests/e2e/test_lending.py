"""Files that are lent to a daemon on the same host: what arrives, what becomes of files that change, who may lend."""

import contextlib
import os
import socket
import threading

import numpy as np
import pytest

from shipd.errors import IntegrityError, Stalled, TensorChanged
from shipd.service.lending import _Job
from shipd.transfer.lane import Lane
from shipd.transfer.lent_files import LentFiles
from shipd.transfer.unixpeer import UnixPeer
from shipproto.frame import MAGIC
from shipproto.messages import Ping
from tests.e2e.test_push import _push_and_watch
from tests.support import checkpoints, hostile
from tests.support.checkpoints import MIB, Content, assert_installed, medium, minilm_content, write_safetensors
from tests.support.containers import CONTAINERS
from tests.support.hostile import TRANSFER, attacker
from tests.support.link import handshaken
from tests.support.naive import LEAF, Tensor, encode_structure
from tests.support.patience import reconfigure
from tests.support.processes import Helper, push, shipctl, status
from tests.support.proxy import until

LENT = ("safetensors", "sharded safetensors", "torch.save", "torch.save, nested", "sharded torch.save", "npz", "HDF5")
READ = ("torch.save, legacy", "TorchScript", "npz, compressed", "HDF5, compressed")
"""Containers whose tensors lie in their files as they travel, and others."""


def local(daemon):
    """What local clients connect to."""
    return daemon.config.socket


@pytest.mark.parametrize("container", [*LENT, *READ])
def test_a_local_push_arrives_bit_for_bit(daemon, tmp_path, container):
    version = minilm_content() if container in LENT else medium()
    path = CONTAINERS[container](tmp_path / "checkpoint", version)
    receipt = push(local(daemon), path, label="v1")
    assert receipt.digest == version.digest
    assert_installed(daemon, version, label="v1")
    if container in LENT:
        assert receipt.bytes_lent >= receipt.bytes_total
        assert receipt.bytes_sent < 10_000
    else:
        assert receipt.bytes_lent == 0
        assert receipt.bytes_sent > receipt.bytes_total


def test_every_dtype_and_size(daemon, tmp_path):
    version = checkpoints.edge_cases()
    receipt = push(local(daemon), write_safetensors(tmp_path / "edges", version))
    assert receipt.bytes_lent
    assert_installed(daemon, version)


def test_what_is_in_no_file_travels_beside_what_is(daemon, tmp_path):
    """One of the arrays is in Fortran's order, and shares its chunk with another."""
    path = tmp_path / "mixed.npz"
    turned = np.asfortranarray(np.arange(3000, dtype=np.float32).reshape(60, 50))
    np.savez(path, large=np.arange(300_000, dtype=np.float32), small=np.ones(100, dtype=np.int64), turned=turned)
    receipt = push(local(daemon), path)
    assert receipt.bytes_lent == 1_200_000
    assert 12_800 < receipt.bytes_sent < 20_000
    layout = daemon.server.models["model"].pool.layout
    row = layout.structure.names.index("turned")
    image = daemon.server.models["model"].version.slot.memory.view
    assert image[layout.offsets[row] : layout.offsets[row] + 12_000] == turned.tobytes("C")


def test_it_is_told(daemon, medium):
    finished = shipctl("push", medium, "--to", local(daemon), "--model", "model", "--profile", "--explain")
    assert finished.code == 0, finished
    assert "of which the daemon has read 12.6 MB from the file itself" in finished.out
    assert "the daemon, on this host, has read the file itself" in finished.out


def test_who_has_heard_that_a_push_is_committed_may_push_again(daemon, medium, monkeypatch):
    """At once, also where a file system takes its time to close what was read."""
    leave = _Job._leave

    def leaving(self):
        threading.Event().wait(0.2)
        leave(self)

    monkeypatch.setattr(_Job, "_leave", leaving)
    for label in ("v1", "v2"):
        assert push(local(daemon), medium, label=label).bytes_lent


def test_over_tcp_and_where_it_is_switched_off_bytes_travel(start_daemon, medium):
    daemon = start_daemon(models={"model": "1GiB"}, lending=False)
    assert push(local(daemon), medium, label="v1").bytes_lent == 0
    assert_installed(daemon, checkpoints.medium(), label="v1")
    assert push(f"127.0.0.1:{daemon.port}", medium, label="v2").bytes_lent == 0


def test_the_sender_takes_next_to_no_memory(daemon, tmp_path):
    version = checkpoints.large(100)
    path = write_safetensors(tmp_path / "large", version)
    with Helper(_push_and_watch, local(daemon), path, "large") as sender:
        report = sender.next(60)
        assert sender.wait() == 0
    assert report["growth"] <= 8 * MIB
    assert report["digest"] == version.digest
    assert not report["torch"]


# --- files that change -----------------------------------------------------------------------------------------------


@pytest.fixture
def at_chunk(monkeypatch):
    """Has something happen just before the n-th read of a lent chunk, on either side."""
    read, counted = LentFiles.read, [0]
    lock = threading.Lock()

    def arrange(number, act):
        def reading(self, chunk, into):
            with lock:
                counted[0] += 1
                now = counted[0] == number
            if now:
                act()
            read(self, chunk, into)

        monkeypatch.setattr(LentFiles, "read", reading)

    return arrange


@pytest.mark.parametrize("number", [1, 10, 49])
def test_a_file_that_is_written_to_meanwhile(daemon, tmp_path, at_chunk, number):
    """Whichever side has read the old bytes: the push does not succeed."""
    before = medium(0)
    push(local(daemon), write_safetensors(tmp_path / "before", before), label="before")
    path = write_safetensors(tmp_path / "after", medium(1))

    def write():
        with path.open("r+b") as file:
            file.seek(-3 * MIB, os.SEEK_END)
            file.write(bytes(MIB))

    at_chunk(number, write)
    with pytest.raises((TensorChanged, IntegrityError), match="changed"):
        push(local(daemon), path, label="after")
    assert_installed(daemon, before, label="before")


@pytest.mark.parametrize("number", [1, 10, 40])
def test_a_file_that_is_cut_meanwhile(daemon, tmp_path, at_chunk, number):
    before = medium(0)
    push(local(daemon), write_safetensors(tmp_path / "before", before), label="before")
    path = write_safetensors(tmp_path / "after", medium(1))
    at_chunk(number, lambda: os.truncate(path, MIB))
    with pytest.raises(TensorChanged, match=r"cut|changed"):
        push(local(daemon), path, label="after")
    assert_installed(daemon, before, label="before")


@pytest.fixture
def unswept(monkeypatch):
    """However long a sender is silent, it is not what is given up."""
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 600)


@pytest.mark.usefixtures("unswept")
@pytest.mark.parametrize("resident", [True, False])
def test_a_file_system_that_does_not_answer(start_daemon, tmp_path, monkeypatch, resident):
    """The push ends, the next one goes into other memory, and what the late read brings reaches nobody."""
    daemon = start_daemon(models={"model": "1GiB"})
    images = daemon.server.images
    if resident:
        push(f"127.0.0.1:{daemon.port}", write_safetensors(tmp_path / "before", medium(0)), label="before")
    read, hangs, go_on = LentFiles.read, threading.Event(), threading.Event()

    def reading(self, chunk, into):
        if threading.current_thread().name == "shipd-lent" and not hangs.is_set():
            hangs.set()
            go_on.wait(30)
        read(self, chunk, into)

    monkeypatch.setattr(LentFiles, "read", reading)
    try:
        reconfigure(daemon, stall=1.0)
        with pytest.raises(Stalled, match=r"waited 1 s for bytes of a file .* \(of tensor 'block"):
            push(local(daemon), write_safetensors(tmp_path / "first", medium(1)), label="first")
        reconfigure(daemon, stall=30.0)
        push(local(daemon), write_safetensors(tmp_path / "second", medium(2)), label="second")
        usual = daemon.server.models["model"].pool.size
        assert images.budget.used > usual, "what the read that hangs writes to is counted"
    finally:
        go_on.set()
    until(lambda: images.budget.used == usual, "the memory of the read that hung has been given back")
    assert_installed(daemon, medium(2), label="second")


@pytest.fixture
def hanging(monkeypatch):
    """Has the daemon's first read of each push to come hang until the event of that number is set."""
    read, events = LentFiles.read, [threading.Event() for _ in range(2)]
    hung: list[LentFiles] = []
    lock = threading.Lock()

    def reading(self, chunk, into):
        event = None
        if threading.current_thread().name == "shipd-lent":
            with lock:
                if len(hung) < len(events) and self not in hung:
                    event = events[len(hung)]
                    hung.append(self)
        if event is not None:
            event.wait(30)
        read(self, chunk, into)

    monkeypatch.setattr(LentFiles, "read", reading)
    yield events
    for event in events:
        event.set()


def is_over(daemon):
    """The daemon has given up waiting for the read as well, a moment after the sender has heard of it."""
    until(lambda: daemon.server.models["model"].incoming is None, "the push is over")


@pytest.mark.usefixtures("unswept")
def test_what_hangs_is_told_apart(start_daemon, tmp_path, hanging):
    """When one read ends the memory of another that still hangs is not given to anybody either."""
    daemon = start_daemon(models={"model": "1GiB"})
    budget = daemon.server.images.budget
    push(f"127.0.0.1:{daemon.port}", write_safetensors(tmp_path / "before", medium(0)), label="before")
    usual = budget.used
    reconfigure(daemon, stall=1.0)
    for number in (1, 2):
        with pytest.raises(Stalled):
            push(local(daemon), write_safetensors(tmp_path / f"hangs {number}", medium(number)), label=f"{number}")
        is_over(daemon)
    reconfigure(daemon, stall=30.0)
    both = budget.used
    hanging[0].set()
    until(lambda: budget.used < both, "the memory of the first read has been given back")
    push(local(daemon), write_safetensors(tmp_path / "after", medium(3)), label="after")
    hanging[1].set()
    until(lambda: not any(thread.name == "shipd-lent" for thread in threading.enumerate()), "the second has ended")
    assert_installed(daemon, medium(3), label="after")
    until(lambda: budget.used == usual, "the memory of the second read has been given back")


def half(version):
    rows = version.rows[1::2]
    return Content(rows, {row.name: version.data[row.name] for row in rows})


def test_a_part_of_a_model_is_lent_as_well(daemon, tmp_path):
    before, part = medium(0), half(medium(1))
    push(local(daemon), write_safetensors(tmp_path / "before", before), label="before")
    receipt = push(local(daemon), write_safetensors(tmp_path / "part", part), label="after", policy="partial")
    assert receipt.bytes_lent == receipt.bytes_total > 0
    assert_installed(daemon, Content(before.rows, {**before.data, **part.data}), label="after")


@pytest.mark.usefixtures("unswept")
def test_the_memory_of_a_part_is_counted_while_a_read_into_it_hangs(start_daemon, tmp_path, hanging):
    daemon = start_daemon(models={"model": "1GiB"})
    budget = daemon.server.images.budget
    push(f"127.0.0.1:{daemon.port}", write_safetensors(tmp_path / "before", medium(0)), label="before")
    usual = budget.used
    reconfigure(daemon, stall=1.0)
    with pytest.raises(Stalled):
        push(local(daemon), write_safetensors(tmp_path / "part", half(medium(1))), label="part", policy="partial")
    is_over(daemon)
    assert budget.used > usual
    hanging[0].set()
    until(lambda: budget.used == usual, "the memory of the read that hung has been given back")
    assert_installed(daemon, medium(0), label="before")


# --- who lends what --------------------------------------------------------------------------------------------------

ROWS = (Tensor("large", "uint8", (2 * LEAF,)),)
STRUCTURE = encode_structure(ROWS)
TABLE = b"\0" + (100).to_bytes(8, "little")


@contextlib.contextmanager
def asked(daemon):
    """A peer that has offered ROWS and was asked for them."""
    with attacker(local(daemon)) as peer:
        peer.greet().send("Offer", hostile.offer(STRUCTURE, 1, 2 * LEAF, model="model", label="lent"))
        peer.expect("StructureWanted")
        peer.send("StructureIs", {"transfer": TRANSFER}, STRUCTURE)
        peer.expect("Want")
        yield peer


def lend(peer, fds, files=1, table=TABLE):
    """LEND, with these descriptors beside its first byte."""
    raw = hostile.frame("Lend", {"files": files, "transfer": TRANSFER}, table, peer.sequence)
    peer.sequence += 1
    socket.send_fds(peer.sock, [raw], fds)


@pytest.fixture
def file(tmp_path):
    """An open file that holds ROWS from byte 100 on."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100) + bytes(range(256)) * (2 * LEAF // 256))
    with path.open("rb") as opened:
        yield opened.fileno()


def nothing_came_of_it(daemon):
    until(lambda: daemon.server.models["model"].incoming is None or not daemon.server._peers, "the daemon has let go")
    assert daemon.server.models["model"].version is None


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "device"])
def test_what_is_no_regular_file(daemon, tmp_path, kind):
    one, other = socket.socketpair()
    ends = [*os.pipe()]
    try:
        fd = {"pipe": ends[0], "socket": one.fileno()}.get(kind)
        if fd is None:
            fd = os.open(tmp_path if kind == "directory" else "/dev/zero", os.O_RDONLY)
            ends.append(fd)
        with asked(daemon) as peer:
            lend(peer, [fd])
            answer = peer.expect("Abort").fields
        assert answer["code"] == "protocol"
        assert "not a regular file" in answer["message"]
    finally:
        for socket_ in (one, other):
            socket_.close()
        for fd in ends:
            os.close(fd)
    nothing_came_of_it(daemon)


def test_a_tensor_beyond_the_end_of_the_file(daemon, file):
    with asked(daemon) as peer:
        lend(peer, [file], table=b"\0" + (101).to_bytes(8, "little"))
        answer = peer.expect("Abort").fields
    assert answer["code"] == "tensor-changed"
    assert (
        f"has {2 * LEAF + 100} bytes, and tensors that are said to lie in it reach to byte {2 * LEAF + 101}"
        in (answer["message"])
    )
    nothing_came_of_it(daemon)


@pytest.mark.parametrize(("fds", "files"), [(0, 1), (1, 2), (2, 1), (127, 128)])
def test_other_descriptors_than_announced(daemon, file, fds, files):
    with asked(daemon) as peer:
        lend(peer, [file] * fds, files)
        assert peer.drain() == []
    nothing_came_of_it(daemon)


def test_of_descriptors_that_nobody_waits_for_the_latest_stay_open(daemon, file):
    """Of a peer that was asked for bytes: they may be what is lent next."""
    fds = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731, PTH208

    with asked(daemon) as peer:
        before = fds()
        for _ in range(20):
            raw = hostile.frame("Ping", {"reply": True}, b"", peer.sequence)
            peer.sequence += 1
            socket.send_fds(peer.sock, [raw], [file] * 100)
            peer.expect("Ping")
        until(lambda: fds() == before + 100, "all others have been closed")
        lend(peer, [file])
        peer.send("Finish", {"digest": bytes(16), "label": "lent", "transfer": TRANSFER}, bytes(16))
        assert peer.expect("Want").payload, "it was read, and has another digest"
        until(lambda: fds() == before, "those have been closed as well")


def test_lend_is_for_local_transfers_that_want_bytes(daemon, file):
    with attacker(daemon.port) as peer:
        peer.greet().send("Lend", {"files": 1, "transfer": TRANSFER}, TABLE)
        assert peer.drain() == []
    with attacker(local(daemon)) as peer:
        peer.greet()
        lend(peer, [file])
        # It names a transfer that is none: nothing is answered, and the descriptor is closed with the connection.
        peer.send("Ping", {"reply": True})
        peer.expect("Ping")
    nothing_came_of_it(daemon)


def test_descriptors_leave_with_the_first_byte_of_their_own_message(file):
    """Whatever is still to be written before it."""
    here, there = socket.socketpair()
    connection, _ = handshaken()
    lane = Lane(here, "a daemon", connection=connection)
    connection.send(Ping())
    lane.send_with_fds(lambda: connection.send(Ping(reply=True)), [file])
    lane.pump()
    with here, there:
        received, at = b"", []
        for _ in range(lane.bytes_sent):
            byte, fds, *_ = socket.recv_fds(there, 1, 1)
            at += [len(received)] * len(fds)
            received += byte
            for fd in fds:
                os.close(fd)
    assert received.count(MAGIC) == 2
    assert at == [received.rindex(MAGIC)]


def test_a_daemon_that_takes_no_files_gets_bytes_when_the_first_way_breaks(daemon, medium, monkeypatch):
    """Descriptors get lost on the way where a security module has them removed: the push goes on without."""
    taken = UnixPeer.take_fds
    monkeypatch.setattr(UnixPeer, "take_fds", lambda self, count: taken(self, count + 1))
    receipt = push(local(daemon), medium)
    assert receipt.bytes_sent > receipt.bytes_total
    assert_installed(daemon, checkpoints.medium())
    assert status(local(daemon)).models[0].failed is None
