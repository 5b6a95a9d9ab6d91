"""Writes protocol/vectors: ``python -m tests.support.make_vectors``. Byte for byte the same every time.

Everything in them comes from tests.support.naive, naive_codecs and payloads, which share no code with shipproto and
shipd; tests/support/golden has them by chapter.
"""

import json
import shutil
from pathlib import Path
from typing import Final

from tests.support.golden.bad_contents import reject_other_bodies, reject_structures
from tests.support.golden.bad_frames import reject_bodies, reject_frames, reject_handshakes
from tests.support.golden.bad_headers import reject_headers
from tests.support.golden.book import Book
from tests.support.golden.coded import accept_coded, reject_coded
from tests.support.golden.connections import accept_connections
from tests.support.golden.contents import accept_bodies, accept_structures
from tests.support.golden.dense_codecs import accept_dense_codecs, reject_dense_codecs
from tests.support.golden.lending import accept_lending, reject_lending
from tests.support.golden.messages import accept_messages
from tests.support.golden.parts import accept_parts, reject_parts
from tests.support.golden.pushes import accept_conversations, reject_conversations
from tests.support.golden.sparse_codecs import accept_sparse_codecs, reject_sparse_codecs
from tests.support.vectors import DIRECTORY

CHAPTERS: Final = (
    accept_messages,
    accept_connections,
    accept_structures,
    accept_bodies,
    accept_conversations,
    accept_parts,
    accept_coded,
    accept_lending,
    accept_dense_codecs,
    accept_sparse_codecs,
    reject_frames,
    reject_bodies,
    reject_handshakes,
    reject_headers,
    reject_structures,
    reject_other_bodies,
    reject_conversations,
    reject_parts,
    reject_coded,
    reject_lending,
    reject_dense_codecs,
    reject_sparse_codecs,
)


def make() -> dict[str, str]:
    """Every file: path below protocol/vectors, and text."""
    book = Book()
    for chapter in CHAPTERS:
        chapter(book)
    return {
        f"{path}.json": json.dumps(vector, indent=1, ensure_ascii=False) + "\n" for path, vector in book.files.items()
    }


def write(directory: Path = DIRECTORY) -> int:
    """Write them all; returns how many."""
    files = make()
    for which in ("accept", "reject"):
        shutil.rmtree(directory / which, ignore_errors=True)
        (directory / which).mkdir(parents=True)
    for path, text in files.items():
        (directory / path).write_text(text, encoding="utf-8")
    return len(files)


if __name__ == "__main__":
    print(f"{write()} vectors in {DIRECTORY}")
