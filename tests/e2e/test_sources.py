"""Every container that can be pushed, with a real model's weights in it."""

import functools

import pytest

from tests.support import checkpoints
from tests.support.checkpoints import Content, assert_installed
from tests.support.containers import CONTAINERS, WITHOUT_TORCH
from tests.support.processes import Helper, address_of, push, shipctl


@functools.cache
def minilm() -> Content:
    return checkpoints.read_safetensors(checkpoints.minilm())


@pytest.mark.parametrize("container", CONTAINERS)
def test_minilm_arrives_bit_for_bit(daemon, tmp_path, container):
    path = CONTAINERS[container](tmp_path / "checkpoint", minilm())
    receipt = push(address_of(daemon), path, label="v1")
    assert receipt.digest == minilm().digest
    assert receipt.tensors == len(minilm().rows)
    assert_installed(daemon, minilm(), label="v1")


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_command_takes_it_as_checkpoint_and_as_base(daemon, tmp_path, container):
    before, after = checkpoints.medium(0), checkpoints.medium(1)
    old = CONTAINERS[container](tmp_path / "old", before)
    new = CONTAINERS[container](tmp_path / "new", Content(after.rows, {**before.data, "block.0.bias": bytes(4096)}))
    assert shipctl("push", old, "--to", address_of(daemon), "--model", "model").code == 0
    finished = shipctl("push", new, "--to", address_of(daemon), "--model", "model", "--base", old, "--json")
    assert finished.code == 0, finished
    assert finished.answer["bytes_sent"] < 100_000 < finished.answer["bytes_total"]
    assert_installed(daemon, Content(after.rows, {**before.data, "block.0.bias": bytes(4096)}))


def _pushed(report, address, path):
    """Runs in a process of its own."""
    import asyncio
    import sys

    import shipd

    async def main():
        async with shipd.connect(address) as client:
            return await client.push(path, model="model")

    receipt = asyncio.run(main())
    report({"digest": receipt.digest, "torch": "torch" in sys.modules})


@pytest.mark.parametrize("container", sorted(WITHOUT_TORCH))
def test_what_needs_no_torch_imports_none(daemon, tmp_path, container):
    path = CONTAINERS[container](tmp_path / "checkpoint", checkpoints.medium())
    with Helper(_pushed, address_of(daemon), path) as sender:
        found = sender.next(60)
        assert sender.wait() == 0
    assert found["digest"] == checkpoints.medium().digest
    assert not found["torch"]
