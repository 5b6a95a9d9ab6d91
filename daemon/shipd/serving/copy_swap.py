"""``copy`` on the CPU: the bytes of the live tensors are overwritten where they are; the image is the shadow.

``direct`` is the same thing there: the image is copied into the live tensors in place, with the image before as the
undo, and no third copy of the weights exists. What differs is on a device, see ``cuda`` and ``cuda_direct``.

Addresses, Parameter objects, views of parameters, requires_grad and autograd's version counters stay as they are.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from shipd.errors import SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits, scatter
from shipd.serving.staging import Torn, check_stage, check_unchanged, fill_image, never, read_digest
from shipd.serving.tensors import ModelTensors
from shipd.serving.turns import short_turns
from shipproto.layout import Layout


class _Sources(NamedTuple):
    """An image as it is copied from: small tensors of which there are many, and views of the others."""

    parts: list[scatter.Part]
    views: list[Tensor]


class CopySwap:
    """``copy``, or ``direct``; see Swapper."""

    access = Access.READ_ONLY

    def __init__(self, tensors: ModelTensors, layout: Layout, mode: str = "copy") -> None:
        self.mode = mode
        self.tensors = tensors
        self.layout = layout
        self._rows = bits.primary_rows(layout)
        self._live = [bits.integers(tensors.live[row]) for row in self._rows]
        self._scatter = scatter.Scatter(layout, self._rows, self._live)
        singly = [at for at, taken in enumerate(self._scatter.taken) if not taken]
        self._single_rows = [self._rows[at] for at in singly]
        self._singles = [self._live[at] for at in singly]
        # Slots are used again and again, and 20,000 views take 30 ms.
        self._sources: weakref.WeakKeyDictionary[ImageMapping, _Sources] = weakref.WeakKeyDictionary()
        self._current: ImageMapping | None = None
        self._staged: ImageMapping | None = None
        self._saved: list[Tensor] = []

    def fill(self, image: memoryview) -> None:
        """See Swapper."""
        check_unchanged(self.tensors)
        fill_image(self.layout, self.tensors.live, image)

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool] = never) -> None:
        """See Swapper."""
        mapping.populate(cancelled)

    def adopt(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        self._current = mapping
        self._saved = []

    def arrived(self, mapping: ImageMapping, chunks: Iterable[tuple[int, int]]) -> None:
        """See Swapper. The image is where the bytes are needed."""

    def stage(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        check_stage(mapping, self.layout, self.access, self.tensors)
        self._prepare(mapping)
        if self._current is None and not self._saved:
            # The model came with weights of its own, which no image has: this once, an undo is worth its memory.
            with short_turns():
                self._saved = self._save()
        self._staged = mapping

    def discard(self) -> None:
        """See Swapper."""
        self._staged = None
        self._saved = []

    def approach(self) -> None:
        """See Swapper. What the images hold does not fit into a cache."""

    def apply(self) -> None:
        """See Swapper."""
        staged = self._staged
        if staged is None:
            raise RuntimeError("nothing is staged")
        self._staged = None
        try:
            self._make_ready(staged)
        except BaseException as error:
            raise SwapFailed(f"the swap did not begin; the old version serves: {error!r}") from error
        try:
            self._write(staged)
        except BaseException as error:
            try:
                self._undo()
            except BaseException as second:  # noqa: BLE001  whatever it is, the model is torn
                raise Torn(f"the swap failed ({error!r}) and could not be undone ({second!r})") from error
            raise SwapFailed(f"the swap failed and was undone; the old version serves: {error!r}") from error
        self._current = staged
        self._saved = []

    def settle(self) -> bool:
        """See Swapper. Live tensors never refer to an image."""
        return True

    def reads(self, mapping: ImageMapping) -> bool:  # noqa: ARG002
        """See Swapper. Live tensors never refer to an image."""
        return False

    def let_go(self) -> None:
        """See Swapper. Live tensors never refer to an image."""

    def forget(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        self._sources.pop(mapping, None)
        if self._staged is mapping:
            self.discard()
        if self._current is mapping:
            self._current = None

    def digest(self) -> bytes:
        """See Swapper."""
        return read_digest(self.layout, self.tensors)

    def close(self) -> None:
        """See Swapper."""
        self._sources.clear()
        self._live = self._singles = []
        self._scatter = scatter.Scatter(self.layout, [], [])
        self._saved = []
        self._current = self._staged = None

    def _prepare(self, mapping: ImageMapping) -> None:
        """Everything for ``_write`` that takes time and touches nothing live."""
        self._sources_of(mapping)

    def _sources_of(self, mapping: ImageMapping) -> _Sources:
        sources = self._sources.get(mapping)
        if sources is None:
            with short_turns():
                views = bits.image_integers(bits.flat_bytes(mapping.raw), self.layout, self._single_rows)
            sources = self._sources[mapping] = _Sources(self._scatter.parts(mapping), views)
        return sources

    def _make_ready(self, mapping: ImageMapping) -> None:  # noqa: ARG002  it is where it is read from
        """What can fail before anything live is touched."""
        self._scatter.check()

    def _write(self, mapping: ImageMapping) -> None:
        """Overwrite the live tensors with the version in ``mapping``."""
        sources = self._sources_of(mapping)
        bits.copy_all(self._singles, sources.views)
        scatter.copy_parts(sources.parts)

    def _save(self) -> list[Tensor]:
        """A copy of what is live, for ``_restore``."""
        return [view.clone() for view in self._live]

    def _restore(self, saved: list[Tensor]) -> None:
        bits.copy_all(self._live, saved)

    def _undo(self) -> None:
        """Overwrite the live tensors with the version before."""
        self._scatter.check()
        if self._current is not None:
            self._write(self._current)
        else:
            self._restore(self._saved)
