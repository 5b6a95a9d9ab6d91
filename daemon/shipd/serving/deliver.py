"""Versions for whatever has vLLM's ``load_weights``: handed over as names and tensors, and never read back.

    load_weights(weights: Iterable[tuple[str, Tensor]])

That is how the models of vLLM and SGLang load a checkpoint, and how trainers give them new weights: the names are the
checkpoint's, and what becomes of the tensors (fused, split, cast, moved) is the callee's affair.

What it gets are tensors in memory, of a mapping of the image that is copied where it is written. It may keep them: once
the image is about to hold another version, whatever is still referred to becomes memory of this process.

Not atomic: a load_weights that fails has loaded a part. Then the version before is handed over again, from its image.

Belongs here: making pairs of an image, calling load_weights, and what is done where that fails.
"""

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Final, Protocol

import torch
from torch import Tensor

from shipd.errors import AttachError, NotReadBack, StageFailed, SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits
from shipd.serving.staging import Torn, never
from shipd.serving.turns import short_turns
from shipproto.layout import Layout
from shipproto.names import harmless
from shipproto.structure import Structure

log = logging.getLogger("shipd.serving")

_MOST_SHOWN: Final = 500
"""Characters of what load_weights raises that are told."""

Pairs = Iterable[tuple[str, Tensor]]


class LoadsWeights(Protocol):
    """What can be attached beside modules. What ``load_weights`` returns is not looked at."""

    def load_weights(self, weights: Pairs, /) -> object: ...


class Image(ImageMapping):
    """An image as it is, and a way to get further mappings of it, which needs the descriptor."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int, size: int) -> None:
        """See ImageMapping; the access is READ_ONLY."""
        super().__init__(fd, size, Access.READ_ONLY)
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd)

    def copied_on_write(self) -> ImageMapping:
        """A mapping to hand out. Raises OSError."""
        return ImageMapping.private(self._fd, self.size)


class Handout:
    """One version, made ready to be handed out once. Raises OSError, and StageFailed where torch lacks a dtype."""

    def __init__(self, image: Image, layout: Layout) -> None:
        self.image = image
        self._memory = image.copied_on_write()
        # Else whoever copies a tensor would find its pages one by one, and holds would wait for that.
        self._memory.populate()
        self._given: list[tuple[weakref.ref[memoryview], int, int]] = []
        with short_turns():
            self._pairs = [(name, self._tensor(layout, row)) for row, name in enumerate(layout.structure.names)]
        self.handed = 0
        self.total = len(self._pairs)

    def _tensor(self, layout: Layout, row: int) -> Tensor:
        structure = layout.structure
        name, shape, size = structure.names[row], structure.shape(row), int(structure.nbytes[row])
        dtype = getattr(torch, structure.dtype(row), None)
        if not isinstance(dtype, torch.dtype):
            raise StageFailed(
                f"tensor {name!r} is {structure.dtype(row)}, which torch {torch.__version__} does not have"
            )
        start = int(layout.offsets[row])
        if not size:
            content = torch.zeros(0, dtype=torch.uint8)
        elif int(structure.primary[row]) != row:
            # What is tied is one place in the image. Whoever changes what he gets must not change the other as well.
            content = torch.zeros(size, dtype=torch.uint8)
            bits.copy_all([content], [bits.flat_bytes(self._memory.raw[start : start + size])])
        else:
            # A memoryview for each tensor: its storage refers to that and to nothing else of the mapping, so when it
            # is gone nothing can read the tensor any more.
            anchor = self._memory.raw[start : start + size]
            self._given.append((weakref.ref(anchor), start, start + size))
            content = bits.flat_bytes(anchor)
        return content.view(dtype).view(shape)

    def pairs(self) -> Generator[tuple[str, Tensor], None, None]:
        """Every name with its tensor, once, in the structure's order."""
        for pair in self._pairs:
            self.handed += 1
            yield pair

    def forget_pairs(self) -> None:
        """From here on, only whoever has been given a tensor refers to it."""
        self._pairs = []

    def part(self) -> None:
        """Whatever is still referred to stays what it is when the image becomes something else. Raises OSError."""
        for anchor, start, stop in self._given:
            if anchor() is not None:
                self._memory.own(start, stop)

    def is_referred_to(self) -> bool:
        """Whether somebody has kept a tensor."""
        return any(anchor() is not None for anchor, _, _ in self._given)


