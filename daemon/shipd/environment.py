"""What this process runs on, as both sides tell each other in HELLO. Belongs here: all that finds it out.

Nothing is imported for it: a process that has no torch does not get it by saying which one is installed.
"""

import functools
import importlib.metadata
import platform
import sys
from typing import Final

from shipd.release import VERSION

_MAX_VALUE: Final = 64
"""Characters of a word on the wire."""


def environment() -> dict[str, str]:
    """Versions of what this process runs on; the keys are those of ``shipproto.description.ENVIRONMENT``.

    Where torch has been imported, its version and that of CUDA are its own; else torch's is that of the package that
    is installed, and CUDA's is left out.
    """
    found = {
        "platform": f"{sys.platform}-{platform.machine().lower()}",
        "python": platform.python_version(),
        "shipd": VERSION,
        **_torch(),
    }
    return {key: _word(found[key]) for key in sorted(found)}


def _torch() -> dict[str, str]:
    # Another thread may be in the middle of importing it.
    torch = sys.modules.get("torch")
    version = getattr(torch, "__version__", None)
    if version is None:
        installed = _installed_torch()
        return {"torch": installed} if installed else {}
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    return {"torch": str(version), **({"cuda": str(cuda)} if cuda else {})}


@functools.cache
def _installed_torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _word(text: str) -> str:
    """``text`` as a word on the wire: a peer would refuse any other, and with it every connection."""
    return "".join(character if " " <= character <= "~" else "?" for character in text[:_MAX_VALUE])
