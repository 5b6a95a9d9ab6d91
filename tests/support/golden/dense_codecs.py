"""Payloads of XPH, DUH, F32D and PLANES (SPEC.md, A.2, A.5 to A.7), and what their zstd frames may be (A.1)."""

from collections.abc import Iterable
from typing import Final

import xxhash

from tests.support.golden.book import Book, CodecPages
from tests.support.payloads import MAGIC, block, duh, frame, little, packed_planes, xph

ZEROS: Final = frame(b"\0", times=12)
"""10 bytes: a packed plane of 12."""
COMPRESSED: Final = bytes.fromhex(
    "28b52ffd600000ed020054037e7d7e7c7e7d7e7b7e7d7e7c7e7d7e7a7b797b7a7b787b7a7b797b7a7b777b7a7b797b7a7b787b7a7b797b7a7b7e7d"
    "7e7c7e7d7e761d040440c00106041c6040c00106041c6040c00106041c6040c00106041c6040c00106849525"
)
"""What zstd 1.5.7 has made of 256 exponents: half of them 7E, a quarter 7D, and so on. Blocks with codes need it."""


def words(text: str) -> bytes:
    """Words as one reads them, little-endian."""
    return b"".join(bytes.fromhex(word)[::-1] for word in text.split())


def halves(run: bytes) -> tuple[bytes, bytes]:
    """Exponents and rest of words of 16 bits."""
    rotated = [(low | high << 8) << 1 | high >> 7 for low, high in zip(run[::2], run[1::2], strict=True)]
    return bytes(word >> 8 & 0xFF for word in rotated), bytes(word & 0xFF for word in rotated)


def near_one(count: int) -> bytes:
    """Words from 1.0 on, whose exponents are all 7F."""
    return little(2, *range(0x3F80, 0x3F80 + count))


def accept_dense_codecs(book: Book) -> None:
    """Annex A's examples, and what is only just allowed."""
    _accept_xph(CodecPages(book, 2, "xph"))
    _accept_duh(CodecPages(book, 5, "duh"))
    _accept_f32d(CodecPages(book, 6, "f32d"))
    _accept_planes(CodecPages(book, 7, "planes"))


def reject_dense_codecs(book: Book) -> None:
    """One payload for each thing that a decoder has to refuse."""
    _reject_xph(CodecPages(book, 2, "xph"))
    _reject_frames(CodecPages(book, 2, "xph"))
    _reject_duh(CodecPages(book, 5, "duh"))
    _reject_f32d(CodecPages(book, 6, "f32d"))
    _reject_planes(CodecPages(book, 7, "planes"))


# --- XPH -----------------------------------------------------------------------------------------------------------


def _accept_xph(pages: CodecPages) -> None:
    example = words("3f80 bf80 3fc0 0001")
    exponents, rest = halves(example)
    pages.accept("whole", "annex A's example: exponents whole", b"\0" + exponents + rest, example)
    pages.accept("codes", "annex A's example: exponents as codes", xph(0x7F, b"\x00\xf0", b"\0", rest), example)

    special = words("0000 8000 0001 807f 0080 7880 7f00 7f7f 7f80 ff80 7f81 7fc0 ffc1 7fff ffff")
    exponents, rest = halves(special)
    codes = [exponent - 241 if exponent >= 241 else 15 for exponent in exponents] + [0]
    pairs = bytes(first | second << 4 for first, second in zip(codes[::2], codes[1::2], strict=True))
    others = bytes(exponent for exponent in exponents if exponent < 241)
    pages.accept(
        "highest-codes",
        "zeros, denormals, infinities and NaNs, an odd number of words; the highest codes that there are",
        xph(241, pairs, others, rest),
        special,
    )

    run = near_one(31)
    _, rest = halves(run)
    packed = frame(b"\0", times=16)
    pages.accept("codes-frame", "codes of an odd number of words, in a frame", xph(0x7F, packed, b"", rest), run)
    run = near_one(12)
    _, rest = halves(run)
    others = frame(b"\x7f", times=12)
    pages.accept(
        "others-frame", "no exponent has a code, and they are in a frame", xph(0, b"\xff" * 6, others, rest), run
    )

    run = near_one(40)
    plane, rest = halves(run)
    content = block(b"\x7f", times=40)
    checksum = little(4, xxhash.xxh64_intdigest(plane) & 0xFFFFFFFF)
    frames = {
        "frame": ("a frame of one block", frame(b"\x7f", times=40)),
        "frame-blocks": (
            "a frame of three blocks, of which one is empty",
            MAGIC + b"\x20\x28" + bytes.fromhex("1a0100 7f 000000 2b0000 7f"),
        ),
        "frame-checksum": ("a frame with the checksum of its content", MAGIC + b"\x24\x28" + content + checksum),
        "frame-dictionary": ("a frame that names dictionary 0, which is none", MAGIC + b"\x21\0\x28" + content),
        "frame-window": ("a frame with a window of 8 MiB", MAGIC + b"\x80\x68" + little(4, 40) + content),
    }
    for name, (what, packed) in frames.items():
        pages.accept(name, f"exponents in {what}", b"\0" + packed + rest, run)
    exponents = bytes(0x7E - ((at + 1) & -(at + 1)).bit_length() + 1 for at in range(256))
    run = little(2, *(exponent << 7 | at & 0x7F for at, exponent in enumerate(exponents)))
    payload = b"\0" + COMPRESSED + halves(run)[1]
    pages.accept("frame-compressed", "exponents in a frame that a compressor has made", payload, run)


