"""Pushes over real sockets that succeed: every byte arrives, and nothing more is sent than has to be."""

import asyncio
import re
import shutil
from pathlib import Path

import pytest

import shipd
from tests.support import checkpoints
from tests.support.checkpoints import Content, assert_installed, minilm_content
from tests.support.frames import DATA, HELLO, OFFER, STRUCTURE_IS, Way
from tests.support.naive import Tensor
from tests.support.processes import Background, Helper, address_of, memory, push, status
from tests.support.proxy import Proxy

MIB = 1 << 20


# --- content ---------------------------------------------------------------------------------------------------------


def test_minilm_arrives_bit_for_bit(daemon):
    receipt = push(address_of(daemon), checkpoints.minilm(), label="v0")
    assert_installed(daemon, minilm_content(), label="v0")
    assert receipt.digest == minilm_content().digest
    assert receipt.model == "model"
    assert receipt.label == "v0"
    assert receipt.tensors == len(minilm_content().rows)
    assert receipt.bytes_total == minilm_content().nbytes
    # Frames, manifest and handshake cost less than a thousandth.
    assert minilm_content().nbytes < receipt.bytes_sent < minilm_content().nbytes * 1.001
    assert (receipt.frames_resent, receipt.resent_tensors, receipt.skipped) == (0, (), ())
    assert (receipt.swapped, receipt.stale, receipt.already) == (0, (), False)
    assert receipt.pause_seconds is None, "nothing is attached, so nothing paused"
    assert 0 < receipt.wire_seconds < receipt.seconds


def test_next_version_replaces_the_first(daemon, tmp_path):
    second = checkpoints.perturbed(minilm_content(), 1)
    path = checkpoints.write_safetensors(tmp_path / "second.safetensors", second)
    first = push(address_of(daemon), checkpoints.minilm(), label="v0")
    receipt = push(address_of(daemon), path, label="v1")
    assert_installed(daemon, second, label="v1")
    assert receipt.digest == second.digest != first.digest
    assert receipt.transfer_id != first.transfer_id


def test_torch_save_has_the_digest_of_the_same_safetensors(daemon, tmp_path):
    path = checkpoints.write_torch(tmp_path / "checkpoint.pt", minilm_content())
    assert push(address_of(daemon), path).digest == minilm_content().digest
    assert_installed(daemon, minilm_content())


def test_every_dtype_and_odd_shape_from_a_file(daemon, tmp_path):
    version = checkpoints.edge_cases()
    path = checkpoints.write_safetensors(tmp_path / "edge.safetensors", version)
    assert push(address_of(daemon), path).digest == version.digest
    assert_installed(daemon, version)


def test_every_dtype_and_odd_shape_from_memory(daemon):
    version = checkpoints.edge_cases()
    state = checkpoints.as_state_dict(version)
    assert push(address_of(daemon), state).digest == version.digest
    assert_installed(daemon, version)


