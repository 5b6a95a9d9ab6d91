"""Versions that are pushed into models that are serving: to the bit, whole, and one at a time."""

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
from typing import NoReturn

import pytest
import torch
from torch import nn

import shipd
from shipd.serving.copy_swap import CopySwap
from tests.conftest import StartDaemon
from tests.support import naive
from tests.support.exact import CROWD, Exact, ask, fingerprint, question, right_answer, state
from tests.support.frames import DATA
from tests.support.naive import Tensor
from tests.support.processes import Background, Finished, address_of, push, shipctl
from tests.support.proxy import Proxy, until
from tests.support.serving_process import Attach, Serve, both

pytest_plugins = ["tests.support.serving_process"]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


# --- every kind of tensor --------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every dtype, and every oddity that must work."""

    def __init__(self, *, inference: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode() if inference else contextlib.nullcontext():
            for dtype in naive.ITEMSIZE:
                value = raw(generator, getattr(torch, dtype), 3, 5)
                if value.is_floating_point() and value.element_size() > 1:
                    self.register_parameter(f"of_{dtype}", nn.Parameter(value, requires_grad=dtype != "float16"))
                else:
                    self.register_buffer(f"of_{dtype}", value)
            self.register_buffer("empty", torch.empty(0, 4))
            self.empty_parameter = nn.Parameter(torch.empty(3, 0))
            self.scalar = nn.Parameter(torch.tensor(1.5))
            self.register_buffer("scalar_step", torch.tensor(7))
            self.channels_last = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
            self.transposed = nn.Parameter(torch.zeros(700, 300).t())
            self.strided_complex = nn.Parameter(torch.zeros(6, 4, dtype=torch.complex128).t())
            self.large = nn.Parameter(torch.zeros(1100, 513))
            self.odd_flags = nn.Buffer(torch.zeros(1023, dtype=torch.bool))
            self.embedding = nn.Parameter(torch.zeros(40, 8))
            self.head = nn.Linear(8, 40, bias=False)
            self.head.weight = self.embedding
            # Tied without being one object.
            self.again = nn.Parameter(self.embedding.detach(), requires_grad=False)
            self.norm = nn.BatchNorm1d(4)
        self.norm.eval()


def raw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of random bytes: NaNs with payloads, bools that are neither 0 nor 1, denormals."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for length in shape:
        count *= length
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def logical_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in their order, whatever the strides, without any conversion."""
    if tensor.dtype is torch.bool:
        # To copy a bool makes 1 of whatever is not 0.
        tensor = tensor.view(torch.uint8)
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_version(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random bits for every tensor, each of other strides than the model's; tied where the model is."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    roots: dict[int, torch.Tensor] = {}
    for at, (name, live) in enumerate(model.state_dict(keep_vars=True).items()):
        if live.numel() and live.data_ptr() in roots:
            made[name] = roots[live.data_ptr()]
            continue
        if live.dim() >= 2 and at % 2:
            made[name] = raw(generator, live.dtype, *reversed(live.shape)).permute(*reversed(range(live.dim())))
        else:
            made[name] = raw(generator, live.dtype, *live.shape)
        assert made[name].shape == live.shape
        roots[live.data_ptr()] = made[name]
    # The corner cases by name: minus zero, and NaNs whose payload says something.
    words = torch.tensor([-(2**31), 0x7FC0DEAD, -0x3F2153, 0x7F800001], dtype=torch.int32)
    made["of_float32"][0, :4] = words.view(torch.float32)
    made["odd_flags"] = (torch.arange(1023) % 256).to(torch.uint8).view(torch.bool)
    return made


def naive_digest(version: dict[str, torch.Tensor]) -> str:
    """The version digest by the second implementation, ties taken from the tensors themselves."""
    first: dict[int, str] = {}
    rows = []
    for name in sorted(version):
        tensor = version[name]
        root = first.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(Tensor(name, dtype, tuple(tensor.shape), root if root != name else None))
    return naive.version_digest(rows, {name: logical_bytes(tensor) for name, tensor in version.items()}).hex()


@both
@pytest.mark.parametrize("inference", [False, True], ids=["ordinary", "inference"])
def test_every_kind_of_tensor_arrives_to_the_bit(
    start_daemon: StartDaemon, attach: Attach, mode: str, inference: bool
) -> None:
    daemon = start_daemon(models={})
    model = Zoo(inference=inference)
    before = model.state_dict(keep_vars=True)
    objects = {name: id(tensor) for name, tensor in before.items()}
    strides = {name: tensor.stride() for name, tensor in before.items()}
    needs = {name: tensor.requires_grad for name, tensor in before.items()}
    training = {name: module.training for name, module in model.named_modules()}
    initial = {name: logical_bytes(tensor) for name, tensor in before.items()}
    resident = attach(model, daemon, mode=mode)
    assert resident.label == "initial"
    assert resident.digest == resident.verify()
    for name, tensor in model.state_dict().items():
        assert logical_bytes(tensor) == initial[name], name

    places = {name: tensor.data_ptr() for name, tensor in before.items()}
    for seed in range(1, 5):
        version = random_version(model, seed)
        receipt = push(address_of(daemon), version, label=f"v{seed}")
        assert (receipt.label, receipt.swapped, receipt.stale) == (f"v{seed}", 1, ())
        assert receipt.digest == resident.digest == resident.verify() == naive_digest(version)
        live = model.state_dict(keep_vars=True)
        for name, tensor in live.items():
            assert logical_bytes(tensor) == logical_bytes(version[name]), name
            moved = tensor.data_ptr() != places[name]
            # An empty tensor has no memory that could move.
            assert moved == (mode == "flip" and tensor.numel() > 0), name
        assert {name: id(tensor) for name, tensor in live.items()} == objects
        assert {name: tensor.stride() for name, tensor in live.items()} == strides
        assert {name: tensor.requires_grad for name, tensor in live.items()} == needs
        assert {name: module.training for name, module in model.named_modules()} == training
        assert model.head.weight is model.embedding
        assert model.again.data_ptr() == model.embedding.data_ptr()
        places = {name: tensor.data_ptr() for name, tensor in live.items()}
    resident.detach()
    last = random_version(model, 4)
    for name, tensor in model.state_dict().items():
        assert logical_bytes(tensor) == logical_bytes(last[name]), name


@both
def test_a_version_without_the_tied_names_will_do(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Zoo()
    resident = attach(model, daemon, mode=mode)
    whole = random_version(model, 1)
    fewer = {name: tensor for name, tensor in whole.items() if name not in ("head.weight", "embedding")}
    receipt = push(address_of(daemon), fewer)
    assert receipt.digest == resident.verify() == naive_digest(whole)
    assert logical_bytes(model.head.weight) == logical_bytes(whole["again"])


@both
def test_copies_of_what_the_model_ties_must_be_equal(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Zoo()
    resident = attach(model, daemon, mode=mode)
    tied = random_version(model, 1)
    untied = {name: tensor.clone() for name, tensor in tied.items()}
    receipt = push(address_of(daemon), untied)
    assert receipt.digest == resident.verify()
    assert model.head.weight is model.embedding
    assert logical_bytes(model.again) == logical_bytes(tied["again"])

    untied["head.weight"][3, 3] += 1
    with pytest.raises(shipd.TensorMismatch, match=r"ties .*different values") as caught:
        push(address_of(daemon), untied)
    assert caught.value.tensor in ("head.weight", "embedding", "again")
    assert resident.digest == receipt.digest == resident.verify()


@both
def test_a_hundred_megabytes(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """In two tensors and many chunks; the third push uses images that have been used before."""
    daemon = start_daemon(models={})
    model = nn.Sequential(nn.Linear(5000, 5000), nn.Linear(5, 3))
    resident = attach(model, daemon, mode=mode)
    for seed in range(1, 4):
        version = {name: raw_like(tensor, seed) for name, tensor in model.state_dict().items()}
        receipt = push(address_of(daemon), version, label=f"v{seed}")
        assert receipt.bytes_total > 100_000_000
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), version[name].view(torch.int32)), name


def raw_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Random bits, made faster than by ``raw``."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, tensor.shape, dtype=torch.int64, generator=generator)
    return bits.to(torch.int32).view(torch.float32)


# --- one version at a time -------------------------------------------------------------------------------------------


class Slow(Exact):
    """Stops in the middle of a forward until it is told to go on."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = torch.remainder(self.layer(0)(numbers), 61) - 30
        self.inside.set()
        assert self.go_on.wait(20)
        for layer in itertools.islice(self.layers, 1, None):
            numbers = torch.remainder(layer(numbers), 61) - 30
        return self.last(numbers)


@both
def test_a_forward_that_is_under_way_finishes_with_its_version(
    start_daemon: StartDaemon, attach: Attach, mode: str
) -> None:
    daemon = start_daemon(models={})
    model = Slow(0)
    resident = attach(model, daemon, mode=mode)
    with Background(ask, model) as forward:
        assert model.inside.wait(20)
        with Background(push, address_of(daemon), state(1), label="v1") as pushed:
            until(lambda: resident._gate.shut, "the swap waits for the forward")
            # A newcomer waits for the swap and not for the forward.
            with Background(lambda: held_answer(resident, model)) as newcomer:
                assert resident.label == "initial"
                assert not pushed.done
                model.go_on.set()
                assert forward.result() == right_answer(0)
                assert pushed.result().swapped == 1
                assert newcomer.result() in (("v1", right_answer(1)), ("initial", right_answer(0)))
    assert ask(model) == right_answer(1)


def held_answer(resident: shipd.Resident, model: nn.Module) -> tuple[str, str]:
    """Label and answer inside one hold."""
    with resident.hold() as version, torch.inference_mode():
        return version.label, fingerprint(model.forward(question()))


@both
def test_a_hold_of_many_forwards_sees_one_version(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode, max_hold=0.05)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed, resident.hold() as version:
        until(lambda: resident._gate.shut, "the swap waits for the hold")
        for _ in range(10):
            # Calls and holds within a hold never wait.
            with resident.hold() as inner:
                assert inner == version == resident.version
            assert ask(model) == right_answer(0)
        assert not pushed.done
    assert pushed.result().pause_seconds is not None
    with resident.hold() as version:
        assert version.label == "v1"
        assert ask(model) == right_answer(1)


@both
def test_a_push_from_inside_a_hold_ends(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """It would wait for itself: the commit's deadline ends that, and the next one is fine."""
    daemon = start_daemon(models={}, commit_timeout=0.3)
    model = Exact(0)
    resident = attach(model, daemon, mode=mode, max_hold=0.1)

    async def push_and_hold() -> None:
        async with shipd.connect(address_of(daemon)) as client:
            async with resident.hold() as version:
                with pytest.raises(shipd.SwapFailed, match="MainThread"):
                    await client.push(state(1), model="model", label="v1")
                assert version.label == resident.label == "initial"
                assert ask(model) == right_answer(0)
            await client.push(state(1), model="model", label="v1")
        async with resident.hold() as version:
            assert version.label == "v1"
        assert ask(model) == right_answer(1)

    asyncio.run(push_and_hold())


@both
def test_a_model_is_pushed_from_where_it_is_served(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    """As a checkpoint of itself: the tensors that are read are the ones that are swapped."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    for number in range(1, 4):
        with torch.no_grad():
            model.layer(1).bias.add_(1)
        receipt = push(address_of(daemon), model, label=f"v{number}")
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        assert receipt.label == resident.label == f"v{number}"


def test_without_hooks_only_holds_are_respected(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Slow(0)
    resident = attach(model, daemon, hooks=False)
    with Background(ask, model) as forward:
        assert model.inside.wait(20)
        push(address_of(daemon), state(1), label="v1")
        model.go_on.set()
        assert forward.result() not in (right_answer(0), right_answer(1))
    assert held_answer(resident, model) == ("v1", right_answer(1))


# --- callbacks -------------------------------------------------------------------------------------------------------


@both
def test_callbacks_run_between_the_swap_and_the_next_hold(
    start_daemon: StartDaemon, attach: Attach, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    called: list[tuple[str, str, str]] = []

    def holding(version: shipd.Version) -> None:
        with resident.hold() as held:
            called.append((version.label, held.label, ask(model)))

    def raising(version: shipd.Version) -> None:
        called.append((version.label, "raising", ""))
        raise ValueError("the callback's own problem")

    def remembering(version: shipd.Version) -> None:
        called.append((version.label, "last", version.digest))

    removed = resident.on_swap(lambda version: called.append((version.label, "removed", "")))
    handles = [resident.on_swap(callback) for callback in (holding, raising, remembering)]
    removed.remove()
    removed.remove()
    with caplog.at_level(logging.ERROR, "shipd.serving"):
        receipt = push(address_of(daemon), state(1), label="v1")
    assert receipt.swapped == 1
    assert called == [("v1", "v1", right_answer(1)), ("v1", "raising", ""), ("v1", "last", receipt.digest)]
    assert any("callback" in record.message and record.exc_info for record in caplog.records)
    for handle in handles:
        handle.remove()
    push(address_of(daemon), state(2), label="v2")
    assert len(called) == 3
    assert ask(model) == right_answer(2)


def test_a_callback_belongs_to_the_pause(start_daemon: StartDaemon, attach: Attach) -> None:
    """Readers get in when it is done, and the pause that is reported has it in."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    running, finish = threading.Event(), threading.Event()

    def callback(_version: shipd.Version) -> None:
        running.set()
        assert finish.wait(20)

    resident.on_swap(callback)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        assert running.wait(20)
        with Background(ask, model) as reader:
            until(lambda: len(resident._gate._waiting) == 1, "the reader waits for the callback")
            assert not reader.done
            finish.set()
            assert reader.result() == right_answer(1)
        assert (pushed.result().pause_seconds or 0) > 0


def test_a_callback_may_detach(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    resident.on_swap(lambda _version: resident.detach())
    receipt = push(address_of(daemon), state(1), label="v1")
    assert receipt.label == "v1"
    until(lambda: not daemon.server.models["model"].sessions, "the session ends")
    assert ask(model) == right_answer(1)


def test_a_callback_may_detach_while_another_thread_does(start_daemon: StartDaemon, attach: Attach) -> None:
    """That one waits for the swap, and so for the callback, which must not wait for it."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon)
    running = threading.Event()

    def callback(_version: shipd.Version) -> None:
        running.set()
        until(lambda: resident._link._stopping, "the other thread detaches")
        resident.detach()

    resident.on_swap(callback)
    with Background(push, address_of(daemon), state(1), label="v1") as pushed:
        assert running.wait(20)
        resident.detach()
        assert pushed.result().label == "v1"
    assert not resident.connected
    assert ask(model) == right_answer(1)


def test_a_swap_is_settled_when_its_daemon_is_lost_at_once(
    start_daemon: StartDaemon, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it has replaced would be kept until there is a daemon again."""
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode="flip")
    link, follower = resident._link, resident._follower
    with_a_session: list[bool] = []
    settle = follower.settle

    def watch() -> bool:
        with_a_session.append(link._lane is not None)
        return settle()

    def lose(_version: shipd.Version) -> None:
        def pump() -> NoReturn:
            raise shipd.ConnectError("injected")

        assert link._lane is not None
        monkeypatch.setattr(link._lane, "pump", pump)

    monkeypatch.setattr(follower, "settle", watch)
    handle = resident.on_swap(lose)
    # Whether the daemon counts this process is not what is asked here.
    with contextlib.suppress(shipd.ShipError):
        push(address_of(daemon), state(1), label="v1")
    until(lambda: bool(with_a_session), "the swap is settled")
    assert with_a_session[0] is False
    handle.remove()
    until(lambda: resident.connected, "the session is back")
    assert ask(model) == right_answer(1)
    monkeypatch.undo()


# --- proof -----------------------------------------------------------------------------------------------------------


@both
def test_verify_finds_what_somebody_has_scribbled(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    receipt = push(address_of(daemon), state(1), label="v1")
    assert verify(daemon).code == 0
    with torch.no_grad():
        model.layer(1).bias.view(torch.uint8)[2] ^= 1
    with pytest.raises(shipd.IntegrityError, match=r"(?s)'v1'.*written to them") as caught:
        resident.verify()
    assert caught.value.model == "model"
    assert receipt.digest in str(caught.value)
    answer = verify(daemon)
    assert answer.code == 13
    (process,) = answer.answer["processes"]
    assert not process["matches"]
    assert process["digest"] not in ("", receipt.digest)
    # The next push puts it right.
    receipt = push(address_of(daemon), state(2), label="v2")
    assert resident.verify() == receipt.digest
    assert verify(daemon).code == 0


def verify(daemon: shipd.Daemon) -> Finished:
    """``shipctl verify``."""
    return shipctl("verify", "--to", address_of(daemon), "--model", "model", "--json")


@both
def test_what_the_model_writes_itself_is_found_and_replaced(
    start_daemon: StartDaemon, attach: Attach, mode: str
) -> None:
    """BatchNorm in training mode changes its buffers with every forward, in flip on pages of its own."""
    daemon = start_daemon(models={})
    model = nn.BatchNorm1d(8).train()
    resident = attach(model, daemon, mode=mode)
    for step in range(1, 4):
        version = nn.BatchNorm1d(8)
        nn.init.constant_(version.running_mean, float(step))  # type: ignore[arg-type]  # a buffer that is there
        receipt = push(address_of(daemon), version, label=f"v{step}")
        assert resident.verify() == receipt.digest
        assert torch.equal(model.running_mean, torch.full((8,), float(step)))  # type: ignore[arg-type]
        model(torch.randn(5, 8))
        assert model.training
        with pytest.raises(shipd.IntegrityError):
            resident.verify()


# --- mismatches ------------------------------------------------------------------------------------------------------


@both
def test_every_mismatch_is_listed_before_a_byte_travels(start_daemon: StartDaemon, attach: Attach, mode: str) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode=mode)
    wrong = state(1)
    del wrong["layers.0.weight"], wrong["layers.2.bias"]
    wrong["layers.1.weight"] = torch.zeros(16, 17)
    wrong["layers.1.bias"] = torch.zeros(16, dtype=torch.float16)
    wrong["shift"] = torch.zeros(3, dtype=torch.int32)
    wrong["surprise"] = torch.zeros(2, 2)
    with Proxy(daemon.port) as proxy:
        with pytest.raises(shipd.TensorMismatch) as caught:
            push(proxy.address, wrong)
        assert proxy.count(DATA) == 0
    assert set(caught.value.problems) == {
        "missing: layers.0.weight (float32 [16, 16])",
        "missing: layers.2.bias (float32 [16])",
        "unexpected: surprise (float32 [2, 2])",
        "shape: layers.1.weight is [16, 17], the resident model has [16, 16]",
        "dtype: layers.1.bias is float16, the resident model has float32",
        "shape: shift is [3], the resident model has [16]",
        "dtype: shift is int32, the resident model has int64",
    }
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    assert resident.label == "initial"
    assert ask(model) == right_answer(0)
    assert push(address_of(daemon), state(1), label="v1").swapped == 1
    assert ask(model) == right_answer(1)


def test_direct_in_memory_is_a_copy_under_its_own_name(start_daemon: StartDaemon, attach: Attach) -> None:
    daemon = start_daemon(models={})
    model = Exact(0)
    resident = attach(model, daemon, mode="direct")
    # Of both ways of copying: one by one, and many small ones at once.
    swapper = resident._follower._swapper
    assert isinstance(swapper, CopySwap)
    assert sum(swapper._scatter.taken) == len(CROWD) < len(swapper._scatter.taken)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for number in (1, 2, 3):
        receipt = push(address_of(daemon), state(number), label=f"v{number}")
        assert (receipt.swapped, receipt.digest) == (1, resident.verify())
        assert ask(model) == right_answer(number)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert resident.mode == "direct"

    async def modes() -> list[str]:
        async with shipd.connect(address_of(daemon)) as client:
            return [process.mode for served in (await client.status()).models for process in served.processes]

    assert asyncio.run(modes()) == ["direct"]


# --- under load ------------------------------------------------------------------------------------------------------

PUSHES = int(os.environ.get("SHIPD_SWAPS", "1000")) // 2
"""Each is a swap in two processes. SHIPD_SWAPS=10000 pytest -k thousand_swaps tests/e2e: ten thousand of them."""
SECONDS = max(60.0, 0.3 * PUSHES)
"""Until it is given up. Two idle cores need a small part of it."""


@pytest.mark.timeout(60 + SECONDS)
def test_a_thousand_swaps_under_eight_readers_each(start_daemon: StartDaemon, serve: Serve) -> None:
    """Real pushes to two processes, one in each mode; every answer is compared to the bit with what its version must
    answer."""
    daemon = start_daemon(models={})
    processes = [serve(daemon.config.socket, mode=mode) for mode in ("copy", "flip")]
    for process in processes:
        process.ask("read", ["hold"] * 4 + ["forward"] * 3 + ["tasks"])
    versions = {number: state(number) for number in range(1, PUSHES + 1)}

    async def push_all() -> int:
        swaps = 0
        end = time.monotonic() + SECONDS
        async with shipd.connect(address_of(daemon)) as client:
            for number, version in versions.items():
                receipt = await client.push(version, model="model", label=f"v{number}")
                assert receipt.stale == ()
                swaps += receipt.swapped
                assert time.monotonic() < end, f"only {swaps} swaps in {SECONDS:.0f} s"
        return swaps

    assert asyncio.run(push_all()) == 2 * PUSHES
    for process in processes:
        report = process.ask("read_stop")
        assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
        assert process.ask("verify") == process.ask("digest")
        # They have been reading all the time, and not only before and after.
        assert len(report["labels"]) > PUSHES // 5
        assert report["answers"] > 2 * PUSHES


def test_four_models_of_two_processes_each_pushed_at_once(start_daemon: StartDaemon, serve: Serve) -> None:
    """For some seconds, with readers in every process: models do not disturb one another."""
    daemon = start_daemon(models={})
    names = ["one", "two", "three", "four"]
    processes = {
        name: [
            serve(daemon.config.socket, name=name, version=at * 1000, mode=mode, kind="small" if at % 2 else "wide")
            for mode in ("copy", "flip")
        ]
        for at, name in enumerate(names)
    }
    for name, pair in processes.items():
        for process in pair:
            process.ask("read", ["hold", "tasks" if name == "one" else "forward"], name=name)

    async def push_for(name: str, at: int, seconds: float) -> list[shipd.Receipt]:
        kind = "small" if at % 2 else "wide"
        versions = [state(at * 1000 + number, kind) for number in range(1, 9)]
        end = time.monotonic() + seconds
        receipts: list[shipd.Receipt] = []
        async with shipd.connect(address_of(daemon)) as client:
            for number, version in enumerate(versions, 1):
                receipt = await client.push(version, model=name, label=f"v{at * 1000 + number}")
                assert (receipt.swapped, receipt.stale, receipt.frames_resent) == (2, (), 0)
                receipts.append(receipt)
                if number >= 4 and time.monotonic() > end:
                    break
        return receipts

    async def push_all() -> list[list[shipd.Receipt]]:
        return await asyncio.gather(*(push_for(name, at, 3.0) for at, name in enumerate(names)))

    for name, (*_, receipt) in zip(names, asyncio.run(push_all()), strict=True):
        for process in processes[name]:
            report = process.ask("read_stop", name=name)
            assert (report["wrong"], report["backwards"], report["errors"], report["fenced"]) == ([], [], [], 0)
            assert process.ask("verify", name=name) == receipt.digest
            assert process.ask("label", name=name) == receipt.label
