"""The real successive versions: rebuilt bit for bit, and nothing else is taken for them."""

import math
import tomllib

import numpy as np
import pytest
import torch

from tests.support import finetune
from tests.support.processes import ROOT


def test_every_kept_version_is_rebuilt_and_changes_what_is_said_of_it():
    shares = {1: 0.94, 5: 1.4, 40: 4.0, 41: 0.25, 45: 0.80, 60: 2.2}
    found, before = {}, None
    for step, flat in finetune.words():
        if before is not None:
            found[step] = 100 * float(np.mean(flat != before))
        before = flat
    # As many digits as are said of each.
    assert found == {step: pytest.approx(share, rel=0.05) for step, share in shares.items()}
    assert {0, *found} == set(finetune.DIGESTS)


def test_tensors_are_torchs_own_rounding_of_the_file():
    step, state = next(iter(finetune.versions()))
    assert step == 0
    masters = torch.from_numpy(finetune.masters()).bfloat16()
    assert (
        torch.cat([tensor.reshape(-1) for tensor in state.values()]).view(torch.int16).equal(masters.view(torch.int16))
    )
    rows = finetune.tensors()
    assert [(row.name, row.shape) for row in rows] == [(name, tuple(t.shape)) for name, t in state.items()]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert sum(math.prod(row.shape) for row in rows) == 22_713_216


def test_ties_are_rounded_to_even_and_signs_are_kept():
    values = np.array([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, 1e-40], dtype=np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert finetune.rounded(values).tolist() == expected.tolist()


def test_a_part_is_the_words_of_its_tensors():
    rows = finetune.tensors()
    flat = finetune.rounded(finetune.masters())
    chosen, part = finetune.part_of(rows, flat)
    # The six layers: 46.9 % of all.
    assert len(part) == sum(math.prod(row.shape) for row in chosen) == 10_646_784
    whole, some = finetune.state_dict(rows, flat), finetune.state_dict(chosen, part)
    assert all(tensor.equal(whole[name]) for name, tensor in some.items())
    assert {name for name in whole if name.startswith("encoder.")} == set(some)


def test_another_file_than_the_packages_is_no_version(monkeypatch):
    original = finetune.masters()
    original[5] *= 1.5
    monkeypatch.setattr(finetune, "masters", lambda: original)
    with pytest.raises(ValueError, match="step 0 is rebuilt as"):
        next(finetune.words())


def test_the_wheel_has_no_tests_in_it():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"]["packages"] == ["protocol/shipproto", "daemon/shipd"]
    # An allow-list: nothing else is taken, unless something is added to it.
    assert set(built["wheel"]) == {"packages"}
