import sys
import threading

import numpy as np
import pytest

from shipd.bases.base import BaseLost
from shipd.bases.store import VersionStore, kept_versions
from shipd.errors import TensorChanged
from shipproto.digests import LeafDigests
from shipproto.layout import Layout
from tests.support.bases import Version, assert_reads, model, raising, read
from tests.support.models import SMALL, build, leaves_of
from tests.unit.test_gate_forks import forking, in_child

MIB = 1 << 20


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def keep(store: VersionStore, version: Version, name: str = "m") -> str | None:
    return store.keep(name, version.digests, version.chunk)


def charged(version: Version) -> int:
    """What the newest version costs alone."""
    return version.layout.size + len(version.digests.encoded)


def held(store: VersionStore, version: Version, name: str = "m") -> bool:
    return version.digest in store.digests(name, version.layout.structure)


def test_older_versions_are_read_bit_for_bit(generator: np.random.Generator) -> None:
    store = VersionStore()
    with leaves_of(512):
        versions = [Version.of(build(SMALL))]
        for share in (0.002, 0.01, 0.0, 0.01):
            versions.append(versions[-1].next(generator, share))
    digests = list(dict.fromkeys(version.digest for version in reversed(versions)))
    for version in versions:
        assert keep(store, version) is None
        assert_reads(store.open("m", version.layout, version.digest), version)
    assert list(store.digests("m", versions[0].layout.structure)) == digests
    for version in versions:
        assert_reads(store.open("m", version.layout, version.digest), version)


def test_every_version_can_be_read_while_the_next_is_taken_in(generator: np.random.Generator) -> None:
    """The reads are made from where the new version's chunks are asked for: the image is half old and half new."""
    store = VersionStore()
    with leaves_of(512):
        versions = [Version.of(build(SMALL))]
        for _ in range(3):
            versions.append(versions[-1].next(generator, 0.01))
    for version in versions[:3]:
        keep(store, version)
    bases = [store.open("m", version.layout, version.digest) for version in versions[:3]]
    asked = []

    def chunk(number: int) -> memoryview:
        asked.append(number)
        for base, version in zip(bases, versions, strict=False):
            assert_reads(base, version)
        assert not held(store, versions[3])
        return versions[3].chunk(number)

    assert store.keep("m", versions[3].digests, chunk) is None
    assert len(asked) > 3
    for base, version in zip(bases, versions, strict=False):
        assert_reads(base, version)


