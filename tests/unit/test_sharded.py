import json
import os
import sys
from pathlib import Path

import pytest
import torch

from shipd.checkpoints.parts import Parts
from shipd.checkpoints.source import Source, open_source
from shipd.errors import CheckpointError, TensorChanged
from tests.support.checkpoints import MIB, Content, as_state_dict, content, write_safetensors
from tests.support.naive import Tensor
from tests.support.processes import Helper
from tests.support.reading import content_of, digest_of, read_through

INDEX = "model.safetensors.index.json"


def version() -> Content:
    """Tensors whose neighbours by name are in other files, of a chunk and more and of a few bytes."""
    rows = [Tensor(f"layer.{at:02}.weight", "float32", (400, 400)) for at in range(6)]
    rows += [Tensor(f"layer.{at:02}.bias", "bfloat16", (at,)) for at in range(6)]
    return content(rows)


def shards(whole: Content, count: int = 3) -> dict[str, Content]:
    """Its tensors dealt to ``count`` files."""
    return {
        f"model-{at + 1:05}-of-{count:05}.safetensors": Content(whole.rows[at::count], whole.data)
        for at in range(count)
    }


def write_index(path: Path, weight_map: object, **more: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 7}, **more, "weight_map": weight_map}))
    return path


def saved(folder: Path, whole: Content | None = None) -> Path:
    """A sharded checkpoint, and what transformers puts beside one."""
    parts = shards(whole or version())
    for name, part in parts.items():
        write_safetensors(folder / name, part)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.txt").write_text("[CLS]")
    write_index(folder / INDEX, {row.name: name for name, part in parts.items() for row in part.rows})
    return folder


