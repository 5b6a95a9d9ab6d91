"""What a session asks of the resident model that it belongs to, and nothing of how it is done.

Belongs here: what ``link`` and ``resident`` have to agree on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shipd.images.memory import ImageMapping
from shipd.serving.version import Version
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident
from shipproto.structure import Structure


@dataclass(frozen=True, slots=True)
class SwapTimes:
    """``pause_seconds``: gate closed to gate open. Of it ``wait_seconds`` until the last hold had ended, and
    ``copy_seconds`` to move the weights."""

    pause_seconds: float
    wait_seconds: float
    copy_seconds: float


class Follower(Protocol):
    """The resident model as the link sees it. All of it is called on the link's thread.

    private    whether a version is served out of its mapping, which then is copy on write, and is used for another one
               only where nothing was written to it
    delivered  whether versions are handed on to something that takes tensors of any names, and cannot be read back
    """

    private: bool
    delivered: bool

    def resident(self) -> Resident:
        """What it says of itself when it attaches."""

    def lay_out(self, structure: Structure) -> None:
        """The images that come next hold these tensors. Raises MalformedMessage unless ``delivered``."""

    def held(self) -> Version | None:
        """The version that is live and whole; None while fenced, and before the first attach."""

    def map(self, fd: int, size: int) -> ImageMapping:
        """Map an image the way this model wants it."""

    def fill(self, image: memoryview) -> None:
        """Write the live parameters into an image."""

    def prepare(self, mapping: ImageMapping, cancelled: Callable[[], bool]) -> None:
        """Get a mapping ready ahead of time. On any thread, and only for speed."""

    def arrived(self, mapping: ImageMapping, chunks: RangeSet) -> None:
        """These chunks of the next version are in the image, unverified as a whole."""

    def stage(self, mapping: ImageMapping) -> None:
        """The version in this image is verified: make everything ready to swap."""

    def unstage(self) -> None:
        """Forget what was staged or has arrived."""

    def swap(self, version: Version, timeout: float) -> SwapTimes:
        """Swap to what is staged. Raises SwapFailed (the old version is whole) or Fenced (it is not)."""

    def settle(self) -> bool:
        """Clean up after swaps. Whether nobody can read an earlier version's image any more."""

    def reads(self, mapping: ImageMapping) -> bool:
        """Whether somebody may still read this image of an earlier version."""

    def forget(self, mapping: ImageMapping) -> None:
        """This mapping will not be named again."""

    def adopt(self, mapping: ImageMapping, version: Version) -> None:
        """This version is live, and this image has its bytes."""

    def wait_for_version(self) -> None:
        """It is attached, and there is no version yet. Raises MalformedMessage unless ``delivered``."""

    def read_back(self) -> bytes:
        """Version digest of the live parameters."""

    def fence(self, reason: str) -> None:
        """Stop serving until a version has been installed."""

    def let_go(self) -> bool:
        """Serve from memory of its own from now on: the images go back to the daemon. False where that cannot be."""

    def close(self) -> None:
        """The link has ended: keep nothing but what is live."""