def test_a_write_during_a_copy_is_noticed(generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VersionStore()
    first = Version.of(model(5000))
    second = first.next(generator, 0.01)
    keep(store, first)
    base = store.open("m", first.layout, first.digest)
    copyto = np.copyto
    copies = []

    def slow(target: np.ndarray, source: np.ndarray) -> None:
        copies.append(len(target))
        copyto(target, source)
        if len(copies) == 1:
            keep(store, second)
            # As if half of it had been copied afterwards.
            target[2500:] = np.frombuffer(second.image, dtype=np.uint8)[2500 : len(target)]

    monkeypatch.setattr("shipd.bases.history.np.copyto", slow)
    assert_reads(base, first)
    assert keep(store, second) is None
    assert held(store, second)


def test_chunks_that_have_not_changed_are_not_read(generator: np.random.Generator) -> None:
    store = VersionStore()
    with leaves_of(512):
        first = Version.of(build(SMALL))
        second = first.next(generator, 0.1, chunks=0.3)
    keep(store, first)
    asked: list[int] = []

    def chunk(number: int) -> memoryview:
        asked.append(number)
        return second.chunk(number)

    store.keep("m", second.digests, chunk)
    assert asked == [chunk for chunk in range(first.layout.chunks) if first.chunk(chunk) != second.chunk(chunk)]
    assert 0 < len(asked) < first.layout.chunks
    assert_reads(store.open("m", second.layout, second.digest), second)
    assert_reads(store.open("m", first.layout, first.digest), first)


def test_a_version_that_is_kept_already_is_not_read_again(generator: np.random.Generator) -> None:
    store = VersionStore()
    first = Version.of(model(5000))
    second = first.next(generator, 0.01)
    for version in (first, second):
        keep(store, version)
    used = store.memory_used
    for version in (first, second):
        assert store.keep("m", version.digests, raising(version, 0, AssertionError("was read"))) is None
        assert store.keep("another name", version.digests, raising(version, 0, AssertionError("was read"))) is None
    assert store.memory_used == used
    assert store.digests("another name", first.layout.structure) == (second.digest, first.digest)


def test_models_of_one_structure_have_histories_of_their_own(generator: np.random.Generator) -> None:
    store = VersionStore()
    structure = model(20000)
    one, two = Version.of(structure, 1), Version.of(structure, 2)
    for _ in range(3):
        one, two = one.next(generator, 0.005), two.next(generator, 0.005)
        keep(store, one, "one")
        keep(store, two, "two")
    assert len(store.digests("one", structure)) == 6
    assert store.digests("one", structure)[0] == one.digest
    assert store.digests("two", structure)[0] == two.digest
    assert_reads(store.open("one", two.layout, two.digest), two)


def test_a_structure_that_lacks_what_is_offered() -> None:
    """A receiver's structure rules, and has no place for non-persistent buffers."""
    store = VersionStore()
    rows = [row for row in SMALL if row.name != "steps"]
    ruling, offered = build(rows), build(SMALL)
    version = Version.of(ruling)
    keep(store, version)
    assert store.digests("m", offered) == (version.digest,)
    assert store.open("m", Layout.of(offered), version.digest) is None
    more = Version.of(offered)
    keep(store, more)
    assert store.digests("m", ruling) == (version.digest,)
    assert store.digests("m", offered) == (more.digest, version.digest)
    # Asked again, from what is remembered.
    assert store.digests("m", ruling) == (version.digest,)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_memory_is_counted_to_the_byte(generator: np.random.Generator) -> None:
    store = VersionStore()
    first = Version.of(model(40000, dtype="uint16"))
    assert store.memory_used == 0
    keep(store, first)
    assert store.memory_used == charged(first)
    image = np.frombuffer(first.image, dtype=np.uint16).copy()
    image[5:40000:400] ^= 1
    second = Version(first.layout, image.tobytes())
    keep(store, second)
    assert store.memory_used == charged(second) + 12 + 4 * 100
    keep(store, second.next(generator, 1.0))
    # Dense: the patches would be as large as the model, so there is no way back.
    assert store.memory_used == charged(first)
    assert len(store.digests("m", first.layout.structure)) == 1
    store.clear()
    assert store.memory_used == 0


def test_only_so_many_versions_are_kept(generator: np.random.Generator) -> None:
    store = VersionStore(versions=3)
    versions = [Version.of(model(9000))]
    for _ in range(5):
        keep(store, versions[-1])
        versions.append(versions[-1].next(generator, 0.001))
    structure = versions[0].layout.structure
    assert store.digests("m", structure) == tuple(version.digest for version in versions[4:1:-1])
    patches = store.memory_used - charged(versions[0])
    for version in versions[2:5]:
        assert_reads(store.open("m", version.layout, version.digest), version)
    one = VersionStore(versions=1)
    for version in versions:
        keep(one, version)
    assert one.digests("m", structure) == (versions[-1].digest,)
    assert one.memory_used == charged(versions[0])
    assert patches > 0


def test_patches_take_a_share_of_the_model(generator: np.random.Generator) -> None:
    store = VersionStore(patch_share=0.1)
    versions = [Version.of(model(9000, 9000))]
    for _ in range(6):
        keep(store, versions[-1])
        assert store.memory_used - charged(versions[0]) <= 0.1 * versions[0].layout.size
        versions.append(versions[-1].next(generator, 0.01))
    assert 1 < len(store.digests("m", versions[0].layout.structure)) < 5
    for version in versions[:6]:
        if held(store, version):
            assert_reads(store.open("m", version.layout, version.digest), version)


def test_the_least_recently_used_model_gives_way() -> None:
    models = {name: Version.of(model(30000 + at)) for at, name in enumerate("abc")}
    store = VersionStore(limit=2 * charged(models["a"]) + 100)
    for name in "ab":
        assert keep(store, models[name], name) is None
    lost = store.open("b", models["b"].layout, models["b"].digest)
    kept = store.open("a", models["a"].layout, models["a"].digest)
    assert keep(store, models["c"], "c") is None
    assert held(store, models["a"], "a")
    assert held(store, models["c"], "c")
    assert not held(store, models["b"], "b")
    assert store.memory_used == charged(models["a"]) + charged(models["c"])
    assert_reads(kept, models["a"])
    assert lost is not None
    with pytest.raises(BaseLost, match="no longer kept"):
        read(lost, 0, 1, models["b"].layout)


def test_patches_stay_within_the_limit(generator: np.random.Generator) -> None:
    first = Version.of(model(60000))
    store = VersionStore(limit=charged(first) + 1500)
    for _ in range(4):
        keep(store, first)
        assert store.memory_used <= store.limit
        first = first.next(generator, 0.004)
    assert len(store.digests("m", first.layout.structure)) == 2


def test_what_does_not_fit_is_not_kept() -> None:
    small, large = Version.of(model(1000)), Version.of(model(99999))
    store = VersionStore(limit=charged(small))
    keep(store, small, "small")
    reason = keep(store, large, "large")
    assert reason is not None
    assert "at most 4.1 kB are kept" in reason
    assert held(store, small, "small")


def test_switched_off_and_lowered() -> None:
    version = Version.of(model(1000))
    off = VersionStore(limit=0)
    assert keep(off, version) == "keeping versions in memory is switched off"
    assert off.memory_used == 0
    store = VersionStore()
    keep(store, version)
    store.limit = 100
    assert store.memory_used == 0
    assert not held(store, version)
    with pytest.raises(ValueError, match="-1"):
        store.limit = -1
    with pytest.raises(ValueError, match="9 versions"):
        VersionStore(versions=9)


def test_no_memory_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    store = VersionStore()
    monkeypatch.setattr("shipd.bases.history.mmap.mmap", none)
    reason = keep(store, Version.of(model(1000)))
    assert reason is not None
    assert "Cannot allocate memory" in reason
    assert store.memory_used == 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "error", [TensorChanged("moved", tensor="t"), OSError(5, "Input/output error"), KeyError("a bug")]
)
def test_an_advance_that_fails_leaves_nothing(generator: np.random.Generator, at: int, error: Exception) -> None:
    store = VersionStore()
    with leaves_of(512):
        first = Version.of(build(SMALL))
        second = first.next(generator, 0.1)
    keep(store, first)
    base = store.open("m", first.layout, first.digest)
    assert base is not None
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            store.keep("m", second.digests, raising(second, at, error))
    else:
        assert store.keep("m", second.digests, raising(second, at, error)) == str(error)
    assert store.digests("m", first.layout.structure) == ()
    assert store.memory_used == 0
    with pytest.raises(BaseLost):
        read(base, 0, 1, first.layout)
    # And the next is kept as the first was.
    assert keep(store, second) is None
    assert_reads(store.open("m", second.layout, second.digest), second)


