"""A sender and a receiver that have agreed on coded runs, moved by hand. To be used with leaves of 512 bytes."""

from shipproto.digests import digest_image
from shipproto.outcomes import RunToDecode
from tests.support.coding import CODECS, DIFF, ability, decode_into, encode
from tests.support.models import SMALL, contents, make_image
from tests.support.naive import Tensor
from tests.support.pair import Pair

ROWS = (*SMALL, *(Tensor(f"t{at}", "bfloat16", (300,)) for at in range(4)))


class CodedPair(Pair):
    """A pair that has agreed on everything: the receiver has the version before, and so has the sender."""

    def __init__(self) -> None:
        super().__init__(ROWS)
        self.before = memoryview(make_image(self.layout, contents(self.structure, 1)))
        self.after = memoryview(make_image(self.layout, self.data))
        self.held = digest_image(self.layout, self.before)
        self.base = self.held.version_digest()
        self.sender.bases = (self.base,)
        self.connect()
        self.accept()
        assert self.sender.codecs == CODECS

    def accept(self) -> None:
        self.there.accept(self.layout, memoryview(self.image), lanes=4, ability=ability(self.base, self.held))
        self.flow()

    def take(self, most: int = 3) -> range:
        """Chunks that are handed out and digested."""
        chunks = self.sender.next_chunks(most)
        for chunk in chunks:
            self.sender.digest_chunk(chunk, self.content(chunk))
        return chunks

    def payload(self, chunks: range, codec: int = DIFF) -> bytes:
        start, end = self.layout.span(chunks)
        return encode(codec, bytes(self.after[start:end]), bytes(self.before[start:end]))

    def send(self, chunks: range, codec: int = DIFF) -> None:
        """A run, on the transfer's own connection."""
        self.sender.send_run(chunks, codec, self.payload(chunks, codec))

    def arrived(self) -> RunToDecode:
        """The run that has just arrived."""
        run = self.outcomes.pop()
        assert isinstance(run, RunToDecode)
        return run

    def decode(self, run: RunToDecode) -> list:
        decode_into(run, self.layout, memoryview(self.image), self.before)
        return self.there.decoded(run)

    def is_after(self, chunks: range) -> bool:
        start, end = self.layout.span(chunks)
        return self.image[start:end] == self.after[start:end]
