"""Whether a model still consists of the same modules and tensors, without asking for its state_dict().

That builds every name anew: 3 µs a tensor, each time a version is staged. Here the modules' own dictionaries are
compared with what was in them, all at once.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Final, Self

from torch import nn

_contents: Final[Callable[[nn.Module], tuple[dict[str, Any], ...]]] = attrgetter("_parameters", "_buffers", "_modules")
_left_out: Final[Callable[[nn.Module], set[str]]] = attrgetter("_non_persistent_buffers_set")
_hooks: Final[Callable[[nn.Module], tuple[dict[int, Any], ...]]] = attrgetter(
    "_state_dict_hooks", "_state_dict_pre_hooks"
)

_MEANING: Final = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""What a class can redefine to make its state_dict() something else than what is in its dictionaries."""


class ModuleTree:
    """The modules of a model as they are now, and all that is in them. ``of`` makes one."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._sizes, self._keys, self._values = self._look()
        self._left_out = [frozenset(names) for names in map(_left_out, modules)]

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The tree of ``model``; None where its state_dict() says something else than its modules."""
        modules = list(model.modules())
        plain = all(map(_is_plain, modules)) and not any(chain.from_iterable(map(_hooks, modules)))
        return cls(modules) if plain else None

    def unchanged(self) -> bool:
        """Whether every name leads to the very object that it led to when this was made. Only if it does, nobody has
        added, removed or replaced a module or a tensor; the tensors may have been given other memory."""
        sizes, keys, values = self._look()
        return (
            sizes == self._sizes
            and keys == self._keys
            and all(map(is_, values, self._values))
            and list(map(_left_out, self._modules)) == self._left_out
            and not any(chain.from_iterable(map(_hooks, self._modules)))
        )

    def _look(self) -> tuple[list[int], list[str], list[object]]:
        """How much is in each dictionary, under what names, and what."""
        contents = list(self._contents())
        keys = list(chain.from_iterable(contents))
        return list(map(len, contents)), keys, list(chain.from_iterable(map(dict.values, contents)))

    def _contents(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(map(_contents, self._modules))


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    return (
        all(getattr(kind, name) is getattr(nn.Module, name) for name in _MEANING)
        and vars(module).keys().isdisjoint(_MEANING)
        # A ScriptModule's are something else that only looks alike.
        and all(isinstance(content, dict) for content in _contents(module))
    )
