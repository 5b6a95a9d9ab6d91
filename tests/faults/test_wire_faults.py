"""What a network does to a push, done by a proxy: each push survives it, or fails with an error that names it."""

import asyncio
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import shipd
import shipd.client.client
import shipd.client.push
import shipd.transfer.lane
from shipd.checkpoints import source
from shipd.transfer.lane import Lane
from tests.support import checkpoints
from tests.support.checkpoints import LEAF, assert_installed
from tests.support.frames import (
    COMMIT,
    COMMITTED,
    DATA,
    FINISH,
    HELLO,
    NACK,
    OFFER,
    PRELUDE,
    PROGRESS,
    STAGED,
    STRUCTURE_IS,
    STRUCTURE_WANTED,
    WANT,
    Way,
)
from tests.support.processes import Background, Helper, Shipctl, push, status
from tests.support.proxy import RECEIVE_BUFFER, Proxy, until

OLD = checkpoints.medium(0)
NEW = checkpoints.medium(1)
CHUNKS = NEW.chunks


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    """What is waited for when a connection is given up, or opened anew, is not what is tested here."""
    monkeypatch.setattr(shipd.transfer.lane, "_GOODBYE_SECONDS", 0.1)
    monkeypatch.setattr(shipd.client.push, "_BACKOFF", (0.01, 0.02, 0.05, 0.1))


@pytest.fixture
def daemon(start_daemon, tmp_path):
    """A daemon that has a version already, of the same structure."""
    daemon = start_daemon()
    push(f"127.0.0.1:{daemon.port}", checkpoints.write_safetensors(tmp_path / "old", OLD), label="old")
    return daemon


@pytest.fixture
def proxy(daemon):
    with Proxy(daemon.port) as proxy:
        yield proxy


@pytest.fixture
def new(tmp_path):
    return checkpoints.write_safetensors(tmp_path / "new", NEW)


def assert_fit(daemon, new):
    """Nothing has happened to the version that serves, and the next push goes through."""
    assert_installed(daemon, OLD, label="old")
    push(f"127.0.0.1:{daemon.port}", new, label="after")
    assert_installed(daemon, NEW, label="after")


# --- flipped bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nth", "tensor"), [(0, "block.0.weight"), (7, "block.1.weight"), (23, "block.5.weight")])
@pytest.mark.parametrize("part", ["payload", "header"])
def test_one_flipped_bit_costs_exactly_one_frame(daemon, proxy, new, part, nth, tensor):
    proxy.flip(part, nth=nth)
    receipt = push(proxy.address, new, label="new")
    assert receipt.frames_resent == 1
    assert receipt.resent_tensors == (tensor,)
    assert proxy.count(DATA) == CHUNKS + 1
    assert proxy.count(NACK, Way.TO_SENDER) == 1
    assert proxy.connections == 1
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("bit", [0, 7, 4096 * 8, LEAF * 8 - 1])
def test_wherever_in_the_payload_the_bit_is(daemon, proxy, new, bit):
    proxy.flip("payload", nth=3, bit=bit)
    assert push(proxy.address, new).frames_resent == 1
    assert proxy.count(DATA) == CHUNKS + 1
    assert_installed(daemon, NEW)


def test_a_damaged_chunk_of_many_small_tensors_names_them(proxy, new):
    proxy.flip("payload", nth=CHUNKS - 1)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == 1
    assert receipt.resent_tensors == tuple(f"block.{at}.bias" for at in range(6))


def test_several_flipped_bits_cost_a_frame_each(daemon, proxy, new):
    for nth in (1, 2, 9, 10):
        proxy.flip("payload", nth=nth)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == 4
    assert proxy.count(DATA) == CHUNKS + 4
    assert "block.0.weight" in receipt.resent_tensors
    assert_installed(daemon, NEW)


def test_a_frame_sent_again_may_be_damaged_again(daemon, proxy, new):
    rule = proxy.flip("payload", nth=5, every=True, times=4)
    receipt = push(proxy.address, new)
    assert receipt.frames_resent == rule.applied == 4
    assert proxy.count(DATA) == CHUNKS + 4
    assert receipt.resent_tensors == ("block.1.weight",)
    assert_installed(daemon, NEW)


