"""A YOLOv3 that was trained on one machine and is loaded on another, while it serves: detections equal to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import StartDaemon
from tests.support.bitwise import bits
from tests.support.processes import address_of, push
from tests.support.serving_process import Attach
from tests.support.yolo import (
    CLASSES,
    LAYERS,
    PARAMETERS,
    STRIDES,
    WEIGHTS_FILE,
    Box,
    Convolution,
    Detection,
    Yolo,
    decode,
    detect,
    loss,
)

pytest_plugins = ["tests.support.serving_process", "tests.support.bitwise"]

pytestmark = pytest.mark.usefixtures("one_thread")

THRESHOLD = 0.2
"""One step has taught it to doubt; a score of 0.25 it gives to nothing."""


def image(side: int) -> torch.Tensor:
    """Noise, with two rectangles in it."""
    made = torch.rand(3, side, side, generator=torch.Generator().manual_seed(side)) * 0.3
    made[0, side // 5 : side * 3 // 4, side // 10 : side // 2] += 0.7
    made[2, side * 5 // 8 :, side * 5 // 8 :] += 0.7
    return made


@dataclass(frozen=True)
class Trained:
    """A training run's end: what nn.DataParallel saved, the same without it, and what the network detects."""

    parallel: Path
    plain: Path
    detections: torch.Tensor


def train_one_step(model: nn.Module) -> None:
    """On one image of two boxes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    loss(model(image(96)[None]), [[Box(29, 45, 38, 53, kind=3), Box(78, 78, 36, 36, kind=7)]]).backward()
    optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Trained under nn.DataParallel, saved as that gives it, and loaded as everybody does."""
    folder = tmp_path_factory.mktemp("yolo")
    run = Trained(folder / "parallel.pth", folder / "plain.pth", torch.empty(0))
    model = nn.DataParallel(Yolo(seed=1))
    train_one_step(model)
    torch.save(model.state_dict(), run.parallel)
    torch.save(model.module.state_dict(), run.plain)

    local = Yolo(seed=2)
    state = torch.load(run.parallel, map_location="cpu", weights_only=True)
    local.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    yield Trained(run.parallel, run.plain, detect(local.eval(), image(160), threshold=THRESHOLD))
    for path in (run.parallel, run.plain):
        path.unlink()


def test_it_is_the_published_network() -> None:
    """By its count of parameters, by the size of its authors' file of weights, and by its numbering of layers."""
    model = Yolo()
    counted = sum(parameter.numel() for parameter in model.parameters())
    running = sum(buffer.numel() for name, buffer in model.named_buffers() if "running" in name)
    assert counted == PARAMETERS
    assert 20 + 4 * (counted + running) == WEIGHTS_FILE
    assert len(LAYERS) == 107
    assert [at for at, row in enumerate(LAYERS) if isinstance(row, Detection)] == [82, 94, 106]
    assert sum(isinstance(row, Convolution) for row in LAYERS) == 75
    with torch.no_grad():
        maps = model.eval()(image(64)[None])
    assert [tuple(each.shape) for each in maps] == [(1, 3 * (5 + CLASSES), 64 // s, 64 // s) for s in STRIDES]


def test_boxes_are_read_from_its_maps() -> None:
    """A prediction of zeros is a box in the middle of its cell with its anchor's shape; of equals the first stays."""
    maps = [torch.zeros(1, 255, 64 // stride, 64 // stride) for stride in STRIDES]
    cells = maps[0].view(3, 85, 2, 2)
    # Nothing anywhere, but for the third class in the cell of the second row and first column, of two anchors.
    for each in maps:
        each.view(3, 85, *each.shape[2:])[:, 4] = -20
    cells[0:2, 4, 1, 0] = torch.tensor([3.0, 2.0])
    cells[0:2, 5 + 2, 1, 0] = 3
    found = decode(maps)[0]
    assert len(found) == 3 * (4 + 16 + 64)
    (at, other) = torch.nonzero(found[:, 4] > 0.5).flatten().tolist()
    assert found[at, :4].tolist() == [16 - 58, 48 - 45, 16 + 58, 48 + 45]
    assert found[other, :4].tolist() == [16 - 78, 48 - 99, 16 + 78, 48 + 99]

    class Fixed(nn.Module):
        def forward(self, _: torch.Tensor) -> list[torch.Tensor]:
            return maps

    assert [row[5].item() for row in detect(Fixed(), image(64))] == [2, 2], "their overlap is 0.34"
    (best,) = detect(Fixed(), image(64), overlap=0.3)
    assert torch.equal(best[:4], found[at, :4])
    assert best[4].item() == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item() ** 2)


def test_it_follows_its_checkpoint(start_daemon: StartDaemon, attach: Attach, trained: Trained) -> None:
    daemon = start_daemon(models={})
    model = Yolo(seed=3).eval()
    resident = attach(model, daemon)
    before = detect(model, image(160), threshold=0)
    receipt = push(address_of(daemon), trained.plain, label="trained")
    assert (receipt.swapped, receipt.tensors) == (1, len(model.state_dict()))
    assert resident.verify() == receipt.digest
    detections = detect(model, image(160), threshold=THRESHOLD)
    assert bits([detections]) == bits([trained.detections])
    assert len(detections) > 100
    assert not torch.equal(before[: len(detections)], detections)
    assert detections[:, 4].tolist() == sorted(detections[:, 4].tolist(), reverse=True)


def test_its_data_parallel_checkpoint_fits_every_process(
    start_daemon: StartDaemon, attach: Attach, trained: Trained
) -> None:
    """A plain, a wrapped and a compiled module serve under one name, and one push of one file is for all of them."""
    daemon = start_daemon(models={})
    models: dict[str, Any] = {
        "plain": Yolo(seed=3).eval(),
        "wrapped": nn.DataParallel(Yolo(seed=4)).eval(),
        "compiled": torch.compile(Yolo(seed=5).eval(), backend="eager"),
    }
    residents = [attach(model, daemon) for model in models.values()]
    # Whatever attached first: compiled before the weights change, too.
    assert len({bits([detect(model, image(160), threshold=THRESHOLD)]) for model in models.values()}) == 1

    receipt = push(address_of(daemon), trained.parallel, label="trained")
    assert (receipt.swapped, receipt.stale) == (len(models), ())
    assert {resident.verify() for resident in residents} == {receipt.digest}
    for model in models.values():
        assert bits([detect(model, image(160), threshold=THRESHOLD)]) == bits([trained.detections])
    # With or without the prefix, it is the same version.
    assert push(address_of(daemon), trained.plain, label="trained").already
