"""What can be chosen for a push, and what it tells meanwhile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a push stands; ``stage`` is fetching, connecting, sending, or what the daemon says it is doing."""

    stage: str
    bytes_done: int
    bytes_total: int
    """0 where that is not known."""
    bytes_sent: int = 0
    """Written to sockets so far; of unchanged and coded chunks fewer than are done."""


@dataclass(kw_only=True)
class PushOptions:
    """What can be chosen for a push. Times are seconds; None means no limit.

    ``on_progress`` is called on the push's own thread, at most some ten times a second.
    """

    model: str
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    token: bytes | None = None
    timeout: float | None = None
    stall: float = 30.0
    lanes: int | None = None
    """Connections to send on; None for as many as make it faster."""
    limit: float | None = None
    """Bytes a second; None for as many as there is room for."""
    partial: bool = False
    """Tensors of the model that are not in the checkpoint keep the values of the version that it has."""
    on_progress: Callable[[Progress], None] | None = None

    def fetched(self, done: int, total: int) -> None:
        """Tell of a checkpoint that is fetched before it is read."""
        if self.on_progress is not None:
            self.on_progress(Progress("fetching", done, total))
