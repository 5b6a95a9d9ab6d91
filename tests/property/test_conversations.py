"""A sender and a receiver over a link that flips, cuts, loses, doubles and stalls.

However it goes, a push ends: committed with the right digest and the right bytes in the image, or with a typed error
and nothing committed. Nothing is ever written into an image after its commit.
"""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from shipproto.digests import digest_image
from shipproto.errors import AbortCode
from shipproto.layout import Layout
from shipproto.limits import MAX_CHUNK_ATTEMPTS
from shipproto.states import SenderState
from tests.property.strategies import LEAF, examples, models, untied
from tests.support import naive
from tests.support.link import Fault, Installed, Push, Receiving, Sending, check_committed
from tests.support.models import SMALL, build, contents, leaves_of, make_image
from tests.support.naive import Tensor

PADDED = [*SMALL, Tensor("position_ids", "int64", (1, 40)), Tensor("mask", "bool", (3, 3))]
APART = untied(list(SMALL))
WITHOUT = [row for row in SMALL if row.name != "head.weight"]
"""What a safetensors file of a tied model has: one of each group."""

kinds = st.sampled_from(("payload", "header", "prelude", "cut", "lose", "again", "stall"))
repairable = st.sampled_from(("payload", "header"))
bits = st.integers(0, 1 << 24)


def faults(kind: st.SearchStrategy[str] = kinds, *, most: int = 6, last: int = 40) -> st.SearchStrategy[list[Fault]]:
    """A plan of faults, at most one for each frame."""
    return st.lists(
        st.builds(Fault, side=st.integers(0, 1), at=st.integers(0, last), kind=kind, bit=bits),
        max_size=most,
        unique_by=lambda fault: (fault.side, fault.at),
    )


@dataclass
class Setting:
    """What is pushed into what."""

    offered: list[Tensor]
    resident: list[Tensor] | None
    transient: list[Tensor] = field(default_factory=list)


settings = st.sampled_from(
    (
        Setting(list(SMALL), list(SMALL)),
        Setting(list(SMALL), None),
        Setting(PADDED, list(SMALL), PADDED[-2:]),
        Setting(APART, list(SMALL)),
        Setting(list(SMALL), APART),
        Setting(WITHOUT, list(SMALL)),
        Setting(list(SMALL), WITHOUT, [Tensor("head.weight", "float32", (40, 8))]),
    )
)


def push_of(setting: Setting, plan: list[Fault], seed: int, *, label: str | None = "v1", **options) -> Push:
    structure = build(setting.offered)
    data = contents(structure)
    if "head.weight" in data and "embed.weight" in data:
        # Offered apart, they have the same bytes all the same.
        data["head.weight"] = data["embed.weight"]
    receiving = Receiving(
        resident=build(setting.resident) if setting.resident is not None else None, transient=build(setting.transient)
    )
    return Push(Sending(structure, data, label=label), receiving, faults=plan, seed=seed, **options)


def check(push: Push) -> None:
    """Committed and right; or given up, for a reason that the link has provided, and nothing committed."""
    sender = push.run()
    if sender.state is SenderState.COMMITTED:
        check_committed(push, leaf=LEAF)
        assert push.receiving.commits == 1
        return
    assert sender.error is not None
    assert sender.error.code is AbortCode.INTEGRITY
    assert max(sender.chunks_resent.values()) >= MAX_CHUNK_ATTEMPTS
    assert push.receiving.commits == 0


@examples(300)
@given(
    setting=settings,
    plan=faults(),
    seed=st.integers(0, 1 << 32),
    sender_side=st.integers(0, 1),
    token=st.sampled_from((None, b"sixteen or more bytes")),
    label=st.sampled_from(("v1", None)),
)
def test_a_push_ends_committed(setting, plan, seed, sender_side, token, label) -> None:
    with leaves_of(LEAF):
        check(push_of(setting, plan, seed, sender_side=sender_side, token=token, label=label))


