"""YOLOv3 for tests: the network of its published layer table, what it is trained with, and how boxes are read from it.

    LAYERS     the table: cfg/yolov3.cfg of https://github.com/pjreddie/darknet, layer by layer, with its numbering
    Yolo       the network: images in, one map of raw predictions for each of three scales out
    loss       what one batch is trained on
    decode     boxes, confidences and class scores from the maps
    detect     what is in one image: ``decode`` and non-maximum suppression

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", arXiv:1804.02767, and "YOLO9000", arXiv:1612.08242, for
the boxes. Everything is deterministic: the weights, the order of detections, and which of two equal boxes stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES: Final = 80
"""Those of COCO."""

ANCHORS: Final = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
"""Width and height in pixels of the boxes that predictions are relative to."""

PARAMETERS: Final = 61_949_149
"""Weights and biases of the convolutions, scales and shifts of the normalisations: what Keras and Ultralytics count."""

WEIGHTS_FILE: Final = 248_007_048
"""Bytes of https://pjreddie.com/media/files/yolov3.weights: a header of 20, and every parameter, running mean and
running variance as a float32."""

STRIDES: Final = (32, 16, 8)
"""Pixels between neighbouring cells of the maps, in their order."""


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """With normalisation and a leaky rectifier, or ``plain``: with a bias and neither of them."""

    filters: int
    size: int
    stride: int = 1
    plain: bool = False


@dataclass(frozen=True)
class Shortcut:
    """The sum of the layer before and of the one ``back`` layers back."""

    back: int = 3


@dataclass(frozen=True)
class Route:
    """The channels of these layers, one after another; negative ones are counted back from here."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Upsample:
    """Each pixel becomes four."""


@dataclass(frozen=True)
class Detection:
    """The layer before is a map of predictions, of boxes relative to these anchors."""

    anchors: tuple[int, ...]


Layer = Convolution | Shortcut | Route | Upsample | Detection