def test_nan_payloads_negative_zero_and_complex_are_bits(daemon):
    import torch

    words = torch.tensor([0x7FC00001, -0x400001, 0x7F800001, -(1 << 31), 1], dtype=torch.int32)
    state = {
        "nan": words.view(torch.float32),
        "complex": torch.view_as_complex(words[:4].view(torch.float32).reshape(2, 2)),
        "complex128": torch.complex(
            torch.tensor([-0.0, 1.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        ),
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "odd bools": torch.arange(256, dtype=torch.uint8).view(torch.bool),
    }
    rows = tuple(
        Tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()
    )
    # As integers: copying bools makes all that is not 0 a 1.
    raw = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}
    push(address_of(daemon), state)
    assert_installed(daemon, Content(rows, raw))


def test_views_that_are_not_contiguous(daemon):
    import torch

    base = torch.arange(600 * 700, dtype=torch.float32).reshape(600, 700)
    state = {"turned": base.t(), "sliced": base[::3, 5:77:2], "expanded": base[0:1].expand(300, 700)}
    rows = tuple(Tensor(name, "float32", tuple(tensor.shape)) for name, tensor in state.items())
    raw = {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}
    push(address_of(daemon), state)
    assert_installed(daemon, Content(rows, raw))


def test_tied_tensors_stay_tied_and_travel_once(daemon):
    rows = [
        Tensor("decoder.weight", "float32", (512, 1024), "embedding.weight"),
        Tensor("embedding.weight", "float32", (512, 1024)),
        Tensor("norm", "float32", (3,)),
    ]
    version = checkpoints.content(rows)
    with Proxy(daemon.port) as proxy:
        receipt = push(proxy.address, checkpoints.as_state_dict(version))
        assert proxy.count(DATA) == 5, "four chunks of one matrix, and one of the rest"
    assert receipt.bytes_total == version.nbytes
    assert_installed(daemon, version)


def test_a_module_is_pushed_with_its_buffers(daemon):
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    receipt = push(address_of(daemon), module)
    rows = tuple(
        Tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    )
    assert receipt.tensors == len(rows) == 7
    raw = {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}
    assert_installed(daemon, Content(rows, raw))


def test_only_empty_tensors(daemon, tmp_path):
    version = checkpoints.content([Tensor("nothing", "float32", (0, 4)), Tensor("nothing.else", "int8", (0,))])
    path = checkpoints.write_safetensors(tmp_path / "empty.safetensors", version)
    with Proxy(daemon.port) as proxy:
        assert push(proxy.address, path).digest == version.digest
        assert proxy.count(DATA) == 0
    assert_installed(daemon, version)


def test_many_tiny_tensors_do_not_cost_a_frame_each(daemon, tmp_path):
    version = checkpoints.many_tiny(20_000)
    path = checkpoints.write_safetensors(tmp_path / "tiny.safetensors", version)
    with Proxy(daemon.port) as proxy:
        push(proxy.address, path)
        assert proxy.count(DATA) == version.chunks == 3
        assert proxy.count(STRUCTURE_IS) == 1
    assert_installed(daemon, version)


# --- labels and repetition -------------------------------------------------------------------------------------------


def test_same_label_and_content_sends_no_data(daemon):
    with Proxy(daemon.port) as proxy:
        first = push(proxy.address, checkpoints.minilm(), label="v0")
        sent = proxy.count(DATA)
        again = push(proxy.address, checkpoints.minilm(), label="v0")
        assert proxy.count(DATA) == sent
    assert again.already
    assert not first.already
    assert again.digest == first.digest
    assert again.bytes_sent < 5000


def test_structure_travels_only_where_it_is_not_known(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "v0.safetensors", checkpoints.medium(0))
    other = checkpoints.write_safetensors(tmp_path / "v1.safetensors", checkpoints.medium(1))
    with Proxy(daemon.port) as proxy:
        push(proxy.address, path, label="v0")
        push(proxy.address, other, label="v1")
        assert proxy.count(STRUCTURE_IS) == 1


def test_default_label_is_time_and_digest(daemon, tmp_path):
    version = checkpoints.tiny()
    path = checkpoints.write_safetensors(tmp_path / "tiny.safetensors", version)
    receipt = push(address_of(daemon), path)
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", receipt.label)
    assert receipt.label.endswith(version.digest[:8])
    assert_installed(daemon, version, label=receipt.label)


def test_other_structure_replaces_images_where_nothing_is_attached(daemon, tmp_path):
    for number, version in enumerate((checkpoints.medium(), checkpoints.tiny(), checkpoints.edge_cases())):
        path = checkpoints.write_safetensors(tmp_path / f"{number}.safetensors", version)
        push(address_of(daemon), path, label=f"v{number}")
        assert_installed(daemon, version, label=f"v{number}")
    pool = daemon.server.models["model"].pool
    assert pool is not None
    assert daemon.server.images.budget.used == pool.size, "the images of earlier structures were given back"


# --- clients ---------------------------------------------------------------------------------------------------------


def test_one_client_pushes_and_asks_many_times(daemon, tmp_path):
    versions = [checkpoints.medium(number) for number in range(3)]
    paths = [checkpoints.write_safetensors(tmp_path / f"{at}", version) for at, version in enumerate(versions)]

    async def converse():
        async with shipd.connect(address_of(daemon)) as client:
            assert (await client.status()).models[0].label == ""
            for number, path in enumerate(paths):
                receipt = await client.push(path, model="model", label=f"v{number}")
                model = (await client.status("model")).models[0]
                assert (model.label, model.digest) == (f"v{number}", receipt.digest)
            verification = await client.verify("model")
            assert (verification.label, verification.processes) == ("v2", [])

    asyncio.run(converse())
    assert_installed(daemon, versions[2])


def test_over_the_unix_socket(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "medium.safetensors", checkpoints.medium())
    push(daemon.config.socket, path)
    assert_installed(daemon, checkpoints.medium())


def test_two_models_at_once(start_daemon, tmp_path):
    daemon = start_daemon(models={"one": "1GiB", "other": "1GiB"})
    versions = {"one": checkpoints.medium(1), "other": checkpoints.medium(2)}
    with Proxy(daemon.port) as proxy:
        held = [proxy.hold(nth=10, connection=number) for number in range(2)]
        pushes = []
        for model, version in versions.items():
            path = checkpoints.write_safetensors(tmp_path / model, version)
            pushes.append(Background(push, proxy.address, path, model=model, label=model))
        with pushes[0], pushes[1]:
            for rule in held:
                rule.wait()
            under_way = {model.name: model.transfer for model in status(address_of(daemon)).models}
            assert set(under_way) == {"one", "other"}
            assert all(transfer is not None and transfer.stage == "receiving" for transfer in under_way.values())
            for rule in held:
                rule.release()
            receipts = [running.result() for running in pushes]
    for (model, version), receipt in zip(versions.items(), receipts, strict=True):
        assert receipt.model == receipt.label == model
        assert_installed(daemon, version, model=model, label=model)


def test_two_models_over_one_client_at_once(start_daemon, tmp_path):
    daemon = start_daemon(models={"one": "1GiB", "other": "1GiB"})
    versions = {"one": checkpoints.medium(1), "other": checkpoints.medium(2)}
    paths = {model: checkpoints.write_safetensors(tmp_path / model, version) for model, version in versions.items()}

    async def converse():
        async with shipd.connect(address_of(daemon)) as client:
            return await asyncio.gather(*(client.push(path, model=model) for model, path in paths.items()))

    receipts = asyncio.run(converse())
    assert [receipt.model for receipt in receipts] == ["one", "other"]
    for model, version in versions.items():
        assert_installed(daemon, version, model=model)


def test_progress_is_reported_and_only_grows(daemon, tmp_path):
    seen: list[shipd.Progress] = []
    path = checkpoints.write_safetensors(tmp_path / "large.safetensors", checkpoints.large(40))
    push(address_of(daemon), path, on_progress=seen.append)
    assert seen
    assert {progress.bytes_total for progress in seen} <= {40 * MIB}
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert all(0 <= count <= 40 * MIB for count in done)


def test_metadata_of_the_push_travels_with_the_offer(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "tiny.safetensors", checkpoints.tiny())
    with Proxy(daemon.port) as proxy:
        push(proxy.address, path, metadata={"run": "17", "who": "Ünal"})
        (offer,) = proxy.seen(OFFER)
    assert "Ünal".encode() in offer.header


def test_checkpoint_on_a_path_that_is_replaced_meanwhile(daemon, tmp_path):
    """What is open stays what it was: careful savers write aside and rename."""
    path = checkpoints.write_safetensors(tmp_path / "checkpoint.safetensors", checkpoints.medium(0))
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=5)
        with Background(push, proxy.address, path, label="v0") as pushing:
            held.wait()
            beside = checkpoints.write_safetensors(tmp_path / "aside", checkpoints.medium(1))
            beside.rename(path)
            held.release()
            pushing.result()
    assert_installed(daemon, checkpoints.medium(0))


