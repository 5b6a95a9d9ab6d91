"""The default hooks: every forward of the resident module is a hold. Belongs here: what knows how torch calls modules.

A forward that ends in a BaseException (KeyboardInterrupt) skips torch's post hooks, so a hold can be left behind.
``find_calls`` is how the gate finds out: it looks for the module's call on a thread's stack.

Importing this imports torch._dynamo, which takes a second or two where nothing else has: torch.compiler.disable is
the documented way of keeping torch.compile from tracing into a hook.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as _module

from shipd.serving.gate import Gate
from shipd.serving.wrappers import layers

_CALL: Final = nn.Module._call_impl.__code__  # noqa: SLF001
"""The function that is on the stack exactly once for every call of a module, around its hooks and its forward."""

_MODULE_FILES: Final = frozenset((_module.__file__, _CALL.co_filename))
_DYNAMO: Final = f"{Path(torch.__file__).parent}/_dynamo/"


class _Hook:
    """A hook that belongs to one gate. Copies of the model are not resident, so in them it is a hook that does nothing.

    copy.deepcopy and pickle both ask ``__reduce__``; what it names is a method of the standard library's that takes
    anything and returns None, so that a saved model loads where shipd is not installed.
    """

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Enter(_Hook):
    __slots__ = ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, _args: Any) -> None:
        if not _is_replica(module):
            self._gate.enter_forward(module)


class _Leave(_Hook):
    __slots__ = ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, _args: Any, _result: Any) -> None:
        if not _is_replica(module):
            self._gate.leave_forward()


def _is_replica(module: nn.Module) -> bool:
    """Whether DataParallel made this copy, for one call and one device. It is called on a thread that DataParallel's
    own call waits for: were it to wait for a swap, which waits for that call, it would be for ``max_hold`` seconds."""
    return getattr(module, "_is_replica", False)


class Hooks:
    """The default hooks on a module and on the modules that it wraps, until ``remove()``.

    On each of them, because some wrappers touch the weights before they call what they wrap (DistributedDataParallel
    broadcasts buffers, DataParallel copies parameters), and because what is wrapped may be called by itself.
    """

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        # Called on the class: ScriptModules refuse the method of their own, although their calls run the hooks.
        # First in, so that whatever a user's hook reads is of one version; last out among those registered so far,
        # and also where the forward or another hook raises.
        self._handles = [
            handle
            for layer in layers(module)
            for handle in (
                nn.Module.register_forward_pre_hook(layer, _Enter(gate), prepend=True),
                nn.Module.register_forward_hook(layer, _Leave(gate), always_call=True),
            )
        ]

    def remove(self) -> None:
        """Take the hooks off; harmless twice. A forward that is under way is held for good by then, so only a gate
        that swaps no more, or a swap itself, should do this."""
        for handle in self._handles:
            handle.remove()


def find_calls(frame: FrameType | None, module: int) -> tuple[int, bool]:
    """How many calls of the module with that id() are on the stack for certain, and whether there may be others.

    A call shows as a function of torch's module.py whose ``self`` is the module. Frames that torch.compile has
    rewritten may not tell their ``self``, or may stand for functions that are not on the stack any more; they make
    the answer doubtful, unless the module's own call lies further out and is what they belong to.
    """
    calls = 0
    doubtful = False
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _MODULE_FILES:
            try:
                owner = frame.f_locals["self"]
            except (KeyError, RuntimeError):
                doubtful = True
            else:
                if id(owner) == module:
                    calls += code.co_name == _CALL.co_name
                    doubtful = False
                del owner
        elif code.co_filename.startswith(_DYNAMO):
            doubtful = True
        frame = frame.f_back
    return calls, doubtful
