"""One version in a file: its image as it lies in memory, behind a header that says what it is.

    0     magic "SHIPDVER", u32 format, u32 length of the header, xxh3-128 of the header
    32    header: msgpack, a map; zeros up to a multiple of PAGE_SIZE
    then  the image, padding included, to the end of the file

Little-endian. The image begins on a page, so it can be mapped. It is proved twice when it is opened, in one pass: by
the version's digest, which is what a receiver knows it by, and by one over all of it, because the version's digest says
nothing of the zeros between tensors and a delta needs those as well.

It is read with preadv and not mapped: it is copied in either case, and a disk that fails is an error then, no SIGBUS.
"""

import os
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Final

import msgspec
import numpy as np
import xxhash

from shipd.bases.base import BaseLost, check_room, run_range
from shipproto.digests import LeafDigests, leaf_digests
from shipproto.errors import ProtocolError
from shipproto.layout import Layout
from shipproto.limits import DIGEST_SIZE, MAX_LABEL, MAX_STRUCTURE_BODY, PAGE_SIZE
from shipproto.structure import Structure

_MAGIC: Final = b"SHIPDVER"
_FORMAT: Final = 1
_OPENING: Final = struct.Struct("<8sII16s")
_MAX_HEADER: Final = MAX_STRUCTURE_BODY + 64 * 1024

_Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]


class Unusable(Exception):
    """A file that is no version, or not the one it says it is."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says of itself.

    structure   encoded, as it travels
    digest      of the version
    image       xxh3-128 of the whole image, padding included
    created     seconds since 1970
    """

    created: int
    digest: _Digest
    image: _Digest
    model: Annotated[str, msgspec.Meta(max_length=MAX_LABEL)]
    structure: Annotated[bytes, msgspec.Meta(max_length=MAX_STRUCTURE_BODY)]


_decoder: Final = msgspec.msgpack.Decoder(Header)
_encoder: Final = msgspec.msgpack.Encoder()


def file_size(model: str, layout: Layout) -> int:
    """Bytes of the file of a version."""
    return _image_start(_encode(model, layout, b"\0" * DIGEST_SIZE, b"\0" * DIGEST_SIZE)) + layout.size


def write_version(fd: int, model: str, digests: LeafDigests, read_chunk: Callable[[int], memoryview]) -> None:
    """Write a version into an empty file. Each chunk is digested and must be what was sent.

    Raises Unusable where it is not, OSError where it cannot be written, and what ``read_chunk`` raises.
    """
    layout = digests.layout
    leaves, digest = digests.encoded, digests.version_digest()
    # Its length does not depend on the digests, of which one is known when the image has been written.
    at = _image_start(_encode(model, layout, digest, b"\0" * DIGEST_SIZE))
    hasher = xxhash.xxh3_128()
    bounds = _bounds(layout)
    scratch = np.zeros(_longest(bounds), dtype=np.uint8)
    if layout.chunks == 0:
        at = _write(fd, scratch.data[: bounds[0]], at, hasher)
    for chunk in range(layout.chunks):
        size, span = layout.chunk(chunk)[1], bounds[chunk + 1] - bounds[chunk]
        np.copyto(scratch[:size], np.frombuffer(read_chunk(chunk), dtype=np.uint8))
        scratch[size:span] = 0
        first, last = layout.chunk_leaves(chunk)
        if leaf_digests(layout, chunk, scratch.data[:size]) != leaves[first * DIGEST_SIZE : last * DIGEST_SIZE]:
            raise Unusable(f"tensor {layout.chunk_names(chunk)[0]!r} has changed since it was sent")
        at = _write(fd, scratch.data[:span], at, hasher)
    header = _encode(model, layout, digest, hasher.digest())
    opening = _OPENING.pack(_MAGIC, _FORMAT, len(header), xxhash.xxh3_128_digest(header))
    _write(fd, memoryview(opening + header), 0)


