"""Forwards that end with an exception, their own, a hook's or Ctrl-C: they hold up no swap."""

import signal
import threading

import pytest
import torch

from tests.conftest import StartDaemon
from tests.support.exact import Exact, ask, question, right_answer, state
from tests.support.processes import Background, address_of, push
from tests.support.serving_process import Attach, Serve, both, serves

pytest_plugins = ["tests.support.serving_process"]


class Fragile(Exact):
    """Raises in the middle of a forward what it is told to."""

    failure: BaseException | None = None

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return super().forward(numbers)


@both
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(3), ValueError("no"), GeneratorExit()], ids=repr)
def test_a_forward_that_raises(start_daemon: StartDaemon, attach: Attach, mode: str, failure: BaseException) -> None:
    """Also what skips torch's hooks, in a thread that lives on."""
    daemon = start_daemon(models={}, commit_timeout=5.0)
    model = Fragile(0)
    attach(model, daemon, mode=mode)
    raised, leave = threading.Event(), threading.Event()
    answers: list[str] = []

    def work() -> None:
        model.failure = failure
        with pytest.raises(type(failure)):
            model(question())
        model.failure = None
        raised.set()
        assert leave.wait(20)
        answers.append(ask(model))

    with Background(work) as worker:
        assert raised.wait(20)
        receipt = push(address_of(daemon), state(1), label="v1")
        leave.set()
        worker.result()
    assert receipt.swapped == 1
    assert answers == [right_answer(1)]


def test_ctrl_c_in_the_middle_of_forwards(start_daemon: StartDaemon, serve: Serve) -> None:
    daemon = start_daemon(models={}, commit_timeout=5.0)
    process = serve(daemon.config.socket)
    for number in range(1, 6):
        process.begin("forward_until_interrupted")
        push(address_of(daemon), state(2 * number - 1), label=f"v{2 * number - 1}")
        process.signal(signal.SIGINT)
        assert process.result() == "KeyboardInterrupt"
        receipt = push(address_of(daemon), state(2 * number), label=f"v{2 * number}")
        serves(daemon, process, receipt, 2 * number)


@both
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_a_users_hook_that_raises(start_daemon: StartDaemon, attach: Attach, mode: str, early: bool) -> None:
    """Registered before the model was attached, or after."""
    daemon = start_daemon(models={}, commit_timeout=5.0)
    model = Exact(0)
    failing = True

    def hook(*_: object) -> None:
        if failing:
            raise ValueError("the user's own")

    def register() -> None:
        model.register_forward_pre_hook(hook)
        model.register_forward_pre_hook(hook, prepend=True)
        model.register_forward_hook(hook)

    if early:
        register()
    attach(model, daemon, mode=mode)
    if not early:
        register()
    raised, leave = threading.Event(), threading.Event()

    def work() -> None:
        with pytest.raises(ValueError, match="the user's own"):
            ask(model)
        raised.set()
        assert leave.wait(20)

    with Background(work):
        assert raised.wait(20)
        assert push(address_of(daemon), state(1), label="v1").swapped == 1
        leave.set()
    failing = False
    assert ask(model) == right_answer(1)
