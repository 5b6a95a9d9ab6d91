"""Frames as the proxy sees them: their types by number, the two ways they travel, and what is known of one."""

import enum
from dataclasses import dataclass
from typing import Literal

PRELUDE = 32
HELLO, NACK, PING, OFFER, STRUCTURE_WANTED, STRUCTURE_IS, WANT, DATA = 1, 4, 5, 16, 17, 18, 19, 20
PROGRESS, FINISH, STAGED, COMMIT, COMMITTED, ABORT = 21, 22, 23, 24, 25, 26
CODED, HELD = 29, 30
DESCRIBE, DESCRIPTION_IS = 36, 37

Part = Literal["prelude", "header", "payload"]


class Way(enum.Enum):
    """The direction in which bytes travel."""

    TO_DAEMON = "to the daemon"
    TO_SENDER = "to the sender"


MESSAGES = [(kind, Way.TO_DAEMON) for kind in (OFFER, STRUCTURE_IS, FINISH, COMMIT)]
MESSAGES += [(kind, Way.TO_SENDER) for kind in (STRUCTURE_WANTED, WANT, PROGRESS, STAGED, COMMITTED)]
"""What a push consists of besides DATA, each with its way."""


def name_of_way(value: object) -> str | None:
    """For the ids of parametrized tests: ways by their names, anything else as pytest has it."""
    return value.name.lower() if isinstance(value, Way) else None


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that passed, or was to. ``number`` counts frames of its kind that went this way, from 0."""

    connection: int
    way: Way
    kind: int
    sequence: int
    header: bytes
    payload: int
    number: int
    number_here: int
    """The same, within its connection; ``sequence`` counts all kinds there."""

    @property
    def size(self) -> int:
        """All of its bytes."""
        return PRELUDE + len(self.header) + self.payload

    def offset(self, part: Part) -> int:
        """Where a part begins."""
        return {"prelude": 0, "header": PRELUDE, "payload": PRELUDE + len(self.header)}[part]
