import dataclasses
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.address import DEFAULT_PORT, Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("gpu-01", "gpu-01", 7447, "gpu-01:7447"),
        ("gpu-01:7000", "gpu-01", 7000, "gpu-01:7000"),
        ("gpu-01.rack_2.example.com", "gpu-01.rack_2.example.com", 7447, "gpu-01.rack_2.example.com:7447"),
        ("example.com.:1", "example.com.", 1, "example.com.:1"),
        ("bücher.example:65535", "bücher.example", 65535, "bücher.example:65535"),
        ("127.0.0.1", "127.0.0.1", 7447, "127.0.0.1:7447"),
        ("[::1]", "::1", 7447, "[::1]:7447"),
        ("[fd00::7]:7000", "fd00::7", 7000, "[fd00::7]:7000"),
        ("[fe80::1%eth0]:7000", "fe80::1%eth0", 7000, "[fe80::1%eth0]:7000"),
        ("[::ffff:10.0.0.1]", "::ffff:10.0.0.1", 7447, "[::ffff:10.0.0.1]:7447"),
    ],
)
def test_addresses_are_understood(text, host, port, shown):
    address = parse_address(text)
    assert address == Address(host, port)
    assert str(address) == shown
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host; write HOST or HOST:PORT"),
        (":7447", "names no host"),
        ("http://gpu-01:7447", "is a URL and not an address"),
        ("gpu-01:", "has the port ''; a port is a number from 1 to 65535"),
        ("gpu-01:0", "has the port '0'; a port is a number from 1"),
        ("gpu-01:65536", "has the port '65536'"),
        ("gpu-01:-1", "has the port '-1'"),
        ("gpu-01:+1", "has the port"),
        ("gpu-01: 7447", "has the port ' 7447'"),
        ("gpu-01:٣", "has the port"),
        ("gpu-01:" + "9" * 100, "has the port"),
        ("gpu-01:http", "has the port 'http'"),
        ("::1", "looks like an IPv6 address, which needs brackets"),
        ("fd00::7:7447", "needs brackets"),
        ("[::1", "opening bracket and no closing one"),
        ("[::1]7447", "has '7447' after the bracket"),
        ("[::1]:", "has the port ''"),
        ("[]", "no IPv6 address in its brackets"),
        ("[gpu-01]", "no IPv6 address in its brackets"),
        ("[127.0.0.1]:7447", "no IPv6 address in its brackets"),
        ("[fe80::1%a b]", "zone that is no interface name"),
        ("[fe80::1%eth0\n]", "zone that is no interface name"),
        ("256.1.1.1", "neither an IPv4 address nor a host name"),
        ("10.0.0", "neither an IPv4 address nor a host name"),
        ("gpu 01", "is not a host name"),
        ("user@gpu-01", "is not a host name"),
        ("gpu-01/path", "is not a host name"),
        ("gpu..01", "is not a host name"),
        ("gpu-01\n", "is not a host name"),
        (".", "is not a host name|neither an IPv4"),
        ("a" * 64, "is not a host name"),
        ("a." * 127 + "b", "is not a host name"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_address(text)
    assert len(str(caught.value)) < 300


def test_a_listener_may_leave_the_port_to_the_system():
    assert parse_address("127.0.0.1:0", listen=True) == Address("127.0.0.1", 0)


def test_the_default_port_can_be_another():
    assert DEFAULT_PORT == 7447
    assert parse_address("gpu-01", default_port=9000).port == 9000
    assert Address("gpu-01").port == DEFAULT_PORT


def test_an_address_is_a_value():
    assert len({Address("a", 1), Address("a", 1), Address("a", 2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Address("a", 1).port = 2  # type: ignore[misc]


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_is_read_back(ip, port):
    address = Address(str(ip), port)
    assert str(address).startswith("[") == isinstance(ip, ipaddress.IPv6Address)
    assert parse_address(str(address)) == address


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == address
