"""Closing descriptors that came from a peer, aside from the loop: whose close(2) takes how long is the peer's choice.

A TCP socket with SO_LINGER set and bytes that its own peer does not take keeps whoever closes it last for as long as it
says; a file of a FUSE file system does so until its server answers.
"""

import contextlib
import os
import threading
from collections.abc import Sequence


def close_aside(descriptors: Sequence[int]) -> None:
    """Close them on a thread of their own, which nobody waits for."""
    if not descriptors:
        return
    closer = threading.Thread(target=_close_all, args=(tuple(descriptors),), name="shipd-close", daemon=True)
    try:
        closer.start()
    except RuntimeError:
        # No thread to be had: rather wait than run out of descriptors as well.
        _close_all(descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # EIO and the like: it is closed all the same.
            os.close(descriptor)
