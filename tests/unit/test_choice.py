"""Which codec a run gets: computed by hand, for links and codecs whose figures make that easy."""

import math

import pytest

from shipd.client.choice import RAW, Choice, Chooser, Measured, Prospect
from shipd.client.incremental import untried
from shipd.codecs import registry

MB = 1e6
RUN = 12_000_000
"""Bytes: 4 ms of a core at the 3 GB/s that bytes as they are take."""

EGR, GZ, XPH = 4, 3, 2


def codecs() -> dict[int, Measured]:
    """EGR is small and slow, GZ larger and faster, and XPH needs no base."""
    return {
        EGR: Measured(EGR, "egr", encode=60 * MB, share_at_least=0.001, share_of_density=0.4),
        GZ: Measured(GZ, "gz", encode=1200 * MB, share_at_least=0.01, share_of_density=1.0),
        XPH: Measured(XPH, "xph", encode=600 * MB, share_at_least=0.5),
    }


def chooser(**options) -> Chooser:
    decoding = {EGR: 60 * MB, GZ: 1200 * MB, XPH: 600 * MB}
    return Chooser(codecs(), **{"decoding": decoding, **options})


def choose(
    by: Chooser, link: float, *, density: float | None = 0.01, runs: int = 1, candidates=(XPH, GZ, EGR)
) -> Choice:
    return by.choose(RUN, candidates, link=link, density=density, runs=runs)


# --- how long a run takes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "seconds"),
    [
        # 2 s to encode, 3 s on the link, 1 s to decode: one run after the other, or all at once but for the slowest.
        (1, 6.0),
        (3, 3.0 + (2.0 + 1.0) / 3),
        (1000, 3.003),
        # Nothing is left, and still this one is to be sent.
        (0, 6.0),
    ],
)
def test_stages_overlap_but_for_the_first_run(runs: int, seconds: float) -> None:
    prospect = Prospect(GZ, "gz", share=0.5, encode=6 * MB, decode=12 * MB)
    assert prospect.seconds(RUN, 2 * MB, runs) == pytest.approx(seconds)


def test_a_link_without_limit_takes_no_time() -> None:
    prospect = Prospect(RAW, "raw", share=1.0, encode=3 * MB, decode=4 * MB)
    assert prospect.seconds(RUN, math.inf, 1) == pytest.approx(4.0 + 3.0)
    assert prospect.seconds(RUN, math.inf, 1_000_000) == pytest.approx(4.0, rel=1e-5)


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "name", "milliseconds"),
    [
        # raw: 4 + 4 ms and the link. egr: 200 + 200 ms and 0.5 % of the link. gz: 10 + 10 ms and 2 % of the link.
        (math.inf, "raw", 8),
        (3000 * MB, "raw", 12),
        (1000 * MB, "raw", 20),
        (100 * MB, "gz", 22.4),
        (10 * MB, "gz", 44),
        (MB, "gz", 260),
        (0.4 * MB, "egr", 550),
        (0.01 * MB, "egr", 6400),
    ],
)
def test_time_takes_what_is_there_first(link: float, name: str, milliseconds: float) -> None:
    choice = choose(chooser(), link)
    assert choice.codec.name == name
    assert choice.seconds * 1000 == pytest.approx(milliseconds)


def test_with_many_runs_only_the_slowest_stage_counts() -> None:
    """At 2 MB/s the link needs 30 ms for EGR and 120 ms for GZ; EGR's 200 ms of encoding are what is slowest."""
    by = chooser()
    assert choose(by, 2 * MB, runs=10_000).codec.name == "gz"
    # At 1 MB/s GZ takes 240 ms of the link.
    assert choose(by, MB, runs=10_000).codec.name == "egr"
    assert choose(by, MB, runs=1).codec.name == "gz"


def test_more_encoders_make_a_slow_codec_pay_where_it_is_decoded_fast() -> None:
    decoding = {EGR: 1200 * MB, GZ: 1200 * MB}
    # One run of many: 200 ms of encoding against 120 ms on the link.
    assert choose(chooser(decoding=decoding), 2 * MB, runs=10_000).codec.name == "gz"
    choice = choose(chooser(decoding=decoding, encoders=4), 2 * MB, runs=10_000)
    assert choice.codec.name == "egr"
    assert choice.codec.encode == 240 * MB
    assert choice.seconds == pytest.approx(0.05, rel=1e-3)


