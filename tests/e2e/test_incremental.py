"""Pushes that send only what has changed, to a daemon: what travels, what it is made from, and what is there then."""

import asyncio
from pathlib import Path

import pytest
import torch

import shipd
from shipd.bases.store import kept_versions
from tests.support import checkpoints, naive
from tests.support.checkpoints import LEAF, MIB, as_state_dict, assert_installed, write_safetensors
from tests.support.frames import CODED, DATA, HELD, Way
from tests.support.processes import Background, address_of, push
from tests.support.proxy import Proxy
from tests.support.successive import changed_in, first, following, push_small, used

pytest_plugins = ["tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")

V0 = first(20)
V1 = following(V0)
V2 = following(V1, seed=2)


@pytest.fixture
def has_v0(daemon):
    """A daemon that has V0, which was pushed from here."""
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    return daemon


# --- what has changed ------------------------------------------------------------------------------------------------


def test_a_step_costs_what_has_changed(has_v0):
    receipt = push_small(address_of(has_v0), as_state_dict(V1), label="v1")
    assert receipt.bytes_sent < V1.nbytes / 300
    assert receipt.base == V0.digest
    assert receipt.digest == V1.digest
    assert set(used(receipt)) == {"egr"}
    assert used(receipt)["egr"].content_bytes >= V1.nbytes
    assert not receipt.not_kept
    assert_installed(has_v0, V1, label="v1")


def test_a_file_is_sent_as_a_state_dict_is(has_v0, tmp_path):
    receipt = push_small(address_of(has_v0), write_safetensors(tmp_path / "v1", V1), label="v1")
    assert receipt.bytes_sent < V1.nbytes / 300
    assert receipt.base == V0.digest
    assert_installed(has_v0, V1, label="v1")


def test_over_the_unix_socket_too(has_v0):
    receipt = push_small(str(has_v0.config.socket), as_state_dict(V1), label="v1")
    assert receipt.bytes_sent < V1.nbytes / 300
    assert_installed(has_v0, V1, label="v1")


def test_large_models_take_several_runs_and_none_is_too_long(has_v0):
    with Proxy(has_v0.port) as proxy:
        push_small(proxy.address, as_state_dict(V1), label="v1")
        runs = [naive.unpack(frame.header) for frame in proxy.seen(CODED)]
        assert proxy.count(DATA) == 0
    assert len(runs) >= 2
    covered = sorted(chunk for run in runs for chunk in range(run["chunk"], run["chunk"] + run["chunks"]))
    assert covered == list(range(V1.chunks)), "each chunk once"
    assert max(run["chunks"] for run in runs) * LEAF <= 16 * MIB
    assert_installed(has_v0, V1, label="v1")


@pytest.mark.parametrize("threads", [2, 4])
def test_several_threads_encode(has_v0, monkeypatch, threads):
    monkeypatch.setattr("shipd.client.coded.encoding_threads", lambda: threads)
    for at, version in enumerate((V1, V2, V0)):
        receipt = push_small(address_of(has_v0), as_state_dict(version), label=f"new-{at}")
        assert receipt.bytes_sent < version.nbytes / 100
        assert_installed(has_v0, version, label=f"new-{at}")


def test_what_has_not_changed_costs_a_few_hundred_bytes(has_v0):
    receipt = push_small(address_of(has_v0), as_state_dict(V0), label="the-same")
    assert receipt.bytes_sent < 1000
    assert set(used(receipt)) == {"same"}
    assert not receipt.already
    assert_installed(has_v0, V0, label="the-same")


def test_a_label_that_is_there_already_costs_no_more(has_v0):
    receipt = push_small(address_of(has_v0), as_state_dict(V0), label="v0")
    assert receipt.already
    assert receipt.bytes_sent < 1000
    with pytest.raises(shipd.LabelConflict):
        push_small(address_of(has_v0), as_state_dict(V1), label="v0")
    assert_installed(has_v0, V0, label="v0")