def test_a_flipped_prelude_costs_the_connection_and_no_frame_that_is_held(daemon, proxy, new):
    proxy.flip("prelude", nth=11)
    receipt = push(proxy.address, new, label="new")
    assert proxy.connections == 2
    assert proxy.count(DATA, connection=1) == CHUNKS - 11, "only what was missing travels again"
    assert receipt.frames_resent == 0, "frames lost with a connection are not damaged frames"
    assert_installed(daemon, NEW, label="new")


TO_DAEMON = [(kind, Way.TO_DAEMON) for kind in (OFFER, STRUCTURE_IS, FINISH, COMMIT)]
TO_SENDER = [(kind, Way.TO_SENDER) for kind in (STRUCTURE_WANTED, WANT, PROGRESS, STAGED, COMMITTED)]


def _name(value):
    return value.name.lower() if isinstance(value, Way) else None


@pytest.mark.parametrize("part", ["prelude", "header", "payload"])
@pytest.mark.parametrize(("kind", "way"), TO_DAEMON + TO_SENDER, ids=_name)
def test_a_flipped_bit_in_any_other_message(start_daemon, tmp_path, kind, way, part):
    daemon = start_daemon()
    path = checkpoints.write_safetensors(tmp_path / "new", NEW)
    with Proxy(daemon.port) as proxy:
        rule = proxy.flip(part, kind=kind, way=way)
        if part == "payload" and kind not in (STRUCTURE_IS, FINISH, WANT):
            pytest.skip("has no payload")
        receipt = push(proxy.address, path, label="new")
        assert rule.applied == 1
        assert proxy.connections == (2 if part == "prelude" else 1)
        if kind not in (WANT, PROGRESS):
            assert proxy.count(DATA) == CHUNKS
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_flipped_bit_in_the_request_to_send_again(daemon, proxy, new, part):
    proxy.flip("payload", nth=3)
    proxy.flip(part, kind=NACK, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert proxy.connections == (2 if part == "prelude" else 1)
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("way", Way, ids=_name)
@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_damaged_handshake_on_the_first_connection_is_a_typed_error(daemon, proxy, new, way, part):
    proxy.flip(part, kind=HELLO, way=way, connection=0)
    with pytest.raises(shipd.ConnectError):
        push(proxy.address, new)
    assert_fit(daemon, new)


@pytest.mark.parametrize("way", Way, ids=_name)
@pytest.mark.parametrize("part", ["prelude", "header"])
def test_a_damaged_handshake_on_a_later_connection_is_repeated(daemon, proxy, new, way, part):
    proxy.cut(nth=5)
    proxy.flip(part, kind=HELLO, way=way, connection=1)
    push(proxy.address, new)
    assert proxy.connections == 3
    assert_installed(daemon, NEW)


def test_a_frame_damaged_every_time_ends_the_push_and_is_named(daemon, proxy, new):
    rule = proxy.flip("payload", nth=9, every=True)
    with pytest.raises(shipd.IntegrityError, match=r"block\.2\.weight.* damaged 5 times") as caught:
        push(proxy.address, new, label="new")
    assert caught.value.tensor == "block.2.weight"
    assert caught.value.transfer_id is not None
    assert caught.value.exit_code == 13
    assert rule.applied == 5
    assert_fit(daemon, new)


def test_a_header_damaged_every_time_ends_the_push_and_is_named(daemon, proxy, new):
    proxy.flip("header", nth=9, every=True)
    with pytest.raises(shipd.IntegrityError, match=r"block\.2\.weight"):
        push(proxy.address, new, label="new")
    assert_fit(daemon, new)


def test_a_prelude_damaged_every_time_ends_the_push(daemon, proxy, new):
    for connection in range(10):
        proxy.flip("prelude", nth=0, connection=connection)
    with pytest.raises(shipd.TransferFailed, match="broke 5 times"):
        push(proxy.address, new, label="new")
    assert proxy.connections == 5
    assert_fit(daemon, new)


@pytest.mark.parametrize(("kind", "way"), [(OFFER, Way.TO_DAEMON), (WANT, Way.TO_SENDER)], ids=_name)
def test_a_message_damaged_every_time_ends_the_push(daemon, proxy, new, kind, way):
    proxy.flip("header", kind=kind, way=way, nth=None)
    with pytest.raises(shipd.ShipError, match=r"127\.0\.0\.1"):
        push(proxy.address, new, label="new", stall=5)
    assert_fit(daemon, new)


# --- bytes lost and doubled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 32, 5000])
@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_lost_or_doubled_bytes_cost_the_connection(daemon, proxy, new, fault, count):
    getattr(proxy, fault)(count, nth=8)
    push(proxy.address, new)
    assert proxy.connections == 2
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_lost_or_doubled_bytes_from_the_daemon(daemon, proxy, new, fault):
    getattr(proxy, fault)(3, kind=PROGRESS, nth=0, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert_installed(daemon, NEW)


def test_a_whole_frame_doubled_is_out_of_sequence(daemon, proxy, new):
    proxy.duplicate(LEAF + PRELUDE + 10, nth=8)
    push(proxy.address, new)
    assert_installed(daemon, NEW)


# --- connections that end --------------------------------------------------------------------------------------------


FRAME = LEAF + 64
"""A DATA frame, at most."""


def in_the_kernel() -> int:
    """The most that a sender can have written and the proxy not read: a send buffer as large as it may grow, and the
    proxy's receive buffer, which the kernel doubles."""
    return int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) + 2 * RECEIVE_BUFFER


@pytest.mark.parametrize("tenth", range(10))
def test_cut_at_every_tenth(daemon, proxy, new, tenth):
    how = "rst" if tenth % 2 else "fin"
    cut = NEW.nbytes * tenth // 10 + 400
    proxy.cut_at_byte(cut, connection=0, how=how)
    receipt = push(proxy.address, new, label="new")
    assert proxy.connections == 2
    whole = NEW.nbytes * tenth // 10 // (LEAF + 50)
    if how == "fin":
        assert proxy.count(DATA, connection=1) <= CHUNKS - whole
    # Written on the first connection: what passed, with the rest of the frame that was cut; what lay in the kernel;
    # and, since the sender looks for the end of the connection after every chunk, one more. Then what was missing.
    first = cut + in_the_kernel() + 2 * FRAME
    assert receipt.bytes_sent <= first + proxy.count(DATA, connection=1) * FRAME + LEAF // 8
    assert_installed(daemon, NEW, label="new")


def assert_only_missing(proxy, connection, arrived, how):
    """What was passed on whole does not travel again; a reset may throw away some that the daemon had not read yet."""
    again = proxy.count(DATA, connection=connection)
    assert CHUNKS - arrived <= again <= (CHUNKS - arrived if how == "fin" else CHUNKS)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("keep", [16 / LEAF, 35 / LEAF, 0.5, 0.999999])
def test_cut_inside_prelude_header_and_payload(daemon, proxy, new, keep, how):
    proxy.cut(nth=4, keep=keep, how=how)
    push(proxy.address, new)
    assert proxy.connections == 2
    assert_only_missing(proxy, 1, 4, how)
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_several_cuts_in_a_row(daemon, proxy, new, how):
    for connection in range(6):
        proxy.cut(nth=3, connection=connection, keep=0.3, how=how)
    push(proxy.address, new)
    assert proxy.connections == 7
    assert_only_missing(proxy, 6, 6 * 3, how)
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize(("kind", "way"), TO_DAEMON + TO_SENDER, ids=_name)
def test_cut_at_any_message(start_daemon, tmp_path, kind, way, how):
    daemon = start_daemon()
    path = checkpoints.write_safetensors(tmp_path / "new", NEW)
    with Proxy(daemon.port) as proxy:
        rule = proxy.cut(kind=kind, way=way, how=how)
        receipt = push(proxy.address, path, label="new")
        assert rule.applied == 1
        assert proxy.connections == 2
        if kind not in (PROGRESS, WANT):
            assert proxy.count(DATA) == CHUNKS
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


@pytest.mark.parametrize("way", Way, ids=_name)
def test_half_closed_connections_are_opened_anew(daemon, proxy, new, way):
    proxy.half_close(kind=DATA if way is Way.TO_DAEMON else PROGRESS, nth=0, way=way)
    push(proxy.address, new)
    assert proxy.connections == 2
    assert_installed(daemon, NEW)


def _refusals(monkeypatch):
    """Counts the attempts to connect that were refused."""
    refused = threading.Semaphore(0)
    opened = Lane.open

    def counting(*arguments, **options):
        try:
            return opened(*arguments, **options)
        except shipd.ConnectError:
            refused.release()
            raise

    monkeypatch.setattr(Lane, "open", counting)
    return refused


def test_connections_refused_for_a_while(daemon, proxy, new, monkeypatch):
    refused = _refusals(monkeypatch)
    held = proxy.hold(nth=10)
    with Background(push, proxy.address, new, label="new") as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        for _ in range(3):
            assert refused.acquire(timeout=20)
        proxy.accept()
        pushing.result()
    assert_only_missing(proxy, 1, 10, "rst")
    assert_installed(daemon, NEW, label="new")


def test_connections_refused_for_too_long(daemon, proxy, new):
    held = proxy.hold(nth=10)
    with Background(push, proxy.address, new, label="new", stall=0.4) as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        error = pushing.error(10)
    assert isinstance(error, shipd.ConnectError), error
    assert "refused" in str(error)
    assert proxy.address in str(error)
    assert error.model == "model"
    assert error.transfer_id is not None
    assert_fit(daemon, new)


def test_nobody_there_at_all(proxy, new):
    proxy.refuse()
    with pytest.raises(shipd.ConnectError, match=r"refused.*Is shipd running there\?"):
        push(proxy.address, new)


# --- COMMIT and COMMITTED --------------------------------------------------------------------------------------------


def test_lost_committed_is_answered_on_the_next_connection(daemon, proxy, new):
    proxy.cut(kind=COMMITTED, way=Way.TO_SENDER)
    receipt = push(proxy.address, new, label="new")
    assert proxy.connections == 2
    assert proxy.count(DATA) == CHUNKS
    assert proxy.count(COMMIT) == 1, "the transfer is asked for by its id, not committed again"
    assert not receipt.already
    assert receipt.label == "new"
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")


def test_lost_commit_is_sent_again(daemon, proxy, new):
    proxy.cut(kind=COMMIT)
    push(proxy.address, new, label="new")
    assert proxy.count(COMMIT) == 2
    assert proxy.count(DATA) == CHUNKS
    assert_installed(daemon, NEW, label="new")


def test_outcome_unknown_and_settled_by_pushing_again(daemon, proxy, new):
    held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
    with Background(push, proxy.address, new, label="new", stall=0.4) as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        error = pushing.error(10)
    assert isinstance(error, shipd.OutcomeUnknown), error
    assert error.transfer_id is not None
    assert proxy.address in str(error)
    receipt = push(f"127.0.0.1:{daemon.port}", new, label="new")
    assert receipt.already, "it had been committed"
    assert_installed(daemon, NEW, label="new")


def test_stall_after_commit_leaves_the_outcome_unknown(proxy, new):
    proxy.stall(kind=COMMITTED, way=Way.TO_SENDER)
    with pytest.raises(shipd.OutcomeUnknown):
        push(proxy.address, new, label="new", stall=0.4)


def test_broken_protocol_after_commit_leaves_the_outcome_unknown(proxy, new):
    """Whatever goes wrong once COMMIT has left: that the old version serves cannot be said any more."""
    held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
    with foreign_listener() as port, Background(push, proxy.address, new, label="new") as pushing:
        held.wait()
        proxy.upstream = port
        proxy.sever_all()
        error = pushing.error(10)
    assert isinstance(error, shipd.OutcomeUnknown), error


class foreign_listener:  # noqa: N801  a context manager
    """Speaks HTTP to whoever connects."""

    def __enter__(self):
        import socket

        self._sock = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self._sock.getsockname()[1]

    def _serve(self):
        while True:
            try:
                peer, _address = self._sock.accept()
            except OSError:
                return
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def __exit__(self, *_):
        self._sock.shutdown(2)
        self._thread.join()
        self._sock.close()


# --- stalls and thin links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "way"), [(DATA, Way.TO_DAEMON), (PROGRESS, Way.TO_SENDER)], ids=_name)
def test_a_stall_ends_the_push_in_time(daemon, proxy, tmp_path, kind, way):
    version = checkpoints.large(48)
    path = checkpoints.write_safetensors(tmp_path / "large", version)
    proxy.stall(kind=kind, way=way, nth=0)
    started = time.monotonic()
    with pytest.raises(shipd.Stalled) as caught:
        push(proxy.address, path, label="new", stall=0.5)
    assert time.monotonic() - started < 5
    assert caught.value.peer == proxy.address
    assert caught.value.model == "model"
    assert caught.value.transfer_id is not None
    proxy.sever_all()
    assert_installed(daemon, OLD, label="old")
    push(f"127.0.0.1:{daemon.port}", path, label="after")
    assert_installed(daemon, version, label="after")


@pytest.mark.parametrize("kind", [OFFER, FINISH])
def test_a_stall_while_nothing_is_sent(daemon, proxy, new, kind):
    proxy.stall(kind=kind)
    with pytest.raises(shipd.Stalled):
        push(proxy.address, new, stall=0.3)
    proxy.sever_all()
    assert_fit(daemon, new)


def test_a_stalled_handshake_ends_in_time(proxy, new, monkeypatch):
    monkeypatch.setattr(shipd.client.client, "_CONNECT_SECONDS", 0.3)
    proxy.stall(kind=HELLO, way=Way.TO_SENDER)
    with pytest.raises(shipd.Stalled, match="not answered in time"):
        push(proxy.address, new)


def test_the_whole_push_has_a_timeout_where_it_is_asked_for(daemon, proxy, new):
    proxy.throttle(2e6)
    started = time.monotonic()
    with pytest.raises(shipd.Stalled, match="timeout"):
        push(proxy.address, new, timeout=0.5)
    assert time.monotonic() - started < 5
    proxy.sever_all()
    assert_fit(daemon, new)


def test_a_thin_link_is_no_stall(daemon, proxy, new):
    """What moves has not stalled, although the daemon acknowledges nothing for longer than the stall deadline."""
    proxy.throttle(5e6)
    receipt = push(proxy.address, new, stall=1.0)
    assert receipt.seconds > 2, "else this has shown nothing"
    assert proxy.connections == 1
    assert_installed(daemon, NEW)


@pytest.mark.parametrize("way", Way, ids=_name)
def test_pieces_of_any_size(start_daemon, tmp_path, way):
    daemon = start_daemon()
    version = checkpoints.edge_cases()
    path = checkpoints.write_safetensors(tmp_path / "edge", version)
    with Proxy(daemon.port) as proxy:
        proxy.trickle(997, way)
        push(proxy.address, path)
    assert_installed(daemon, version)


def test_byte_by_byte(start_daemon, tmp_path):
    daemon = start_daemon()
    version = checkpoints.tiny()
    path = checkpoints.write_safetensors(tmp_path / "tiny", version)
    with Proxy(daemon.port) as proxy:
        proxy.trickle(1, Way.TO_DAEMON)
        proxy.trickle(1, Way.TO_SENDER)
        push(proxy.address, path)
    assert_installed(daemon, version)


def test_a_slow_path(daemon, proxy, new):
    proxy.delay(0.01, way=Way.TO_DAEMON)
    proxy.delay(0.05, way=Way.TO_SENDER)
    push(proxy.address, new)
    assert_installed(daemon, NEW)


# --- senders that die ------------------------------------------------------------------------------------------------


def _push_slowly(report, address, path, label):
    import asyncio

    import shipd

    async def main():
        async with shipd.connect(address) as client:
            report("connected")
            await client.push(path, model="model", label=label)

    asyncio.run(main())


def test_sender_killed_halfway(daemon, proxy, new, tmp_path):
    held = proxy.hold(nth=12)
    other = checkpoints.medium(2)
    with Helper(_push_slowly, proxy.address, new, "killed") as sender:
        held.wait()
        until(lambda: daemon.server.models["model"].incoming.receiver.held, "chunks that are held")
        sender.kill()
        held.release()
        proxy.sever_all()
        incoming = daemon.server.models["model"].incoming
        until(lambda: not incoming.receiver.attended, "the daemon sees that the sender is gone")
    transfer = status(f"127.0.0.1:{daemon.port}").models[0].transfer
    assert not transfer.connected
    assert transfer.stage == "receiving"
    assert 0 < transfer.bytes_held < transfer.bytes_total, "what has arrived is kept for a sender that comes back"
    assert_installed(daemon, OLD, label="old")
    path = checkpoints.write_safetensors(tmp_path / "other", other)
    push(f"127.0.0.1:{daemon.port}", path, label="newer")
    assert incoming.receiver.error.code == "superseded"
    assert_installed(daemon, other, label="newer")


def test_a_sender_that_does_not_come_back_is_forgotten(start_daemon, tmp_path):
    daemon = start_daemon(resume_window=0.3)
    path = checkpoints.write_safetensors(tmp_path / "new", NEW)
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Helper(_push_slowly, proxy.address, path, "killed") as sender:
            held.wait()
            sender.kill()
            held.release()
            proxy.sever_all()
        until(lambda: daemon.server.models["model"].incoming is None, "the transfer is given up")
    assert daemon.server.images.budget.used == 0
    assert status(f"127.0.0.1:{daemon.port}").models[0].label == ""
    push(f"127.0.0.1:{daemon.port}", path)
    assert_installed(daemon, NEW)


def test_a_sender_that_was_stopped_finds_itself_superseded(start_daemon, tmp_path, monkeypatch):
    monkeypatch.setattr("shipd.service.server._SWEEP_SECONDS", 0.05)
    daemon = start_daemon(stall=0.3)
    paths = [checkpoints.write_safetensors(tmp_path / f"{at}", checkpoints.medium(at)) for at in range(2)]
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)
        with Shipctl("push", paths[0], "--to", proxy.address, "--model", "model", "--json") as sender:
            held.wait()
            sender.signal(signal.SIGSTOP)
            incoming = daemon.server.models["model"].incoming
            until(lambda: not incoming.receiver.attended, "the daemon has closed the silent connection")
            push(f"127.0.0.1:{daemon.port}", paths[1], label="newer")
            held.release()
            sender.signal(signal.SIGCONT)
            assert sender.wait() == 1, sender.describe()
            assert sender.answer["error"] == "Superseded"
            assert sender.answer["transfer_id"] == incoming.transfer_id
    assert_installed(daemon, checkpoints.medium(1), label="newer")