def test_a_receiver_that_decodes_slowly_is_spared() -> None:
    by = chooser(decoding={EGR: 60 * MB, GZ: 1 * MB, XPH: 600 * MB})
    assert choose(by, 10 * MB).codec.name == "egr"
    by = chooser(decoding={EGR: 1 * MB, GZ: 1 * MB, XPH: 1 * MB})
    assert choose(by, 10 * MB).codec.name == "raw"
    # No speed at all is as slow as can be, and no division by nothing.
    assert choose(chooser(decoding={EGR: 0.0}), 10 * MB).codec.name == "raw"


def test_bytes_takes_the_smallest_whatever_time_it_takes() -> None:
    by = chooser(prefer="bytes")
    for link in (math.inf, 1000 * MB, 0.01 * MB):
        choice = choose(by, link)
        assert choice.codec.name == "egr"
        assert choice.codec.share == pytest.approx(0.005)


def test_bytes_takes_the_faster_of_two_of_a_size() -> None:
    by = chooser(prefer="bytes")
    by.codecs[GZ].share_at_least, by.codecs[GZ].share_of_density = 0.001, 0.4
    assert choose(by, 10 * MB).codec.name == "gz"


def test_bytes_tries_a_codec_also_where_it_is_not_expected_to_help() -> None:
    by = chooser(prefer="bytes")
    by.codecs[XPH].share_at_least = 1.5
    choice = choose(by, 10 * MB, candidates=(XPH,))
    assert choice.codec.name == "xph"
    assert choice.codec.share == 1.0, "never more than the bytes as they are"
    assert choose(by, 10 * MB, candidates=()).codec.name == "raw"


def test_dense_changes_make_a_delta_no_better_than_none() -> None:
    """All words have changed: GZ would make 101 %, EGR 40.1 % and XPH 50 %."""
    assert choose(chooser(prefer="bytes"), 10 * MB, density=1.0).codec.name == "egr"
    assert choose(chooser(), 10 * MB, density=1.0, candidates=(GZ,)).codec.name == "raw"
    # raw: 8 + 1200 ms, egr: 400 + 481, xph: 40 + 600.
    assert choose(chooser(), 10 * MB, density=1.0).codec.name == "xph"


def test_only_what_the_receiver_decodes_and_this_side_has_is_chosen() -> None:
    assert choose(chooser(decoding={XPH: 600 * MB}), 0.01 * MB).codec.name == "xph"
    assert choose(chooser(decoding={}), 0.01 * MB).codec.name == "raw"
    assert choose(chooser(decoding={99: 600 * MB}), 0.01 * MB, candidates=(99,)).codec.name == "raw"
    assert choose(chooser(), 0.01 * MB, candidates=(GZ,)).codec.name == "gz"