def test_checkpoint_that_is_deleted_meanwhile(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "checkpoint.safetensors", checkpoints.medium(0))
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=5)
        with Background(push, proxy.address, path) as pushing:
            held.wait()
            path.unlink()
            held.release()
            pushing.result()
    assert_installed(daemon, checkpoints.medium(0))


# --- tensors that change ---------------------------------------------------------------------------------------------


def _push_while_changed(daemon, state, change, **options):
    """Push ``state`` and change it when the daemon holds about half of it."""
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=10)
        with Background(push, proxy.address, state, label="changing", **options) as pushing:
            held.wait()
            change()
            held.release()
            return pushing.result()


def test_tensor_changed_during_the_push_is_named(daemon):
    push(address_of(daemon), checkpoints.as_state_dict(checkpoints.medium(0)), label="v0")
    state = checkpoints.as_state_dict(checkpoints.medium(1))
    with pytest.raises(shipd.TensorChanged, match=r"block\.3\.weight") as caught:
        _push_while_changed(daemon, state, lambda: state["block.3.weight"].add_(1))
    assert caught.value.tensor is not None
    assert "block.3.weight" in caught.value.tensor
    assert caught.value.exit_code == 13
    assert_installed(daemon, checkpoints.medium(0), label="v0")
    push(address_of(daemon), state, label="at-rest")


def test_change_that_leaves_no_trace_but_in_a_digest(daemon):
    """A fused optimiser bumps no version: only a chunk that is read twice, here after damage, can show it."""
    version = checkpoints.medium(1)
    state = checkpoints.as_state_dict(version)
    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", nth=0)
        held = proxy.hold(nth=0)
        with Background(push, proxy.address, state, label="changing") as pushing:
            held.wait()
            state["block.0.weight"].numpy()[0, 0] += 1
            held.release()
            error = pushing.error()
    assert isinstance(error, shipd.TensorChanged), error
    assert error.tensor == "block.0.weight"
    assert daemon.server.models["model"].version is None