# --- daemons that die ------------------------------------------------------------------------------------------------


def test_daemon_killed_halfway_and_restarted(start_shipd, new):
    first = start_shipd()
    push(first.address, new, label="before")
    with Proxy(first.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, new, label="new") as pushing:
            held.wait()
            proxy.refuse()
            first.kill()
            proxy.forget_rules()
            second = start_shipd(directory=first.directory)
            proxy.upstream = second.port
            proxy.accept()
            receipt = pushing.result()
        assert proxy.count(DATA, connection=1) == CHUNKS, "a daemon keeps nothing on disk: everything travels again"
    model = status(second.address).models[0]
    assert (model.label, model.digest) == ("new", NEW.digest)
    assert receipt.digest == NEW.digest


def test_daemon_killed_halfway_and_gone(start_shipd, new):
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, new, label="new", stall=0.4) as pushing:
            held.wait()
            proxy.refuse()
            service.kill()
            held.release()
            error = pushing.error(10)
    assert isinstance(error, shipd.ConnectError), error
    assert error.transfer_id is not None


def test_daemon_restarted_without_the_model(start_shipd, new):
    first = start_shipd()
    with Proxy(first.port) as proxy:
        held = proxy.hold(nth=12)
        with Background(push, proxy.address, new, label="new", stall=0.4) as pushing:
            held.wait()
            proxy.refuse()
            first.kill()
            proxy.forget_rules()
            second = start_shipd(models={"another": "1GiB"})
            proxy.upstream = second.port
            proxy.accept()
            error = pushing.error(20)
    assert isinstance(error, shipd.UnknownModel | shipd.ConnectError), error


