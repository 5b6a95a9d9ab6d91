"""A sender of coded runs by hand: it agrees on them with a real daemon as any does, and then sends what a test says.

Payloads are made with shipd's codecs, which are tested elsewhere; everything else is ``tests.support.naive``'s.
"""

import socket
from typing import Any, Self

from shipd.codecs import registry
from shipproto.dtypes import BY_CODE
from tests.support import naive
from tests.support.checkpoints import Content
from tests.support.hostile import TRANSFER, Peer, offer
from tests.support.naive import Frame, encode_structure


def code_of(dtype: str) -> int:
    """The number of a dtype."""
    return next(number for number, known in BY_CODE.items() if known.name == dtype)


class CodedSender(Peer):
    """Offers ``version`` to a daemon, with ``base`` as the version that it has.

    base         None: no base is known, but it is asked what the daemon holds where ``incremental``
    want         what the daemon has answered
    """

    def __init__(
        self,
        port: int,
        version: Content,
        base: Content | None,
        *,
        model: str = "victim",
        label: str = "hostile",
        transfer: bytes = TRANSFER,
        incremental: bool = True,
    ) -> None:
        super().__init__(socket.create_connection(("127.0.0.1", port)))
        self.port = port
        self.version = version
        self.base = base
        self.label = label
        self.transfer = transfer
        self._structure = encode_structure(version.rows)
        self._picture = naive.picture(version.rows)
        self.image = self._image(version)
        self.old = self._image(base) if base is not None else None
        self._fields = offer(self._structure, len(version.rows), version.nbytes, model=model, transfer=transfer)
        if incremental:
            self._fields["incremental"] = True
        if base is not None:
            self._fields["bases"] = [bytes.fromhex(base.digest)]
        try:
            self.want: Frame = self._agree()
        except BaseException:
            self.close()
            raise

    def _agree(self) -> Frame:
        self.greet().send("Offer", self._fields)
        while (found := self.receive()) is not None:
            if found.name == "StructureWanted":
                self.message("StructureIs", {"transfer": self.transfer}, self._structure)
            elif found.name == "Want":
                return found
            assert found.name != "Abort", (found.fields, found.payload)
        raise AssertionError("no WANT")

    def _image(self, version: Content) -> bytes:
        image = bytearray(self._picture.size)
        for row in version.rows:
            start = self._picture.offsets[row.name]
            image[start : start + row.nbytes] = version.data[row.name]
        return bytes(image)

    # --- what there is -------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """How many there are."""
        return len(self._picture.chunks)

    def span(self, first: int, count: int) -> slice:
        """Where a run lies in the image."""
        last, size, _ = self._picture.chunks[first + count - 1]
        return slice(self._picture.chunks[first][0], last + size)

    def payload(self, codec: str, first: int, count: int, *, dtype: str = "bfloat16") -> bytes:
        """The right one."""
        place = self.span(first, count)
        chosen = registry.BY_NAME[codec]
        made = chosen.encode(
            self.image[place],
            self.old[place] if self.old is not None else None,
            dtype=code_of(dtype),
            most=1 << 30,
        )
        assert made is not None
        return made

    # --- what is sent --------------------------------------------------------------------------------------

    def coded(self, codec: int, first: int, count: int, payload: bytes = b"", **lies: Any) -> Self:
        """A frame with a run."""
        return self.send("Coded", {"chunk": first, "chunks": count, "codec": codec}, payload, **lies)

    def right(self, codec: str, first: int, count: int) -> Self:
        """A run as it is to be."""
        return self.coded(registry.BY_NAME[codec].number, first, count, self.payload(codec, first, count))

    def data(self, chunk: int, **lies: Any) -> Self:
        """A chunk as it is."""
        return self.send("Data", {"chunk": chunk}, self.image[self.span(chunk, 1)], **lies)

    def finish(self) -> Self:
        """FINISH, with the digests of what is to arrive."""
        rows = sorted(self.version.rows, key=lambda row: row.name.encode())
        digests = b"".join(naive.tensor_digest(bytes(self.version.data[row.name])) for row in rows)
        fields = {"digest": bytes.fromhex(self.version.digest), "label": self.label, "transfer": self.transfer}
        return self.message("Finish", fields, digests)

    def commit(self) -> Frame:
        """Wait for STAGED, ask for the commit, and wait for it."""
        self.expect("Staged")
        self.send("Commit", {"transfer": self.transfer})
        return self.expect("Committed")

    def answer(self, *names: str) -> Frame:
        """The next frame of one of these types."""
        while (found := self.receive()) is not None:
            if found.name in names:
                return found
        raise AssertionError(f"the connection ended without {' or '.join(names)}")

    def join(self, number: int = 1) -> Peer:
        """A lane beside it."""
        lane = Peer(socket.create_connection(("127.0.0.1", self.port))).greet()
        lane.send("Join", {"lane": number, "transfer": self.transfer})
        lane.expect("Joined")
        return lane


def ranges_of(want: Frame) -> list[int]:
    """The chunks that a WANT asks for."""
    numbers = [int.from_bytes(want.payload[at : at + 4], "little") for at in range(0, len(want.payload), 4)]
    return [chunk for start, stop in zip(numbers[::2], numbers[1::2], strict=True) for chunk in range(start, stop)]
