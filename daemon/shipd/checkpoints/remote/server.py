"""What is asked of every kind of server, and the two ways in which it may fail."""

from typing import NamedTuple, Protocol

from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError, ShipError, TensorChanged


class Refusal(Exception):
    """A failure that trying again does not help.

    kind    what the user gets to see it as
    absent  whether there is no such file
    """

    def __init__(self, message: str, *, kind: type[ShipError] = CheckpointError, absent: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.absent = absent


class Broken(Exception):
    """A failure that may be over when it is tried again. Its text is a clause, such as "it answers 503"."""


class Silent(Broken):
    """Nothing came in time."""


class Answer(NamedTuple):
    """What a server says before the bytes.

    size         bytes of the whole file; None where it does not say
    start, stop  which of its bytes follow; ``stop`` is None where ``size`` is
    in_parts     whether any part can be asked for by itself, and is known to be of the same version of the file
    """

    size: int | None
    start: int
    stop: int | None
    in_parts: bool


class Line(Protocol):
    """A way to a server for one question. Used by one thread, but for ``abort``."""

    def ask(self, start: int, stop: int | None) -> Answer:
        """Ask for bytes [start, stop) of the file, ``stop`` None for all the rest. The answer may be of other bytes
        where nothing is known of the file yet. Raises Broken and Refusal."""
        ...

    def read(self, into: memoryview) -> int:
        """Write the next bytes of the answer into ``into``, and return how many; 0 at its end. Raises Broken."""
        ...

    def done(self) -> None:
        """Everything was read: the way there may be used again."""
        ...

    def close(self) -> None:
        """Give it up, whatever it is at."""
        ...

    def abort(self) -> None:
        """Have ``ask`` and ``read`` end now, as far as that can be done. Any thread."""
        ...


class Remote(Protocol):
    """A file on a server.

    shown   its URL, without secrets
    folder  the URL of what is beside it, without secrets
    most    bytes that are to be asked for at once
    """

    @property
    def shown(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def most(self) -> int: ...

    def line(self) -> Line:
        """A new way to it. Opens nothing yet."""
        ...

    def confirm(self) -> None:
        """Called when all bytes are there, before the last of them is read. Raises Refusal where they are known to be
        of more than one version of the file, Broken where that cannot be found out now."""
        ...

    def beside(self, name: str) -> "Remote":
        """The file of that name, a relative path, in the same place."""
        ...


def changed(shown: str, what: str) -> Refusal:
    """The refusal of a file that is another one now than when it was first asked for."""
    return Refusal(
        f"{quoted(shown)} changed while it was being fetched ({what}); push it again when it is complete, or a copy "
        "that nobody writes to",
        kind=TensorChanged,
    )
