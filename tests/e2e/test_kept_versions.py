"""``shipd.kept_versions``: what a process keeps for its next pushes, as whoever uses shipd sees and bounds it."""

import pytest

import shipd
from tests.support.checkpoints import as_state_dict, assert_installed
from tests.support.processes import address_of
from tests.support.successive import first, following, push_small, used

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first(3)
V1 = following(V0)
V2 = following(V1, seed=2)


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    """Whatever a test sets it to, the next one finds it as it was."""
    monkeypatch.setattr(shipd.kept_versions, "limit", shipd.kept_versions.limit)


def test_it_is_part_of_the_public_surface_and_bounded():
    assert "kept_versions" in dir(shipd)
    assert shipd.kept_versions.limit == 8 << 30
    assert shipd.kept_versions.memory_used == 0
    with pytest.raises(ValueError, match="-1"):
        shipd.kept_versions.limit = -1
    assert shipd.kept_versions.limit == 8 << 30


def test_memory_is_that_of_a_version_and_a_little_more_for_each_before_it(daemon):
    used_after = []
    for at, version in enumerate((V0, V1, V2)):
        receipt = push_small(address_of(daemon), as_state_dict(version), label=f"v{at}")
        assert receipt.not_kept == ()
        assert receipt.keep_seconds > 0
        used_after.append(shipd.kept_versions.memory_used)
    assert V0.nbytes < used_after[0] < V0.nbytes * 1.02
    assert used_after == sorted(used_after)
    assert used_after[2] < V0.nbytes * 1.1


def test_what_is_cleared_is_no_base_and_the_next_push_keeps_again(daemon):
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    shipd.kept_versions.clear()
    assert shipd.kept_versions.memory_used == 0
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == ""
    assert set(used(receipt)) == {"xph"}
    receipt = push_small(address_of(daemon), as_state_dict(V2), label="v2")
    assert receipt.base == V1.digest
    assert_installed(daemon, V2, label="v2")


def test_a_limit_that_is_lowered_frees_at_once_and_nothing_is_kept_beyond_it(daemon):
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    shipd.kept_versions.limit = V0.nbytes // 2
    assert shipd.kept_versions.memory_used == 0
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    (why,) = receipt.not_kept
    assert "at most" in why
    shipd.kept_versions.limit = 0
    receipt = push_small(address_of(daemon), as_state_dict(V2), label="v2")
    assert receipt.not_kept == ("keeping versions in memory is switched off",)
    assert shipd.kept_versions.memory_used == 0
    assert_installed(daemon, V2, label="v2")


def test_a_push_that_fails_is_not_kept(daemon):
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    kept = shipd.kept_versions.memory_used
    with pytest.raises(shipd.LabelConflict):
        push_small(address_of(daemon), as_state_dict(V1), label="v0")
    assert shipd.kept_versions.memory_used == kept
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert receipt.base == V0.digest
