"""What the kernel says of connections, and what it is told about them: real ones, on loopback."""

import math
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import cast

import pytest

from shipd.transfer import link_rate
from shipd.transfer.lane import ConnectionLost, Lane
from tests.support.processes import DEADLINE, Background
from tests.support.proxy import until
from tests.support.pumps import reset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux measures connections")

_PACING_RATE_AT = 104
_MAX_PACING_RATE_AT = 112
"""tcpi_pacing_rate and tcpi_max_pacing_rate in struct tcp_info (linux/tcp.h): two u64 after 8 bytes and 24 u32."""

UNLIMITED = (1 << 64) - 1
FAMILIES = {"IPv4": (socket.AF_INET, "127.0.0.1"), "IPv6": (socket.AF_INET6, "::1")}


@pytest.fixture(params=FAMILIES)
def ends(request) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    family, host = FAMILIES[request.param]
    with closing(socket.socket(family)) as listener:
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {request.param} here: {error}")
        listener.listen(1)
        with socket.create_connection(listener.getsockname()[:2], timeout=DEADLINE) as here:
            there, _ = listener.accept()
            with there:
                there.settimeout(DEADLINE)
                yield here, there


def send(ends: tuple[socket.socket, socket.socket], size: int) -> None:
    """``size`` bytes from here to there, all of them read."""
    here, there = ends

    def receive() -> None:
        left = size
        while left:
            got = there.recv(min(left, 1 << 20))
            assert got
            left -= len(got)

    with Background(receive) as receiving:
        here.sendall(os.urandom(size))
        receiving.result()


def told(sock: socket.socket, at: int) -> int:
    """A number of 64 bits of the kernel's tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    found: int = struct.unpack_from("=Q", info, at)[0]
    return found


def test_what_has_arrived_is_counted(ends):
    here, _ = ends
    assert link_rate.measure(here) is None, "nothing has been sent that could be measured"
    send(ends, 300_000)
    acknowledged = 0

    def all_acknowledged() -> bool:
        nonlocal acknowledged
        measured = link_rate.measure(here)
        acknowledged = measured.acknowledged if measured is not None else 0
        return acknowledged >= 300_000

    until(all_acknowledged, "the bytes are acknowledged")
    # The SYN counts as one.
    assert acknowledged in (300_000, 300_001)


def test_the_rate_is_what_the_kernel_says(ends):
    here, _ = ends
    send(ends, 4_000_000)
    until(lambda: link_rate.measure(here) is not None, "there is a rate")
    measured = link_rate.measure(here)
    assert measured is not None
    assert measured.rate > 0
    assert 0 < measured.round_trip < DEADLINE
    assert isinstance(measured.at_least, bool)


def test_a_paced_connection_is_paced_by_the_kernel(ends):
    here, there = ends
    assert told(here, _MAX_PACING_RATE_AT) in (UNLIMITED, (1 << 32) - 1)
    assert link_rate.pace(here, 1_000_000)
    send(ends, 200_000)
    assert told(here, _MAX_PACING_RATE_AT) == 1_000_000
    assert told(here, _PACING_RATE_AT) == 1_000_000
    assert told(there, _MAX_PACING_RATE_AT) > 1_000_000, "the other way is not"
    # Another rate, and none, from now on.
    assert link_rate.pace(here, 7_654_321.9)
    send(ends, 200_000)
    assert told(here, _PACING_RATE_AT) == 7_654_321
    assert link_rate.pace(here, math.inf)
    assert told(here, _MAX_PACING_RATE_AT) == UNLIMITED


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 1), (1e30, UNLIMITED), (5e9, 5_000_000_000)])
def test_rates_at_the_ends_of_what_can_be_said(ends, rate, kept):
    """Found here: a rate of more than 64 bits was a struct.error."""
    here, _ = ends
    assert link_rate.pace(here, rate)
    assert told(here, _MAX_PACING_RATE_AT) == kept


def test_little_is_held_or_as_much_as_the_kernel_likes(ends):
    here, _ = ends

    def most_held() -> int:
        return here.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)

    before = most_held()
    link_rate.hold_little(here, True)
    assert most_held() == 128 * 1024
    link_rate.hold_little(here, False)
    assert most_held() in (0, before), "zero means the system's own"


def test_of_a_unix_socket_nothing_is_known_and_it_cannot_be_paced():
    here, there = socket.socketpair()
    with here, there:
        assert link_rate.measure(here) is None
        assert not link_rate.pace(here, 1e6)
        link_rate.hold_little(here, True)


def test_of_a_socket_that_is_closed_nothing_is_known():
    sock = socket.socket()
    sock.close()
    assert link_rate.measure(sock) is None
    assert not link_rate.pace(sock, 1e6)


def test_of_a_kernel_that_says_less_nothing_is_known(ends, monkeypatch):
    here, _ = ends
    send(ends, 300_000)
    until(lambda: link_rate.measure(here) is not None, "there is a rate")
    monkeypatch.setattr(link_rate, "_TCP_INFO_SIZE", 160)
    assert link_rate.measure(here) is None


def test_a_connection_that_was_reset_is_lost_and_nothing_that_is_asked_of_it_fails_before(ends):
    here, there = ends
    reset(there)
    poll = select.poll()
    poll.register(here, select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    lane = Lane(here, "there")
    assert lane.address is None
    assert lane.local
    lane.hold_little(True)
    with pytest.raises(ConnectionLost):
        list(lane.pump(DEADLINE))


def test_systems_that_set_nothing_on_a_lost_connection():
    """macOS answers EINVAL once the peer has reset it."""

    class Lost:
        family = socket.AF_INET

        def setsockopt(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    link_rate.hold_little(cast("socket.socket", Lost()), True)