def test_daemon_killed_after_commit(start_shipd, new):
    """Nobody can say whether it was committed: a new daemon knows nothing of it."""
    service = start_shipd()
    with Proxy(service.port) as proxy:
        held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
        with Background(push, proxy.address, new, label="new", stall=0.4) as pushing:
            held.wait()
            proxy.refuse()
            service.kill()
            proxy.sever_all()
            error = pushing.error(10)
    assert isinstance(error, shipd.OutcomeUnknown), error


# --- cancelling ------------------------------------------------------------------------------------------------------


async def _cancelled_at(proxy, held, new, before_cancel=lambda: None, after_cancel=lambda: None, **options):
    async with shipd.connect(proxy.address) as client:
        pushing = asyncio.create_task(client.push(new, model="model", label="new", **options))
        await asyncio.to_thread(held.wait)
        await asyncio.to_thread(before_cancel)
        pushing.cancel()
        await asyncio.sleep(0)
        await asyncio.to_thread(after_cancel)
        with pytest.raises(asyncio.CancelledError):
            await pushing


def test_cancelling_the_task_ends_the_push(daemon, proxy, new):
    held = proxy.hold(nth=12)
    started = time.monotonic()
    asyncio.run(_cancelled_at(proxy, held, new, after_cancel=held.release))
    assert time.monotonic() - started < 5
    until(lambda: daemon.server.models["model"].incoming is None or not _attended(daemon), "the daemon knows")
    assert_fit(daemon, new)


