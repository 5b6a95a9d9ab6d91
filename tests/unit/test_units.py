import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipd.units import format_bytes, format_seconds, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("00", 0),
        ("4096", 4096),
        ("4096 B", 4096),
        ("12 bytes", 12),
        ("8GiB", 8 * 1024**3),
        ("8 gib", 8 * 1024**3),
        ("8G", 8 * 1024**3),
        ("64k", 64 * 1024),
        ("1.5 GB", 1_500_000_000),
        ("512kB", 512_000),
        ("  2 TiB ", 2 * 1024**4),
        ("1PB", 10**15),
        ("0.1 KiB", 102),
        ("1.0000000000000000001 B", 1),
        (0, 0),
        (123, 123),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a size; write a number and a unit"),
        ("GB", "is not a size"),
        ("8 GiB please", "is not a size"),
        ("1,5 GB", "is not a size"),
        (".5 GB", "is not a size"),
        ("1_000", "is not a size"),
        ("1e9", "unknown unit 'e'|is not a size"),
        ("٣ GB", "is not a size"),
        ("-1 GB", "is not a size"),
        ("8 XB", "unknown unit 'XB'; use B, kB"),
        ("8 Ki", "unknown unit 'Ki'"),
        ("nan", "is not a size"),
        ("9" * 30, "is too large; a size is at most 9223372036854775807"),
        ("9000000 TiB", "is too large"),
        ("9" * 5000, "is not a size"),
        (2**63, "is too large"),
        (-1, "-1 is negative"),
        (True, "must be a whole number of bytes"),
        (1.5, "must be a whole number of bytes or a text such as '8GiB', not 1.5"),
        (None, "must be a whole number of bytes"),
    ],
)
def test_what_is_no_size_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8bit", 1),
        ("8 bits/s", 1),
        ("8 bps", 1),
        ("800kbit", 100_000),
        ("100Mbit", 12_500_000),
        ("100 mbit/s", 12_500_000),
        ("100 Mbits", 12_500_000),
        ("100MBIT", 12_500_000),
        ("1.5 Gbit/s", 187_500_000),
        ("2Tbit", 250_000_000_000),
        ("10MB/s", 10_000_000),
        ("10 MBps", 10_000_000),
        ("512kB", 512_000),
        ("1MiB/s", 1024 * 1024),
        ("1M", 1024 * 1024),
        ("4096", 4096),
        (" 10 MB ", 10_000_000),
        (1, 1),
        (1.5, 1.5),
        (12_500_000, 12_500_000),
        # A small b is bits and a capital one bytes: eight times as many.
        ("80Mbps", 10_000_000),
        ("80Mb/s", 10_000_000),
        ("80Mb", 10_000_000),
    ],
)
def test_rates_are_understood(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "Mbit", "10 Xbit", "-1Mbit", "1,5Mbit", "10Mbit/h", "1e9bit", "1" * 200])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(
        ValueError, match="is not a rate; write a number and a unit, such as '100Mbit' or '10MB/s'"
    ) as e:
        parse_rate(text)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("text", ["0", "0Mbit", "4bit", "0.9 B", 0.0, -5, 0.5, math.nan, math.inf, True])
def test_less_than_a_byte_a_second_is_no_rate(text):
    with pytest.raises(ValueError, match="at least one byte a second"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (22_713_216, "22.7 MB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3_000_000_000, "3.0 GB"),
        (1.5e12, "1.5 TB"),
        (2e15, "2.0 PB"),
        (123e18, "123000.0 PB"),
        (-1500, "-1.5 kB"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_bytes_are_shown(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.5e-4, "450 µs"),
        (0.0009994, "999 µs"),
        (0.0009996, "1.0 ms"),
        (0.0031, "3.1 ms"),
        (0.99994, "999.9 ms"),
        (0.99996, "1.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 0s"),
        (72, "1m 12s"),
        (3599.4, "59m 59s"),
        (3599.6, "1h 0m"),
        (7500, "2h 5m"),
        (86399, "1d 0h"),
        (100_000, "1d 4h"),
        (-0.5, "-500.0 ms"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_durations_are_shown(seconds, text):
    assert format_seconds(seconds) == text


@given(st.integers(0, 10**17))
def test_what_is_shown_is_read_back_to_within_its_last_digit(size):
    assert math.isclose(parse_size(format_bytes(size)), size, rel_tol=0.051, abs_tol=0)


@given(st.floats(0, 1e9))
def test_no_duration_shows_a_unit_that_is_full(seconds):
    text = format_seconds(seconds)
    assert not text.startswith(("1000", "60.0", "60m", "24h"))
    assert " 60s" not in text
    assert " 60m" not in text