def read_header(fd: int) -> tuple[Header, int]:
    """The header of a file, and where its image begins. Raises Unusable or OSError."""
    opening = os.pread(fd, _OPENING.size, 0)
    if len(opening) < _OPENING.size:
        raise Unusable("too short")
    magic, version, length, digest = _OPENING.unpack(opening)
    if magic != _MAGIC or version != _FORMAT or length > _MAX_HEADER:
        raise Unusable("another format")
    encoded = os.pread(fd, length, _OPENING.size)
    if len(encoded) != length or xxhash.xxh3_128_digest(encoded) != digest:
        raise Unusable("a damaged header")
    try:
        return _decoder.decode(encoded), _image_start(encoded)
    except msgspec.MsgspecError as error:
        raise Unusable(f"a header that is none: {error}") from error


def decode_structure(header: Header) -> Structure:
    """The structure of the version. Raises Unusable."""
    try:
        return Structure.decode(header.structure)
    except ProtocolError as error:
        raise Unusable(f"no structure: {error}") from error


class FileBase:
    """A ``Base`` that reads from an open file of a version, proved by one pass over it. Takes over ``fd``.

    Raises Unusable where the file does not hold this version in this layout; OSError. ``fd`` is the caller's then.
    """

    def __init__(self, fd: int, layout: Layout, digest: bytes) -> None:
        header, self._start = read_header(fd)
        if header.digest != digest or header.structure != layout.structure.encoded:
            raise Unusable("another version")
        if os.fstat(fd).st_size != self._start + layout.size:
            raise Unusable("another size than its header says")
        self.digest = digest
        self._layout = layout
        self._fd = fd
        try:
            image, version = self._digest()
        except BaseLost as error:
            raise Unusable(str(error)) from error
        if image != header.image or version != digest:
            raise Unusable("damaged content")

    def _digest(self) -> tuple[bytes, bytes]:
        """The digests of the image and of the version, in one pass."""
        layout = self._layout
        digests, hasher = LeafDigests(layout), xxhash.xxh3_128()
        bounds = _bounds(layout)
        scratch = memoryview(bytearray(_longest(bounds)))
        if layout.chunks == 0:
            self._read(0, scratch[: bounds[0]])
            hasher.update(scratch[: bounds[0]])
        for chunk in range(layout.chunks):
            part = scratch[: bounds[chunk + 1] - bounds[chunk]]
            self._read(bounds[chunk], part)
            digests.record(chunk, part[: layout.chunk(chunk)[1]])
            hasher.update(part)
        return hasher.digest(), digests.version_digest()

    def read(self, first: int, count: int, into: memoryview) -> None:
        """See ``Base.read``."""
        start, stop = run_range(self._layout, first, count)
        check_room(into, stop - start)
        self._read(start, into)

    def _read(self, start: int, into: memoryview) -> None:
        """Bytes of the image from ``start`` on. Raises BaseLost."""
        if self._fd < 0:
            raise BaseLost("the base is closed")
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._fd, [into[done:]], self._start + start + done)
            except OSError as error:
                raise BaseLost(f"the cached version cannot be read: {error.strerror or error}") from error
            if not got:
                raise BaseLost("the cached version was cut short")
            done += got

    def close(self) -> None:
        """See ``Base.close``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(model: str, layout: Layout, digest: bytes, image: bytes) -> bytes:
    # A fixed width for the time, so that two headers of one version have one length: any since 2004 takes five bytes.
    return _encoder.encode(
        Header(created=int(time.time()), digest=digest, image=image, model=model, structure=layout.structure.encoded)
    )


def _image_start(header: bytes) -> int:
    return -(-(_OPENING.size + len(header)) // PAGE_SIZE) * PAGE_SIZE


def _bounds(layout: Layout) -> list[int]:
    """Where each chunk begins, the padding behind it being its own, and the end of the image."""
    return [*layout.chunk_starts.tolist(), layout.size]


def _longest(bounds: list[int]) -> int:
    return max([bounds[0], *(stop - start for start, stop in pairwise(bounds))])


def _write(fd: int, data: memoryview, at: int, hasher: xxhash.xxh3_128 | None = None) -> int:
    """Write all of ``data`` at ``at``; where it ends."""
    if hasher is not None:
        hasher.update(data)
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
    return at + done
