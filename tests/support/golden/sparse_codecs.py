"""Payloads of GZ and EGR (SPEC.md, A.3 and A.4), and what numbers and bit strings may be (A.1)."""

from typing import Any, Final

from tests.support.golden.book import Book, CodecPages
from tests.support.golden.dense_codecs import words
from tests.support.payloads import Class, bit_string, egr, frame, gz, little, number

BASE: Final = words("3f80 3f81 3e00 bf80 3e01 0000 3f90 3e02 8000 3f7f")
RUN: Final = words("3f80 3f82 3e00 bf80 3e00 0000 3f93 3e02 0000 3f7f")
"""Annex A's example."""
ONES: Final = little(2, *[0x3F80] * 50)
"""Of one class where the highest exponent is 127."""
K: Final = 23
"""That class."""


def changed(base: bytes, at: dict[int, int]) -> bytes:
    """``base`` with other words at these places."""
    run = bytearray(base)
    for place, word in at.items():
        run[2 * place : 2 * place + 2] = little(2, word)
    return bytes(run)


def one(**fields: Any) -> bytes:
    """An EGR payload of one class: the words 5 and 16 one up, with the parameter 2; or what ``fields`` say."""
    given: dict[str, Any] = {"gaps": [5, 10], "signs": [0, 0], "r": 2} | fields
    return egr(7, 127, {K: Class(**given)})


def parts(unary: list[int], low: list[int], escapes: bytes = b"") -> bytes:
    """An EGR payload of one change up with the parameter 2, its parts as given."""
    part = bit_string(unary)
    return b"\x07\x7f\0\0\x80" + b"\x01\x02" + number(len(part)) + part + bit_string(low) + b"\0" + escapes


def accept_sparse_codecs(book: Book) -> None:
    """Annex A's examples, and what is only just allowed."""
    _accept_gz(CodecPages(book, 3, "gz"))
    _accept_egr(CodecPages(book, 4, "egr"))


def reject_sparse_codecs(book: Book) -> None:
    """One payload for each thing that a decoder has to refuse."""
    _reject_gz(CodecPages(book, 3, "gz"))
    _reject_egr_heads(CodecPages(book, 4, "egr"))
    _reject_egr_parts(CodecPages(book, 4, "egr"))


# --- GZ ------------------------------------------------------------------------------------------------------------


def _accept_gz(pages: CodecPages) -> None:
    pages.accept("example", "annex A's example", gz([1, 2, 1, 1], [0] * 4, [0, 1, 0, 0], [0, 0, 2, 0]), RUN, BASE)
    pages.accept("same", "nothing has changed", b"\0", BASE, BASE)
    pages.accept(
        "every-word",
        "every word has changed: between the zeros, from the largest NaN to the smallest and back",
        gz([0] * 4, [0] * 4, [0, 1, 0, 1], [0, 1, 0, 0]),
        words("0000 8001 ffff 7fff"),
        words("8000 0000 7fff ffff"),
    )
    pages.accept(
        "last-word",
        "the last word has changed, by the longest step that there is; steps around the escape",
        gz([0, 0, 0, 46], [0] * 4, [0, 0, 1, 1], [254, 255, 255, 255], large=[255, 256, 32767]),
        changed(ONES, {0: 0x3F80 + 255, 1: 0x3F80 + 256, 2: 0x3F80 - 257, 49: 0xC07F}),
        ONES,
    )
    zeros = bytes(2 * 131_500)
    pages.accept(
        "far",
        "gaps of 255, 256, 65279 and 65280 words, the last of which needs an escape, and 200 changes in all",
        gz([255, 0, 255, 0] + [0] * 196, [0, 1, 254, 255] + [0] * 196, [0] * 200, [0] * 200, far=[255]),
        changed(zeros, dict.fromkeys((255, 512, 65_792, 131_073, *range(131_074, 131_270)), 1)),
        zeros,
    )


