"""What a sender said with FINISH, and whether what has arrived is that."""

import numpy as np
import numpy.typing as npt

from shipproto.digests import LeafDigests, version_digest
from shipproto.errors import AbortCode, MalformedMessage, TransferError
from shipproto.frame import Buffer
from shipproto.layout import Layout
from shipproto.limits import DIGEST_SIZE, MAX_VERIFY_ROUNDS
from shipproto.messages import Finish


def check_size(size: int, layout: Layout) -> None:
    """Raises MalformedMessage where the body of FINISH is not one digest for every name."""
    expected = len(layout.structure) * DIGEST_SIZE
    if size != expected:
        raise MalformedMessage(f"FINISH brings {size} bytes of digests where {expected} are due")


class Verification:
    """The sender's latest FINISH, and how often what it said was not what had arrived."""

    def __init__(self) -> None:
        self.finish: Finish | None = None
        self._sent: npt.NDArray[np.uint8] | None = None
        self._rounds = 0

    def note(self, finish: Finish, body: Buffer, layout: Layout) -> None:
        """The sender says that everything was sent. Raises as ``check_size``."""
        check_size(len(body), layout)
        self._sent = np.frombuffer(bytes(body), dtype=np.uint8).reshape(-1, DIGEST_SIZE)
        self.finish = finish

    def forget(self) -> None:
        """More is to be sent, and FINISH to be said again."""
        self.finish = self._sent = None

    def differing(self, digests: LeafDigests) -> tuple[int, ...]:
        """Rows of the tensors whose digests are not what FINISH said. Pure.

        Raises TransferError where the sender contradicts itself.
        """
        assert self.finish is not None and self._sent is not None
        own = digests.tensor_digests()
        differing = np.flatnonzero((own != self._sent).any(axis=1))
        if not len(differing) and version_digest(digests.layout, own) != self.finish.digest:
            raise TransferError(AbortCode.INTEGRITY, "the sender's version digest is not that of its tensors' digests")
        return tuple(differing.tolist())

    def failed(self, names: list[str], *, repairable: bool) -> None:
        """These tensors differ. Raises TransferError where they are not ``repairable``, or that is enough."""
        self._rounds += 1
        if self._rounds >= MAX_VERIFY_ROUNDS or not repairable:
            raise TransferError(
                AbortCode.INTEGRITY,
                f"the digests of {len(names)} tensors differ from the sender's, the first is {names[0]!r}",
                tensor=names[0],
                details=tuple(names),
            )
        self.forget()
