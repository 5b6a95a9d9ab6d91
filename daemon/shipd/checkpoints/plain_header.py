"""The headers of most safetensors files, read as columns in half of the time; one that was read before, in none.

What is read here is what the checks of ``safetensors_file`` would let pass, tensor by tensor; of everything else, and
of whatever looks unusual, nothing is said but that it is not plain. Those checks then say what is wrong with it.
"""

import json
import re
import threading
from collections import deque
from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from shipd.checkpoints import known
from shipproto.errors import ProtocolError
from shipproto.limits import MAX_IMAGE_BYTES
from shipproto.structure import Structure

METADATA: Final = "__metadata__"

_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})

_METADATA_FIELD: Final = re.compile(rb'"__metadata__"[ ]*:[ ]*')

_CONTROLS: Final = bytes(range(0x20))

_KEPT: Final = 4 * 1024 * 1024
"""Bytes of a header that is remembered, at most."""


class Header(NamedTuple):
    """What a header says.

    metadata   the object of that name, empty where there is none
    structure  of the tensors
    starts     where each row's bytes begin in the data
    end        bytes of data that the tensors describe
    """

    metadata: Mapping[str, Any]
    structure: Structure
    starts: list[int]
    end: int


_lock: Final = threading.Lock()
_read: Final[deque[tuple[bytes, Header]]] = deque(maxlen=4)
"""What was read lately: the checkpoints of one model have one header."""


def read_plain(raw: bytes, dtypes: Mapping[str, str]) -> Header | None:
    """What the header ``raw`` says, or None where it is not plain. ``dtypes``: the format's names to torch's."""
    with _lock:
        kept = list(_read)
    for before, header in kept:
        if before == raw:
            return header
    fields = _decode(raw)
    found = None if fields is None else _as_columns(fields, dtypes)
    if found is not None and len(raw) <= _KEPT:
        with _lock:
            _read.append((raw, found))
    return found


def _decode(raw: bytes) -> dict[str, Any] | None:
    """The header's object; None where it could have a key twice, of which the quick parser says nothing."""
    if b"\\" in raw or len(raw.translate(None, _CONTROLS)) != len(raw):
        return None
    try:
        fields: dict[str, Any] = msgspec.json.decode(raw)
        if METADATA in fields:
            start = _METADATA_FIELD.search(raw)
            if start is None or raw.count(b'"__metadata__"') != 1:
                return None
            pairs, _ = json.JSONDecoder(object_pairs_hook=list).raw_decode(raw[start.end() :].decode())
            if len(pairs) != len(fields[METADATA]):
                return None
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return None
    # Without escapes a key is spelt as what it is. Each tensor has each of the fields; were one there twice, or a
    # tensor itself, it would be written more often than there are tensors.
    tensors = len(fields) - (METADATA in fields)
    return fields if all(raw.count(f'"{name}"'.encode()) == tensors for name in _FIELDS) else None


def _as_columns(fields: dict[str, Any], dtypes: Mapping[str, str]) -> Header | None:
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not set(map(type, metadata.values())) <= {str}:
        return None
    names, entries = list(fields), list(fields.values())
    try:
        if not all(entry.keys() == _FIELDS for entry in entries):
            return None
        shapes, offsets = list(map(itemgetter("shape"), entries)), list(map(itemgetter("data_offsets"), entries))
        if not {*map(type, shapes), *map(type, offsets)} <= {list} or not set(map(len, offsets)) <= {2}:
            return None
        if not {*map(type, chain.from_iterable(shapes)), *map(type, chain.from_iterable(offsets))} <= {int}:
            return None
        structure, order = known.structure_of(
            names, [dtypes[entry["dtype"]] for entry in entries], list(map(tuple, shapes)), {}
        )
        places = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(names)).reshape(-1, 2)
    except (AttributeError, KeyError, TypeError, OverflowError, ProtocolError):
        return None
    if order is not None:
        places = places[order]
    begins, ends = places[:, 0], places[:, 1]
    if not bool(((begins >= 0) & (ends <= MAX_IMAGE_BYTES) & (ends - begins == structure.nbytes)).all()):
        return None
    by_place = np.lexsort((ends, begins))
    followed_by, preceded_by = ends[by_place], begins[by_place]
    if names and (int(preceded_by[0]) != 0 or not bool((preceded_by[1:] == followed_by[:-1]).all())):
        return None
    return Header(metadata, structure, begins.tolist(), int(followed_by[-1]) if names else 0)
