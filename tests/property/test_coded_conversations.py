"""Pushes of coded runs over a link that flips, cuts, loses, doubles and stalls, with decoders that fail.

The rest is as in test_conversations: a push ends committed with the right bytes, or with a typed error and nothing
committed, and nothing is written into an image after its commit.
"""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from shipproto.digests import digest_image
from shipproto.errors import AbortCode
from shipproto.layout import Layout
from shipproto.states import SenderState
from tests.property.strategies import LEAF, examples
from tests.property.test_conversations import bits, faults, repairable
from tests.support.coding import CODECS
from tests.support.link import Fault, Installed, Push, Receiving, Sending, check_committed
from tests.support.models import SMALL, build, contents, leaves_of, make_image
from tests.support.naive import Tensor

WIDE = [*SMALL, *(Tensor(f"wide.{at}", "bfloat16", (300 + 7 * at,)) for at in range(8))]
"""More chunks, of which more follow each other, with gaps between them."""


@dataclass
class Case:
    """One push of a next version.

    changed    tensors that are others than in the version before
    shared     the sender has that version
    asks       the sender would know what the receiver holds
    current    the receiver has that version
    codes      the receiver decodes
    """

    changed: set[str]
    shared: bool = True
    asks: bool = True
    current: bool = True
    codes: bool = True


cases = st.builds(
    Case,
    changed=st.sets(st.sampled_from([row.name for row in WIDE])),
    shared=st.booleans(),
    asks=st.booleans(),
    current=st.booleans(),
    codes=st.sampled_from((True, True, True, False)),
)


def versions(changed: set[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The version before, and the one that is pushed."""
    structure = build(WIDE)
    before, other = contents(structure), contents(structure, 1)
    after = {name: (other if name in changed else before)[name] for name in structure.names}
    after["head.weight"] = after["embed.weight"]
    return before, after


def push_of(case: Case, plan: list[Fault], seed: int, *, spoilt: set[int] = frozenset(), **options) -> Push:  # type: ignore[assignment]
    """``spoilt``: which runs do not decode, in the order in which they are decoded."""
    structure = build(WIDE)
    before, after = versions(case.changed)
    layout = Layout(structure)
    image = make_image(layout, before)
    digests = digest_image(layout, memoryview(image))
    digest = digests.version_digest()
    sending = Sending(
        structure, after, label="v1", bases={digest: before} if case.shared else None, incremental=case.asks
    )
    receiving = Receiving(resident=structure, codecs=CODECS if case.codes else {})
    if case.current:
        receiving.current = Installed("v0", digest, layout, image, digests, before)
    count = iter(range(1 << 30))
    receiving.spoil = lambda run: next(count) in spoilt
    return Push(sending, receiving, faults=plan, seed=seed, **options)


def check(push: Push) -> bool:
    """Whether it ended committed, and right; else it was given up, and nothing was committed."""
    before = bytes(push.receiving.current.image) if push.receiving.current is not None else b""
    old = push.receiving.current
    sender = push.run()
    assert old is None or bytes(old.image) == before, "the base is never written to"
    assert all(receiver.decoding == 0 for receiver in push.receiving.receivers.values())
    if sender.state is SenderState.COMMITTED:
        installed = check_committed(push, leaf=LEAF)
        assert bytes(installed.image) == bytes(make_image(installed.layout, installed.content)), "zeros between tensors"
        assert push.receiving.commits == 1
        return True
    assert sender.error is not None
    assert sender.error.code is AbortCode.INTEGRITY
    assert push.receiving.commits == 0
    return False


@examples(300)
@given(
    case=cases,
    plan=faults(last=30),
    spoilt=st.sets(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 1 << 32),
    sender_side=st.integers(0, 1),
)
def test_a_coded_push_ends_committed(case, plan, spoilt, seed, sender_side) -> None:
    with leaves_of(LEAF):
        assert check(push_of(case, plan, seed, spoilt=spoilt, sender_side=sender_side))


@examples(80)
@given(
    case=cases,
    plan=faults(most=40, last=80),
    spoilt=st.sets(st.integers(0, 40), max_size=20),
    seed=st.integers(0, 1 << 32),
    sender_side=st.integers(0, 1),
)
def test_over_a_very_bad_link(case, plan, spoilt, seed, sender_side) -> None:
    with leaves_of(LEAF):
        check(push_of(case, plan, seed, spoilt=spoilt, sender_side=sender_side))


@examples(80)
@given(case=cases, plan=faults(repairable, most=8, last=30), seed=st.integers(0, 1 << 32))
def test_a_flipped_bit_costs_no_connection(case, plan, seed) -> None:
    with leaves_of(LEAF):
        plan = [fault for fault in plan if fault.at >= 2]
        push = push_of(case, plan, seed)
        assert check(push)
        flipped = [fault for fault in push.faults.applied if fault.side == 0]
        if push.links == 1:
            assert push.frames_resent == len(flipped)


@examples(60)
@given(case=cases, seed=st.integers(0, 1 << 32))
def test_what_travels_on_a_good_link(case, seed) -> None:
    """Coded runs only for who said so, and unchanged chunks without a payload wherever both sides know that."""
    with leaves_of(LEAF):
        push = push_of(case, [], seed)
        assert check(push)
        names = push.faults.counts[0]
        if case.codes:
            assert not names["Data"]
            assert names["Coded"] == push.sending.runs_coded
        else:
            assert not names["Coded"]
            assert names["Data"] == push.sending.sender.layout.chunks
        told = case.codes and case.current and case.asks and not case.shared
        assert push.faults.counts[1]["Held"] == told
        knows = case.codes and case.current and (case.shared or case.asks)
        (receiver,) = push.receiving.receivers.values()
        if knows and not case.changed:
            assert receiver.payload_bytes == 0


@examples(60)
@given(case=cases, seed=st.integers(0, 1 << 32), spoilt=st.sets(st.integers(0, 12), min_size=1, max_size=6))
def test_a_run_that_does_not_decode_comes_again_as_it_is(case, seed, spoilt) -> None:
    with leaves_of(LEAF):
        push = push_of(case, [], seed, spoilt=spoilt)
        assert check(push)
        (receiver,) = push.receiving.receivers.values()
        assert push.links == 1
        assert receiver.runs_undecodable == len([at for at in spoilt if at < push.sending.runs_coded])
        assert push.frames_resent == receiver.runs_undecodable
        resent = sum(push.sending.sender.chunks_resent.values())
        assert push.data_frames == (resent if case.codes else push.sending.sender.layout.chunks)


@examples(40)
@given(case=cases, seed=st.integers(0, 1 << 32), plan=faults(), bit=bits, which=st.integers(0, 30))
def test_a_run_that_decodes_to_what_it_should_not(case, seed, plan, bit, which) -> None:
    """A wrong base, say: digests find it, and the tensors come again as they are."""
    with leaves_of(LEAF):
        push = push_of(case, plan, seed)
        layout = Layout(build(WIDE))
        left = [1]

        def tamper(_receiver, image: memoryview) -> None:
            if left[0]:
                left[0] = 0
                start, size = layout.chunk(which % layout.chunks)
                # What lies behind a chunk is changed with it, as by a run.
                end = min(layout.size, start + size + 8)
                image[start:end] = bytes(byte ^ 0x5A for byte in image[start:end])

        push.receiving.tamper = tamper
        assert check(push)