@examples(60)
@given(setting=settings, plan=faults(most=40, last=80), seed=st.integers(0, 1 << 32), sender_side=st.integers(0, 1))
def test_over_a_very_bad_link(setting, plan, seed, sender_side) -> None:
    with leaves_of(LEAF):
        check(push_of(setting, plan, seed, sender_side=sender_side))


@examples(80)
@given(rows=models(), plan=faults(), seed=st.integers(0, 1 << 32), known=st.booleans())
def test_any_model(rows, plan, seed, known) -> None:
    with leaves_of(LEAF):
        push = push_of(Setting(rows, rows if known else None), plan, seed)
        push.sending.data = contents(push.sending.sender.offered)
        check(push)


@examples(150)
@given(setting=settings, plan=faults(repairable, most=8), seed=st.integers(0, 1 << 32), sender_side=st.integers(0, 1))
def test_a_flipped_bit_costs_exactly_one_frame(setting, plan, seed, sender_side) -> None:
    with leaves_of(LEAF):
        # Damage in the handshake costs the connection.
        plan = [fault for fault in plan if fault.at >= 2]
        push = push_of(setting, plan, seed, sender_side=sender_side)
        sender = push.run()
        check_committed(push, leaf=LEAF)
        flipped = [fault for fault in push.faults.applied if fault.kind in ("payload", "header")]
        if push.links == 1:
            # A "payload" of nothing is a prelude, which would have cost the connection.
            sent = [fault for fault in flipped if fault.side == sender_side]
            assert push.frames_resent == len(sent)
            assert push.data_frames == sender.layout.chunks + sum(sender.chunks_resent.values())
            assert sum(sender.chunks_resent.values()) <= len(sent)


@examples(80)
@given(chunks=st.sets(st.integers(0, 13), max_size=6), seed=st.integers(0, 1 << 32), bit=bits)
def test_flipped_payloads_alone(chunks, seed, bit) -> None:
    """Frames 0 and 1 are HELLO and OFFER; the chunks follow."""
    with leaves_of(LEAF):
        structure = build(SMALL)
        total = Layout(structure).chunks
        plan = [Fault(0, 2 + chunk, "payload", bit) for chunk in chunks if chunk < total]
        push = push_of(Setting(list(SMALL), list(SMALL)), plan, seed)
        sender = push.run()
        check_committed(push, leaf=LEAF)
        assert push.links == 1
        assert push.frames_resent == len(plan) == sum(sender.chunks_resent.values())
        assert push.data_frames == total + len(plan)


@examples(60)
@given(at=st.integers(2, 14), seed=st.integers(0, 1 << 32), bit=bits)
def test_after_a_cut_only_what_is_missing_travels(at, seed, bit) -> None:
    with leaves_of(LEAF):
        push = push_of(Setting(list(SMALL), list(SMALL)), [Fault(0, at, "cut", bit)], seed)
        sender = push.run()
        check_committed(push, leaf=LEAF)
        # Everything before the cut was delivered or lost with it: no chunk is sent more than twice.
        assert sender.layout.chunks <= push.data_frames <= 2 * sender.layout.chunks
        assert sum(sender.chunks_resent.values()) == 0


@examples(80)
@given(plan=faults(), seed=st.integers(0, 1 << 32), what=st.sampled_from(("missing", "unexpected", "shape", "dtype")))
def test_a_model_that_does_not_fit_is_refused(plan, seed, what) -> None:
    with leaves_of(LEAF):
        offered = {
            "missing": [row for row in SMALL if row.name != "steps"],
            "unexpected": PADDED,
            "shape": [Tensor("steps", "int64", (2,)) if row.name == "steps" else row for row in SMALL],
            "dtype": [Tensor("steps", "uint64", (1,)) if row.name == "steps" else row for row in SMALL],
        }[what]
        push = push_of(Setting(offered, list(SMALL)), plan, seed)
        sender = push.run()
        assert sender.state is SenderState.ABORTED
        assert sender.error is not None
        assert sender.error.code is AbortCode.MISMATCH
        assert any("steps" in detail or "position_ids" in detail for detail in sender.error.details)
        assert push.receiving.commits == 0
        assert push.data_frames == 0, "refused before any byte of a tensor travels"


