"""Texts from files and state dicts: what they tell, and in messages quoted, bounded and safe to print on a terminal."""

import re
from collections.abc import Iterable
from typing import Final

_TEXT: Final = 120
_ITEMS: Final = 8

OPTIMIZER: Final = re.compile(r"optim(?!al|um)", re.IGNORECASE)
"""In the names under which the states of optimizers are saved, which are never shipped."""


def quoted(text: str) -> str:
    """``text`` as a Python literal (so without control characters), cut short where it is long."""
    return repr(text) if len(text) <= _TEXT else f"{text[:_TEXT]!r}…"


def listed(items: Iterable[str]) -> str:
    """``"a, b, c"``; beyond the first few only how many more there are."""
    every = list(items)
    shown = ", ".join(every[:_ITEMS])
    return shown if len(every) <= _ITEMS else f"{shown} and {len(every) - _ITEMS} more"


def encodable(text: str) -> bool:
    """Whether ``text`` is free of lone surrogates, which JSON and Python can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