def _attended(daemon):
    incoming = daemon.server.models["model"].incoming
    return incoming is not None and incoming.receiver.attended


def test_cancelling_while_nobody_listens(daemon, proxy, new, monkeypatch):
    refused = _refusals(monkeypatch)
    held = proxy.hold(nth=12)

    def lose():
        proxy.refuse()
        proxy.sever_all()
        assert refused.acquire(timeout=20)

    started = time.monotonic()
    asyncio.run(_cancelled_at(proxy, held, new, before_cancel=lose))
    assert time.monotonic() - started < 5
    assert_fit(daemon, new)


def test_cancelling_during_the_commit_waits_for_it(daemon, proxy, new):
    """And tells how it went: that it was cancelled is not true of it."""
    held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)

    async def main():
        async with shipd.connect(proxy.address) as client:
            pushing = asyncio.create_task(client.push(new, model="model", label="new"))
            await asyncio.to_thread(held.wait)
            for _ in range(2):
                pushing.cancel()
                await asyncio.sleep(0)
            held.release()
            return await pushing

    assert asyncio.run(main()).label == "new"
    assert_installed(daemon, NEW, label="new")


def test_cancelling_while_connecting(proxy, monkeypatch):
    """Also where the connection stands by the time that the cancellation is noticed."""
    opened = Lane.open
    opening, go_on = threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        lane = opened(*arguments, **options)
        opening.set()
        assert go_on.wait(20)
        return lane

    monkeypatch.setattr(Lane, "open", slowly)

    async def main():
        client = shipd.connect(proxy.address)
        connecting = asyncio.create_task(client.__aenter__())
        await asyncio.to_thread(opening.wait)
        connecting.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await connecting

    asyncio.run(main())


