"""Deltas into models that are served by real processes: what they answer, and what they read back."""

import ctypes
import gc

import pytest
import torch

import shipd
from shipd.bases.store import kept_versions
from tests.support import finetune
from tests.support.checkpoints import MIB, as_state_dict
from tests.support.exact import right_answer, state
from tests.support.frames import CODED
from tests.support.processes import Background, address_of, memory, push, status
from tests.support.proxy import Proxy, until
from tests.support.serving_process import both, sessions
from tests.support.successive import following, of_words, push_small, used

pytest_plugins = ["tests.support.serving_process", "tests.support.successive"]

pytestmark = pytest.mark.usefixtures("fresh_bases")


def mixed(version, frozen):
    """The state of ``version``, but for the last layers, which are those of ``frozen``."""
    newer, older = state(version, "wide"), state(frozen, "wide")
    return {name: older[name] if name.startswith(("layers.4", "layers.5")) else newer[name] for name in newer}


@both
@pytest.mark.parametrize("prefer", ["time", "bytes"])
def test_a_process_answers_as_each_version_does(start_daemon, serve, mode, prefer):
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode=mode, kind="wide")
    for at, version in enumerate((1, 2, 1, 1, 0)):
        label = f"{at}-v{version}"
        receipt = push(address_of(daemon), state(version, "wide"), label=label, prefer=prefer)
        assert receipt.swapped == 1
        process.ask("await_label", label)
        assert process.ask("answer") == right_answer(version, "wide")
        assert process.ask("verify") == receipt.digest
        (verified,) = status(address_of(daemon)).models[0].processes
        assert verified.digest == receipt.digest


@both
def test_the_weights_that_a_process_began_with_are_a_base(start_daemon, serve, mode):
    """Nothing was ever pushed: the daemon tells the digests of what it was attached with."""
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode=mode, kind="wide")
    receipt = push(address_of(daemon), mixed(1, 0), label="v1")
    whole = sum(tensor.nbytes for tensor in mixed(1, 0).values())
    assert receipt.bytes_sent < whole * 0.7, "two of six layers are left out"
    process.ask("await_label", "v1")
    assert process.ask("verify") == receipt.digest


@both
def test_a_base_that_is_named_of_what_a_process_began_with(start_daemon, serve, mode):
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode=mode, kind="wide")
    began_with = process.ask("digest")
    receipt = push_small(address_of(daemon), mixed(1, 0), label="v1", base=state(0, "wide"))
    assert receipt.base == began_with
    assert set(used(receipt)) > {"same"}
    process.ask("await_label", "v1")
    assert process.ask("verify") == receipt.digest


@both
def test_a_process_whose_live_weights_were_changed_is_put_right_by_the_next_delta(start_daemon, serve, mode):
    """A delta is applied to what was committed, not to what somebody has written into the live parameters."""
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode=mode, kind="wide")
    push_small(address_of(daemon), state(1, "wide"), label="v1")
    process.ask("await_label", "v1")
    process.ask("scribble")
    receipt = push_small(address_of(daemon), mixed(2, 1), label="v2")
    process.ask("await_label", "v2")
    assert receipt.swapped == 1
    # What was left out was not copied to the process either: the bias of layer 1, which was scribbled on, was sent.
    assert process.ask("verify") == receipt.digest


def test_readers_never_see_anything_between_two_versions(start_daemon, serve):
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode="copy", kind="wide")
    process.ask("read", ["hold", "forward"])
    for version in range(1, 9):
        push_small(address_of(daemon), state(version, "wide"), label=f"v{version}")
    process.ask("await_label", "v8")
    found = process.ask("read_stop")
    assert found["answers"] > 0
    assert (found["wrong"], found["backwards"], found["errors"]) == ([], [], [])


def test_two_processes_and_one_that_comes_later(start_daemon, serve):
    daemon = start_daemon(models={})
    processes = [serve(daemon.config.socket, version=0, mode=mode, kind="wide") for mode in ("copy", "flip")]
    push_small(address_of(daemon), state(1, "wide"), label="v1")
    processes.append(serve(daemon.config.socket, version=5, mode="copy", kind="wide"))
    receipt = push_small(address_of(daemon), mixed(2, 1), label="v2")
    assert receipt.swapped == 3
    assert "same" in used(receipt)
    for process in processes:
        process.ask("await_label", "v2")
        assert process.ask("verify") == receipt.digest


