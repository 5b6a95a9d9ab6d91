"""Where a transfer stands, as each end sees it. What leads from one state to the next is in sender and receiver."""

import enum
from typing import Final


class SenderState(enum.Enum):
    """Where the transfer stands, as far as the sender knows."""

    OFFERED = enum.auto()
    SENDING = enum.auto()
    FINISHING = enum.auto()
    STAGED = enum.auto()
    COMMITTING = enum.auto()
    COMMITTED = enum.auto()
    ABORTED = enum.auto()


SENDER_ENDED: Final = frozenset({SenderState.COMMITTED, SenderState.ABORTED})


class ReceiverState(enum.Enum):
    """Where the transfer stands."""

    OFFERED = enum.auto()
    STRUCTURE = enum.auto()
    RECEIVING = enum.auto()
    VERIFYING = enum.auto()
    STAGING = enum.auto()
    STAGED = enum.auto()
    COMMITTING = enum.auto()
    COMMITTED = enum.auto()
    ABORTED = enum.auto()


RECEIVER_ENDED: Final = frozenset({ReceiverState.COMMITTED, ReceiverState.ABORTED})
