"""Text from peers that people get to see: what names and labels may look like, and how the rest is made harmless.

Names of models and labels of versions are visible ASCII without spaces and slashes, since they are printed, logged
and one day used as file names; the first character is a letter, a digit or an underscore.
"""

import re
from typing import Final

from shipproto.limits import MAX_LABEL

LABEL_PATTERN: Final = r"[A-Za-z0-9_][A-Za-z0-9._:+@-]*"

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters with which a text could break out of a log line, take over a terminal, show itself backwards, or not be
encoded at all."""

_LABEL: Final = re.compile(LABEL_PATTERN)


def check_label(what: str, text: str) -> str:
    """``text``, if it can be ``what`` ("model name", "label"). Raises ValueError that says what can be."""
    if not _LABEL.fullmatch(text) or len(text) > MAX_LABEL:
        raise ValueError(
            f"{text!r:.100} cannot be a {what}: 1 to {MAX_LABEL} letters, digits and ._:+@-, the first a letter, a "
            "digit or an underscore"
        )
    return text


def harmless(text: str, limit: int | None = None) -> str:
    """``text`` cut to ``limit`` characters, on one line and without control characters.

    What UTF-8 cannot express, as in some file names, becomes "?".
    """
    return CONTROL.sub(" ", text[:limit].encode("utf-8", "replace").decode())