@pytest.mark.parametrize("place", [0, -1])
def test_a_tensor_that_has_changed_is_no_base(generator: np.random.Generator, place: int) -> None:
    """After it was sent and before it was kept, by a single bit, in a large tensor and in a packed one."""
    store = VersionStore()
    with leaves_of(512):
        first = Version.of(model(2000, 30, 40))
        second = first.next(generator, 0.2)
    keep(store, first)
    image = bytearray(second.image)
    offset = int(first.layout.offsets[place])
    image[offset] ^= 1
    changed = Version(first.layout, bytes(image))
    reason = store.keep("m", second.digests, changed.chunk)
    assert (
        reason == f"tensor '{first.layout.structure.names[place if place == 0 else 1]}' has changed since it was sent"
    )
    assert store.digests("m", first.layout.structure) == ()
    assert store.memory_used == 0


def test_a_chunk_of_another_size_is_a_bug() -> None:
    store = VersionStore()
    version = Version.of(model(2000))
    with pytest.raises(ValueError, match="broadcast"):
        store.keep("m", version.digests, lambda chunk: version.chunk(chunk)[:-1])
    assert store.memory_used == 0
    with pytest.raises(ValueError, match="not known yet"):
        store.keep("m", LeafDigests(version.layout), version.chunk)


def test_ranges_and_rooms_that_are_none() -> None:
    store = VersionStore()
    version = Version.of(model(2000))
    keep(store, version)
    base = store.open("m", version.layout, version.digest)
    assert base is not None
    for first, count in ((-1, 1), (0, 2), (1, 1), (0, 0)):
        with pytest.raises(ValueError, match="no run"):
            base.read(first, count, memoryview(bytearray(2000)))
    with pytest.raises(ValueError, match="not into 1999"):
        base.read(0, 1, memoryview(bytearray(1999)))
    with pytest.raises(ValueError, match="writable"):
        base.read(0, 1, memoryview(bytes(2000)))
    base.close()
    base.close()
    with pytest.raises(BaseLost, match="closed"):
        read(base, 0, 1, version.layout)


