"""``flip`` on the CPU: the live tensors are bound to the next version's image instead of being overwritten.

No bytes are copied, so the pause does not grow with the model, and the image is all the memory that a version needs.
The image is mapped copy on write: what the model itself writes (BatchNorm in training mode does) stays its own.

Parameter objects, ties, requires_grad and autograd's version counters stay as they are; addresses change. References to
the same *tensor object* follow; a tensor that the user made by slicing a parameter keeps the old version's memory.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from shipd.errors import AttachError, SwapFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits
from shipd.serving.staging import Torn, check_stage, check_unchanged, fill_image, never, read_digest
from shipd.serving.tensors import ModelTensors, Places
from shipd.serving.turns import short_turns
from shipproto.layout import Layout
from shipproto.rangeset import RangeSet

_set_data: Final[Callable[[Tensor, Tensor], None]] = vars(torch._C.TensorBase)["data"].__set__  # noqa: SLF001
"""``tensor.data = value`` as a function."""


_BLOCK: Final = 256
"""Tensors that are touched in one call, during which no other thread can have the GIL: 0.1 to 0.3 ms."""


class Bindings:
    """Live tensors, what each is bound to, and what it is going to be bound to."""

    def __init__(self) -> None:
        self.lives: list[Tensor] = []
        self.olds: list[Tensor] = []
        self.news: list[Tensor] = []
        # The same of those that were made in inference mode.
        self.inference: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, live: Tensor, new: Tensor) -> None:
        """``live`` is going to be bound to the memory of ``new``."""
        if live.is_inference():
            self.inference.append((live, live.data, new))
        else:
            self.lives.append(live)
            self.olds.append(live.data)
            self.news.append(new)

    def touch(self) -> None:
        """Read what ``apply`` will read, so that less of it comes from memory then."""
        for start in range(0, len(self.lives), _BLOCK):
            some = slice(start, start + _BLOCK)
            deque(map(Tensor.data_ptr, self.lives[some]), maxlen=0)
            deque(map(Tensor.data_ptr, self.news[some]), maxlen=0)

    def apply(self) -> None:
        """Bind all of them. May fail anywhere.

        Binding one tensor over and over takes 0.23 µs; 10,000 different ones 0.65 µs each (0.5 at best) even if touched
        before, presumably because what torch keeps of them is more than the cache holds. So their pause is 5 to 6 ms
        at best, and 8 to 14 ms in the median on two cores that others use as well.
        """
        rebind(self.lives, self.news)
        for live, _, new in self.inference:
            bind(live, new)

    def undo(self) -> None:
        """Bind all of them to what they were bound to, whichever had been changed."""
        rebind(self.lives, self.olds)
        for live, old, _ in self.inference:
            bind(live, old)


class _Staged(NamedTuple):
    """The next version, ready to be bound. ``places`` is where the live tensors are then."""

    mapping: ImageMapping
    bindings: Bindings
    places: Places
    anchor: weakref.ref[memoryview]


class FlipSwap:
    """``flip``, see Swapper."""

    mode: Final = "flip"
    access: Final = Access.PRIVATE

    def __init__(self, tensors: ModelTensors, layout: Layout) -> None:
        if sharing := tensors.sharing_transients():
            raise AttachError(
                f"mode flip would part the non-persistent buffer {sharing[0]!r} from the tensor whose memory it "
                "shares; use mode copy",
                tensor=sharing[0],
            )
        self.tensors = tensors
        self.layout = layout
        self._staged: _Staged | None = None
        self._mapped: weakref.WeakKeyDictionary[ImageMapping, RangeSet] = weakref.WeakKeyDictionary()
        """The chunks of each mapping whose pages are mapped."""
        self._current: tuple[ImageMapping, weakref.ref[memoryview]] | None = None
        self._retired: list[tuple[ImageMapping, weakref.ref[memoryview]]] = []
        # What live tensors were bound to before: freeing it takes 0.1 s a gigabyte, so not inside the gate.
        self._replaced: tuple[Bindings, Places] | None = None

    def fill(self, image: memoryview) -> None:
        """See Swapper."""
        check_unchanged(self.tensors)
        fill_image(self.layout, self.tensors.live, image)

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool] = never) -> None:
        """See Swapper."""
        mapping.populate(cancelled)

    def adopt(self, mapping: ImageMapping) -> None:
        """See Swapper. The tensors that are replaced are the undo; an image of them is not needed."""

    def arrived(self, mapping: ImageMapping, chunks: Iterable[tuple[int, int]]) -> None:
        """See Swapper. The image is where the bytes are needed; their pages are mapped, while others still arrive."""
        mapped = self._mapped.setdefault(mapping, RangeSet())
        if len(mapped) == self.layout.chunks:
            return
        for first, stop in chunks:
            start, end = self.layout.span(range(first, stop))
            mapping.touch(start, end)
            mapped.add(first, stop)

    def stage(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        check_stage(mapping, self.layout, self.access, self.tensors)
        # Else the first forward after the swap would find its pages one by one.
        self.arrived(mapping, list(self._mapped.get(mapping, RangeSet()).missing(self.layout.chunks).ranges()))
        # Every tensor gets a storage of its own, as in any model, and each storage refers to this memoryview and to
        # nothing else of the mapping: when it is gone, nothing can read the image any more.
        anchor = mapping.raw
        primary, offsets = self.layout.structure.primary.tolist(), self.layout.offsets.tolist()
        # One object may stand under several names; and several objects may share one memory.
        lives = {id(live): (primary[row], live) for row, live in enumerate(self.tensors.live) if live.numel()}
        replacements: dict[int, Tensor] = {}
        bindings = Bindings()
        with short_turns():
            # All of them before anything else: what apply() reads then lies close together.
            for root, live in lives.values():
                if root not in replacements:
                    replacements[root] = _replacement(anchor, offsets[root], live)
            for root, live in lives.values():
                bindings.add(live, replacements[root])
            places = _places_after(self.tensors.live, {key: replacements[root] for key, (root, _) in lives.items()})
        self._staged = _Staged(mapping, bindings, places, weakref.ref(anchor))

    def discard(self) -> None:
        """See Swapper."""
        self._staged = None

    def approach(self) -> None:
        """See Swapper."""
        if self._staged is not None:
            self._staged.bindings.touch()

    def apply(self) -> None:
        """See Swapper."""
        if self._staged is None:
            raise RuntimeError("nothing is staged")
        staged, self._staged = self._staged, None
        try:
            staged.bindings.apply()
        except BaseException as error:
            try:
                staged.bindings.undo()
            except BaseException as second:  # noqa: BLE001  whatever it is, the model is torn
                raise Torn(f"the swap failed ({error!r}) and could not be undone ({second!r})") from error
            raise SwapFailed(f"the swap failed and was undone; the old version serves: {error!r}") from error
        if self._current is not None:
            self._retired.append(self._current)
        self._current = staged.mapping, staged.anchor
        self._replaced = staged.bindings, self.tensors.places
        self.tensors.places = staged.places

    def settle(self) -> bool:
        """See Swapper. An output, a slice of a parameter or a saved graph may refer to earlier versions."""
        self._replaced = None
        self._retired = [(mapping, anchor) for mapping, anchor in self._retired if anchor() is not None]
        return not self._retired

    def reads(self, mapping: ImageMapping) -> bool:
        """See Swapper."""
        return any(other is mapping for other, _ in self._retired)

    def let_go(self) -> None:
        """See Swapper. Takes as much memory as the model."""
        lives = list({id(live): live for live in self.tensors.live if live.numel()}.values())
        copies: dict[int, Tensor] = {}
        for live in lives:
            if live.data_ptr() not in copies:
                copies[live.data_ptr()] = _copied(live, live)
        replacements = [copies[live.data_ptr()] for live in lives]
        places = _places_after(self.tensors.live, dict(zip(map(id, lives), replacements, strict=True)))
        for live, replacement in zip(lives, replacements, strict=True):
            bind(live, replacement)
        self.tensors.places = places
        if self._current is not None:
            self._retired.append(self._current)
            self._current = None

    def forget(self, mapping: ImageMapping) -> None:
        """See Swapper."""
        self._retired = [(other, anchor) for other, anchor in self._retired if other is not mapping]
        if self._staged is not None and self._staged.mapping is mapping:
            self._staged = None

    def digest(self) -> bytes:
        """See Swapper. What the model itself has written since counts."""
        return read_digest(self.layout, self.tensors)

    def close(self) -> None:
        """See Swapper."""
        self._staged = self._replaced = None
        self._current = None
        self._retired = []


def _places_after(lives: Sequence[Tensor], replacements: Mapping[int, Tensor]) -> Places:
    """Where ``lives`` are once each is bound to the replacement that is filed under its id(); others stay."""
    return Places([replacements.get(id(live), live) for live in lives])


def _replacement(image: memoryview, offset: int, live: Tensor) -> Tensor:
    """The next version of ``live``, which lies at ``offset`` in an image, with the strides of the live one."""
    # view() lets go of the GIL, and frombuffer() does not.
    value = torch.frombuffer(image, dtype=live.dtype, count=live.numel(), offset=offset)
    if live.dim() != 1:
        value = value.view(live.shape)
    # Other strides need another order of bytes, and so memory of their own.
    return value if live.is_contiguous() else _copied(value, live)


def _copied(value: Tensor, like: Tensor) -> Tensor:
    """The bits of ``value`` in memory of their own, with the strides of ``like``. clone() would close the gaps
    between strides, and torch.empty warns of some dtypes."""
    reach = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    memory = torch.zeros(reach * like.element_size(), dtype=torch.uint8)
    copy = memory.view(like.dtype).as_strided(like.shape, like.stride())
    bits.copy_all([bits.integers(copy)], [bits.integers(value)])
    return copy


def rebind(lives: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Make each of ``lives`` use the memory of its value. One call in C, which no thread can take the GIL from: a loop
    in Python would lose it beside a busy thread, and take twice as long."""
    deque(map(_set_data, lives, values), maxlen=0)


def bind(live: Tensor, replacement: Tensor) -> None:
    """Make ``live`` use the memory of ``replacement``; as an object it stays what it is."""
    if live.is_inference():
        # Inference tensors refuse .data = anything, because they have no version counter to keep.
        with torch.inference_mode():
            live.set_(replacement)  # type: ignore[call-overload]
    else:
        live.data = replacement
