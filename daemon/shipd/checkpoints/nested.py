"""State dicts inside other objects: found where there is one, listed where there are several.

Trainers save {"epoch": 3, "model": {...}, "optimizer": {...}} and the like, each in its own words, so nothing depends
on the words. A state dict is a mapping that has tensors under names. The states of optimizers are recognised and are
never what is meant; numbers, texts and lists beside tensors are left out.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from shipd.checkpoints.wording import OPTIMIZER, listed, quoted
from shipd.errors import CheckpointError
from shipd.units import format_bytes

_DEEPEST: Final = 6
"""Mappings and lists inside one another that are searched."""

_ITSELF: Final = "."
"""The key of what is not inside anything."""

_RANDOM: Final = re.compile(r"rng|random", re.IGNORECASE)
"""In the names under which the states of random generators are saved, which are tensors."""

_NOTHING: Final = object()

_HOW: Final = "save torch.save(model.state_dict(), other_path), or a safetensors file, and push that"


@dataclass(frozen=True, slots=True)
class _Found:
    """A state dict and the keys that lead to it."""

    path: tuple[str, ...]
    tensors: Mapping[str, Any]

    @property
    def key(self) -> str:
        return ".".join(self.path) or _ITSELF

    @property
    def only_scalars(self) -> bool:
        return not any(isinstance(value, Tensor) and value.dim() for value in self.tensors.values())

    def __str__(self) -> str:
        sizes = [value.numel() * value.element_size() for value in self.tensors.values() if isinstance(value, Tensor)]
        noun = "tensor" if len(sizes) == 1 else "tensors"
        return f"{quoted(self.key)} ({len(sizes)} {noun}, {format_bytes(sum(sizes))})"


@dataclass(slots=True)
class _Search:
    """A walk over mappings and lists, each of which is looked at once however often it is referred to."""

    found: list[_Found] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def walk(self, value: object, path: tuple[str, ...], depth: int = 0) -> None:
        if not isinstance(value, (Mapping, list, tuple)) or depth > _DEEPEST or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if _is_optimizer(value, path):
            self.optimizers.append(".".join(path) or _ITSELF)
            return
        before = len(self.found)
        for name, inner in _entries(value):
            if not _is_extra_state(name):
                self.walk(inner, (*path, name), depth + 1)
        tensors = _tensors(value)
        if len(self.found) > before:
            # Beside a state dict these say how training stood: a best loss, random generators.
            tensors = {name: tensor for name, tensor in tensors.items() if not _RANDOM.search(name)}
            if _Found(path, tensors).only_scalars:
                return
        if tensors:
            self.found.append(_Found(path, _tensors(value)))

    def candidates(self) -> list[_Found]:
        """Without measurements, mappings of 0-dim tensors alone, as long as there is anything else."""
        return [one for one in self.found if not one.only_scalars] or self.found


def state_dict_in(loaded: object, origin: str, key: str | None = None) -> Mapping[str, Tensor]:
    """The state dict in ``loaded``, or in what is under ``key``: names joined by dots, positions in lists included.

    ``origin`` stands for it in messages, quoted. Raises CheckpointError where there is none, or more than one, each of
    which is then listed.
    """
    if key is None and isinstance(loaded, Mapping) and _is_plain(loaded):
        return loaded
    path: tuple[str, ...] = ()
    inner = loaded
    if key is not None and key != _ITSELF:
        inner = _follow(loaded, key)
        path = tuple(key.split("."))
        if inner is _NOTHING:
            raise _absent(loaded, origin, key)
    search = _Search()
    search.walk(inner, path)
    candidates = search.candidates()
    named = next((one for one in candidates if one.path == path), None) if key is not None else None
    if named is not None:
        return named.tensors
    if key == _ITSELF and candidates:
        raise _absent(loaded, origin, key)
    if len(candidates) > 1:
        raise _several(candidates, origin, key)
    if not candidates:
        raise _none(inner, origin, key, search.optimizers)
    return candidates[0].tensors


def _is_plain(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _is_optimizer(value: object, path: tuple[str, ...]) -> bool:
    if path and OPTIMIZER.search(path[-1]):
        return True
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _entries(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return ((str(name), inner) for name, inner in pairs)


def _tensors(value: object) -> dict[str, Any]:
    """What of ``value`` would be a state dict, with the extra states of modules, which are refused by name."""
    if not isinstance(value, Mapping):
        return {}
    if any(isinstance(tensor, Tensor) and not isinstance(name, str) for name, tensor in value.items()):
        return {}
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(tensor, Tensor) or (isinstance(name, str) and _is_extra_state(name))
    }


def _is_extra_state(name: str) -> bool:
    return name == "_extra_state" or name.endswith("._extra_state")


def _follow(value: object, key: str) -> object:
    """What ``key`` leads to. Names may have dots in them themselves."""
    if not isinstance(value, (Mapping, list, tuple)):
        return _NOTHING
    inside = dict(_entries(value))
    if key in inside:
        return inside[key]
    for name in sorted(inside, key=len, reverse=True):
        if key.startswith(f"{name}."):
            found = _follow(inside[name], key[len(name) + 1 :])
            if found is not _NOTHING:
                return found
    return _NOTHING


def _several(candidates: list[_Found], origin: str, key: str | None) -> CheckpointError:
    first = candidates[0].key
    under = f" under {quoted(key)}" if key is not None and key != _ITSELF else ""
    return CheckpointError(
        f"{origin} holds {len(candidates)} state dicts{under}: {listed(map(str, candidates))}. Choose the one that is "
        f"to be served, as in key={quoted(first)} or --key {shlex.quote(first)} (of a base: base_key, --base-key)"
    )


def _absent(loaded: object, origin: str, key: str) -> CheckpointError:
    search = _Search()
    search.walk(loaded, ())
    if candidates := search.candidates():
        there = f"the state dicts in it: {listed(map(str, candidates))}"
    else:
        there = f"it holds {_described(loaded)}"
    return CheckpointError(f"{origin} has no state dict under the key {quoted(key)}; {there}")


def _none(inner: object, origin: str, key: str | None, optimizers: list[str]) -> CheckpointError:
    what = origin if key is None else f"{origin}, under the key {quoted(key)},"
    if optimizers:
        return CheckpointError(
            f"{what} holds the state of an optimizer ({listed(map(quoted, optimizers))}), which is never shipped, "
            f"and no state dict of a model; {_HOW}"
        )
    if not isinstance(inner, (Mapping, list, tuple)):
        return CheckpointError(f"{what} holds a value of type {_kind(inner)} and no state dict; {_HOW}")
    return CheckpointError(
        f"{what} holds no state dict, which is a mapping of names to tensors, but {_described(inner)}; {_HOW}"
    )


def _described(value: object) -> str:
    if not isinstance(value, (Mapping, list, tuple)):
        return f"a value of type {_kind(value)}"
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__} of {listed(_kind(inner) for inner in value) or 'nothing'}"
    return listed(f"{quoted(str(name))} ({_kind(inner)})" for name, inner in value.items()) or "nothing"


def _kind(value: object) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return f"{'mapping' if isinstance(value, Mapping) else type(value).__name__} of {len(value)}"
    return type(value).__name__
