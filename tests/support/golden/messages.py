"""One frame of every message, to be accepted."""

from collections.abc import Sequence
from typing import Any, Final

import msgpack

from tests.support.golden.book import (
    DIGEST,
    OFFER,
    Book,
    T,
    acceptor,
    answers,
    established,
    greeted,
    message,
)
from tests.support.naive import encode_ranges

MESSAGES: Final[Sequence[tuple[str, dict[str, Any], bytes]]] = (
    ("Offer", OFFER, b""),
    ("Offer", {"model": "m", "nbytes": 0, "resumed": True, "structure": DIGEST, "tensors": 0, **T}, b""),
    ("Offer", {**OFFER, "bases": [DIGEST, bytes(16)], "incremental": True}, b""),
    ("Offer", {**OFFER, "partial": True}, b""),
    ("StructureWanted", T, b""),
    ("StructureIs", T, b"any body"),
    ("Want", {"structure": DIGEST, **T}, encode_ranges([(0, 3), (7, 8)])),
    ("Want", {"lanes": 16, "structure": DIGEST, **T}, b""),
    (
        "Want",
        {"base": DIGEST, "codecs": [1, 2, 255], "speeds": [0, 4096, 4_294_967_295], "structure": DIGEST, **T},
        encode_ranges([(0, 3)]),
    ),
    ("Want", {"codecs": [2], "speeds": [1], "structure": DIGEST, **T}, b""),
    ("Held", T, DIGEST * 3),
    ("Lend", {"files": 128, **T}, b"a table"),
    ("Join", {"lane": 1, **T}, b""),
    ("Joined", {"lane": 15, **T}, b""),
    ("Progress", {"held": 4_294_967_295, "stage": "receiving", **T}, b""),
    ("Finish", {"digest": DIGEST, "label": "v:1@x+y-z_.0", **T}, DIGEST * 3),
    ("Staged", {"processes": 2, "stage_seconds": 0.125, **T}, b""),
    ("Staged", {"processes": 0, **T}, b""),
    ("Commit", T, b""),
    ("Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": 0.0015, "stale": ["811"], "swapped": 3, **T}, b""),
    (
        "Committed",
        {
            "check_seconds": 0.04, "copy_seconds": 0.06, "decode_seconds": 0.07, "digest": DIGEST,
            "digest_seconds": 0.03, "label": "v1", "pause_seconds": 0.07, "receive_seconds": 0.2,
            "verify_seconds": 0.01, "wait_seconds": 0.005, **T,
        },
        b"",
    ),
    ("Committed", {"already": True, "digest": DIGEST, "label": "v1", **T}, b""),
    ("Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": 0.0, "swapped": 1, **T}, b""),
    ("Committed", {"digest": DIGEST, "label": "v1", "live": bytes(16), "swapped": 1, **T}, b""),
    ("Abort", {"code": "mismatch", "message": "2 tensors differ", "tensor": "a.b", **T}, msgpack.packb(["a", "b"])),
    ("Abort", {"code": "from-a-later-release"}, b""),
    ("StatusRequest", {}, b""),
    ("StatusRequest", {"model": "minilm"}, b""),
    ("StatusIs", {}, b"a status"),
    ("VerifyRequest", {"model": "minilm"}, b""),
    ("VerifyIs", {}, b"a verification"),
    ("Describe", {"model": "minilm"}, b""),
    ("Describe", {"model": "minilm", "structure": DIGEST}, b""),
    ("DescriptionIs", {}, b"a description"),
    ("Attach", {"digest": DIGEST, "label": "v1", "mode": "copy", "model": "minilm", "pinned": True}, b"a resident"),
    ("Attach", {"mode": "auto", "model": "minilm"}, b""),
    ("Attach", {"mode": "flip", "model": "minilm", "model_class": "a.b.<locals>.C d" + "x" * 240}, b""),
    ("Attach", {"delivered": True, "mode": "load_weights", "model": "minilm"}, b"a resident without tensors"),
    ("Attached", {"digest": DIGEST, "generation": (1 << 63) - 1, "label": "v1", "slot": 15}, b""),
    ("Attached", {"digest": b"", "generation": 0, "label": "", "slot": 0}, b""),
    (
        "Images",
        {"slots": [{"size": 4096, "slot": 0}, {"size": 1 << 44, "slot": 1, "writable": True}]},
        b"",
    ),
    ("Fill", {"generation": 1, "slot": 0}, b""),
    ("Filled", {"generation": 1, "slot": 0}, b""),
    ("Arriving", {"generation": 2, "slot": 1, **T}, encode_ranges([(5, 9)])),
    ("Stage", {"digest": DIGEST, "generation": 2, "label": "v1", "slot": 1, **T}, b""),
    ("StageReady", {"error": "no room", "generation": 2, **T}, b""),
    ("StageReady", {"generation": 2, "stage_seconds": 1e9, **T}, b""),
    ("Swap", {"generation": 2, "timeout": 5.0, **T}, b""),
    ("Swapped", {"copy_seconds": 0.25, "generation": 2, "pause_seconds": 0.5, **T}, b""),
    ("Swapped", {"generation": 2, "pause_seconds": 0.5, "wait_seconds": 0.25, **T}, b""),
    ("Swapped", {"error": "out of memory", "fenced": True, "generation": 2, **T}, b""),
    ("Unstage", {"generation": 2, **T}, b""),
    ("Release", {"generation": 2, "slot": 1}, b""),
    ("Evicted", {"reason": "did not release an image"}, b""),
    ("DigestRequest", {"request": 7}, b""),
    ("DigestIs", {"digest": DIGEST, "label": "v1", "request": 7}, b""),
    ("DigestIs", {"error": "no", "request": 7}, b""),
    ("DigestIs", {"delivered": True, "digest": DIGEST, "label": "v1", "request": 7}, b""),
    ("Detach", {}, b""),
    ("LaidOut", {}, b"a structure"),
)  # fmt: skip


def accept_messages(book: Book) -> None:
    """One frame of every message."""
    seen: dict[str, int] = {}
    for name, fields, body in MESSAGES:
        seen[name] = seen.get(name, 0) + 1
        file = f"message-{name.lower()}" + (f"-{seen[name]}" if seen[name] > 1 else "")
        book.accept(
            file,
            f"{name}, alone in its frame",
            **acceptor(greeted().add(name, fields, body).data),
            events=[established(), message(name, fields, body)],
            output=answers(),
        )
