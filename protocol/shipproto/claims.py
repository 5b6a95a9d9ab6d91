"""Who brings each chunk: what is held, arriving or being decoded is never overwritten by what comes a second time.

A chunk is claimed by the connection on which it arrives, alone or with the others of a coded run. Once a run is being
decoded its chunks are its own, whatever becomes of the connection.

Connections of one transfer may receive on threads of their own, so ``claim``, ``claim_run`` and ``damaged`` may be
called on any of them. Everything else belongs to the one thread that keeps the transfer's books.
"""

import enum
from dataclasses import dataclass

from shipproto.connection import Connection


class _Stage(enum.Enum):
    ARRIVING = enum.auto()
    DECODING = enum.auto()
    HELD = enum.auto()


@dataclass(eq=False, slots=True)
class _Claim:
    """Of a chunk, or of all chunks of a run at once."""

    connection: Connection
    sequence: int | None = None
    """The frame of a run; None for a chunk."""
    stage: _Stage = _Stage.ARRIVING


class Claims:
    """The claims of one transfer, by chunk."""

    def __init__(self) -> None:
        self._claims: dict[int, _Claim] = {}

    # --- chunks --------------------------------------------------------------------------------------------

    def claim(self, chunk: int, connection: Connection) -> bool:
        """Whether ``chunk`` is to be received on ``connection``: nobody else receives it, and it is not held."""
        claim = _Claim(connection)
        # One step of the interpreter: of two threads only one gets its own claim back.
        return self._claims.setdefault(chunk, claim) is claim

    def hold(self, chunk: int, connection: Connection) -> bool:
        """``chunk`` has arrived intact. False where it was not ``connection``'s to bring, or is held already."""
        claim = self._arriving(chunk, connection, None)
        if claim is None:
            return False
        claim.stage = _Stage.HELD
        return True

    def damaged(self, chunk: int, connection: Connection) -> None:
        """``chunk`` has arrived damaged: whoever brings it next may."""
        if self._arriving(chunk, connection, None) is not None:
            del self._claims[chunk]

    def forget(self, chunk: int) -> None:
        """``chunk`` has to come again, although it was held."""
        self._claims.pop(chunk, None)

    # --- runs ----------------------------------------------------------------------------------------------

    def claim_run(self, chunks: range, connection: Connection, sequence: int) -> int:
        """Claim the chunks of a run that has arrived, all of them or none. How many were free."""
        claim = _Claim(connection, sequence)
        own = [chunk for chunk in chunks if self._claims.setdefault(chunk, claim) is claim]
        if len(own) < len(chunks):
            for chunk in own:
                del self._claims[chunk]
        return len(own)

    def decode_run(self, chunks: range, connection: Connection, sequence: int) -> bool:
        """The run is being decoded from now on. False where its chunks are not claimed for it."""
        claim = self._arriving(chunks.start, connection, sequence)
        if claim is None:
            return False
        claim.stage = _Stage.DECODING
        return True

    def take_run(self, chunks: range, connection: Connection) -> bool:
        """Claim chunks that this side reads itself, as a run that is being decoded: all of them or none."""
        claim = _Claim(connection, stage=_Stage.DECODING)
        if any(chunk in self._claims for chunk in chunks):
            return False
        self._claims.update(dict.fromkeys(chunks, claim))
        return True

    def hold_run(self, chunks: range) -> None:
        """The run that is being decoded is in its place."""
        self._claims[chunks.start].stage = _Stage.HELD

    def drop_run(self, chunks: range) -> None:
        """The run that is being decoded does not decode: whoever brings its chunks next may."""
        for chunk in chunks:
            del self._claims[chunk]

    # --- connections ---------------------------------------------------------------------------------------

    def give_up(self, connection: Connection) -> list[int]:
        """``connection`` brings nothing any more; the chunks that it had claimed and that are neither held nor being
        decoded."""
        lost = [
            chunk
            for chunk, claim in list(self._claims.items())
            if claim.connection is connection and claim.stage is _Stage.ARRIVING
        ]
        for chunk in lost:
            del self._claims[chunk]
        return lost

    def _arriving(self, chunk: int, connection: Connection, sequence: int | None) -> _Claim | None:
        """The claim of a chunk that ``connection`` still brings, alone or in the run of this number."""
        claim = self._claims.get(chunk)
        if claim is None or claim.connection is not connection:
            return None
        return claim if claim.stage is _Stage.ARRIVING and claim.sequence == sequence else None
