"""When a push codes and when it sends bytes as they are, by a clock that the test moves. No threads, no sockets."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shipd.client import coded
from shipd.client.coded import CodedRuns
from shipd.transfer.times import Times

MB = 1e6


class Stage:
    """A push as ``CodedRuns`` sees it: what was sent, what coding is thought of, and which rates are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bytes_sent = 0
        self.coding_pays = True
        self.rates: list[float] = []
        self.sending = True
        self.agreed = object()
        self.connection = None
        self.lock = threading.Lock()
        self.times = Times()
        self.base = self.chooser = object()
        self.outlets = SimpleNamespace(bytes_sent=0, lock=self.lock, want=lambda *_: None)
        self.account = SimpleNamespace(times=Times())

    def reads_base(self, _: object) -> bool:
        return False

    def begin(self, *_: object) -> bool:
        return True

    def plain(self) -> bool:
        return True

    def reconsider(self, rate: float) -> None:
        self.rates.append(rate)

    def hold_little(self, *_: object) -> None:
        pass

    def pump(self, *_: object) -> list[object]:
        return []


class EndedEncoder:
    """Has found at once that nothing is to be coded."""

    done = True

    def __init__(self, *_: object, **__: object) -> None:
        self.times = Times()

    def take(self, _patience: float) -> None:
        return None

    def stop(self) -> None:
        pass


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(coded, "time", SimpleNamespace(monotonic=lambda: stage.now))
    monkeypatch.setattr(coded, "Encoder", EndedEncoder)
    return stage


def runs_of(stage: Stage) -> CodedRuns:
    acting = cast("Any", stage)
    return CodedRuns(acting, acting, acting, cast("Any", stage.outlets), acting, cast("Any", stage.account), 30.0)


def coding(runs: CodedRuns) -> bool:
    """Whether what goes next is coded."""
    return runs.active


def test_the_rate_of_bytes_as_they_are_is_not_taken_from_when_they_were_coded(stage):
    """Ten seconds of little coded bytes are no slow link: on that belief the next push would code for nothing."""
    runs = runs_of(stage)
    assert coding(runs)
    stage.now, stage.bytes_sent, stage.coding_pays = 10.0, 1000, False
    runs.step(list)
    assert not coding(runs)
    assert stage.rates == []
    stage.now, stage.bytes_sent = 10.5, 1000 + int(50 * MB)
    assert not coding(runs)
    assert stage.rates == [100 * MB]