def _reject_xph(pages: CodecPages) -> None:
    run = near_one(4)
    plane, rest = halves(run)
    pages.reject("odd", "a run of an odd number of bytes", b"\0" + plane[:3] + rest[:3], 7)
    pages.reject("empty", "no bytes", b"", 8)
    pages.reject("kind", "exponents in a third way", b"\x02" + plane + rest, 8)
    pages.reject("short", "too short for the rest", b"\0" + rest[:3], 8)
    pages.reject("plane-short", "exponents that are neither whole nor a frame", b"\0" + plane[:3] + rest, 8)
    pages.reject("plane-long", "a frame that is longer than the exponents in it", b"\0" + frame(plane) + rest, 8)
    pages.reject("head-short", "too short for its head", b"\x01\x7f\x02\0\0" + rest, 8)
    pages.reject("c", "codes from 242 on, of which the last would be exponent 256", xph(242, bytes(2), b"", rest), 8)
    pages.reject("codes-far", "codes that end behind the payload", xph(0x7F, bytes(2), b"", rest, size=0xFFFFFFFF), 8)
    pages.reject("codes-long", "codes in more bytes than they are", xph(0x7F, bytes(3), b"", rest), 8)
    pages.reject("codes-odd", "a code after the last word", xph(0x7F, b"\x00\x10", b"", rest[:3]), 6)
    pages.reject("others-few", "an exponent without a code is missing", xph(0x7F, b"\xf0\xf0", b"\0", rest), 8)
    pages.reject("others-many", "an exponent without a code too many", xph(0x7F, b"\x00\xf0", b"\0\0", rest), 8)
    pages.reject("others-lowest", "an exponent by itself that has the code 0", xph(0x70, b"\x00\xf0", b"\x70", rest), 8)
    pages.reject(
        "others-highest", "an exponent by itself that has the code 14", xph(0x70, b"\x00\xf0", b"\x7e", rest), 8
    )


def _reject_frames(pages: CodecPages) -> None:
    """What A.1 says of zstd frames; XPH is only what they are in."""
    run = near_one(40)
    _, rest = halves(run)
    content = block(b"\x7f", times=40)
    frames = {
        "other-size": ("declares another size, which it has", frame(b"\x7f", times=39)),
        "no-size": ("declares no size", MAGIC + b"\0\0" + content),
        "less": ("has less than it declares", frame(b"\x7f", times=39, declared=40)),
        "more": ("has more than it declares", frame(b"\x7f", times=41, declared=40)),
        "window": ("has a window of 9 MiB", MAGIC + b"\x80\x69" + little(4, 40) + content),
        "dictionary": ("names a dictionary", MAGIC + b"\x21\x07\x28" + content),
        "reserved": ("has the reserved bit set", MAGIC + b"\x28\x28" + content),
        "block": ("has a block of the reserved type", MAGIC + b"\x20\x28" + little(3, 40 << 3 | 3 << 1 | 1) + b"\x7f"),
        "checksum": ("has another checksum than its content", MAGIC + b"\x24\x28" + content + bytes(4)),
        "magic": ("begins with another magic", b"\x27" + frame(b"\x7f", times=40)[1:]),
        "cut": ("ends inside its block", frame(b"\x7f", times=40)[:-1]),
        "trailing": ("has a byte after it", frame(b"\x7f", times=40) + b"\0"),
        "skippable": ("has a skippable frame before it", little(4, 0x184D2A50, 2) + b"ab" + frame(b"\x7f", times=40)),
        "second": ("has another frame after it", frame(b"\x7f", times=40) + frame(b"\x7f", times=40)),
    }
    for name, (what, packed) in frames.items():
        pages.reject(f"frame-{name}", f"a zstd frame that {what}", b"\0" + packed + rest, 80)