def _reject_gz(pages: CodecPages) -> None:
    def reject(name: str, what: str, payload: bytes, run: bytes = ONES) -> None:
        pages.reject(name, what, payload, len(run), run)

    good = gz([5], [0], [0], [0])
    reject("odd", "a run of an odd number of bytes, of which nothing has changed", b"\0", ONES[:-1])
    reject("empty", "no bytes", b"")
    reject("same-trailing", "a byte after nothing has changed", b"\0\0")
    reject("number-long", "a number of a byte more than it needs", b"\x81\0" + good[1:])
    reject("number-five", "a number of five bytes", b"\x80\x80\x80\x80\x01" + good[1:])
    reject("number-cut", "a number that does not end", b"\x81")
    reject("words", "more changes than words", gz([0] * 51, [0] * 51, [0] * 51, [0] * 51))
    reject("claim", "as many changes as a number can say", gz([0], [0], [0], [0], changes=(1 << 28) - 1))
    reject("frames", "frames that end behind the payload", good[:-1])
    reject("no-frame", "a frame of no bytes", b"\x01" + number(0) + good[2:5] + good[5 + len(frame(b"\0")) :])
    reject("frame", "a frame of fewer bytes than changes", gz([5, 0], [0, 0], [0, 0], [0]))
    reject("signs", "signs in a byte more than they are", gz([5], [0], [0] * 9, [0]))
    reject("signs-padding", "a sign after the last change", gz([5], [0], [0, 1], [0]))
    reject("far-least", "an escaped gap that needed none", gz([0], [255], [0], [0], far=[0]), bytes(2 * 65_300))
    reject("far-missing", "a gap's escape is missing", gz([0], [255], [0], [0]), bytes(2 * 65_300))
    reject("large-least", "an escaped step that needed none", gz([5], [0], [0], [255], large=[254]))
    reject("large-most", "a step of more than 32768", gz([5], [0], [1], [255], large=[32768]))
    reject("large-missing", "a step's escape is missing", gz([5], [0], [0], [255]))
    reject("step", "a step of 32768 up, which is one of 32768 down", gz([5], [0], [0], [255], large=[32767]))
    reject("trailing", "a byte after the last", good + b"\0")
    reject("end", "a change in the word behind the last", gz([50], [0], [0], [0]))
    reject("end-far", "a gap beyond everything", gz([255], [255], [0], [0], far=[0xFFFFFFFF]))


# --- EGR -----------------------------------------------------------------------------------------------------------


def _accept_egr(pages: CodecPages) -> None:
    three = Class([1, 1], [0, 0], kind=1, lists=[([0, 2], 0)])
    example = egr(7, 127, {0: Class([1], [0]), 20: Class([1], [1]), K: three})
    pages.accept("example", "annex A's example", example, RUN, BASE)
    pages.accept("same", "no class has a change", egr(7, 127, {}), BASE, BASE)
    up = {5: 0x3F81, 16: 0x3F81}
    pages.accept("largest-r", "the largest parameter of gaps", one(r=23), changed(ONES, up), ONES)
    pages.accept(
        "kind-2",
        "steps of which one is the longest that there is, with the largest parameters",
        one(kind=2, lists=[([1], 23), ([32766], 15)], signs=[0, 1]),
        changed(ONES, {5: 0x3F81, 16: 0xC07F}),
        ONES,
    )
    pages.accept(
        "kind-2-all",
        "as many steps above 1 as changes; places in a row",
        one(gaps=[0, 0, 0], signs=[1, 0, 1], kind=2, lists=[([0, 0, 0], 0), ([0, 1, 2], 1)]),
        changed(ONES, {0: 0x3F7E, 1: 0x3F83, 2: 0x3F7C}),
        ONES,
    )
    pages.accept("unary-30", "a quotient of 30", one(gaps=[30], signs=[0], r=0), changed(ONES, {30: 0x3F81}), ONES)
    pages.accept(
        "escapes",
        "quotients of 31 and above, of a gap and of a step; and the last word",
        one(gaps=[0, 31, 16], signs=[1, 0, 0], r=0, kind=1, lists=[([0, 62, 0], 1)]),
        changed(ONES, {0: 0x3F7F, 32: 0x3F80 + 63, 49: 0x3F81}),
        ONES,
    )
    pages.accept(
        "float16",
        "exponents of float16, of which the class is 23 above the highest named and 0 for all that are far below",
        egr(10, 25, {0: Class([1], [0]), 1: Class([0], [1]), 22: Class([1], [0]), K: Class([2], [1])}),
        words("0001 0c00 0bff 6000 6001 6400 7c00 fe01"),
        words("0001 0bff 0c00 6000 6000 6400 7c00 fe00"),
    )
    pages.accept(
        "low-top",
        "the highest exponent is 2: all classes below 21 are empty",
        egr(7, 2, {21: Class([1], [0]), 22: Class([0], [0]), K: Class([1], [1], r=1)}),
        words("0000 8000 0081 0100 ff81"),
        words("0000 8001 0080 0100 ff80"),
    )


