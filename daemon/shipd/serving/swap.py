"""How a version gets into a resident model: what every way of swapping offers, and which one a model gets.

The life of a version: ``arrived`` while its bytes are coming, ``stage`` when all of them are there and verified,
``approach``, then ``apply`` inside the closed gate, ``settle`` when the gate is open again; or ``discard`` instead of
``apply``. Nothing live is touched before ``apply``, and ``apply`` is all or nothing.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from shipd.errors import AttachError
from shipd.images.memory import Access, ImageMapping
from shipd.serving.copy_swap import CopySwap
from shipd.serving.flip import FlipSwap
from shipd.serving.staging import Torn
from shipd.serving.tensors import ModelTensors
from shipproto.layout import Layout

log = logging.getLogger("shipd.serving")

__all__ = ("MODES", "Swapper", "Torn", "make_swapper")

MODES: Final = ("auto", "copy", "direct", "flip")


class Swapper(Protocol):
    """One way of swapping. All methods are called by one thread at a time.

    mode     its name
    access   how the images that it is given must be mapped. Where it is PRIVATE a version is served out of its
             mapping, and the next one in the same slot needs another, unless nothing was written to this one
    """

    @property
    def mode(self) -> str: ...

    @property
    def access(self) -> Access: ...

    def fill(self, image: memoryview) -> None:
        """Write the live tensors into ``image``, padding as zeros: the version that the model came with."""

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool] = ...) -> None:
        """Get a new mapping ready, so that nothing has to wait for its pages later. Long, and only for speed: it may
        be called from another thread than the rest, and be left out or cancelled."""

    def adopt(self, mapping: ImageMapping) -> None:
        """``mapping`` holds what is live now, and is what a failed swap is undone from."""

    def arrived(self, mapping: ImageMapping, chunks: Iterable[tuple[int, int]]) -> None:
        """The chunks in these half-open ranges have arrived in ``mapping``, perhaps not for the first time."""

    def stage(self, mapping: ImageMapping) -> None:
        """The version in ``mapping`` is complete: get ready to apply it. Nothing live is touched.

        Raises StageFailed.
        """

    def discard(self) -> None:
        """What was staged, or has arrived, is not going to be applied. Must come before anything else arrives in the
        same mapping."""

    def approach(self) -> None:
        """``apply`` comes next. The gate is still open: touch nothing live, and only for speed."""

    def apply(self) -> None:
        """Make the staged version live. The caller keeps the gate closed.

        Raises SwapFailed where the old version is still live, and Torn where neither is.
        """

    def settle(self) -> bool:
        """Clean up after ``apply``, when the gate is open. Whether nothing can read an image of an earlier version any
        more, so that its lease may end; where something still refers to one, ask again later."""

    def reads(self, mapping: ImageMapping) -> bool:
        """Whether anything still refers to ``mapping``, an image of an earlier version; as of the last ``settle``."""

    def let_go(self) -> None:
        """Serve from memory of its own from now on, so that every lease may end. The caller keeps the gate closed."""

    def forget(self, mapping: ImageMapping) -> None:
        """``mapping`` is about to be closed: keep nothing of it."""

    def digest(self) -> bytes:
        """Version digest of the live values, read back. The caller holds the gate. Raises AttachError where the
        model does not use the tensors any more that it was attached with."""

    def close(self) -> None:
        """Let go of everything; the model keeps what is live."""


def make_swapper(tensors: ModelTensors, layout: Layout, mode: str = "auto") -> Swapper:
    """The swapper for a model. Raises AttachError.

    ``auto`` is ``copy``, and ``direct`` where the device has no room for a shadow: both keep every address.
    """
    if mode not in MODES:
        raise AttachError(f"unknown mode {mode!r}; there are {', '.join(MODES)} and load_weights")
    if tensors.device.type == "cuda":
        return _make_cuda_swapper(tensors, layout, mode)
    if mode == "flip":
        return FlipSwap(tensors, layout)
    # In memory the image is the shadow, and the two are one.
    return CopySwap(tensors, layout, "direct" if mode == "direct" else "copy")


def _make_cuda_swapper(tensors: ModelTensors, layout: Layout, mode: str) -> Swapper:
    if mode == "flip":
        raise AttachError("mode flip is for models on the CPU; use copy or direct")
    from shipd.serving.cuda import CudaCopySwap, NoRoom
    from shipd.serving.cuda_direct import CudaDirectSwap

    if mode != "direct":
        try:
            return CudaCopySwap(tensors, layout)
        except NoRoom as error:
            if mode == "copy":
                raise
            log.warning("no room for a shadow on the device: swapping in mode direct", extra={"why": str(error)})
    return CudaDirectSwap(tensors, layout)