def test_a_choice_says_what_it_rests_on() -> None:
    by = chooser()
    choice = choose(by, 10 * MB, runs=1)
    assert (choice.size, choice.link, choice.density) == (RUN, 10 * MB, 0.01)
    assert [(name, size) for name, _seconds, size in choice.others] == [
        ("raw", RUN),
        ("xph", RUN // 2),
        ("egr", 60_000),
    ]
    seconds = {name: seconds for name, seconds, _size in choice.others}
    assert seconds == pytest.approx({"raw": 1.208, "xph": 0.64, "egr": 0.406})
    again = choose(by, math.inf)
    assert {name for name, _seconds, _size in again.others} == {"xph", "gz", "egr"}


def test_changes_of_mind_are_remembered_and_not_too_many() -> None:
    by = chooser()
    choices = [choose(by, link) for link in (10 * MB, 11 * MB, math.inf, math.inf, 10 * MB)]
    assert by.taken == [choices[0], choices[2], choices[4]]
    for _ in range(100):
        choose(by, math.inf)
        choose(by, 10 * MB)
    assert len(by.taken) == 64
    assert by.taken[:3] == [choices[0], choices[2], choices[4]]


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_first_measurement_replaces_the_guess_and_later_ones_count_for_half() -> None:
    known = Measured(XPH, "xph", encode=1.0, share_at_least=0.9)
    known.learn(1000, 500, 0.001, None)
    assert known.encode == pytest.approx(1e6)
    assert (known.share(None), known.tried) == (0.5, 1)
    known.learn(1000, 700, 0.0005, None)
    assert known.encode == pytest.approx(1.5e6)
    assert known.share(None) == pytest.approx(0.6)
    assert known.tried == 2


def test_what_took_no_time_says_nothing_of_the_speed() -> None:
    known = Measured(XPH, "xph", encode=5.0)
    known.learn(1000, 500, 0.0, None)
    assert known.encode == 5.0
    assert known.share(None) == 0.5


def test_the_share_is_learnt_by_density() -> None:
    known = Measured(EGR, "egr", encode=1.0, share_at_least=0.001, share_of_density=2.0)
    known.learn(1_000_000, 6000, 0.01, 0.01)
    assert known.share_at_least == 0.001
    assert known.share_of_density == pytest.approx(0.5)
    assert known.share(0.02) == pytest.approx(0.011)
    assert known.share(0.0) == known.share(None) == 0.001
    # Fewer bytes than the least that was expected: changes cost nothing, and never less.
    known.learn(1_000_000, 10, 0.01, 0.01)
    assert known.share_of_density == pytest.approx(0.25)


def test_where_no_change_was_seen_the_least_share_is_learnt() -> None:
    known = Measured(EGR, "egr", encode=1.0, share_at_least=0.001, share_of_density=0.5)
    known.learn(1_000_000, 100, 0.01, 0.0)
    assert known.share_at_least == pytest.approx(0.0001)
    assert known.share_of_density == 0.5


def test_a_codec_whose_share_does_not_depend_on_changes_learns_one() -> None:
    known = Measured(XPH, "xph", encode=1.0, share_at_least=0.7)
    known.learn(1000, 650, 0.001, 0.5)
    assert known.share_of_density == 0.0
    assert known.share(0.001) == known.share(None) == 0.65


def test_a_sample_that_missed_the_changes_does_not_spoil_a_codec() -> None:
    """Found here: rows of an embedding change together. Where the sample met one word of them, a changed word looked as
    if it cost hundreds, and no later run of the push was tried with the codec."""
    by = chooser()
    by.codecs[EGR].learn(RUN, RUN // 200, 0.2, 1e-5)
    choice = choose(by, 0.1 * MB, density=0.005, candidates=(XPH, EGR))
    assert choice.codec.name == "egr"
    assert choice.codec.share < 0.03


def test_what_is_learnt_changes_what_is_chosen() -> None:
    by = chooser()
    assert choose(by, 10 * MB).codec.name == "gz"
    # As small as was thought, and far slower.
    by.codecs[GZ].learn(RUN, RUN // 50, 12.0, 0.01)
    assert choose(by, 10 * MB).codec.name == "egr"
    # A codec that turns out fast is expected to stay so.
    by.codecs[EGR].learn(RUN, RUN // 1000, RUN / 1e12, 0.01)
    assert choose(by, 10 * MB).codec.encode == pytest.approx(1e12)


# --- what is expected before anything was tried ----------------------------------------------------------------------


def test_every_codec_has_a_first_guess() -> None:
    guesses = untried()
    assert set(guesses) == {codec.number for codec in registry.CODECS}
    for number, guess in guesses.items():
        assert guess.name == registry.NAMES[number]
        assert guess.tried == 0
        assert guess.encode > 0
        assert 0 < guess.share(0.005) < 1
        assert (guess.share_of_density > 0) == (number in (GZ, EGR, 5)), "sparse codecs, and no others, cost by change"


@pytest.mark.parametrize(
    ("link", "names"),
    [(math.inf, {"raw"}), (5000 * MB, {"raw"}), (125 * MB, {"egr", "gz"}), (12.5 * MB, {"egr", "gz"}), (MB, {"egr"})],
)
def test_a_step_is_sent_as_it_is_on_a_fast_link_and_coded_on_a_thin_one(link: float, names: set[str]) -> None:
    by = Chooser(untried(), dict.fromkeys(untried(), 500 * MB))
    choice = by.choose(16 << 20, by.codecs, link=link, density=0.005, runs=50)
    assert choice.codec.name in names