def _reject_egr_heads(pages: CodecPages) -> None:
    def reject(name: str, what: str, payload: bytes, run: bytes = ONES) -> None:
        pages.reject(name, what, payload, len(run), run)

    reject("odd", "a run of an odd number of bytes, of which nothing has changed", egr(7, 127, {}), ONES[:-1])
    reject("empty", "no bytes", b"")
    reject("head", "the head is cut", one()[:6])
    reject("shift", "exponents of no float of 16 bits", egr(8, 127, {}))
    reject("top", "an exponent that no float16 has", egr(10, 32, {}))
    reject("same-trailing", "a byte after nothing has changed", egr(7, 127, {}) + b"\0")
    reject("changes-none", "a class that is present and has no change", egr(7, 127, {K: Class([], [])}))
    reject("changes-number", "a number of a byte more than it needs", b"\x07\x7f\0\0\x80\x82\0" + one()[6:])
    reject(
        "changes-words",
        "more changes than words, in two classes together",
        egr(7, 127, {22: Class([0] * 26, [0] * 26), K: Class([0] * 25, [0] * 25)}),
    )
    reject("how", "the reserved bit of how a class is described", one(kind=4))
    reject("kind", "a kind of lists that there is not", one(kind=3))
    reject("r-gaps", "a parameter of gaps above 23", one(r=24))
    reject("r-list", "a parameter of steps above 15", one(kind=1, lists=[([1, 1], 16)]))
    reject("r-places", "a parameter of places above 23", one(kind=2, lists=[([1], 24), ([1], 0)]))
    reject("r-second", "a parameter of rare steps above 15", one(kind=2, lists=[([1], 0), ([1], 16)]))
    reject("rare-none", "no rare step in a class that has a list of them", one(kind=2, lists=[([], 0), ([], 0)]))
    reject("rare-many", "more rare steps than changes", one(kind=2, lists=[([0] * 3, 0), ([0] * 3, 0)]))
    reject("unary-far", "a unary part that ends behind the payload", one()[:7] + number(1000) + one()[8:])


def _reject_egr_parts(pages: CodecPages) -> None:
    def reject(name: str, what: str, payload: bytes, base: bytes = ONES) -> None:
        pages.reject(name, what, payload, len(base), base)

    reject("unary-few", "fewer quotients than numbers", egr(7, 127, {K: Class([5], [0], changes=2)}))
    reject("unary-many", "more quotients than numbers", parts([1, 1], [0, 0]))
    reject("unary-32", "32 zeros before a one", parts([0] * 32 + [1], [0, 0], little(4, 32)))
    reject("unary-long", "a byte of zeros at the end of the unary part", parts([1, *[0] * 15], [0, 0]))
    reject("low-padding", "a bit after the last number", parts([1], [0, 0, 1]))
    reject("signs-padding", "a sign after the last change", egr(7, 127, {K: Class([5], [0])}, signs_after=[1]))
    reject("escapes-few", "an escape is missing", parts([0] * 31 + [1], [0, 0]))
    reject("escapes-many", "an escape too many", parts([1], [0, 0], little(4, 31)))
    escaped, long = [0] * 31 + [1], ONES * 4
    reject("escapes-cut", "an escape that is cut", parts(escaped, [0, 0], little(4, 31)[:3]), long)
    reject("escapes-least", "an escape that needed none", parts(escaped, [0, 0], little(4, 30)), long)
    reject("gaps", "a gap as long as the run", one(gaps=[50], signs=[0]))
    reject("gaps-sum", "gaps that are longer than the run together", one(gaps=[25, 24]))
    reject("gaps-far", "a gap beyond everything", parts(escaped, [0, 0], little(4, 0xFFFFFFFF)))
    reject("places", "a place behind the last change", one(kind=2, lists=[([2], 0), ([0], 0)]))
    reject("places-sum", "places that are longer than the list together", one(kind=2, lists=[([1, 0], 0), ([0, 0], 0)]))
    reject("m", "a step of more than 32768", one(kind=1, lists=[([0, 32768], 15)], signs=[0, 1]))
    reject("m-rare", "a rare step of more than 32768", one(kind=2, lists=[([0], 0), ([32767], 15)], signs=[1, 0]))
    reject("m-up", "a step of 32768 up, which is one of 32768 down", one(kind=1, lists=[([0, 32767], 15)]))
    reject("base", "changes of a class that no word of the base belongs to", egr(7, 127, {22: Class([0], [0])}))
    few = changed(ONES, dict.fromkeys(range(11, 50), 0))
    reject("base-left", "more changes of a class than the base has words of it", one(), few)
