"""Pushes that are to leave room for others: over a link that is really thin, and as the daemon's kernel sees them."""

import asyncio
import socket
import struct
from collections.abc import Iterator

import pytest

import shipd
from shipd.client import incremental
from shipd.transfer import link_rate
from shipd.transfer.lane import Lane
from tests.support import thin_link
from tests.support.checkpoints import as_state_dict, assert_installed, write_safetensors
from tests.support.frames import DATA
from tests.support.processes import TOKEN, ShipdProcess, address_of, push, status
from tests.support.proxy import Proxy
from tests.support.successive import first, following, used
from tests.support.thin_link import MBIT, ThinLink

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first(3)
V1 = following(V0)


@pytest.fixture(scope="module")
def link() -> Iterator[ThinLink]:
    """At 20 Mbit/s: 2.5 MB a second."""
    if why := thin_link.why_not():
        pytest.skip(f"no thin link here: {why}")
    with ThinLink(20 * MBIT) as made:
        yield made


@pytest.fixture
def there(link, place) -> Iterator[ShipdProcess]:
    """A daemon at the other end."""
    token = place / "token"
    token.write_text(TOKEN)
    with (
        link.receiver.entered(),
        ShipdProcess(place, listen=f"{link.receiver.address}:0", token_file=str(token)) as service,
    ):
        yield service


def address(link: ThinLink, service: ShipdProcess) -> str:
    return f"{link.receiver.address}:{service.port}"


def test_others_are_answered_while_a_limited_push_runs(link, there):
    """Half of the link is left for questions on another connection."""
    events: list[str] = []

    async def converse() -> shipd.Receipt:
        where = address(link, there)
        async with shipd.connect(where, token=TOKEN, keep=False) as client, shipd.connect(where, token=TOKEN) as other:
            sending = asyncio.Event()
            loop = asyncio.get_running_loop()

            def on_progress(progress: shipd.Progress) -> None:
                if progress.stage == "sending":
                    loop.call_soon_threadsafe(sending.set)

            pushing = asyncio.create_task(
                client.push(path, model="model", label="v0", limit="10Mbit", base=False, on_progress=on_progress)
            )

            def pushed(_: object) -> None:
                events.append("pushed")
                sending.set()

            pushing.add_done_callback(pushed)
            await sending.wait()
            while not pushing.done():
                (model,) = (await other.status()).models
                if model.label == "" and model.transfer is not None and model.transfer.bytes_held:
                    events.append("answered")
            return await pushing

    with link.sender.entered():
        path = write_safetensors(there.directory / "v0", V0)
        receipt = asyncio.run(converse())
        (model,) = status(address(link, there), token=TOKEN).models
    assert events[0] == "answered", "and what it told was of a push under way"
    assert events[-1] == "pushed"
    assert (model.digest, receipt.digest) == (V0.digest, V0.digest)
    assert receipt.profile.lanes == 1


def test_a_step_over_a_thin_link_is_sent_as_a_delta_with_nothing_said(link, there):
    """What a link carries is measured as it is used."""
    with link.sender.entered():
        where = address(link, there)
        receipts = [
            push(where, as_state_dict(version), label=f"v{at}", token=TOKEN) for at, version in enumerate((V0, V1))
        ]
        (model,) = status(where, token=TOKEN).models
    assert [receipt.base for receipt in receipts] == ["", V0.digest]
    assert set(used(receipts[0])) == {"xph"}
    assert receipts[1].bytes_sent < V1.nbytes / 100
    assert model.digest == V1.digest
    (choice, *_) = receipts[1].choices
    assert choice.link < 100e6, "nowhere near what the cores would do"


def test_what_turns_out_slow_as_it_is_is_coded_after_all(link, there, monkeypatch):
    """The link was fast the last time, so the push begins without; then it looks how fast that goes."""
    larger = first(8)
    with link.sender.entered():
        where = address(link, there)
        monkeypatch.setitem(incremental._rates, where, 5e9)
        receipt = push(where, as_state_dict(larger), label="slow", token=TOKEN)
        (model,) = status(where, token=TOKEN).models
    assert model.digest == larger.digest
    assert "xph" in used(receipt)
    assert used(receipt)["xph"].content_bytes < larger.nbytes, "some of it had been sent by then"
    assert receipt.bytes_sent < larger.nbytes
    assert [choice.codec.name for choice in receipt.choices] == ["xph"], "at first there was nothing to choose"


