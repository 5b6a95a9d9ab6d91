"""Headers that pass their CRC and are not what their type promises, to be refused."""

from collections.abc import Mapping
from typing import Any

import msgpack

from tests.support.golden.book import (
    DIGEST,
    OFFER,
    TRANSFER,
    Book,
    T,
    acceptor,
    answers,
    established,
    greeted,
)
from tests.support.naive import pack


def reject_headers(book: Book) -> None:
    """Headers that pass their CRC and are not what their type promises."""

    def header(
        name: str, what: str, kind: str, raw: bytes | Mapping[str, Any], error: str = "MalformedMessage"
    ) -> None:
        stream = greeted().add(kind, raw)
        book.reject(f"header-{name}", what, error, **acceptor(stream.data), events=[established()], output=answers())

    transfer = msgpack.packb("transfer") + msgpack.packb(TRANSFER)
    commit = b"\x81" + transfer
    committed, attach = {"digest": DIGEST, "label": "v1", **T}, {"mode": "copy", "model": "m"}
    header("empty", "no header at all", "Commit", b"")
    header("array", "an array", "Commit", msgpack.packb([TRANSFER]))
    header("nil", "nil", "Commit", b"\xc0")
    header("cut", "a header cut in the middle", "Commit", commit[:-1])
    header("trailing", "a byte after the map", "Commit", commit + b"\xc0")
    header("never-used", "the byte that msgpack never uses", "Commit", b"\x82\xa1a\xc1" + transfer)
    header("count-too-large", "a map of four billion entries", "Commit", b"\xdf\xff\xff\xff\xff" + transfer)
    header("map-16", "a map header longer than needed", "Commit", b"\xde\x00\x01" + transfer)
    header("map-16-empty", "the same, of an empty map", "Detach", b"\xde\x00\x00")
    header(
        "map-32-unknown",
        "the same, with a field that nobody knows",
        "Commit",
        b"\xdf\x00\x00\x00\x02\xa1a\x01" + transfer,
    )
    header("key-str8", "a key longer than needed", "Commit", b"\x81\xd9\x08transfer" + msgpack.packb(TRANSFER))
    header("key-str8-unknown", "the same, of a field that nobody knows", "Commit", b"\x82\xd9\x01a\x01" + transfer)
    header("bin-16", "bytes longer than needed", "Commit", b"\x81\xa8transfer\xc5\x00\x10" + TRANSFER)
    header("int-longer", "a number longer than needed", "DigestRequest", b"\x81\xa7request\xcc\x07")
    header("int-signed", "a number as a signed one", "DigestRequest", b"\x81\xa7request\xd0\x07")
    header("int-as-float", "a float where a number is due", "DigestRequest", {"request": 7.0})
    header("int-as-bool", "true where a number is due", "DigestRequest", {"request": True})
    header("int-as-str", "a text where a number is due", "DigestRequest", {"request": "7"})
    header("int-negative", "a negative number", "DigestRequest", {"request": -1})
    header("int-beyond-u32", "a number of 33 bits", "DigestRequest", {"request": 1 << 32})
    header("int-beyond-u63", "a number of 64 bits", "Unstage", {"generation": 1 << 63, **T})
    header(
        "float-32",
        "a float of 32 bits",
        "Staged",
        b"\x83\xa9processes\x01\xadstage_seconds\xca\x3e\x00\x00\x00" + transfer,
    )
    header("float-as-int", "a whole number where a float is due", "Staged", {"processes": 1, "stage_seconds": 1, **T})
    header(
        "float-nan", "a duration that is not a number", "Staged", {"processes": 1, "stage_seconds": float("nan"), **T}
    )
    header("float-infinite", "an infinite duration", "Staged", {"processes": 1, "stage_seconds": float("inf"), **T})
    header("float-negative", "a negative duration", "Staged", {"processes": 1, "stage_seconds": -0.5, **T})
    header("float-default", "a duration of 0 spelled out", "Staged", {"processes": 1, "stage_seconds": 0.0, **T})
    header("float-minus-zero", "a duration of -0", "Staged", {"processes": 1, "stage_seconds": -0.0, **T})
    header("default-false", "a default spelled out", "Ping", {"reply": False})
    header("default-empty", "an empty text spelled out", "StatusRequest", {"model": ""})
    header(
        "default-nil", "a nil spelled out", "Committed", {"digest": DIGEST, "label": "v1", "pause_seconds": None, **T}
    )
    header("bool-as-int", "1 where true is due", "Ping", {"reply": 1})
    header("bytes-as-str", "a text where bytes are due", "Commit", {"transfer": "0123456789abcdef"})
    header("str-as-bytes", "bytes where a text is due", "VerifyRequest", {"model": b"minilm"})
    header("missing", "a required field is missing", "Commit", {})
    header("nil-required", "nil for a required field", "Commit", {"transfer": None})
    header("key-twice", "a key twice", "Commit", b"\x82" + transfer * 2)
    header("key-twice-unknown", "a key that nobody knows, twice", "Commit", b"\x83\xa1a\x01\xa1a\x02" + transfer)
    header("keys-unsorted", "keys out of order", "Fill", b"\x82\xa4slot\x00\xaageneration\x01")
    header(
        "keys-unsorted-unknown", "a field that nobody knows, out of order", "Commit", b"\x82" + transfer + b"\xa1a\x01"
    )
    header("key-number", "a key that is a number", "Commit", b"\x82\x01\x02" + transfer)
    header("key-bytes", "a key that is bytes", "Commit", b"\x82\xc4\x01a\x02" + transfer)
    header("key-not-utf8", "a key that is not UTF-8", "Commit", b"\x82\xa1\xff\x01" + transfer)
    header("critical", "a critical field that nobody knows", "Commit", {"!sign": b"", **T})
    header("ext", "an extension type", "Commit", b"\x82\xa1a\xd4\x05\x00" + transfer)
    header("ext-empty", "an extension type without bytes", "Commit", b"\x82\xa1a\xc7\x00\x05" + transfer)
    header("ext-timestamp", "a timestamp", "Commit", b"\x82\xa1a\xd6\xff\x00\x00\x00\x00" + transfer)
    header("not-utf8", "a text that is not UTF-8", "VerifyRequest", b"\x81\xa5model\xa1\xff")
    header("surrogate", "half a surrogate pair", "VerifyRequest", b"\x81\xa5model\xa3\xed\xa0\x80")
    header("not-utf8-unknown", "the same in a field that nobody knows", "Commit", b"\x82\xa1a\xa1\xff" + transfer)
    header(
        "deep",
        "17 arrays in one another, in a field that nobody knows",
        "Commit",
        b"\x82\xa1a" + b"\x91" * 16 + b"\x90" + transfer,
    )
    header("deep-maps", "maps in maps, 17 deep", "Commit", b"\x82\xa1a" + b"\x81\x01" * 16 + b"\x80" + transfer)
    header("very-deep", "16000 arrays in one another", "Commit", b"\x82\xa1a" + b"\x91" * 16000 + b"\xc0" + transfer)
    header(
        "digest-short",
        "a digest of 15 bytes",
        "Stage",
        {"digest": bytes(15), "generation": 1, "label": "v", "slot": 0, **T},
    )
    header("transfer-long", "a transfer of 17 bytes", "Commit", {"transfer": bytes(17)})
    header("transfer-empty", "a transfer of no bytes", "Commit", {"transfer": b""})
    header("abort-transfer", "an optional transfer of 3 bytes", "Abort", {"code": "busy", "transfer": b"abc"})
    header(
        "attach-digest", "an optional digest of 15 bytes", "Attach", {"digest": bytes(15), "mode": "copy", "model": "m"}
    )
    for name, what in (("label", "a version with a label and no digest"), ("digest", "one with a digest and no label")):
        version = {"digest": b"", "label": ""} | {name: {"label": "v1", "digest": DIGEST}[name]}
        header(f"attached-{name}", what, "Attached", {"generation": 1, "slot": 0, **version})
    header("digestis-digest", "another one, of 1 byte", "DigestIs", {"digest": b"x", "request": 1})
    header("label-empty", "an empty label", "Finish", {"digest": DIGEST, "label": "", **T})
    header("label-long", "a label of 129 characters", "Finish", {"digest": DIGEST, "label": "x" * 129, **T})
    for name, label in (
        ("slash", "a/b"),
        ("dot", ".hidden"),
        ("dotdot", ".."),
        ("space", "a b"),
        ("newline", "a\n"),
        ("nul", "a\0"),
        ("dash", "-rf"),
        ("unicode", "ä"),
        ("escape", "\x1b[31m"),
        ("digit-unicode", "٣"),
    ):
        header(f"label-{name}", f"a label that is {label!r}", "VerifyRequest", {"model": label})
    header("label-optional", "an optional label with a newline", "StatusRequest", {"model": "\n"})
    header("nack-none", "a NACK for nothing", "Nack", {"sequences": []})
    header("nack-many", "a NACK for 257 frames", "Nack", {"sequences": list(range(257))})
    header("nack-large", "a NACK for frame 2^63", "Nack", {"sequences": [1 << 63]})
    header(
        "metadata-many", "33 entries of metadata", "Offer", {**OFFER, "metadata": {f"k{at:02}": "" for at in range(33)}}
    )
    header("metadata-long", "metadata of 257 characters", "Offer", {**OFFER, "metadata": {"k": "x" * 257}})
    header("metadata-number", "metadata that is a number", "Offer", {**OFFER, "metadata": {"k": 1}})
    header("metadata-nested", "metadata in metadata", "Offer", {**OFFER, "metadata": {"k": {}}})
    packed = pack({**OFFER, "metadata": {"k": "1", "l": "2"}})
    header("metadata-key-twice", "metadata with a key twice", "Offer", packed.replace(b"\xa1l", b"\xa1k"))
    header("offer-transfer-zero", "a transfer that is all zeros", "Offer", {**OFFER, "transfer": bytes(16)})
    header("offer-bases-many", "nine bases", "Offer", {**OFFER, "bases": [DIGEST] * 9})
    header("offer-bases-short", "a base of 15 bytes, offered", "Offer", {**OFFER, "bases": [DIGEST, bytes(15)]})
    header("offer-incremental-default", "false spelled out", "Offer", {**OFFER, "incremental": False})
    header("offer-bytes", "more bytes than a version may have", "Offer", {**OFFER, "nbytes": (1 << 44) + 1})
    header("offer-tensors", "more tensors than a version may have", "Offer", {**OFFER, "tensors": (1 << 20) + 1})
    header("offer-partial-default", "false spelled out, of a partial offer", "Offer", {**OFFER, "partial": False})
    header("committed-live", "a live digest of 15 bytes", "Committed", {**committed, "live": bytes(15)})
    header("describe-structure", "a structure of 15 bytes", "Describe", {"model": "m", "structure": bytes(15)})
    header("describe-model", "no model to describe", "Describe", {})
    header("attach-class-long", "a class of 257 characters", "Attach", {**attach, "model_class": "x" * 257})
    header("attach-class-newline", "a class with a newline", "Attach", {**attach, "model_class": "a\n"})
    header("staged-processes", "65 processes", "Staged", {"processes": 65, **T})
    header(
        "committed-stale",
        "65 stale processes",
        "Committed",
        {"digest": DIGEST, "label": "v1", "stale": ["1"] * 65, **T},
    )
    header("slot", "slot 16", "Fill", {"generation": 1, "slot": 16})
    header("images-many", "17 images", "Images", {"slots": [{"size": 1, "slot": 0}] * 17})
    header("images-size", "an image of no bytes", "Images", {"slots": [{"size": 0, "slot": 0}]})
    header(
        "images-size-large", "an image of more than 16 TiB", "Images", {"slots": [{"size": (1 << 44) + 1, "slot": 0}]}
    )
    header(
        "images-order", "fields of an image out of order", "Images", b"\x81\xa5slots\x91\x82\xa4slot\x00\xa4size\x01"
    )
    header(
        "images-default",
        "a default of an image spelled out",
        "Images",
        {"slots": [{"size": 1, "slot": 0, "writable": False}]},
    )
    header(
        "images-unknown", "a field of an image that nobody knows", "Images", {"slots": [{"a": 1, "size": 1, "slot": 0}]}
    )
    header("want-lanes-none", "no connection at all", "Want", {"lanes": 0, "structure": DIGEST, **T})
    header("want-lanes-default", "one connection spelled out", "Want", {"lanes": 1, "structure": DIGEST, **T})
    header("want-lanes-many", "17 connections", "Want", {"lanes": 17, "structure": DIGEST, **T})
    want = {"structure": DIGEST, **T}
    header("want-base", "a base of 15 bytes", "Want", {"base": bytes(15), **want})
    header("want-codec-zero", "codec 0", "Want", {"codecs": [0], "speeds": [1], **want})
    header("want-codec-large", "codec 256", "Want", {"codecs": [256], "speeds": [1], **want})
    header("want-codecs-unsorted", "codecs out of order", "Want", {"codecs": [3, 2], "speeds": [1, 1], **want})
    header("want-codecs-twice", "a codec twice", "Want", {"codecs": [2, 2], "speeds": [1, 1], **want})
    many = list(range(2, 35))
    header("want-codecs-many", "33 codecs", "Want", {"codecs": many, "speeds": many, **want})
    header("want-codecs-default", "no codecs, spelled out", "Want", {"codecs": [], **want})
    header("want-speeds-fewer", "a codec without its speed", "Want", {"codecs": [2, 3], "speeds": [1], **want})
    header("want-speeds-alone", "a speed without its codec", "Want", {"speeds": [1], **want})
    header("want-same-alone", "SAME without a base", "Want", {"codecs": [1], "speeds": [1], **want})
    header("coded-codec-zero", "a run of codec 0", "Coded", {"chunk": 0, "chunks": 1, "codec": 0})
    header("coded-codec-large", "a run of codec 256", "Coded", {"chunk": 0, "chunks": 1, "codec": 256})
    header("coded-chunks-none", "a run of no chunks", "Coded", {"chunk": 0, "chunks": 0, "codec": 1})
    header("coded-chunks-large", "a run of 2^32 chunks", "Coded", {"chunk": 0, "chunks": 1 << 32, "codec": 1})
    header("join-lane-none", "lane 0, which is the transfer's own connection", "Join", {"lane": 0, **T})
    header("join-lane-large", "lane 16", "Join", {"lane": 16, **T})
    header("text-long", "a message of 2049 characters", "Evicted", {"reason": "x" * 2049})
    header("word-long", "a word of 65 characters", "Progress", {"held": 0, "stage": "x" * 65, **T})
    header("tensor-long", "a tensor's name of 513 characters", "Abort", {"code": "x", "tensor": "x" * 513})
    header("timeout-long", "a timeout of more than 1e9 seconds", "Swap", {"generation": 1, "timeout": 1.1e9, **T})
