"""The benchmark of the codecs: runs that fit their frames, bytes that come back, and rows that follow from samples."""

import dataclasses
import json

import numpy as np
import pytest

from shipproto.limits import LEAF_SIZE, MAX_PAYLOAD
from tests.benchmarks import codec_runs, codecs, report
from tests.benchmarks.codec_runs import ALL, LAYERS, MASTERS, SYNTHETIC, Case, Ours, Sample
from tests.benchmarks.rows import as_row
from tests.support import finetune, synthetic


class Halving:
    """A codec whose payload is one part in ``share`` of the XOR with the base, where the rest of it is zeros."""

    number = 250
    name = "halving"
    word = 2
    delta = True

    def __init__(self, share: int) -> None:
        self.share = share

    def encode(self, content, base, *, dtype, most):
        """Only where what is cut off equals the base."""
        assert dtype == 4
        new, old = (np.frombuffer(side, dtype=np.uint8) for side in (content, base))
        kept = len(new) // self.share
        assert (new[kept:] == old[kept:]).all()
        return (new ^ old)[:kept].tobytes() if kept <= most else None

    def decode(self, payload, base, out):
        """In place."""
        assert len(base) == len(out)
        np.frombuffer(out, dtype=np.uint8)[: len(payload)] ^= np.frombuffer(payload, dtype=np.uint8)


