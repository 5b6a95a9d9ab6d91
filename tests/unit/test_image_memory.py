import ctypes
import errno
import fcntl
import gc
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shipd.images import memory
from shipd.images.memory import Access, ImageMapping, create_memfd, open_read_only

SIZE = 1 << 20


@pytest.fixture
def fds():
    fd = create_memfd("shipd-test-image", SIZE)
    read_only = open_read_only(fd)
    yield fd, read_only
    os.close(fd)
    os.close(read_only)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def mapped() -> int:
    return sum("shipd-test-image" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_memfd_is_sealed_private_and_not_inherited(fds):
    fd, _ = fds
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
        assert seals & seal
    assert not seals & fcntl.F_SEAL_WRITE
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert not os.get_inheritable(fd)
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_memory_is_created_where_the_kernel_does_not_know_noexec(monkeypatch):
    real = os.memfd_create

    def old_kernel(name, flags):
        if flags & memory._MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "unknown flag")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", old_kernel)
    fd = create_memfd("shipd-test-image", SIZE)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(fd)


def test_no_descriptor_leaks_where_sealing_fails(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no")

    before = open_descriptors()
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="no"):
        create_memfd("shipd-test-image", SIZE)
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [0, -1])
def test_an_image_has_bytes(size, fds):
    with pytest.raises(ValueError, match="image of"):
        create_memfd("shipd-test-image", size)
    with pytest.raises(ValueError, match="image of"):
        ImageMapping.shared(fds[0], size)


def test_the_read_only_descriptor_cannot_write(fds):
    _, read_only = fds
    assert not os.get_inheritable(read_only)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(read_only, b"x")
    with pytest.raises(OSError, match="cannot map"):
        ImageMapping.shared(read_only, SIZE)


def test_what_the_daemon_writes_is_seen_by_readers_and_private_writes_are_not(fds):
    fd, read_only = fds
    daemon = ImageMapping.shared(fd, SIZE)
    reader = ImageMapping.read_only(read_only, SIZE)
    private = ImageMapping.private(read_only, SIZE)
    daemon.view[:3] = b"abc"
    assert bytes(reader.view[:3]) == bytes(private.view[:3]) == b"abc"
    private.view[:3] = b"xyz"
    assert bytes(reader.view[:3]) == b"abc"
    # The written page is private from then on, which is why such a mapping serves one version only.
    daemon.view[:3] = b"def"
    assert bytes(private.view[:3]) == b"xyz"
    assert bytes(reader.view[:3]) == b"def"
    for mapping in (daemon, reader, private):
        mapping.close()


def test_the_view_of_a_read_only_mapping_says_so(fds):
    with_view = ImageMapping.read_only(fds[1], SIZE)
    assert with_view.view.readonly
    with pytest.raises(TypeError):
        with_view.view[0] = 1
    assert not with_view.raw.readonly
    assert ctypes.c_ubyte.from_address(with_view.address).value == 0
    assert (with_view.size, with_view.access) == (SIZE, Access.READ_ONLY)
    with_view.close()


def test_a_mapping_keeps_no_descriptor(fds):
    before = open_descriptors()
    mapping = ImageMapping.shared(fds[0], SIZE)
    assert open_descriptors() == before
    mapping.close()


def test_memory_is_unmapped_with_its_last_user(fds):
    mapping = ImageMapping.shared(fds[0], SIZE)
    view = mapping.view[10:20]
    array = np.frombuffer(mapping.view, dtype=np.uint8)[64:128]
    tensor = torch.frombuffer(mapping.raw, dtype=torch.float32, offset=256, count=4).reshape(2, 2)
    mapping.view[256:272] = np.arange(4, dtype=np.float32).tobytes()
    assert mapped() == 1
    mapping.close()
    mapping.close()
    assert mapping.closed
    with pytest.raises(ValueError, match="closed"):
        _ = mapping.view
    del mapping
    gc.collect()
    assert mapped() == 1
    assert tensor.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    del view, array
    assert mapped() == 1
    del tensor
    assert mapped() == 0


def test_an_unsealed_or_short_file_is_refused(fds, tmp_path):
    with pytest.raises(OSError, match="are expected"):
        ImageMapping.read_only(fds[1], 2 * SIZE)
    fd = os.memfd_create("shipd-test-image", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(OSError, match="not sealed"):
        ImageMapping.shared(fd, SIZE)
    os.close(fd)


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize("access", list(Access))
def test_populating_maps_every_page_and_changes_none(kernel, access, fds, monkeypatch):
    fd, read_only = fds
    monkeypatch.setattr(memory, "POPULATE_SLICE", SIZE // 4)
    if kernel == "old":

        def refuse(*_):
            ctypes.set_errno(errno.EINVAL)
            return -1

        monkeypatch.setattr(memory._libc, "madvise", refuse)
    content = os.urandom(SIZE)
    os.pwrite(fd, content, 0)
    mapping = ImageMapping(fd if access is Access.READ_WRITE else read_only, SIZE, access)
    assert mapping.populate()
    assert bytes(mapping.view) == content
    mapping.close()


def test_a_private_mapping_is_the_image_until_it_is_written_to(fds, monkeypatch):
    monkeypatch.setattr(memory, "_PAGEMAP_SLICE", 10)
    daemon, private = ImageMapping.shared(fds[0], SIZE), ImageMapping.private(fds[1], SIZE)
    daemon.view[:] = bytes(range(256)) * (SIZE // 256)
    assert private.unwritten()
    private.touch(5, SIZE - 5000)
    assert private.unwritten()
    daemon.view[9 * 4096] = 77
    assert private.unwritten()
    assert private.view[9 * 4096] == 77
    private.view[SIZE - 1] = 1
    assert not private.unwritten()
    daemon.close()
    private.close()


def test_populating_allocates_the_pages_of_a_fresh_image(fds):
    fd, _ = fds
    assert os.fstat(fd).st_blocks == 0
    mapping = ImageMapping.shared(fd, SIZE)
    assert mapping.populate()
    assert os.fstat(fd).st_blocks * 512 >= SIZE
    mapping.close()


def test_populating_can_be_given_up(fds, monkeypatch):
    monkeypatch.setattr(memory, "POPULATE_SLICE", SIZE // 4)
    mapping = ImageMapping.shared(fds[0], SIZE)
    answers = iter([False, False, True])
    assert not mapping.populate(lambda: next(answers))
    assert os.fstat(fds[0]).st_blocks * 512 == SIZE // 2
    mapping.close()


def test_populating_says_when_memory_runs_out(fds, monkeypatch):
    def refuse(*_):
        ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(memory._libc, "madvise", refuse)
    mapping = ImageMapping.shared(fds[0], SIZE)
    with pytest.raises(OSError, match="cannot populate"):
        mapping.populate()
    mapping.close()


def test_a_mapping_that_is_in_use_at_exit_is_left_to_the_kernel():
    script = """
import os, torch
from shipd.images.memory import ImageMapping, create_memfd
fd = create_memfd("shipd-test-image", 1 << 20)
mapping = ImageMapping.shared(fd, 1 << 20)
kept = torch.frombuffer(mapping.raw, dtype=torch.uint8)
class Late:
    def __del__(self):
        kept.sum()
late = Late()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