def test_a_link_that_is_faster_than_any_codec_gets_the_bytes_as_they_are(daemon, monkeypatch):
    """A host beyond a link like loopback: its rate is known, and not looked at again."""
    monkeypatch.setattr(Lane, "local", False)
    monkeypatch.setattr("shipd.client.coded._LOOK_SECONDS", 1e9)
    where = address_of(daemon)
    for at, version in enumerate((V0, V1)):
        monkeypatch.setitem(incremental._rates, where, 50e9)
        receipt = push(where, as_state_dict(version), label=f"v{at}")
        assert receipt.codecs == ()
        assert receipt.bytes_sent > version.nbytes
        assert receipt.choices == (), "not even a run was read to choose for"
        assert_installed(daemon, version, label=f"v{at}")
    assert shipd.kept_versions.memory_used == 0


# --- as the kernel has it, over loopback -----------------------------------------------------------------------------


@pytest.fixture
def paced(monkeypatch) -> list[socket.socket]:
    """The sockets that pushes have had paced."""
    found: list[socket.socket] = []
    pace = link_rate.pace

    def noting(sock: socket.socket, rate: float) -> bool:
        found.append(sock)
        return pace(sock, rate)

    monkeypatch.setattr(link_rate, "pace", noting)
    return found


def pacing_rate(sock: socket.socket) -> int:
    """Bytes a second that the kernel sends at most: tcpi_max_pacing_rate of its struct tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    rate: int = struct.unpack_from("=Q", info, 112)[0]
    return rate


@pytest.mark.parametrize("options", [{}, {"prefer": "bytes"}, {"base": False}, {"lanes": 4}], ids=str)
def test_a_limit_is_one_paced_connection(daemon, paced, options):
    rates: list[int] = []

    def on_progress(_: shipd.Progress) -> None:
        rates.extend(pacing_rate(sock) for sock in paced)

    receipt = push(
        address_of(daemon), as_state_dict(V0), label="v0", limit="80Mbit", on_progress=on_progress, **options
    )
    assert len(paced) == 1
    assert rates
    assert set(rates) == {10_000_000}
    assert receipt.profile.lanes == 1
    assert_installed(daemon, V0, label="v0")


def test_every_connection_of_a_push_is_paced(daemon, paced, monkeypatch):
    monkeypatch.setattr("shipd.client.push._BACKOFF", (0.001,))
    with Proxy(daemon.port) as proxy:
        proxy.cut(nth=3, kind=DATA)
        receipt = push(proxy.address, as_state_dict(V0), label="v0", limit=1e8, base=False)
        assert proxy.connections == len(paced) == 2
    assert receipt.digest == V0.digest
    assert_installed(daemon, V0, label="v0")


def test_without_a_limit_nothing_is_paced(daemon, paced):
    push(address_of(daemon), as_state_dict(V0), label="v0")
    assert not paced


def test_a_connection_that_cannot_be_paced_is_not_used(daemon, monkeypatch):
    monkeypatch.setattr(link_rate, "pace", lambda _sock, _rate: False)
    with pytest.raises(shipd.ConnectError, match="cannot be kept to a rate"):
        push(address_of(daemon), as_state_dict(V0), label="v0", limit="80Mbit")
    assert daemon.server.models["model"].version is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": "fast"}, "is not a rate"),
        ({"limit": 0}, "at least one byte"),
        ({"limit": True}, "at least one byte"),
        ({"prefer": "money"}, "it is 'time' or 'bytes'"),
        ({"stall": -1.0}, "stall = -1.0: it is a number of seconds above 0"),
        ({"timeout": 0}, "timeout = 0: it is a number of seconds above 0"),
        ({"cast": "no"}, "cast = 'no': it is True, False or None"),
    ],
    ids=str,
)
def test_what_cannot_be_wanted_is_a_value_error(daemon, options, said):
    with pytest.raises(ValueError, match=said):
        push(address_of(daemon), as_state_dict(V0), **options)
    assert daemon.server.models["model"].version is None


def test_a_limit_on_a_unix_socket_is_a_value_error(daemon):
    with pytest.raises(ValueError, match="only TCP connections can be kept to a rate"):
        push(str(daemon.config.socket), as_state_dict(V0), limit="10Mbit")