def case(size: int, changed: int, coders: tuple[str, ...] = ()) -> Case:
    """Two versions of which the first bytes differ."""
    before = np.arange(size, dtype=np.uint64).view(np.uint8)[:size].copy()
    after = before.copy()
    after[:changed] ^= 1
    return Case("a case", "bfloat16", before, after, [(size // 2, 1)], coders, 2)


def lengths(codec: Halving, size: int) -> list[int]:
    """Of the runs."""
    return [run.stop - run.start for run in Ours(codec, case(size, 0))._runs]


def test_a_run_is_as_long_as_its_payload_allows():
    assert lengths(Halving(64), 40 << 20) == [16 << 20, 16 << 20, 8 << 20]
    assert lengths(Halving(16), (20 << 20) + 100) == [8 << 20, 8 << 20, (4 << 20) + 100]
    assert lengths(Halving(1), LEAF_SIZE + 10) == [MAX_PAYLOAD, 10]


def test_a_codec_that_no_run_is_short_enough_for_is_not_measured(monkeypatch):
    class Never(Halving):
        def encode(self, content, base, *, dtype, most):
            return None

    monkeypatch.setattr(codec_runs, "codecs", lambda: {"never": Never(1)})
    assert codec_runs.coder_of("never", case(LEAF_SIZE, 0)) is None
    assert codec_runs.coder_of("unheard of", case(LEAF_SIZE, 0)) is None


def test_codecs_and_rivals_take_turns_and_every_round_is_kept(monkeypatch):
    monkeypatch.setattr(codec_runs, "codecs", lambda: {"halving": Halving(4)})
    found = codec_runs.measure(case(3 << 20, 64), "numba", ("halving", "gap16", "dense_xor"))
    assert [one.label for one in found] == ["HALVING", "gap16 + XOR + zstd-1", "XOR + zstd-1"]
    assert all(
        len(values) == 2 and min(values) > 0
        for one in found
        for values in (one.encode, one.apply, one.encode_share, one.apply_share)
    )
    assert (found[0].content, found[0].payload, found[0].ratio) == (3 << 20, 3 << 18, 4.0)
    assert [Sample(**values) for values in json.loads(json.dumps([dataclasses.asdict(one) for one in found]))] == found


def test_bytes_that_do_not_come_back_end_it(monkeypatch):
    class Forgetful(Halving):
        def decode(self, payload, base, out):
            pass

    monkeypatch.setattr(codec_runs, "codecs", lambda: {"halving": Forgetful(4)})
    with pytest.raises(AssertionError, match="HALVING, a case: other bytes came out"):
        codec_runs.measure(case(1 << 20, 64), "numba", ("halving",))


def test_the_cases_are_real_steps_and_synthetic_ones():
    made = {one.name: one for one in codec_runs.cases((1_000_000,), 5)}
    rows = finetune.tensors()
    assert {name: len(one.after) for name, one in made.items()} == {
        LAYERS: 2 * 10_646_784,
        ALL: 2 * 22_713_216,
        codec_runs.MANY: 2 * 10_646_784,
        MASTERS: 4 * 22_713_216,
        f"{SYNTHETIC}, 1 MB": 1_000_000,
    }
    for one in made.values():
        itemsize = 4 if one.dtype == "float32" else 2
        assert sum(rows * columns for rows, columns in one.tensors) * itemsize == len(one.after) == len(one.before)
    assert 100 * made[LAYERS].density == pytest.approx(0.497, abs=0.001)
    assert len(made[ALL].tensors) == len(rows)
    assert 2 * sum(np.prod(row.shape) for row in synthetic.layers(1_000_000)) == 1_000_000


# --- the table -------------------------------------------------------------------------------------------------------


def sample(coder: str, payload: int, case: str = LAYERS, kernels: str = "numba", **lists: list[float]) -> Sample:
    """Of 42,000 bytes, with speeds that are the same in every round unless said otherwise."""
    speeds = {"encode": [2e9] * 3, "apply": [3e9] * 3, "encode_share": [0.12, 0.1, 0.2], "apply_share": [0.2] * 3}
    return Sample(case, coder, coder.upper(), kernels, 0.00497, 42_000, payload, f"{payload}", **{**speeds, **lists})


def shown(samples):
    """Name, reference, figure, ratio and verdict of each row."""
    rows = codecs.table(samples)
    assert [as_row(json.loads(json.dumps(row.as_dict()))) for row in rows] == rows
    return {(row.name, row.reference): (row.value, row.ratio, row.verdict) for row in rows}


def test_a_payload_is_judged_by_how_many_times_smaller_it_is():
    found = shown([sample("egr", 98), sample("gz", 200), sample("pulse", 350)])
    assert found[f"EGR, {LAYERS}", None] == (pytest.approx(428.6, abs=0.1), None, "floor")
    assert found[f"GZ, {LAYERS}", None] == (210.0, None, "missed")
    assert found[f"PULSE, {LAYERS}", None] == (120.0, None, "")
    assert found[f"EGR, {LAYERS}", "PULSE"] == (pytest.approx(428.6, abs=0.1), pytest.approx(3.571, abs=0.001), "floor")
    assert (f"EGR, {LAYERS}", "GAP16") not in found


def test_speed_is_judged_as_a_share_of_the_memcpy_beside_it():
    found = shown([sample("egr", 98), sample("egr", 98, kernels="numpy", encode_share=[0.01] * 3)])
    assert found["EGR, encode", "memcpy"] == (2.0, 0.12, "floor")
    assert found["EGR, apply", "memcpy"] == (3.0, 0.2, "floor")
    assert found["EGR without numba, encode", "memcpy"] == (2.0, 0.01, "missed")
    assert found["EGR without numba, apply", "memcpy"] == (3.0, 0.2, "floor")
    # Its payload is told once.
    assert [name for name, reference in found if reference is None] == [f"EGR, {LAYERS}"]


def test_who_is_faster_is_judged_round_by_round():
    rival = sample("zipnn", 28_000, ALL, encode_share=[0.04, 0.05, 0.05], apply_share=[0.1] * 3)
    found = shown([sample("xph", 27_500, ALL), rival])
    assert found["XPH, encode", "ZIPNN"] == (2.0, pytest.approx(3.0), "floor")
    assert found["XPH, apply", "ZIPNN"] == (3.0, pytest.approx(2.0), "missed")
    assert found[f"XPH, {ALL}", None][2] == "floor"


def test_speed_is_told_where_it_matters():
    large = f"{SYNTHETIC}, 100 MB"
    made = [sample(name, 100, case) for name in ("egr", "gap16") for case in (LAYERS, ALL, large)]
    speeds = [name for name, reference in shown(made) if reference == "memcpy"]
    assert speeds == [
        *("EGR, encode", "EGR, apply", "GAP16, encode", "GAP16, apply"),
        *(f"EGR, encode, {large}", f"EGR, apply, {large}"),
    ]


def test_two_ways_to_run_a_codec_must_make_the_same_payloads():
    with pytest.raises(AssertionError, match="numpy and numba make different payloads"):
        codecs.table([sample("egr", 98), sample("egr", 99, kernels="numpy")])


def test_the_rows_say_how_much_has_changed():
    machine = {"cpu": "A CPU", "cores": 2, "kernel": "Linux", "python": "3", "torch": "2", "date": "", "commit": "0"}
    section = report.section("Codecs", machine, 5, codecs.table([sample("egr", 98)]))
    assert f"| EGR, {LAYERS} (0.497 % changed) | 429 x |" in report.markdown({"sections": {"codecs": section}})
