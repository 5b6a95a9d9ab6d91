"""Runs on their way from a source to whoever sends: each chunk once, decodable, in frames, and bounded; no sockets."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from shipd.bases.base import BaseLost, run_range
from shipd.checkpoints.source import Source, open_source
from shipd.client.choice import RAW, Chooser, Measured
from shipd.client.chunks import ChunkReader
from shipd.client.encoding import MAX_RUN, Encoded, Encoder, encoding_threads
from shipd.client.incremental import untried
from shipd.codecs import registry
from shipd.errors import TransferFailed
from shipproto.agreement import Ability
from shipproto.digests import LeafDigests, digest_image
from shipproto.layout import Layout
from shipproto.limits import LEAF_SIZE, MAX_PAYLOAD
from tests.support.checkpoints import Content, as_state_dict, random_bytes
from tests.support.models import make_image
from tests.support.naive import Tensor
from tests.support.pair import Pair
from tests.support.proxy import until
from tests.support.successive import changed_in, first, following

V0 = first(20)
V1 = following(V0)
PATIENCE = 0.02


@dataclass
class MemoryBase:
    """A base that is bytes in memory, and may be lost after some reads."""

    layout: Layout
    image: bytes
    reads: int = 1 << 30
    digest: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, first: int, count: int, into: memoryview) -> None:
        with self.lock:
            self.reads -= 1
            if self.reads < 0:
                raise BaseLost("gone")
        start, stop = run_range(self.layout, first, count)
        into[:] = self.image[start:stop]

    def close(self) -> None:
        pass


class Encoding:
    """A sender that has offered ``after`` to a receiver that has ``before``, and what its encoder makes of it."""

    def __init__(self, after: Content, before: Content | None = None, *, told: bool = False) -> None:
        """told   the receiver alone knows what it has, and says so"""
        self.pair = Pair(after.rows)
        self.sender, self.layout = self.pair.sender, Layout.of(self.pair.structure)
        self.after = _image(self.layout, after)
        self.before = _image(self.layout, before) if before is not None else b""
        held = digest_image(self.layout, memoryview(self.before)) if before is not None else None
        self.sender.incremental = told
        self.sender.bases = (held.version_digest(),) if held is not None and not told else ()
        self.pair.connect()
        self.pair.there.accept(self.layout, memoryview(bytearray(self.layout.size)), ability=_ability(held))
        self.pair.flow()
        self.base = MemoryBase(self.layout, self.before) if held is not None and not told else None
        self.chooser = Chooser(untried(), dict.fromkeys(untried(), 5e8), prefer="bytes")
        self.lock = threading.Lock()
        self.plain: Callable[[float], bool] = lambda _link: False
        self.link = 1e6
        self.source: Source = open_source(as_state_dict(after))

    @contextmanager
    def encoder(self, threads: int = 1) -> Iterator[Encoder]:
        encoder = Encoder(
            self.sender,
            self.lock,
            lambda: ChunkReader(self.sender, self.source),
            base=self.base,
            chooser=self.chooser,
            link=lambda: self.link,
            plain=self.plain,
            threads=threads,
        )
        try:
            yield encoder
        finally:
            encoder.stop()
            self.source.close()

    def run(self, threads: int = 1) -> list[Encoded]:
        """Everything that comes, checked to be what it stands for."""
        found = []
        with self.encoder(threads) as encoder:
            while not encoder.done:
                if (ready := encoder.take(PATIENCE)) is not None:
                    self.check(ready)
                    found.append(ready)
        return found

    def changed(self) -> list[int]:
        """The chunks that are not as they were."""
        spans = {chunk: run_range(self.layout, chunk, 1) for chunk in range(self.layout.chunks)}
        return [chunk for chunk, (start, stop) in spans.items() if self.before[start:stop] != self.after[start:stop]]

    def check(self, ready: Encoded) -> None:
        start, stop = run_range(self.layout, ready.chunks[0], len(ready.chunks))
        assert ready.size == stop - start
        assert len(ready.payload) <= MAX_PAYLOAD
        assert len(ready.chunks) <= MAX_RUN
        before = memoryview(self.before)[start:stop] if self.before else None
        if ready.codec == RAW:
            assert len(ready.chunks) == 1
            assert bytes(ready.payload) == self.after[start:stop]
        elif ready.codec == registry.SAME:
            assert not ready.payload
            assert self.before[start:stop] == self.after[start:stop]
        else:
            content = memoryview(bytearray(stop - start))
            registry.BY_NUMBER[ready.codec].decode(memoryview(ready.payload), before, content)
            assert content == self.after[start:stop]


def _image(layout: Layout, version: Content) -> bytes:
    return bytes(make_image(layout, {name: bytes(data) for name, data in version.data.items()}))


def _ability(held: LeafDigests | None) -> Ability:
    """Of a daemon that has a version, or none."""
    deltas = {codec.number for codec in registry.CODECS if codec.delta}
    if held is None:
        return Ability(codecs={number: 0 for number in registry.BY_NUMBER if number not in deltas})
    return Ability(held.version_digest(), held, dict.fromkeys(registry.DECODABLE, 0), deltas)


def covered(found: list[Encoded]) -> list[int]:
    return sorted(chunk for ready in found for chunk in ready.chunks)


def names(found: list[Encoded]) -> set[str]:
    return {registry.NAMES[ready.codec] for ready in found}


# --- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_each_chunk_comes_once_and_decodes(threads):
    encoding = Encoding(V1, V0)
    found = encoding.run(threads)
    assert covered(found) == list(range(encoding.layout.chunks))
    assert names(found) == {"egr"}
    assert encoding.sender.digests.complete
    assert encoding.sender.waiting == 0


@pytest.mark.parametrize("there_are", [1, 2])
def test_where_the_system_has_few_threads_those_that_there_are_do_the_work(monkeypatch, there_are):
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == there_are:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    encoding = Encoding(V1, V0)
    monkeypatch.setattr(threading.Thread, "start", limited)
    assert covered(encoding.run(4)) == list(range(encoding.layout.chunks))
    with pytest.raises(TransferFailed, match="no further thread"):
        encoding.run(4)


def test_what_is_the_same_as_in_the_base_is_told_apart_from_what_is_not():
    encoding = Encoding(changed_in(V0, {V0.rows[0].name: [0]}), V0)
    found = encoding.run()
    coded = [ready for ready in found if ready.codec != registry.SAME]
    assert len(covered(coded)) == 1
    assert covered(coded) == encoding.changed()
    assert covered(found) == list(range(encoding.layout.chunks))


def test_without_a_base_what_the_receiver_told_is_compared_by_digest():
    encoding = Encoding(changed_in(V0, {V0.rows[0].name: [0]}), V0, told=True)
    assert encoding.sender.bases == ()
    found = encoding.run()
    assert names(found) == {"same", "xph"}
    assert covered([ready for ready in found if ready.codec != registry.SAME]) == encoding.changed()
    assert covered(found) == list(range(encoding.layout.chunks))


def test_without_anything_there_whole_tensors_are_coded():
    encoding = Encoding(V1)
    found = encoding.run()
    assert names(found) == {"xph"}
    assert covered(found) == list(range(encoding.layout.chunks))
    assert all(choice.density is None for choice in encoding.chooser.taken)


def test_padding_and_tensors_of_several_dtypes_are_coded_too():
    """Small tensors share a chunk, with zeros between them; of a chunk of several dtypes any one may be changed."""
    rows = (
        Tensor("a.big", "bfloat16", (LEAF_SIZE // 2 + 100,)),
        Tensor("b.float", "float32", (1001,)),
        Tensor("b.half", "bfloat16", (33,)),
        Tensor("b.long", "int64", (5,)),
        Tensor("b.odd", "uint8", (13,)),
    )
    data = {row.name: random_bytes(row.name, row.nbytes) for row in rows}
    before = Content(rows, dict(data))
    odd = bytearray(data["b.odd"])
    odd[7] ^= 1
    encoding = Encoding(Content(rows, {**data, "b.odd": bytes(odd)}), before)
    found = encoding.run()
    assert covered(found) == list(range(encoding.layout.chunks))
    assert "same" in names(found)


# --- what does not fit, and what does not help -----------------------------------------------------------------------


def test_a_guess_that_is_far_too_good_costs_tries_and_is_not_believed_for_long():
    encoding = Encoding(V1)
    xph = registry.BY_NAME["xph"].number
    encoding.chooser.codecs = {xph: Measured(xph, "xph", 1e9, share_at_least=0.001)}
    found = encoding.run()
    assert covered(found) == list(range(encoding.layout.chunks))
    assert names(found) == {"xph"}
    assert 0.5 < encoding.chooser.codecs[xph].share(None) < 0.8


def test_what_no_codec_makes_smaller_comes_as_it_is():
    rows = (Tensor("noise", "int64", (4 * LEAF_SIZE // 8,)),)
    encoding = Encoding(Content(rows, {"noise": random_bytes("noise", 4 * LEAF_SIZE)}))
    found = encoding.run()
    assert names(found) == {"raw"}
    assert covered(found) == list(range(4))


def test_where_plain_bytes_are_best_for_all_that_follows_nothing_is_taken_any_more():
    encoding = Encoding(V1, V0)
    encoding.chooser.prefer = "time"
    encoding.link = 1e12
    asked: list[int] = []

    def plain(_link: float) -> bool:
        asked.append(encoding.sender.waiting)
        return True

    encoding.plain = plain
    assert encoding.run() == []
    assert len(asked) == 1
    assert encoding.sender.waiting == encoding.layout.chunks, "what was taken is there for others"


def test_where_plain_bytes_are_best_for_a_run_alone_it_comes_as_it_is():
    encoding = Encoding(V1, V0)
    encoding.chooser.prefer = "time"
    encoding.link = 1e12
    found = encoding.run()
    assert names(found) == {"raw"}
    assert covered(found) == list(range(encoding.layout.chunks))


def test_what_was_refused_comes_as_it_is_even_where_it_is_the_same(monkeypatch):
    encoding = Encoding(V0, V0)
    monkeypatch.setattr(encoding.sender, "raw_only", lambda _chunk: True)
    found = encoding.run()
    assert names(found) == {"raw"}
    assert covered(found) == list(range(encoding.layout.chunks))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [0, 1])
def test_a_base_that_is_lost_is_done_without_from_then_on(reads):
    encoding = Encoding(V1, V0)
    assert encoding.base is not None
    encoding.base.reads = reads
    found = encoding.run()
    assert covered(found) == list(range(encoding.layout.chunks))
    assert names(found) == ({"xph"} if not reads else {"egr", "xph"})


def test_what_ends_a_thread_is_raised_where_its_work_is_asked_for(monkeypatch):
    encoding = Encoding(V1, V0)

    def fail(_self: ChunkReader, _chunk: int) -> memoryview:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(ChunkReader, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        encoding.run()


def test_it_waits_for_whoever_sends_and_ends_when_told_to(monkeypatch):
    """Frames that nobody takes are not heaped up, and hold no thread for good."""
    monkeypatch.setattr("shipd.client.encoding._WAITING", 2)
    encoding = Encoding(V1)
    with encoding.encoder(threads=2) as encoder:
        until(encoder._ready.full, "what may wait is waiting")
        assert not encoder.done
        waiting = encoding.sender.waiting
        assert encoder.take(0.0) is not None
        encoder.stop()
        assert not any(thread.is_alive() for thread in encoder._threads)
    assert encoding.sender.waiting <= waiting


def test_nothing_ready_is_nothing_and_no_error():
    encoding = Encoding(V1)
    # Its thread cannot take anything until the lock is given back, which is before it is stopped.
    with ExitStack() as running, encoding.lock:
        encoder = running.enter_context(encoding.encoder())
        assert encoder.take(0.0) is None
        assert encoder.take(0.001) is None
        assert not encoder.done


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 2), (5, 4), (64, 4)])
def test_one_core_is_left_to_whoever_sends(monkeypatch, cores, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(cores)))
    assert encoding_threads() == threads