def test_a_cancellation_that_comes_as_the_commit_leaves_cannot_be_half_obeyed(daemon, proxy, new, monkeypatch):
    """Between the look at whether the commit is under way and the wake-up, COMMIT may have left."""
    look = shipd.client.push.Push._before_commit

    def woken_too_late(self):
        look(self)
        self._waker.wake()

    monkeypatch.setattr(shipd.client.push.Push, "_before_commit", woken_too_late)
    try:
        push(proxy.address, new, label="new")
    except shipd.Interrupted:
        assert_installed(daemon, OLD, label="old")
        assert proxy.count(COMMIT) == 0
    else:
        assert_installed(daemon, NEW, label="new")


def test_cancelling_while_the_checkpoint_is_opened(daemon, new, monkeypatch):
    opened = source.open_source
    opening, go_on = threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        opening.set()
        assert go_on.wait(20)
        return opened(*arguments, **options)

    monkeypatch.setattr(shipd.client.client, "open_source", slowly)

    async def main():
        async with shipd.connect(f"127.0.0.1:{daemon.port}") as client:
            pushing = asyncio.create_task(client.push(new, model="model", label="new"))
            await asyncio.to_thread(opening.wait)
            pushing.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await pushing

    asyncio.run(main())
    assert_installed(daemon, OLD, label="old")