def test_one_weight_is_found_wherever_it_is(has_v0):
    rows = {row.name: row.nbytes // 2 for row in V0.rows}
    names = sorted(rows)
    before = V0
    for at, places in enumerate(
        (
            {names[0]: [0]},
            {names[-1]: [rows[names[-1]] - 1]},
            {name: [rows[name] // 2] for name in names},
            {names[1]: [LEAF // 2 - 1, LEAF // 2]},
        )
    ):
        before = changed_in(before, places)
        receipt = push_small(address_of(has_v0), as_state_dict(before), label=f"new-{at}")
        assert receipt.bytes_sent < 3000
        assert_installed(has_v0, before, label=f"new-{at}")


def test_a_step_at_any_rate_of_learning(has_v0):
    before = V0
    for at, rate in enumerate((1e-7, 2e-5, 1e-3, 1.0)):
        before = following(before, seed=10 + at, learning_rate=rate)
        receipt = push_small(address_of(has_v0), as_state_dict(before), label=f"new-{at}")
        assert receipt.bytes_sent < before.nbytes * 0.7
        assert_installed(has_v0, before, label=f"new-{at}")


def test_a_tensor_that_nothing_makes_smaller_leaves_the_others_small(daemon):
    """Found here: after one run that was best sent as it is, everything that followed was."""
    noise = naive.Tensor("a.noise", "int64", (2 * MIB // 8,))
    rows = (noise, *V0.rows)

    def version(of, seed):
        return checkpoints.Content(rows, {"a.noise": checkpoints.random_bytes(f"{seed}", 2 * MIB), **of.data})

    push_small(address_of(daemon), as_state_dict(version(V0, 0)), label="v0")
    after = version(V1, 1)
    receipt = push_small(address_of(daemon), as_state_dict(after), label="v1")
    assert 2 * MIB < receipt.bytes_sent < 2 * MIB + V1.nbytes / 100
    assert used(receipt)["raw"].content_bytes == 2 * MIB
    assert_installed(daemon, after, label="v1")


# --- whose base ------------------------------------------------------------------------------------------------------


def test_what_is_not_to_be_kept_is_not(daemon):
    async def converse(version, label):
        async with shipd.connect(address_of(daemon), keep=False) as client:
            return await client.push(as_state_dict(version), model="model", label=label, prefer="bytes")

    for label, version in (("v0", V0), ("v1", V1)):
        receipt = asyncio.run(converse(version, label))
        assert set(used(receipt)) == {"xph"}
        assert receipt.bytes_sent < version.nbytes * 0.7
    assert kept_versions.memory_used == 0
    assert_installed(daemon, V1, label="v1")


@pytest.mark.parametrize("kind", ["file", "torch file", "state dict", "module"])
def test_a_base_that_is_named(has_v0, tmp_path, kind):
    kept_versions.clear()
    base: Path | torch.nn.Module | dict[str, torch.Tensor]
    if kind == "file":
        base = write_safetensors(tmp_path / "v0", V0)
    elif kind == "torch file":
        base = checkpoints.write_torch(tmp_path / "v0.pt", V0)
    elif kind == "module":
        base = _module(as_state_dict(V0))
    else:
        base = as_state_dict(V0)
    receipt = push_small(address_of(has_v0), as_state_dict(V1), label="v1", base=base)
    assert receipt.bytes_sent < V1.nbytes / 300
    assert receipt.base == V0.digest
    assert_installed(has_v0, V1, label="v1")


def _module(state):
    root = torch.nn.Module()
    for name, tensor in state.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def test_a_base_that_the_daemon_does_not_have_is_of_no_use_and_no_harm(has_v0, tmp_path):
    kept_versions.clear()
    base = write_safetensors(tmp_path / "v2", V2)
    after = changed_in(V0, {V0.rows[0].name: [7]})
    receipt = push_small(address_of(has_v0), as_state_dict(after), label="new", base=base)
    # One chunk has changed, and is sent without a base; of the others it is known that they are there.
    assert receipt.bytes_sent < LEAF
    assert set(used(receipt)) == {"same", "xph"}
    assert_installed(has_v0, after, label="new")


def test_a_base_of_other_tensors_is_of_no_use_and_no_harm(has_v0, tmp_path):
    kept_versions.clear()
    base = write_safetensors(tmp_path / "other", checkpoints.medium())
    receipt = push_small(address_of(has_v0), as_state_dict(V0), label="new", base=base)
    assert receipt.bytes_sent < 1000
    assert_installed(has_v0, V0, label="new")


@pytest.mark.parametrize("prefer", ["time", "bytes"])
def test_without_a_base_everything_travels_as_it_is(has_v0, prefer):
    """Found here: it was encoded, where the daemon would have decoded it."""
    with Proxy(has_v0.port) as proxy:
        receipt = push(proxy.address, as_state_dict(V1), label="v1", base=False, prefer=prefer)
        assert proxy.count(DATA) == V1.chunks
        assert proxy.count(CODED) == proxy.count(HELD, Way.TO_SENDER) == 0
    assert receipt.codecs == ()
    assert receipt.base == ""
    assert_installed(has_v0, V1, label="v1")


def test_a_missing_base_is_a_typed_error(has_v0, tmp_path):
    with pytest.raises(shipd.CheckpointError, match="gone"):
        push_small(address_of(has_v0), as_state_dict(V1), label="v1", base=tmp_path / "gone.safetensors")
    assert_installed(has_v0, V0, label="v0")


def test_a_receiver_that_has_missed_steps_gets_one_delta(start_daemon):
    here, there = start_daemon(), start_daemon()
    versions = [V0]
    for at in range(5):
        versions.append(following(versions[-1], seed=20 + at))
    push_small(address_of(there), as_state_dict(versions[0]), label="v0")
    steps = [
        push_small(address_of(here), as_state_dict(version), label=f"v{at}").bytes_sent
        for at, version in enumerate(versions)
    ][1:]
    receipt = push_small(address_of(there), as_state_dict(versions[-1]), label="v5")
    assert receipt.base == V0.digest
    assert max(steps) < receipt.bytes_sent < sum(steps)
    assert_installed(there, versions[-1], label="v5")


def test_a_receiver_that_is_too_far_behind_gets_what_it_does_not_have(start_daemon):
    here, there = start_daemon(), start_daemon()
    push_small(address_of(there), as_state_dict(V0), label="v0")
    version = V0
    for at in range(9):
        version = changed_in(version, {V0.rows[0].name: [at]})
        push_small(address_of(here), as_state_dict(version), label=f"v{at}")
    receipt = push_small(address_of(there), as_state_dict(version), label="v9")
    # V0 is not among the eight; what is the same is known all the same.
    assert set(used(receipt)) == {"same", "xph"}
    assert receipt.bytes_sent < LEAF
    assert_installed(there, version, label="v9")


def test_two_daemons_share_a_base(start_daemon):
    daemons = start_daemon(), start_daemon()
    for daemon in daemons:
        push_small(address_of(daemon), as_state_dict(V0), label="v0")
    kept = kept_versions.memory_used
    assert V0.nbytes <= kept < V0.nbytes * 1.1, "it is kept once"
    for daemon in daemons:
        receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
        assert receipt.bytes_sent < V1.nbytes / 300
        assert_installed(daemon, V1, label="v1")
    assert kept_versions.memory_used < V0.nbytes * 1.2


def test_a_base_moves_on_while_another_push_reads_it(start_daemon, monkeypatch):
    """Two pushes from one process at once, one of them slow: it still gets what it has begun with."""
    monkeypatch.setattr("shipd.client.encoding._WAITING", 1)
    here, there = start_daemon(), start_daemon()
    after = following(V0, seed=40, learning_rate=3e-4)
    for daemon in (here, there):
        push_small(address_of(daemon), as_state_dict(V0), label="v0")
    with Proxy(there.port) as proxy:
        held = proxy.hold(kind=CODED, nth=0)
        with Background(push_small, proxy.address, as_state_dict(after), label="slow") as pushing:
            held.wait()
            for at, version in enumerate((V1, V2)):
                assert not push_small(address_of(here), as_state_dict(version), label=f"v{at + 1}").not_kept
            held.release()
            receipt = pushing.result()
        assert proxy.connections == 1
    assert receipt.base == V0.digest
    assert "xph" not in used(receipt)
    assert not receipt.not_kept
    assert_installed(there, after, label="slow")
    assert_installed(here, V2, label="v2")
    # What was kept last is a base. V2 is too far from it to be kept beside it: it was dropped, and no harm is done.
    receipt = push_small(address_of(there), as_state_dict(following(after, seed=41)), label="next")
    assert receipt.base == after.digest
    following_v2 = following(V2, seed=41)
    receipt = push_small(address_of(here), as_state_dict(following_v2), label="next")
    assert receipt.base == ""
    assert_installed(here, following_v2, label="next")


def test_pushes_to_several_daemons_at_once(start_daemon):
    daemons = [start_daemon() for _ in range(3)]

    async def to_all(version, label):
        async def one(daemon):
            async with shipd.connect(address_of(daemon)) as client:
                return await client.push(as_state_dict(version), model="model", label=label, prefer="bytes")

        return await asyncio.gather(*map(one, daemons))

    before = None
    for at, version in enumerate((V0, V1, V2)):
        receipts = asyncio.run(to_all(version, f"v{at}"))
        for daemon, receipt in zip(daemons, receipts, strict=True):
            assert_installed(daemon, version, label=f"v{at}")
            if before is not None:
                assert receipt.base == before.digest
                assert receipt.bytes_sent < version.nbytes / 300
        before = version


def test_a_version_that_is_back_again(has_v0):
    """From V1 to V0 is as far as from V0 to V1."""
    push_small(address_of(has_v0), as_state_dict(V1), label="v1")
    receipt = push_small(address_of(has_v0), as_state_dict(V0), label="v0-again")
    assert receipt.base == V1.digest
    assert receipt.bytes_sent < V0.nbytes / 300
    receipt = push_small(address_of(has_v0), as_state_dict(V2), label="v2")
    assert receipt.base == V0.digest
    assert_installed(has_v0, V2, label="v2")


# --- other shapes ----------------------------------------------------------------------------------------------------


def test_another_layout_is_sent_whole_and_the_next_step_is_small_again(has_v0):
    other = first(14, seed=5)
    receipt = push_small(address_of(has_v0), as_state_dict(other), label="other")
    assert set(used(receipt)) == {"xph"}
    assert receipt.base == ""
    assert_installed(has_v0, other, label="other")
    after = following(other)
    receipt = push_small(address_of(has_v0), as_state_dict(after), label="after")
    assert receipt.base == other.digest
    assert receipt.bytes_sent < after.nbytes / 300
    assert_installed(has_v0, after, label="after")


def test_the_same_weights_under_another_models_name_are_a_base(start_daemon):
    daemon = start_daemon(models={"model": "1GiB", "copy": "1GiB"})
    push_small(address_of(daemon), as_state_dict(V0), label="v0")
    push_small(address_of(daemon), as_state_dict(V0), model="copy", label="v0")
    receipt = push_small(address_of(daemon), as_state_dict(V1), model="copy", label="v1")
    assert receipt.bytes_sent < V1.nbytes / 300
    assert_installed(daemon, V1, model="copy", label="v1")
    assert_installed(daemon, V0, label="v0")


# --- on loopback, where time is what counts --------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [None, 2, 4])
def test_frozen_layers_are_left_out_also_where_nothing_is_encoded(has_v0, lanes):
    frozen = {row.name: V0.data[row.name] for row in V0.rows[1:]}
    name = V0.rows[0].name
    after = checkpoints.Content(V0.rows, {name: V1.data[name], **frozen})
    with Proxy(has_v0.port) as proxy:
        receipt = push(proxy.address, as_state_dict(after), label="new", lanes=lanes)
        assert proxy.count(HELD, Way.TO_SENDER) == 1
        assert proxy.count(DATA) == V0.rows[0].nbytes // LEAF
        if lanes:
            assert proxy.connections == lanes
        assert all(naive.unpack(frame.header)["codec"] == 1 for frame in proxy.seen(CODED))
    assert receipt.bytes_sent < V0.rows[0].nbytes + 5000
    assert not kept_versions.memory_used or kept_versions.memory_used < V0.nbytes * 1.1
    assert_installed(has_v0, after, label="new")


def test_on_loopback_nothing_is_encoded_and_nothing_kept(daemon):
    receipts = [
        push(address_of(daemon), as_state_dict(version), label=f"v{at}") for at, version in enumerate((V0, V1, V1))
    ]
    assert [receipt.codecs for receipt in receipts] == [(), (), ()]
    assert [receipt.keep_seconds for receipt in receipts] == [0, 0, 0]
    assert receipts[2].bytes_sent < 3000
    assert kept_versions.memory_used == 0
    assert_installed(daemon, V1, label="v2")


def test_a_limit_makes_a_thin_link_of_loopback(daemon):
    push(address_of(daemon), as_state_dict(V0), label="v0", limit="400Mbit")
    receipt = push(address_of(daemon), as_state_dict(V1), label="v1", limit="10Mbit")
    assert receipt.bytes_sent < V1.nbytes / 200
    assert receipt.base == V0.digest
    assert_installed(daemon, V1, label="v1")


def test_what_was_chosen_and_why(has_v0):
    receipt = push_small(address_of(has_v0), as_state_dict(V1), label="v1")
    assert {choice.codec.name for choice in receipt.choices} == {"egr"}
    for choice in receipt.choices:
        assert choice.density is not None
        assert 0.001 < choice.density < 0.05
        assert "raw" in {name for name, _seconds, _bytes in choice.others}
    # What followed was decided alike.
    assert len(receipt.choices) == 1


@pytest.mark.parametrize("prefer", ["time", "bytes"])
def test_what_was_left_out_is_counted(has_v0, prefer):
    receipt = push(address_of(has_v0), as_state_dict(V0), label="again", prefer=prefer)
    assert receipt.bytes_unchanged >= V0.nbytes
    assert receipt.bytes_sent < V0.nbytes / 100


def test_progress_counts_what_is_done_and_what_was_sent(has_v0):
    seen: list[shipd.Progress] = []
    push_small(address_of(has_v0), as_state_dict(V1), label="v1", on_progress=seen.append)
    assert seen
    assert seen[-1].bytes_total >= V1.nbytes
    assert all(progress.bytes_sent < V1.nbytes / 100 for progress in seen)


def test_bounded_memory_is_kept_to(daemon, monkeypatch):
    monkeypatch.setattr(kept_versions, "limit", V0.nbytes // 2)
    receipt = push_small(address_of(daemon), as_state_dict(V0), label="v0")
    assert len(receipt.not_kept) == 1
    assert "at most" in receipt.not_kept[0]
    receipt = push_small(address_of(daemon), as_state_dict(V1), label="v1")
    assert "egr" not in used(receipt)
    assert_installed(daemon, V1, label="v1")
