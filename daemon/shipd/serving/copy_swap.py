"""``copy`` on the CPU: the bytes of the live tensors are overwritten where they are; the image is the shadow.

Addresses, Parameter objects, views of parameters, requires_grad and autograd's version counters stay as they are.
"""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

from shipd.errors import SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits
from shipd.serving.staging import Torn, check_stage, check_unchanged, fill_image, never, read_digest
from shipd.serving.tensors import ModelTensors
from shipproto.layout import Layout


class CopySwap:
    """``copy``, see Swapper."""

    mode = "copy"
    access = Access.READ_ONLY

    def __init__(self, tensors: ModelTensors, layout: Layout) -> None:
        self.tensors = tensors
        self.layout = layout
        self._rows = bits.primary_rows(layout)
        self._live = [bits.integers(tensors.live[row]) for row in self._rows]
        # Slots are used again and again, and 20,000 views take 30 ms.
        self._views: weakref.WeakKeyDictionary[ImageMapping, list[Tensor]] = weakref.WeakKeyDictionary()
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
            self._saved = [view.clone() for view in self._live]
        self._staged = mapping

    def discard(self) -> None:
        """See Swapper."""
        self._staged = None
        self._saved = []

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
        self._views.pop(mapping, None)
        if self._staged is mapping:
            self.discard()
        if self._current is mapping:
            self._current = None

    def digest(self) -> bytes:
        """See Swapper."""
        return read_digest(self.layout, self.tensors)

    def close(self) -> None:
        """See Swapper."""
        self._views.clear()
        self._live = []
        self._saved = []
        self._current = self._staged = None

    def _prepare(self, mapping: ImageMapping) -> None:
        self._image_views(mapping)

    def _image_views(self, mapping: ImageMapping) -> list[Tensor]:
        views = self._views.get(mapping)
        if views is None:
            views = bits.image_integers(bits.flat_bytes(mapping.raw), self.layout, self._rows)
            self._views[mapping] = views
        return views

    def _make_ready(self, mapping: ImageMapping) -> None:
        """What can fail before anything live is touched."""

    def _write(self, mapping: ImageMapping) -> None:
        """Overwrite the live tensors with the version in ``mapping``."""
        bits.copy_all(self._live, self._image_views(mapping))

    def _undo(self) -> None:
        """Overwrite the live tensors with the version before."""
        if self._current is not None:
            self._write(self._current)
        else:
            bits.copy_all(self._live, self._saved)
