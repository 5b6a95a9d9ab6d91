"""Connections that are cut, half closed or refused: what travels again, and what is known of a COMMIT that was lost."""

import asyncio
import threading
from pathlib import Path

import pytest

import shipd
from shipd.client.sending import RUN
from tests.support import checkpoints
from tests.support.checkpoints import LEAF, assert_installed
from tests.support.frames import COMMIT, COMMITTED, DATA, MESSAGES, PROGRESS, WANT, Way, name_of_way
from tests.support.processes import Background, push
from tests.support.proxy import RECEIVE_BUFFER, Proxy
from tests.support.upgrades import CHUNKS, NEW, assert_fit

pytest_plugins = ["tests.support.upgrades", "tests.support.patience"]

pytestmark = pytest.mark.usefixtures("short_backoff", "short_goodbye")


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
    # and what was drained until the sender, between two runs of chunks, looked for the end of the connection. Then what
    # was missing.
    first = cut + FRAME + in_the_kernel() + RUN * FRAME
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
def test_lost_between_connecting_and_pushing(daemon, proxy, new, how):
    async def converse() -> None:
        async with shipd.connect(proxy.address) as client:
            proxy.sever_all(how)
            await client.push(new, model="model")

    asyncio.run(converse())
    assert proxy.connections == 2
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
@pytest.mark.parametrize(("kind", "way"), MESSAGES, ids=name_of_way)
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


@pytest.mark.parametrize("way", Way, ids=name_of_way)
def test_half_closed_connections_are_opened_anew(daemon, proxy, new, way):
    proxy.half_close(kind=DATA if way is Way.TO_DAEMON else PROGRESS, nth=0, way=way)
    push(proxy.address, new)
    assert proxy.connections == 2
    assert_installed(daemon, NEW)


def test_connections_refused_for_a_while(daemon, proxy, new, refused):
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


def test_connections_refused_for_too_long(daemon, proxy, new, out_of_patience):
    held = proxy.hold(nth=10)
    with Background(push, proxy.address, new, label="new") as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        out_of_patience()
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


def test_outcome_unknown_and_settled_by_pushing_again(daemon, proxy, new, out_of_patience):
    held = proxy.hold(kind=COMMITTED, way=Way.TO_SENDER)
    with Background(push, proxy.address, new, label="new") as pushing:
        held.wait()
        proxy.refuse()
        proxy.sever_all()
        out_of_patience()
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
        push(proxy.address, new, label="new", stall=3.0)


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