@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_a_model_without_bytes(sizes: tuple[int, ...]) -> None:
    store = VersionStore()
    version = Version.of(model(*sizes))
    assert keep(store, version) is None
    assert_reads(store.open("m", version.layout, version.digest), version)


def test_dropped_while_a_version_is_taken_in(generator: np.random.Generator) -> None:
    store = VersionStore()
    with leaves_of(512):
        first = Version.of(build(SMALL))
        second = first.next(generator, 0.1)
    keep(store, first)

    def chunk(number: int) -> memoryview:
        if number == 3:
            store.clear()
        return second.chunk(number)

    assert store.keep("m", second.digests, chunk) == "dropped while a version was taken in"
    assert store.memory_used == 0
    assert store.digests("m", first.layout.structure) == ()


def test_another_thread_is_not_waited_for(generator: np.random.Generator) -> None:
    store = VersionStore()
    first = Version.of(model(9000))
    second, third = first.next(generator, 0.01), first.next(generator, 0.01)
    keep(store, first)
    reasons: list[str | None] = []

    def chunk(number: int) -> memoryview:
        other = threading.Thread(target=lambda: reasons.append(keep(store, third)))
        other.start()
        other.join()
        return second.chunk(number)

    assert store.keep("m", second.digests, chunk) is None
    assert reasons == ["another push of the model is just being kept"]
    assert store.digests("m", first.layout.structure) == (second.digest, first.digest)
    assert keep(store, third) is None


# --- forks -----------------------------------------------------------------------------------------------------------


@forking
def test_a_child_has_nothing_and_disturbs_nothing(generator: np.random.Generator) -> None:
    store = VersionStore()
    first = Version.of(model(90000))
    second = first.next(generator, 0.01)
    keep(store, first)
    base = store.open("m", first.layout, first.digest)
    assert base is not None

    def child() -> None:
        assert store.digests("m", first.layout.structure) == ()
        assert store.memory_used == 0
        with pytest.raises(BaseLost):
            read(base, 0, 1, first.layout)
        assert keep(store, second) is None
        assert_reads(store.open("m", second.layout, second.digest), second)

    assert in_child(child) == ""
    assert_reads(base, first)
    assert keep(store, second) is None
    assert_reads(base, first)


@forking
def test_a_fork_while_locks_are_held(generator: np.random.Generator) -> None:
    """As by another thread, which the child does not have: it must not wait for it."""
    store = VersionStore()
    first = Version.of(model(9000))
    keep(store, first)
    base = store.open("m", first.layout, first.digest)
    assert base is not None

    def child() -> None:
        with pytest.raises(BaseLost):
            read(base, 0, 1, first.layout)
        assert keep(store, first) is None
        kept_versions.clear()

    (history,) = store._histories.values()
    with history._lock, store._lock, kept_versions._lock:
        assert in_child(child) == ""
    assert_reads(base, first)


@forking
@pytest.mark.skipif(sys.platform != "linux", reason="memory is wiped in children on Linux alone")
def test_a_child_shares_no_page(generator: np.random.Generator) -> None:
    """Else the next version would have the kernel copy every page that it writes to, for as long as the child lives."""
    store = VersionStore()
    version = Version.of(model(90000))
    keep(store, version)
    (history,) = store._histories.values()
    image = history._image
    assert image is not None
    assert image.any()

    def child() -> None:
        assert not image.any()

    assert in_child(child) == ""


def test_every_structure_is_remembered_in_bounds() -> None:
    store = VersionStore()
    keep(store, Version.of(model(100)))
    for size in range(101, 300):
        assert store.digests("m", model(size)) == ()
    assert len(store._answers) <= 64