def _residual(filters: int, count: int) -> tuple[Layer, ...]:
    return (Convolution(filters // 2, 1), Convolution(filters, 3), Shortcut()) * count


def _head(filters: int, anchors: tuple[int, ...]) -> tuple[Layer, ...]:
    last = Convolution(len(anchors) * (5 + CLASSES), 1, plain=True)
    return (*(Convolution(filters, 1), Convolution(2 * filters, 3)) * 3, last, Detection(anchors))


LAYERS: Final[tuple[Layer, ...]] = (
    # Darknet-53 without its classifier.
    Convolution(32, 3),
    *(Convolution(64, 3, stride=2), *_residual(64, 1)),
    *(Convolution(128, 3, stride=2), *_residual(128, 2)),
    *(Convolution(256, 3, stride=2), *_residual(256, 8)),
    *(Convolution(512, 3, stride=2), *_residual(512, 8)),
    *(Convolution(1024, 3, stride=2), *_residual(1024, 4)),
    *_head(512, (6, 7, 8)),
    *(Route((-4,)), Convolution(256, 1), Upsample(), Route((-1, 61)), *_head(256, (3, 4, 5))),
    *(Route((-4,)), Convolution(128, 1), Upsample(), Route((-1, 36)), *_head(128, (0, 1, 2))),
)


# --- the network -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A row of the table that has weights."""

    def __init__(self, channels: int, row: Convolution) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, row.filters, row.size, row.stride, row.size // 2, bias=row.plain)
        self.norm = None if row.plain else nn.BatchNorm2d(row.filters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else functional.leaky_relu(self.norm(x), 0.1)


class Yolo(nn.Module):
    """YOLOv3, with random weights by ``seed`` alone.

    Takes images f32[n, 3, h, w] of 0 to 1, where h and w are multiples of 32. Gives maps f32[n, 3 * 85, h/32, w/32],
    and the same for 16 and for 8: of each cell and anchor x, y, width, height, whether there is a box, and 80 classes.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        channels: list[int] = []
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            for at, row in enumerate(LAYERS):
                before = channels[-1] if channels else 3
                match row:
                    case Convolution():
                        self.layers[str(at)] = Block(before, row)
                        channels.append(row.filters)
                    case Route():
                        channels.append(sum(channels[layer] for layer in row.layers))
                    case _:
                        channels.append(before)

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        maps: list[Tensor] = []
        x = images
        for at, row in enumerate(LAYERS):
            match row:
                case Convolution():
                    x = self.layers[str(at)](x)
                case Shortcut():
                    x = x + outputs[-row.back]
                case Route():
                    x = torch.cat([outputs[layer] for layer in row.layers], dim=1)
                case Upsample():
                    x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                case Detection():
                    maps.append(x)
            outputs.append(x)
        return maps


# --- boxes -----------------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A box in an image: its centre and size in pixels, and what is in it."""

    x: float
    y: float
    width: float
    height: float
    kind: int


def _anchors() -> list[tuple[int, ...]]:
    return [row.anchors for row in LAYERS if isinstance(row, Detection)]


def _cells(raw: Tensor) -> Tensor:
    """f32[n, anchors, rows, columns, 85] of a map."""
    n, channels, rows, columns = raw.shape
    return raw.view(n, channels // (5 + CLASSES), 5 + CLASSES, rows, columns).permute(0, 1, 3, 4, 2)


def loss(maps: Sequence[Tensor], truth: Sequence[Sequence[Box]]) -> Tensor:
    """The sum of section 2.1 of the paper over a batch, for the boxes in each of its images.

    Each box is the business of one prediction: of its centre's cell, and of the anchor whose shape is nearest. Only
    that one has its place, size and class corrected; all are told whether there is a box.
    """
    shapes = torch.tensor(ANCHORS, dtype=torch.float32)
    total = maps[0].new_zeros(())
    for raw, stride, anchors in zip(maps, STRIDES, _anchors(), strict=True):
        cells = _cells(raw)
        present = torch.zeros_like(cells[..., 4])
        for image, boxes in enumerate(truth):
            for box in boxes:
                size = torch.tensor([box.width, box.height])
                common = torch.minimum(shapes, size).prod(1)
                nearest = int((common / (shapes.prod(1) + size.prod() - common)).argmax())
                if nearest not in anchors:
                    continue
                row, column = int(box.y / stride), int(box.x / stride)
                given = cells[image, anchors.index(nearest), row, column]
                place = torch.tensor([box.x / stride - column, box.y / stride - row])
                kind = functional.one_hot(torch.tensor(box.kind), CLASSES).float()
                total = total + (given[:2].sigmoid() - place).square().sum()
                total = total + (given[2:4] - (size / shapes[nearest]).log()).square().sum()
                total = total + functional.binary_cross_entropy_with_logits(given[5:], kind, reduction="sum")
                present[image, anchors.index(nearest), row, column] = 1
        total = total + functional.binary_cross_entropy_with_logits(cells[..., 4], present, reduction="sum")
    return total


def decode(maps: Sequence[Tensor]) -> Tensor:
    """f32[n, boxes, 85]: left, top, right, bottom in pixels, confidence, and a score for each class."""
    decoded = []
    for raw, stride, anchors in zip(maps, STRIDES, _anchors(), strict=True):
        cells = _cells(raw)
        rows, columns = cells.shape[2:4]
        corner = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1)
        shape = torch.tensor([ANCHORS[at] for at in anchors]).view(1, len(anchors), 1, 1, 2)
        centre = (cells[..., :2].sigmoid() + corner) * stride
        half = cells[..., 2:4].exp() * shape / 2
        boxes = torch.cat([centre - half, centre + half, cells[..., 4:].sigmoid()], dim=-1)
        decoded.append(boxes.flatten(1, 3))
    return torch.cat(decoded, dim=1)


def detect(model: nn.Module, image: Tensor, *, threshold: float = 0.25, overlap: float = 0.45) -> Tensor:
    """f32[detections, 6]: left, top, right, bottom, score and class of what is in one image f32[3, h, w], best first.

    Of boxes of one class that overlap by more than ``overlap`` of their union, the one with the highest score stays.
    """
    with torch.no_grad():
        (boxes,) = decode(model(image[None]))
    scores, kinds = (boxes[:, 4:5] * boxes[:, 5:]).max(1)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    found = torch.cat([boxes[:, :4], scores[:, None], kinds[:, None].float()], dim=1)[order]
    kept: list[Tensor] = []
    while len(found):
        best, found = found[0], found[1:]
        kept.append(best)
        found = found[(found[:, 5] != best[5]) | (_overlaps(best, found) <= overlap)]
    return torch.stack(kept) if kept else torch.empty(0, 6)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box with each of the others."""
    common = (torch.minimum(box[2:4], others[:, 2:4]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0).prod(1)
    areas = (others[:, 2:4] - others[:, :2]).prod(1)
    return common / ((box[2:4] - box[:2]).prod() + areas - common)