def test_what_the_model_ties_and_the_checkpoint_does_not(start_daemon, attach):
    """The daemon's structure rules, and the base is laid out by it."""

    def tied(seed):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(512, 1024), "head": torch.nn.Linear(1024, 512)})
        model["head"].weight = model["embed"].weight
        return model.to(torch.bfloat16)

    daemon = start_daemon(models={})
    resident = attach(tied(0), daemon)
    loose = {name: tensor.detach().clone() for name, tensor in tied(1).state_dict().items()}
    whole = push_small(address_of(daemon), loose, label="v1")
    loose["embed.weight"][0, 0] += 1
    loose["head.weight"][0, 0] += 1
    receipt = push_small(address_of(daemon), loose, label="v2")
    assert receipt.base == whole.digest
    assert receipt.bytes_sent < 2000
    assert resident.verify() == receipt.digest
    loose["embed.weight"][0, 0] += 1
    with pytest.raises(shipd.TensorMismatch):
        push_small(address_of(daemon), loose, label="v3")
    assert resident.verify() == receipt.digest


def test_a_process_that_attaches_while_a_delta_is_on_its_way(start_daemon, serve):
    daemon = start_daemon(models={})
    first_one = serve(daemon.config.socket, version=0, mode="copy", kind="wide")
    push_small(address_of(daemon), state(1, "wide"), label="v1")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=CODED, nth=1)
        with Background(push_small, proxy.address, state(2, "wide"), label="v2") as pushing:
            held.wait()
            later = serve(daemon.config.socket, version=7, mode="flip", kind="wide")
            assert later.ask("answer") == right_answer(1, "wide")
            held.release()
            receipt = pushing.result()
    assert receipt.swapped == 2
    for process in (first_one, later):
        process.ask("await_label", "v2")
        assert process.ask("verify") == receipt.digest


@pytest.mark.parametrize("how", ["detach", "kill"])
def test_the_last_process_leaves_while_a_delta_is_on_its_way(start_daemon, serve, how):
    """The version that it is made from stays for as long as the push takes."""
    daemon = start_daemon(models={})
    process = serve(daemon.config.socket, version=0, mode="copy", kind="wide")
    push_small(address_of(daemon), state(1, "wide"), label="v1")
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(kind=CODED, nth=1)
        with Background(push_small, proxy.address, mixed(2, 1), label="v2") as pushing:
            held.wait()
            if how == "kill":
                process.kill()
            else:
                process.ask("detach")
            until(lambda: not sessions(daemon), "the daemon has seen it leave")
            held.release()
            receipt = pushing.result()
    assert receipt.swapped == 0
    assert receipt.bytes_sent < receipt.bytes_total
    (model,) = status(address_of(daemon)).models
    assert (model.label, model.digest) == ("v2", receipt.digest)
    process = serve(daemon.config.socket, version=0, mode="copy", kind="wide")
    assert process.ask("label") == "v2"
    assert process.ask("verify") == receipt.digest


# --- many steps ------------------------------------------------------------------------------------------------------


def steps(count):
    """The layers of the fine-tuned model in the versions that are there, and synthetic steps from the last of them on.

    Its embeddings, as many weights again, were not fine-tuned.
    """
    rows = finetune.tensors()
    version = None
    for at, (_, words) in enumerate(finetune.words()):
        if at == count:
            return
        version = of_words(*finetune.part_of(rows, words))
        yield version
    assert version is not None
    for seed in range(count - at - 1):
        version = following(version, seed=seed)
        yield version


@pytest.mark.timeout(600)
def test_fifty_steps_of_a_real_models_layers(start_shipd):
    """Sender and daemon agree at each step, and the memory of neither grows."""
    daemon = start_shipd(models={"model": "1GiB"})
    daemons: list[int] = []
    senders: list[int] = []
    kept: list[int] = []
    sent: list[float] = []
    for at, version in enumerate(steps(51)):
        receipt = push_small(daemon.address, as_state_dict(version), label=f"v{at}")
        (model,) = status(daemon.address).models
        assert receipt.digest == version.digest == model.digest
        if at:
            assert receipt.base
            sent.append(version.nbytes / receipt.bytes_sent)
        gc.collect()
        # Else what the heap of a process in which other tests have run keeps of what was freed would count as well.
        ctypes.CDLL(None).malloc_trim(0)
        daemons.append(memory(daemon.pid)["RssAnon"])
        senders.append(memory()["RssAnon"])
        kept.append(kept_versions.memory_used)
    assert min(sent) > 20
    assert sorted(sent)[len(sent) // 2] > 300
    # The first dozen fill eight versions, caches of layouts, and the heap's holes.
    assert max(daemons[12:]) < max(daemons[:12]) + 8 * MIB
    assert max(senders[12:]) < max(senders[:12]) + 24 * MIB
    assert max(kept) < version.nbytes * 1.4