def test_file_written_in_place_during_the_push(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "checkpoint.safetensors", checkpoints.medium(0))

    def change():
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")

    with pytest.raises(shipd.TensorChanged, match=r"checkpoint\.safetensors"):
        _push_while_changed(daemon, path, change)
    assert daemon.server.models["model"].version is None


def test_file_cut_short_during_the_push(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "checkpoint.safetensors", checkpoints.large(40))

    def change():
        with path.open("r+b") as file:
            file.truncate(1000)

    with pytest.raises(shipd.TensorChanged, match=r"cut|had .* bytes"):
        _push_while_changed(daemon, path, change)
    assert daemon.server.models["model"].version is None


def test_snapshot_lets_training_go_on(daemon):
    version = checkpoints.medium(1)
    state = checkpoints.as_state_dict(version)
    receipt = _push_while_changed(daemon, state, lambda: state["block.3.weight"].add_(1), snapshot=True)
    assert receipt.digest == version.digest
    assert_installed(daemon, version)


# --- memory ----------------------------------------------------------------------------------------------------------


def _push_and_watch(report, address, path, label):
    """Runs in a process of its own: the growth of its anonymous memory, and whether torch was imported."""
    import asyncio
    import sys
    from pathlib import Path

    import shipd
    import shipd.checkpoints.safetensors_file
    import shipd.client.client

    def anonymous():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    async def main():
        async with shipd.connect(address) as client:
            before = anonymous()
            most = before

            def watch(_progress):
                nonlocal most
                most = max(most, anonymous())

            receipt = await client.push(path, model="model", label=label, on_progress=watch)
            return receipt, max(most, anonymous()) - before

    receipt, growth = asyncio.run(main())
    report({"growth": growth, "torch": "torch" in sys.modules, "digest": receipt.digest, "bytes": receipt.bytes_total})


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_hundred_megabytes_cost_the_sender_little_memory(daemon, tmp_path, form):
    version = checkpoints.large(100)
    write = checkpoints.write_safetensors if form == "safetensors" else checkpoints.write_torch
    path = write(tmp_path / "large", version)
    with Helper(_push_and_watch, address_of(daemon), path, "large") as sender:
        report = sender.next(60)
        assert sender.wait() == 0
    if form == "safetensors":
        assert report["growth"] <= 80 * MIB
        assert not report["torch"], "a push of a safetensors file imports no torch"
    assert report["digest"] == version.digest
    assert_installed(daemon, version, label="large")


def _available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def test_three_gigabytes(start_shipd, tmp_path):
    """Image, page cache and the second image, which is populated in the background, are 9 GB at the worst."""
    if _available() < 11e9 or shutil.disk_usage(tmp_path).free < 1e9:
        pytest.skip("needs 11 GB of free memory")
    path = checkpoints.write_sparse(tmp_path / "three.safetensors", tensors=24, size=128 * MIB)
    service = start_shipd(models={"model": "4GiB"}, memory_limit="7GiB")
    before = memory(service.pid)
    with Helper(_push_and_watch, service.address, path, "three") as sender:
        report = sender.next(100)
        assert sender.wait() == 0
    after = memory(service.pid)
    assert report["growth"] <= 80 * MIB
    assert not report["torch"]
    assert report["bytes"] == 3 << 30
    assert status(service.address).models[0].digest == report["digest"]
    grown = after["RssAnon"] + after["RssFile"] - before["RssAnon"] - before["RssFile"]
    assert grown <= 32 * MIB, f"the daemon grew by {grown / MIB:.0f} MiB besides its images"


def test_repeated_pushes_leave_the_daemon_as_it_was(daemon, tmp_path):
    paths = [checkpoints.write_safetensors(tmp_path / f"{at}", checkpoints.medium(at)) for at in range(2)]
    for number in range(4):
        push(address_of(daemon), paths[number % 2], label=f"v{number}")
    pool = daemon.server.models["model"].pool
    slots = [slot.memory.fd for slot in pool.slots]
    used = daemon.server.images.budget.used
    for number in range(4, 24):
        push(address_of(daemon), paths[number % 2], label=f"v{number}")
    assert daemon.server.models["model"].pool is pool
    assert [slot.memory.fd for slot in pool.slots] == slots, "slots are reused for every push"
    assert daemon.server.images.budget.used == used
    assert_installed(daemon, checkpoints.medium(1), label="v23")


def test_both_ways_carry_what_the_receipt_says(daemon, tmp_path):
    path = checkpoints.write_safetensors(tmp_path / "medium.safetensors", checkpoints.medium())
    with Proxy(daemon.port) as proxy:
        receipt = push(proxy.address, path)
        handshake = sum(frame.size for frame in proxy.seen(HELLO))
        assert proxy.received[Way.TO_DAEMON] == receipt.bytes_sent + handshake