# --- DUH -----------------------------------------------------------------------------------------------------------


def _accept_duh(pages: CodecPages) -> None:
    base = words("3f80 3f80 3f80")
    content = words("3f80 3f7f 4080")
    pages.accept("example", "annex A's example", duh(b"\x10\x0f", b"\xff", 512), content, base)
    base = near_one(33)
    pages.accept("same", "nothing has changed, in an odd number of words", duh(frame(b"\0", times=17), b""), base, base)
    pages.accept(
        "edges",
        "z of 3, 15, 269, 270 and 65535, the last of each kind",
        duh(b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", 270, 65535),
        words("3e7e 3e78 3df9 3f07 c17f"),
        words("3e80 3e80 3e80 3e80 3e80"),
    )
    pages.accept(
        "zeros",
        "between the zeros, and from the largest NaN to the smallest and back, where keys wrap around",
        duh(b"\x32\x12", b""),
        words("0000 8001 ffff 7fff"),
        words("8000 0000 7fff ffff"),
    )
    pages.accept(
        "frame",
        "the steps that are not small in a frame",
        duh(b"\xff" * 6, frame(b"\x01", times=12), said=(6, 12, 0)),
        little(2, *range(0x3F88, 0x3F88 + 12)),
        near_one(12),
    )


def _reject_duh(pages: CodecPages) -> None:
    base = words("3e80 3e80 3e80 3e80 3e80")
    codes, plane, large = b"\xf3\xff\x0f", b"\x00\xfe\xff\xff", (270, 65535)

    def reject(name: str, what: str, payload: bytes, run: bytes = base) -> None:
        pages.reject(name, what, payload, len(run), run)

    reject("odd", "a run of an odd number of bytes, with steps for the whole words", duh(b"\x10", b""), bytes(5))
    reject("head", "no head", duh(codes, plane, *large)[:11])
    reject("short", "too short for the parts that its head names", duh(codes, plane, *large, said=(3, 4, 6)))
    reject("codes-far", "codes that end behind the payload", duh(codes, plane, *large, said=(0xFFFFFFFF, 4, 2)))
    reject("codes-odd", "a step after the last word", duh(b"\xf3\xff\x1f", plane, *large))
    reject("m-less", "fewer steps that are not small than are marked", duh(codes, plane[:1] + plane[2:], *large))
    reject("m-more", "more steps that are not small than are marked", duh(b"\xf3\xff\x0e", plane, *large))
    # A frame of so many bytes, that nothing of their size may be taken for.
    reject(
        "m-words", "more steps that are not small than words", duh(codes, frame(b"\0", times=60000), said=(3, 60000, 0))
    )
    reject("l-less", "one large step fewer than are marked", duh(codes, plane, 270))
    reject("l-more", "one large step more than are marked", duh(codes, b"\x00\xfe\xfd\xff", *large))
    reject("large", "a step that is not large among the large", duh(codes, plane, 269, 65535))
    reject("plane-long", "more bytes of steps than there are", duh(codes, plane + b"\0", *large, said=(3, 4, 2)))


# --- F32D ----------------------------------------------------------------------------------------------------------


def by_bytes(numbers: Iterable[int]) -> list[bytes]:
    """The four planes of numbers of 32 bits."""
    return [bytes(number >> 8 * k & 0xFF for number in numbers) for k in range(4)]


def _accept_f32d(pages: CodecPages) -> None:
    base = words("3f800000 bf800000")
    payload = packed_planes(b"\x58\x01", b"\x02\0", bytes(2), bytes(2))
    pages.accept("example", "annex A's example", payload, words("3f80012c bf800001"), base)
    run = words("3f800000 7fc00001 ffffffff 80000000") * 3
    pages.accept("same", "nothing has changed: four frames of zeros", packed_planes(*[ZEROS] * 4), run, run)
    pages.accept(
        "wrapping",
        "from -0 to +0, from the largest NaN to the smallest and back, and the longest step that there is",
        packed_planes(*by_bytes((2, 2, 1, 0xFFFFFFFF))),
        words("00000000 ffffffff 7fffffff c07fffff"),
        words("80000000 7fffffff ffffffff 3f800000"),
    )
    pages.accept(
        "frames",
        "the lowest plane as it is, the others in frames",
        packed_planes(bytes(range(0, 24, 2)), frame(b"\x01", times=12), ZEROS, ZEROS),
        little(4, *(0x3F800000 + 128 + at for at in range(12))),
        little(4, *[0x3F800000] * 12),
    )


def _reject_f32d(pages: CodecPages) -> None:
    base = words("3f800000 bf800000")
    planes = (b"\x58\x01", b"\x02\0", bytes(2), bytes(2))

    def reject(name: str, what: str, payload: bytes, run: bytes = base) -> None:
        pages.reject(name, what, payload, len(run), run)

    reject("odd", "a run of no whole number of words of four bytes", packed_planes(*planes), bytes(10))
    reject("head", "a length of a plane is cut", packed_planes(*planes)[:15])
    reject("short", "planes that end behind the payload", packed_planes(*planes)[:-1])
    reject("trailing", "a byte after the planes", packed_planes(*planes) + b"\0")
    reject("far", "a length of a plane beyond everything", packed_planes(*planes, said=(2, 2, 2, 0xFFFFFFFE)))
    reject("plane-long", "a plane of more bytes than words", packed_planes(*planes, said=(2, 3, 1, 2)))
    reject("plane-short", "a plane that is neither whole nor a frame", packed_planes(*planes[:3], b"\0"))
    reject("frame", "a plane in a frame of fewer words", packed_planes(frame(b"\0", times=11), *[ZEROS] * 3), bytes(48))


# --- PLANES --------------------------------------------------------------------------------------------------------


def _accept_planes(pages: CodecPages) -> None:
    pages.accept(
        "example",
        "annex A's example: XORed with the base, with a tail",
        b"\x04\x01" + packed_planes(b"\0\4", b"\3\7", b"\2\6", b"\5\x09") + b"\x08",
        bytes(range(1, 10)),
        b"\x01" * 9,
    )
    pages.accept("bytes", "words of one byte, no base", b"\x01\x00" + packed_planes(b"any"), b"any")
    pages.accept("tail", "fewer bytes than a word has", b"\x08\x00" + packed_planes(*[b""] * 8) + b"five.", b"five.")
    run = b"\x80\x3f" * 12 + b"\x07"
    low, high = frame(b"\x80", times=12), frame(b"\x3f", times=12)
    pages.accept("frames", "planes in frames, and a tail", b"\x02\x00" + packed_planes(low, high) + b"\x07", run)
    run = bytes(range(100))
    pages.accept(
        "same", "XORed with a base that is the same", b"\x08\x01" + packed_planes(*[ZEROS] * 8) + bytes(4), run, run
    )
    pages.accept(
        "unused", "there is a base, and it is not used", b"\x02\x00" + packed_planes(b"ac", b"bd"), b"abcd", b"efgh"
    )


def _reject_planes(pages: CodecPages) -> None:
    planes = packed_planes(b"\0\4", b"\1\5", b"\2\6", b"\3\7")
    pages.reject("empty", "a head of one byte", b"\x01", 1)
    pages.reject("w-0", "words of no bytes", b"\0\0" + b"12345678", 8)
    pages.reject("w-3", "words of three bytes", b"\3\0" + packed_planes(b"ab", b"cd", b"ef") + b"gh", 8)
    pages.reject("w-16", "words of sixteen bytes", b"\x10\0" + packed_planes(*[b"a"] * 16), 16)
    pages.reject("flags", "another flag", b"\4\2" + planes, 8, bytes(8))
    pages.reject("flags-both", "another flag beside the one that there is", b"\4\3" + planes, 8, bytes(8))
    pages.reject("base", "XORed with a base, and there is none", b"\4\1" + planes, 8)
    pages.reject("head", "the lengths of planes are cut", b"\4\0" + planes[:15], 8)
    pages.reject("tail", "no tail where one is due", b"\4\0" + planes, 9)
    pages.reject("trailing", "a byte after the last", b"\4\0" + planes + b"\0", 8)
    pages.reject("plane-long", "a plane of more bytes than there are words", b"\1\0" + packed_planes(bytes(9)), 8)
    pages.reject("plane-short", "a plane of fewer bytes than words, and no frame", b"\1\0" + packed_planes(bytes(7)), 8)
    pages.reject("frame", "a plane in a frame of more bytes than words", b"\1\0" + packed_planes(ZEROS), 11)
