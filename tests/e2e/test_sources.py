"""Every container that can be pushed, with a real model's weights in it."""

import pytest
import torch

from tests.e2e.test_push import _push_and_watch
from tests.support import checkpoints
from tests.support.checkpoints import MIB, Content, assert_installed, minilm_content
from tests.support.containers import CONTAINERS, WITHOUT_TORCH
from tests.support.processes import Helper, address_of, push, shipctl


def changed(version: Content) -> Content:
    """A version of medium() in which one small tensor is another."""
    return Content(version.rows, {**version.data, "block.0.bias": bytes(4096)})


@pytest.mark.parametrize("container", CONTAINERS)
def test_minilm_arrives_bit_for_bit(daemon, tmp_path, container):
    path = CONTAINERS[container](tmp_path / "checkpoint", minilm_content())
    receipt = push(address_of(daemon), path, label="v1")
    assert receipt.digest == minilm_content().digest
    assert receipt.tensors == len(minilm_content().rows)
    assert_installed(daemon, minilm_content(), label="v1")


@pytest.mark.parametrize("container", CONTAINERS)
def test_it_may_be_a_base(daemon, tmp_path, container):
    before, after = checkpoints.medium(), changed(checkpoints.medium())
    old = CONTAINERS[container](tmp_path / "old", before)
    push(address_of(daemon), old)
    new = CONTAINERS[container](tmp_path / "new", after)
    receipt = push(address_of(daemon), new, base=old)
    assert receipt.bytes_sent < 100_000 < receipt.bytes_total
    assert_installed(daemon, after)


def test_the_command_takes_a_directory(daemon, tmp_path):
    path = CONTAINERS["sharded safetensors"](tmp_path / "checkpoint", checkpoints.medium())
    finished = shipctl("push", path, "--to", address_of(daemon), "--model", "model", "--label", "v1")
    assert finished.code == 0, finished
    assert_installed(daemon, checkpoints.medium(), label="v1")


def test_a_key_chooses_for_checkpoint_and_base(daemon, tmp_path):
    net, ema = checkpoints.medium(0), checkpoints.medium(1)
    later = changed(ema)
    for name, version in (("old", ema), ("new", later)):
        state = {"net": checkpoints.as_state_dict(net), "ema": checkpoints.as_state_dict(version)}
        torch.save({"model": state}, tmp_path / name)
    to = ("--to", address_of(daemon), "--model", "model")

    finished = shipctl("push", tmp_path / "old", *to)
    assert finished.code == 1, finished
    assert "'model.net' (12 tensors, 12.6 MB), 'model.ema' (12 tensors, 12.6 MB)" in finished.err
    assert "key='model.net' or --key model.net" in finished.err
    assert shipctl("push", tmp_path / "old", *to, "--key", "model.ema").code == 0
    assert_installed(daemon, ema)

    base = ("--base", tmp_path / "old", "--base-key", "model.ema")
    finished = shipctl("push", tmp_path / "new", *to, "--key", "model.ema", *base, "--json")
    assert finished.code == 0, finished
    assert finished.answer["bytes_sent"] < 100_000
    assert_installed(daemon, later)
    assert push(address_of(daemon), tmp_path / "new", key="model.net").digest == net.digest

    assert shipctl("push", tmp_path / "old", *to, "--base-key", "model.ema").code == 2
    with pytest.raises(ValueError, match="base_key = 'ema': there is no base in which to look for it"):
        push(address_of(daemon), tmp_path / "old", key="model.ema", base_key="ema")


@pytest.mark.parametrize("container", sorted(WITHOUT_TORCH))
def test_what_needs_no_torch_imports_none(daemon, tmp_path, container):
    path = CONTAINERS[container](tmp_path / "checkpoint", checkpoints.tiny())
    with Helper(_push_and_watch, address_of(daemon), path, "tiny") as sender:
        report = sender.next(60)
        assert sender.wait() == 0
    assert report["digest"] == checkpoints.tiny().digest
    assert not report["torch"]


@pytest.mark.parametrize("container", ["sharded safetensors", "npz", "HDF5", "HDF5, compressed"])
def test_what_is_mapped_or_streamed_costs_little_memory(daemon, tmp_path, container):
    """Importing h5py counts, too."""
    version = checkpoints.large(100)
    path = CONTAINERS[container](tmp_path / "large", version)
    with Helper(_push_and_watch, address_of(daemon), path, "large") as sender:
        report = sender.next(60)
        assert sender.wait() == 0
    assert report["growth"] <= 80 * MIB
    assert report["digest"] == version.digest
    assert_installed(daemon, version, label="large")
