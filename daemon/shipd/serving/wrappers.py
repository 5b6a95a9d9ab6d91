"""Modules that only wrap another one: which those are, what they wrap, and what tensors are called without them.

The names of a resident model are canonical: what wrappers put into them is left out, so that a plain, a compiled and
a DataParallel process are one model, and one version fits all of them. What counts is the class of a module and never
a name: a model may well have a submodule called "module".

Belongs here: everything that knows a class of wrapper. Each is looked for where torch would have it if anybody had
imported it, because importing some of them takes a second.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

from torch import nn

_WRAPPERS: Final = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    # Its hooks take the component out of state_dict(), but not out of named_buffers().
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)
"""Module, class and the attribute that holds what is wrapped: the component that it adds to every name."""

_COMPILED: Final = _WRAPPERS[0]
_SHARDING: Final = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "")


def _is(module: object, wrapper: tuple[str, str, str]) -> bool:
    kind: Any = getattr(sys.modules.get(wrapper[0]), wrapper[1], None)
    return isinstance(kind, type) and isinstance(module, kind)


def wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """What ``module`` wraps, after the component that this adds to names; None where it is no wrapper."""
    for wrapper in _WRAPPERS:
        if _is(module, wrapper):
            return wrapper[2], getattr(module, wrapper[2])
    return None


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """``model``, what it wraps, what that wraps, and so on."""
    yield model
    while (inner := wrapped(model)) is not None:
        model = inner[1]
        yield model


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that is no wrapper."""
    *_, innermost = layers(model)
    return innermost


def described_class(model: object) -> str:
    """The qualified name of the model's class, whatever wraps it: "transformers.models.bert.modeling_bert.BertModel".

    Of a ScriptModule, the name of the class that it was made from: it remembers no more.
    """
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        if isinstance(original := getattr(model, "original_name", None), str):
            return original
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}"


class CanonicalNames:
    """What the tensors of ``model`` are called without its wrappers.

    names   those of its state_dict(). Where two of them would come out the same, all stay what they are
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        # Of each module's path, because a model has few of those for each tensor.
        self._paths: dict[str, str] = {}
        self._wrapping = any(wrapped(module) is not None for module in model.modules())
        if self._wrapping:
            given = list(names)
            self._wrapping = len({self.of(name) for name in given}) == len(given)

    def of(self, name: str) -> str:
        """The canonical form of ``name``, which may have lost its wrappers already."""
        if not self._wrapping:
            return name
        path, _, own = name.rpartition(".")
        if path not in self._paths:
            self._paths[path] = "".join(f"{part}." for part in self._kept(path.split(".") if path else []))
        return self._paths[path] + own

    def _kept(self, path: list[str]) -> Iterator[str]:
        module: object = self._model
        for part in path:
            inner = wrapped(module) if isinstance(module, nn.Module) else None
            while inner is not None and inner[0] != part:
                module = inner[1]
                inner = wrapped(inner[1])
            if inner is not None:
                module = inner[1]
            else:
                yield part
                module = getattr(module, part, None)


def sharding(model: nn.Module) -> str | None:
    """The path of a module whose parameters FullyShardedDataParallel keeps in parts; None where there is none."""
    return next((path for path, module in model.named_modules() if _is(module, _SHARDING)), None)


def freezes_weights(model: nn.Module) -> bool:
    """Whether torch.compile has been told to make constants of the weights, with which a compiled ``model`` goes on
    computing whatever is written to its parameters."""
    settings: Any = sys.modules.get("torch._inductor.config")
    return bool(getattr(settings, "freezing", False)) and any(_is(module, _COMPILED) for module in model.modules())
