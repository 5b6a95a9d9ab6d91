"""Names of models and labels of versions: printed, logged and one day used as file names, so kept plain.

Visible ASCII without spaces and slashes; the first character is a letter, a digit or an underscore.
"""

import re
from typing import Final

from shipproto.limits import MAX_LABEL

LABEL_PATTERN: Final = r"[A-Za-z0-9_][A-Za-z0-9._:+@-]*"

_LABEL: Final = re.compile(LABEL_PATTERN)


def check_label(what: str, text: str) -> str:
    """``text``, if it can be ``what`` ("model name", "label"). Raises ValueError that says what can be."""
    if not _LABEL.fullmatch(text) or len(text) > MAX_LABEL:
        raise ValueError(
            f"{text!r:.100} cannot be a {what}: 1 to {MAX_LABEL} letters, digits and ._:+@-, the first a letter, a digit "
            "or an underscore"
        )
    return text
