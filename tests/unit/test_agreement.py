"""shipproto.agreement: what a receiver answers to an offer of bases, and what a sender makes of it."""

from unittest import mock

import pytest

from shipproto.agreement import Ability, Agreement
from shipproto.digests import LeafDigests, digest_image
from shipproto.errors import LocalError, MalformedMessage, UnexpectedMessage
from shipproto.layout import Layout
from shipproto.messages import SAME, Held, Offer, Want
from tests.support.models import SMALL, build, contents, leaves_of, make_image
from tests.support.pair import APART, OTHER, TRANSFER, Pair, make_sender

BASE = b"the current one."
CODECS = {2: 20, SAME: 0, 9: 90}
"""Of which 9 needs the base."""


@pytest.fixture(autouse=True)
def _small_leaves():
    with leaves_of(512):
        yield


def digests() -> LeafDigests:
    layout = Layout(build(SMALL))
    return digest_image(layout, memoryview(make_image(layout, contents(layout.structure))))


def offer(*bases: bytes, incremental: bool = False) -> Offer:
    return Offer(
        bases=bases, incremental=incremental, model="m", nbytes=0, structure=bytes(16), tensors=0, transfer=TRANSFER
    )


def test_a_base_that_both_have() -> None:
    ability = Ability(BASE, digests(), CODECS, {9})
    assert ability.answer(offer(OTHER, BASE)) == Agreement(BASE, {1: 0, 2: 20, 9: 90})
    assert ability.answer(offer(OTHER, BASE, incremental=True)) == Agreement(BASE, {1: 0, 2: 20, 9: 90}), "and not told"
    assert list(ability.answer(offer(BASE)).codecs) == [1, 2, 9], "in the order in which WANT names them"


def test_a_base_that_the_receiver_alone_has() -> None:
    told = Agreement(BASE, {1: 0, 2: 20}, told=True)
    assert Ability(BASE, digests(), CODECS, {9}).answer(offer(OTHER, incremental=True)) == told
    nothing = Agreement(b"", {2: 20})
    for ability in (
        Ability(BASE, digests(), CODECS, {9}),
        Ability(b"", None, CODECS, {9}),
    ):
        assert ability.answer(offer(OTHER)) == nothing
        assert ability.answer(offer()) == nothing
    for ability in (
        Ability(b"", None, CODECS, {9}),
        Ability(BASE, None, CODECS, {9}),
        Ability(BASE, digests(), {2: 20, 9: 90}, {9}),
    ):
        assert ability.answer(offer(incremental=True)) == nothing


def test_more_digests_than_fit_are_not_told() -> None:
    ability = Ability(BASE, digests(), CODECS, {9})
    size = 16 * Layout(build(SMALL)).chunks
    with mock.patch("shipproto.agreement.MAX_DIGESTS_BODY", size):
        assert ability.answer(offer(incremental=True)).told
    with mock.patch("shipproto.agreement.MAX_DIGESTS_BODY", size - 1):
        assert ability.answer(offer(incremental=True)) == Agreement(b"", {2: 20})


def test_a_receiver_that_decodes_nothing_says_nothing() -> None:
    for ability in (Ability(), Ability(BASE, digests()), Ability(BASE, digests(), {9: 1}, {9})):
        assert ability.answer(offer(OTHER, incremental=True)) == Agreement()
    assert Ability(BASE, digests()).answer(offer(BASE)) == Agreement()


def test_what_a_sender_makes_of_it() -> None:
    want = Want(base=BASE, codecs=(1, 2), speeds=(0, 20), structure=bytes(16), transfer=TRANSFER)
    assert Agreement.on(want, offer(BASE)) == Agreement(BASE, {1: 0, 2: 20})
    assert Agreement.on(want, offer(incremental=True)) == Agreement(BASE, {1: 0, 2: 20}, told=True)
    assert Agreement.on(Want(structure=bytes(16), transfer=TRANSFER), offer(BASE)) == Agreement()
    with pytest.raises(MalformedMessage, match="not offered"):
        Agreement.on(want, offer(OTHER))


def test_a_base_laid_out_by_another_structure_is_refused() -> None:
    pair = Pair(APART, resident=APART)
    with pytest.raises(LocalError, match="another structure"):
        pair.there.accept(pair.layout, memoryview(pair.image), ability=Ability(BASE, digests(), CODECS))


def test_digests_that_are_told_are_those_of_chunks() -> None:
    pair = Pair()
    pair.sender.incremental = True
    pair.connect()
    own = digests()
    pair.there.accept(pair.layout, memoryview(pair.image), ability=Ability(BASE, own, CODECS, {9}))
    assert pair.flow() == ["Held", "Want"]
    assert pair.sender.base == BASE
    assert pair.sender.codecs == {1: 0, 2: 20}
    for chunk in range(pair.layout.chunks):
        assert pair.sender.held_digest(chunk) == own.chunk_digest(chunk)
        assert not pair.sender.raw_only(chunk)
    pair.sender.bases, pair.sender.incremental = (BASE,), False
    pair.connect()
    assert pair.sender.held_digest(0) is None, "what was said on another connection is forgotten"
    assert pair.sender.codecs == {1: 0, 2: 20, 9: 90}
    pair.finish_from_anywhere()


def test_an_offer_of_too_many_bases_is_refused_at_once() -> None:
    make_sender(bases=[bytes(16)] * 8)
    for bases in ([bytes(16)] * 9, [bytes(15)]):
        with pytest.raises(LocalError, match="not a valid message"):
            make_sender(bases=bases)


def test_digests_that_nobody_asked_to_be_told() -> None:
    pair = Pair()
    pair.right.send(Held(transfer=TRANSFER), bytes(16 * pair.layout.chunks))
    with pytest.raises(UnexpectedMessage, match="HELD"):
        pair.flow()
