"""Where numba is had from: at the first call and not before, and only where this system lets it be had."""

import functools
import importlib
import types


@functools.cache
def numba_module() -> types.ModuleType | None:
    """The numba package, or None where it cannot be imported.

    Where memory may not be made executable its import fails with OSError, not with ImportError, and without a place
    to write to with RuntimeError; whatever it is, everything works without it.
    """
    try:
        return importlib.import_module("numba")
    except Exception:  # noqa: BLE001 - see above
        return None
