"""Reading a source as a push does, and what that costs: for tests of every format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shipd.checkpoints.chunks import SourceChunks
from shipd.checkpoints.source import Source, open_source
from shipd.errors import CheckpointError
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE


def refused(path: Path, message: str, kind: type[Exception] = CheckpointError, key: str | None = None) -> str:
    """The message with which the checkpoint is refused: it names the file, and is short and fit for a terminal."""
    with pytest.raises(kind, match=message) as caught:
        open_source(path, key=key)
    told = str(caught.value)
    assert repr(str(path)) in told
    assert told.isprintable()
    assert len(told) < 900
    return told


def content_of(source: Source, row: int) -> bytes:
    """All bytes of one tensor, read a leaf at a time."""
    size = int(source.structure.nbytes[row])
    return b"".join(bytes(source.read(row, at, min(at + LEAF_SIZE, size))) for at in range(0, size, LEAF_SIZE))


def digest_of(source: Source, watch: Callable[[], object] = lambda: None) -> str:
    """The version digest of its chunks, hexadecimal; ``watch`` is called after each."""
    layout = Layout.of(source.structure)
    chunks = SourceChunks(layout, np.arange(len(layout.structure), dtype=np.int64), source)
    digests = LeafDigests(layout)
    for chunk in range(layout.chunks):
        digests.record(chunk, chunks.read(chunk))
        watch()
    return digests.version_digest().hex()


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def read_through(report, path, module):
    """For ``Helper``: reads a checkpoint in a process of its own. Reports its version digest, the bytes read, how much
    anonymous memory that took above what importing the ``module`` of its reader takes, and whether torch was imported.
    """
    import importlib
    import sys

    from shipd.checkpoints.source import open_source
    from tests.support.reading import anonymous, digest_of

    importlib.import_module(f"shipd.checkpoints.{module}")
    before = most = anonymous()

    def watch():
        nonlocal most
        most = max(most, anonymous())

    source = open_source(path)
    digest = digest_of(source, watch)
    read = source.structure.total_bytes
    source.close()
    report({"growth": most - before, "read": read, "digest": digest, "torch": "torch" in sys.modules})