def refused(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    told = str(caught.value)
    assert told.isprintable()
    assert len(told) < 1200
    return told


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", INDEX])
def test_a_sharded_checkpoint_is_one_version(tmp_path: Path, name: str) -> None:
    source = open_source(saved(tmp_path) / name)
    assert isinstance(source, Source)
    assert source.origin == str(tmp_path / INDEX)
    assert source.structure.names == tuple(sorted(row.name for row in version().rows))
    assert {tensor: content_of(source, row) for row, tensor in enumerate(source.structure.names)} == version().data
    assert digest_of(source) == version().digest
    assert source.changed() is None
    source.close()


def test_any_name_will_do_for_an_index(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "weights")
    for path in (tmp_path, tmp_path / "weights"):
        source = open_source(path)
        assert digest_of(source) == version().digest
        source.close()


def test_the_map_may_come_late_in_an_index(tmp_path: Path) -> None:
    saved(tmp_path)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    write_index(tmp_path / INDEX, weight_map, notes="x" * 10_000)
    source = open_source(tmp_path)
    assert digest_of(source) == version().digest
    source.close()


def test_a_download_cache_of_links_is_followed(tmp_path: Path) -> None:
    """huggingface_hub keeps the files elsewhere, under their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    saved(blobs)
    for at, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{at}")
        file.rename(blobs / f"{at}")
    source = open_source(snapshot)
    assert digest_of(source) == version().digest
    source.close()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_of_torch_save_may_be_shards(tmp_path: Path, legacy: bool) -> None:
    whole = content(
        [*version().rows, Tensor("tied.a", "float32", (5,)), Tensor("tied.b", "float32", (5,), tied_to="tied.a")]
    )
    state = as_state_dict(whole)
    weight_map: dict[str, str] = {}
    for at, names in enumerate((list(state)[:3], list(state)[3:])):
        file = f"pytorch_model-{at + 1:05}-of-00002.bin"
        part = {name: state[name] for name in names}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(names, file)
    write_index(tmp_path / "pytorch_model.bin.index.json", weight_map)
    source = open_source(tmp_path)
    assert source.structure.spec(source.structure.index["tied.b"]).tied_to == "tied.a"
    assert digest_of(source) == whole.digest
    source.close()


def test_what_lies_side_by_side_in_a_shard_is_not_copied(tmp_path: Path) -> None:
    whole = content(Tensor(f"{name}", "float32", (16,)) for name in "abcd")
    for name, part in (("1", whole.rows[:2]), ("2", whole.rows[2:])):
        write_safetensors(tmp_path / name, Content(part, whole.data))
    write_index(tmp_path / INDEX, {"a": "1", "b": "1", "c": "2", "d": "2"})
    source = open_source(tmp_path)
    pair = source.read_packed(range(2), None)
    assert pair.obj is source.read(0, 0, 1).obj
    assert source.lends(pair)
    across = source.read_packed(range(4), None)
    assert not source.lends(across)
    data = [bytes(whole.data[name]) for name in "abcd"]
    assert across == b"".join(data)
    assert source.read_packed([3, 1, 0], [5, 9]) == data[3] + bytes(5) + data[1] + bytes(9) + data[0]
    assert source.read_packed([0, 1, 3, 2], [1, 2, 3]) == b"".join(
        [data[0], bytes(1), data[1], bytes(2), data[3], bytes(3), data[2]]
    )
    source.close()
    assert across == b"".join(data)


def test_a_shard_that_is_written_to_or_cut_is_noticed(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path))
    second = tmp_path / "model-00002-of-00003.safetensors"
    size = second.stat().st_size
    os.truncate(second, 100)
    assert source.changed() == f"the file {str(second)!r} (it had {size} bytes and now has 100)"
    with pytest.raises(TensorChanged, match="was cut from"):
        source.read(source.structure.index["layer.01.weight"], 0, 1)
    assert source.read(source.structure.index["layer.00.weight"], 0, 1).nbytes == 1
    source.close()


def test_parts_of_one_name_are_refused() -> None:
    parts = [open_source({"w": torch.ones(1)}), open_source({"w": torch.ones(1)})]
    with pytest.raises(CheckpointError, match="'here': tensor 'w' appears twice"):
        Parts(parts, "here")


def test_files_are_closed(tmp_path: Path) -> None:
    saved(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_source(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    source.close()
    source.close()
    for name in ("model-00003-of-00003.safetensors", "model-00001-of-00003.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
        refused(tmp_path, "is truncated")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_shards_need_neither_memory_nor_torch(tmp_path: Path) -> None:
    whole = content(Tensor(f"layer.{at}.weight", "float16", (25 * MIB,)) for at in range(6))
    saved(tmp_path, whole)
    with Helper(read_through, tmp_path, "safetensors_file") as reader:
        found = reader.next(60)
        assert reader.wait() == 0
    assert found["read"] == whole.nbytes == 300 * MIB
    assert found["digest"] == whole.digest
    assert found["growth"] <= 80 * MIB
    assert not found["torch"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    told = refused(
        tmp_path, r"of the files that '.*' names, 1 of 3 is missing in '.*': 'model-00002-of-00003\.safetensors'\. "
    )
    assert told.endswith("Fetch what is missing into that directory, or push a checkpoint that is whole")
    for number in (1, 3):
        (tmp_path / f"model-{number:05}-of-00003.safetensors").unlink()
    refused(tmp_path, r"3 of 3 are missing in .*-00001-.*-00002-.*-00003-")


def test_a_file_that_was_not_fetched_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    pointer = tmp_path / "model-00002-of-00003.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438007537\n")
    refused(tmp_path, r"'.*model-00002-of-00003.safetensors' is a git-LFS pointer .*: run `git lfs pull`")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../model.safetensors", "a/../../model.safetensors", "..", "", ".", "a\0b"]
)
def test_files_outside_the_directory_are_not_read(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", content([Tensor("w", "float32", (1,))]))
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    index = write_index(folder / INDEX, {"w": name})
    for path in (index, folder):
        told = refused(path, "says that tensor 'w' is in .*: only files in the directory of the index and below it are")
        assert repr(name) in told


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    parts = shards(version())
    first, second, _ = parts
    both = Content((*parts[second].rows, parts[first].rows[0]), version().data)
    write_safetensors(tmp_path / second, both)
    told = refused(tmp_path, f"tensor 'layer.00.weight' is in '{first}' and in '{second}' as well")
    assert told.endswith("index and files are not of one save; download or save all of them again, together")


def test_a_tensor_that_is_not_where_the_index_says_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    first, second, _ = parts = shards(version())
    write_safetensors(tmp_path / second, Content(parts[second].rows[1:], version().data))
    refused(tmp_path, f"says that '{second}' has tensor 'layer.01.weight', which is in none of the files: index and")
    moved = Content((*parts[first].rows, parts[second].rows[0]), version().data)
    write_safetensors(tmp_path / first, moved)
    refused(tmp_path, f"says that '{second}' has tensor 'layer.01.weight', which is in '{first}': index and")
    write_safetensors(tmp_path / second, content([]))
    refused(tmp_path, rf"says that '{second}' has tensor .* \(4 tensors in all\): index and files")


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    del weight_map["layer.03.bias"]
    write_index(tmp_path / INDEX, weight_map)
    refused(
        tmp_path,
        "does not name 1 of the tensors in its files: 'layer.03.bias' in 'model-00001-of-00003.safetensors'; index",
    )


DAMAGED = {
    "cut": ('{"weight_map": {"w": "model', "is the index of a checkpoint in several files, and damaged"),
    "twice": ('{"weight_map": {"w": "a", "w": "b"}}', "damaged .\"it has 'w' twice\".; fetch or save it again"),
    "list": ('{"weight_map": ["w"]}', "has a weight_map that is not an object of file names"),
    "numbers": ('{"weight_map": {"w": 1}}', "has a weight_map that is not an object of file names"),
    "elsewhere": ('{"a": {"weight_map": {}}}', "has a weight_map that is not an object of file names"),
    "empty": ('{"weight_map": {}}', "is an index that names no tensors"),
    "deep": ('{"weight_map": ' + "[" * 100_000, "is the index of a checkpoint in several files, and damaged"),
    "no text": ('{"weight_map": "\udcff"}', "is the index of a checkpoint in several files, and damaged"),
    "itself": ('{"weight_map": {"w": "index"}}', "is the index of several files: what an index names must"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_indexes_are_refused(tmp_path: Path, case: str) -> None:
    raw, message = DAMAGED[case]
    (tmp_path / "index").write_text(raw, errors="surrogateescape")
    refused(tmp_path / "index", message)


def test_an_index_out_of_proportion_is_not_read(tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, {"w": "a"})
    os.truncate(tmp_path / INDEX, 200_000_000)
    refused(tmp_path / INDEX, r"looks like the index .* has 200\.0 MB, and at most 134\.2 MB are read")


def test_nothing_of_this_module_needs_torch() -> None:
    code = "import sys, shipd.checkpoints.sharded, shipd.checkpoints.directory; assert 'torch' not in sys.modules"
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], dict(os.environ)) == 0
