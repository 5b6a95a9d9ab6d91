"""Which connection takes each chunk: what is held or arriving is never overwritten by what comes a second time.

Connections of one transfer may receive on threads of their own, so ``claim`` may be called on any of them. Everything
else belongs to the one thread that keeps the transfer's books.
"""

from dataclasses import dataclass

from shipproto.connection import Connection


@dataclass(eq=False, slots=True)
class _Claim:
    """A chunk that arrives on this connection, or has arrived on it and is held."""

    connection: Connection
    held: bool = False


class Claims:
    """The claims of one transfer, by chunk."""

    def __init__(self) -> None:
        self._claims: dict[int, _Claim] = {}

    def claim(self, chunk: int, connection: Connection) -> bool:
        """Whether ``chunk`` is to be received on ``connection``: nobody else receives it, and it is not held."""
        claim = _Claim(connection)
        # One step of the interpreter: of two threads only one gets its own claim back.
        return self._claims.setdefault(chunk, claim) is claim

    def hold(self, chunk: int, connection: Connection) -> bool:
        """``chunk`` has arrived intact. False where it was not ``connection``'s to bring, or is held already."""
        claim = self._claims.get(chunk)
        if claim is None or claim.connection is not connection or claim.held:
            return False
        claim.held = True
        return True

    def damaged(self, chunk: int, connection: Connection) -> None:
        """``chunk`` has arrived damaged: whoever brings it next may."""
        claim = self._claims.get(chunk)
        if claim is not None and claim.connection is connection and not claim.held:
            del self._claims[chunk]

    def forget(self, chunk: int) -> None:
        """``chunk`` has to come again, although it was held."""
        self._claims.pop(chunk, None)

    def give_up(self, connection: Connection) -> list[int]:
        """``connection`` brings nothing any more; the chunks that it had claimed and that are not held."""
        lost = [
            chunk for chunk, claim in list(self._claims.items()) if claim.connection is connection and not claim.held
        ]
        for chunk in lost:
            del self._claims[chunk]
        return lost