class DeliverSwap:
    """``load_weights``, see Swapper; before images come, ``lay_out``."""

    mode: Final = "load_weights"
    access: Final = Access.READ_ONLY

    def __init__(self, target: LoadsWeights) -> None:
        self._target = target
        self._layout: Layout | None = None
        self._staged: Handout | None = None
        self._current: tuple[Image, Layout] | None = None
        # What may still be referred to of versions that have been handed out, whether they were taken or not.
        self._lent: list[Handout] = []
        # load_weights runs on another thread than the one that attached, and expects the same device.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @property
    def structure(self) -> Structure | None:
        """Of the version that was taken last; None where there is none, or nobody knows what is loaded."""
        return None if self._current is None else self._current[1].structure

    def lay_out(self, layout: Layout) -> None:
        """Images that are staged from now on are laid out like this."""
        self._layout = layout

    def fill(self, image: memoryview) -> None:
        """See Swapper. It is the version that was delivered."""
        if self._current is None:
            raise AttachError("no version has been delivered that could be read")
        original, layout = self._current
        if len(image) != layout.size:
            raise AttachError(f"an image of {len(image)} bytes cannot hold a version of {layout.size}")
        bits.copy_all([bits.flat_bytes(image)], [bits.flat_bytes(original.raw)])

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool] = never) -> None:
        """See Swapper. What is handed out is another mapping."""

    def adopt(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        assert isinstance(mapping, Image)
        assert self._layout is not None
        self._current = mapping, self._layout
        self.settle()

    def arrived(self, mapping: ImageMapping, chunks: Iterable[tuple[int, int]]) -> None:
        """See Swapper. The image is where the bytes are needed."""

    def stage(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        layout = self._layout
        if layout is None or not isinstance(mapping, Image) or mapping.size != layout.size:
            raise StageFailed(f"cannot stage an image of {mapping.size} bytes: nothing is known of what is in it")
        self._staged = Handout(mapping, layout)

    def discard(self) -> None:
        """See Swapper."""
        self._staged = None
        self.settle()

    def approach(self) -> None:
        """See Swapper. What the images hold does not fit into a cache."""

    def apply(self) -> None:
        """See Swapper."""
        staged, self._staged = self._staged, None
        if staged is None or self._layout is None:
            raise RuntimeError("nothing is staged")
        try:
            self._deliver(staged)
        except BaseException as error:
            problem = _how_far(error, staged)
            log.exception("a version could not be delivered", extra={"why": problem})
            before, self._current = self._current, None
            self._deliver_again(before, problem, error)
            self._current = before
            raise SwapFailed(f"{problem}; the version before was given to it again and serves") from error
        self._current = staged.image, self._layout

    def _deliver_again(self, before: tuple[Image, Layout] | None, problem: str, error: BaseException) -> None:
        if before is None:
            raise Torn(f"{problem}, and there is no version before that it could be given again") from error
        try:
            handout = Handout(*before)
        except OSError as second:
            raise Torn(f"{problem}, and the version before cannot be given to it again: {second!r}") from error
        try:
            self._deliver(handout)
        except BaseException as second:
            again = _how_far(second, handout)
            log.exception("nor could the version before", extra={"why": again})
            raise Torn(f"{problem}; given the version before again, {again}") from error

    def _deliver(self, handout: Handout) -> None:
        """Have load_weights take a version. Whatever that raises comes out here."""
        self._lent.append(handout)
        pairs = handout.pairs()
        device = contextlib.nullcontext() if self._device is None else torch.cuda.device(self._device)
        try:
            with torch.no_grad(), device:
                # What holds have started may still be computing with what is about to be overwritten.
                _drain()
                try:
                    self._target.load_weights(pairs)
                finally:
                    # What has been started may still be reading what is about to be let go of.
                    _drain()
        finally:
            pairs.close()
            handout.forget_pairs()
        if handout.handed < handout.total:
            raise _LeftOver

    def settle(self) -> bool:
        """See Swapper. Of the current version nothing has to be parted yet: its image stays what it is."""
        current = None if self._current is None else self._current[0]
        kept = []
        for handout in self._lent:
            if handout.image is current:
                if handout.is_referred_to():
                    kept.append(handout)
                continue
            try:
                handout.part()
            except OSError as error:
                log.warning("what load_weights has kept of a version keeps its image", extra={"why": str(error)})
                kept.append(handout)
        self._lent = kept
        return all(handout.image is current for handout in kept)

    def reads(self, mapping: ImageMapping) -> bool:
        """See Swapper."""
        current = None if self._current is None else self._current[0]
        return mapping is not current and any(handout.image is mapping for handout in self._lent)

    def let_go(self) -> None:
        """See Swapper. Takes as much memory as load_weights has kept of the version; needs no closed gate."""
        self._current = None
        self.settle()

    def lends(self) -> bool:
        """Whether somebody refers to memory that is still the daemon's."""
        return any(handout.is_referred_to() for handout in self._lent)

    def forget(self, mapping: ImageMapping) -> None:
        """See Swapper, but for the version that was taken last: the daemon will not write to its image while this
        process lives and has not attached again, and then needs it to be brought back."""
        if self._staged is not None and self._staged.image is mapping:
            self._staged = None

    def digest(self) -> bytes:
        """Raises NotReadBack."""
        raise NotReadBack("what load_weights makes of a version cannot be read back")

    def close(self) -> None:
        """See Swapper."""
        self._staged = self._current = None
        self._lent = []


def _drain() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _LeftOver(Exception):
    """load_weights has returned and has not taken everything: it has returned early, or is a generator or coroutine."""


def _how_far(error: BaseException, handout: Handout) -> str:
    count = f"{handout.handed} of {handout.total} tensors"
    if isinstance(error, _LeftOver):
        return f"load_weights returned after it had taken {count}"
    return f"load_weights failed when it had taken {count}: {_shown(error)}"


def _shown(error: BaseException) -> str:
    """As it shows itself, if it can: nothing that belongs to the callee may get in the way of what has to be done."""
    try:
        return harmless(repr(error), _MOST_SHOWN)
    except Exception:  # noqa: BLE001  whatever it is
        return f"{type(error).__name__}, which cannot be shown"
