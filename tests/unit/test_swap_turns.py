"""The switch interval while a gate is closed: short, and afterwards what it was."""

import functools
import os
import sys
import threading
import time

import pytest

from shipd.serving.gate import Gate
from shipd.serving.turns import TURN, short_turns
from tests.support.gates import DEADLINE, NEW, OLD, Worker, swap


@pytest.fixture(autouse=True)
def usual():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield sys.getswitchinterval()
    assert sys.getswitchinterval() == pytest.approx(0.005)
    sys.setswitchinterval(before)


def test_a_swap_shortens_it_and_puts_it_back(usual):
    seen: list[float] = []

    def action():
        seen.append(sys.getswitchinterval())
        return NEW

    swap(Gate(OLD), action, then=lambda _: seen.append(sys.getswitchinterval()))
    assert seen == pytest.approx([TURN, TURN])
    assert sys.getswitchinterval() == usual


def test_it_is_put_back_when_a_swap_fails(usual):
    def action():
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        swap(Gate(OLD), action)
    assert sys.getswitchinterval() == usual


def test_what_others_set_meanwhile_stays(usual):
    with short_turns():
        sys.setswitchinterval(0.003)
    assert sys.getswitchinterval() == pytest.approx(0.003)
    sys.setswitchinterval(0.0001)
    with short_turns():
        assert sys.getswitchinterval() == pytest.approx(0.0001)
    assert sys.getswitchinterval() == pytest.approx(0.0001)
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("first", [0, 1])
def test_two_at_once_in_either_order(first, usual):
    inside = threading.Barrier(3)
    leave = [threading.Event(), threading.Event()]

    def work(index):
        with short_turns():
            inside.wait(DEADLINE)
            assert leave[index].wait(DEADLINE)

    workers = [Worker(functools.partial(work, index)) for index in range(2)]
    inside.wait(DEADLINE)
    assert sys.getswitchinterval() == pytest.approx(TURN)
    leave[first].set()
    workers[first].finish()
    assert sys.getswitchinterval() == pytest.approx(TURN)
    leave[1 - first].set()
    workers[1 - first].finish()
    assert sys.getswitchinterval() == usual


def test_an_interrupt_on_the_way_in_does_not_leave_it_short(usual, monkeypatch):
    def interrupt(_seconds):
        assert sys.getswitchinterval() == pytest.approx(TURN)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), short_turns():
        pytest.fail("not interrupted")
    monkeypatch.undo()
    assert sys.getswitchinterval() == usual

    real = sys.setswitchinterval

    def set_and_interrupt(seconds):
        real(seconds)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "setswitchinterval", set_and_interrupt)
    with pytest.raises(KeyboardInterrupt), short_turns():
        pytest.fail("not interrupted")
    assert sys.getswitchinterval() == usual


def test_a_child_that_another_thread_forks_has_the_usual_one(usual):
    inside, leave = threading.Event(), threading.Event()

    def work():
        with short_turns():
            inside.set()
            assert leave.wait(DEADLINE)

    worker = Worker(work)
    assert inside.wait(DEADLINE)
    pid = os.fork()
    if not pid:
        os._exit(0 if sys.getswitchinterval() == usual else 1)
    leave.set()
    worker.finish()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
