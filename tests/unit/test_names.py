"""shipproto.names: what a model or a version may be called."""

import pytest

from shipproto.names import check_label, harmless


@pytest.mark.parametrize("name", ["a", "_", "9", "step-1200", "v1.0:rc+2@x", "a" * 128, "20260101T000000Z-0011aabb"])
def test_what_may_be(name: str) -> None:
    assert check_label("label", name) is name


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", ":", "@", "/", "a/b", "..", "a b", "ä", "a\n", "\n", "a\0", "٣", "a" * 129, "\x1b[31m"]
)
def test_what_may_not_be(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a model name: 1 to 128 letters"):
        check_label("model name", name)


def test_a_long_name_is_not_quoted_whole() -> None:
    with pytest.raises(ValueError, match="cannot be") as caught:
        check_label("label", "x" * 100_000)
    assert len(str(caught.value)) < 300


def test_harmless() -> None:
    assert harmless("plain, ä and \U0001f600") == "plain, ä and \U0001f600"
    assert harmless("a\r\n\x1b[0m\x7f\x9b\u2028\u202e\u2066b") == "a   [0m     b"
    assert harmless("a\udcffb") == "a?b"
    assert harmless("abcdef", 3) == "abc"
    assert harmless("") == ""