@examples(80)
@given(plan=faults(), seed=st.integers(0, 1 << 32), same=st.booleans())
def test_a_label_that_is_taken(plan, seed, same) -> None:
    with leaves_of(LEAF):
        push = push_of(Setting(list(SMALL), list(SMALL)), plan, seed)
        layout = Layout(build(SMALL))
        data = contents(layout.structure, version=0 if same else 1)
        image = make_image(layout, data)
        digests = digest_image(layout, memoryview(image))
        before = Installed("v1", digests.version_digest(), layout, image, digests, data)
        push.receiving.current = before
        sender = push.run()
        assert push.receiving.current is before
        assert push.data_frames == 0
        if same:
            assert sender.committed is not None
            assert sender.committed.already
            check_committed(push, leaf=LEAF)
        else:
            assert sender.error is not None
            assert sender.error.code is AbortCode.LABEL_CONFLICT


@examples(60)
@given(plan=faults(), seed=st.integers(0, 1 << 32), spoilt=st.integers(0, 4), data=st.data())
def test_memory_that_goes_bad(plan, seed, spoilt, data) -> None:
    """Bytes that were intact when they arrived and are not when they are verified: repaired, or refused and named."""
    with leaves_of(LEAF):
        push = push_of(Setting(list(SMALL), list(SMALL)), plan, seed)
        layout = Layout(build(SMALL))
        filled = [row for row in range(len(layout.structure)) if layout.structure.nbytes[row]]
        row = data.draw(st.sampled_from(filled))
        at = int(layout.offsets[row]) + data.draw(st.integers(0, int(layout.structure.nbytes[row]) - 1))
        left = [spoilt]

        def tamper(_receiver, image: memoryview) -> None:
            if left[0]:
                left[0] -= 1
                image[at] ^= 0x10

        push.receiving.tamper = tamper
        sender = push.run()
        if sender.state is SenderState.COMMITTED:
            check_committed(push, leaf=LEAF)
            assert spoilt <= 2
        else:
            assert sender.error is not None
            assert sender.error.code is AbortCode.INTEGRITY
            assert sender.error.tensor == layout.structure.names[int(layout.structure.primary[row])] or not spoilt
            assert push.receiving.commits == 0


@examples(60)
@given(plan=faults(), seed=st.integers(0, 1 << 32), after=st.integers(0, 30))
def test_a_tensor_that_changes_meanwhile(plan, seed, after) -> None:
    """Either it is noticed, or what was committed is what had been read."""
    with leaves_of(LEAF):
        push = push_of(Setting(list(SMALL), list(SMALL)), plan, seed)
        sending = push.sending
        original = dict(sending.data)
        changed = {**original, "layer.0.weight": b"\x99" * len(original["layer.0.weight"])}
        taken = [0]
        step = sending.step

        def counted() -> bool:
            taken[0] += 1
            if taken[0] == after + 1:
                sending.data = changed
                sending._image = None
            return step()

        sending.step = counted  # type: ignore[method-assign]
        sender = push.run()
        if sender.state is SenderState.COMMITTED:
            current = push.receiving.current
            assert current is not None
            rows = list(SMALL)
            assert current.digest == naive.version_digest(rows, current.content, LEAF)
            assert sender.committed is not None
            assert sender.committed.digest == current.digest == sender.digest
        else:
            assert sender.error is not None
            assert sender.error.code in (AbortCode.TENSOR_CHANGED, AbortCode.INTEGRITY)
            assert push.receiving.commits == 0
