"""A base that is named: what is said where it turns out to be of no use, by the receipt and by shipctl."""

import pytest

from tests.support.checkpoints import as_state_dict, assert_installed, write_safetensors
from tests.support.processes import address_of, push_arguments, shipctl
from tests.support.successive import first, following, push_small

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first()
V1 = following(V0)
V2 = following(V1, seed=2)
SMALLER = first(2)


@pytest.fixture
def has_v0(daemon):
    """A daemon that has V0, of which nothing is known here."""
    push_small(address_of(daemon), as_state_dict(V0), label="v0", base=False)
    return daemon


def test_one_that_the_daemon_has_is_used_and_nothing_said(has_v0):
    receipt = push_small(address_of(has_v0), as_state_dict(V1), base=as_state_dict(V0))
    assert receipt.base == V0.digest
    assert receipt.base_unused == ""


@pytest.mark.parametrize(
    ("base", "why"),
    [(V2, "it is not the version that the daemon has"), (SMALLER, "its tensors are not those of the checkpoint")],
    ids=["another version", "other tensors"],
)
def test_another_is_told_of_and_the_push_goes_on_without(has_v0, tmp_path, base, why):
    receipt = push_small(address_of(has_v0), as_state_dict(V1), label="v1", base=as_state_dict(base))
    assert receipt.base_unused == why
    assert receipt.bytes_sent > V1.nbytes / 3
    assert_installed(has_v0, V1, label="v1")

    new, old = write_safetensors(tmp_path / "new", V0), write_safetensors(tmp_path / "old", base)
    finished = shipctl(
        *push_arguments(has_v0, new, "--base", old, "--prefer", "bytes"), env={"SHIPD_CACHE": str(tmp_path / "cache")}
    )
    assert finished.code == 0, finished
    assert f"shipctl: --base {old} is of no use here: {why}" in finished.err


def test_where_no_base_is_worth_looking_at_nothing_is_said(has_v0, tmp_path):
    new, old = write_safetensors(tmp_path / "new", V1), write_safetensors(tmp_path / "old", V2)
    finished = shipctl(*push_arguments(has_v0, new, "--base", old), env={"SHIPD_CACHE": ""})
    assert finished.code == 0, finished
    assert finished.err == ""