# --- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_damage(daemon, proxy, new, seed):
    """A few faults of every kind that can be survived, anywhere in either direction."""
    dice = random.Random(seed)
    for _ in range(dice.randint(2, 5)):
        way = dice.choice((Way.TO_DAEMON, Way.TO_DAEMON, Way.TO_SENDER))
        kinds = (
            (DATA, DATA, DATA, OFFER, FINISH, COMMIT) if way is Way.TO_DAEMON else (WANT, PROGRESS, STAGED, COMMITTED)
        )
        kind = dice.choice(kinds)
        nth = dice.randrange(CHUNKS) if kind == DATA else 0
        # Bytes that are lost behind the last frame of an exchange are a stall, and TCP loses none.
        fault = dice.choice(("header", "prelude", "cut", "duplicate"))
        if fault == "cut":
            proxy.cut(kind=kind, nth=nth, way=way, keep=dice.random(), how=dice.choice(("fin", "rst")))
        elif fault == "duplicate":
            proxy.duplicate(dice.randint(1, 40), kind=kind, nth=nth, way=way)
        else:
            proxy.flip(fault, kind=kind, nth=nth, way=way)
    receipt = push(proxy.address, new, label="new", stall=10)
    assert receipt.digest == NEW.digest
    assert_installed(daemon, NEW, label="new")
