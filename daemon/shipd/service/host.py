"""What a push needs of the daemon around it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from shipd.service.config import Config
from shipd.service.decoding import Speeds
from shipd.service.models import ImageStore

if TYPE_CHECKING:
    from shipd.service.incoming import Incoming

_T = TypeVar("_T")


class Host(Protocol):
    """What a push needs of the daemon around it."""

    config: Config
    images: ImageStore
    speeds: Speeds

    async def work(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run ``function`` off the loop."""

    def background(self, function: Callable[[Callable[[], bool]], object]) -> None:
        """Run ``function`` off the loop, some time; it is given a way to see that it should stop."""

    def lane_ended(self, received: int, resent: int) -> None:
        """A further connection is gone, which took so many bytes and resent so many frames as one."""

    def finished(self, incoming: "Incoming") -> None:
        """The push is over."""
