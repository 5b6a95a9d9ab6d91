import io
from pathlib import Path

import pytest
import torch

from shipd.checkpoints.source import open_source
from shipd.errors import CheckpointError
from tests.support.checkpoints import Content, content, tiny, write_safetensors, write_torch
from tests.support.naive import Tensor
from tests.support.reading import digest_of
from tests.unit.test_sharded import INDEX, refused, saved, shards, version, write_index


def opened_as(folder: Path) -> str:
    source = open_source(folder)
    try:
        return Path(source.origin).name
    finally:
        source.close()


def test_a_directory_of_one_checkpoint_is_that(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# A model")
    (tmp_path / "runs").mkdir()
    (tmp_path / "broken link").symlink_to("nowhere")
    write_torch(tmp_path / "weights", tiny())
    source = open_source(tmp_path)
    assert source.origin == str(tmp_path / "weights")
    assert digest_of(source) == tiny().digest
    source.close()


def test_safetensors_comes_before_what_else_a_trainer_writes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", tiny())
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save({"args": 1}, tmp_path / "training_args.bin")
    assert opened_as(tmp_path) == "model.safetensors"


def test_a_sharded_safetensors_comes_before_a_sharded_torch_save(tmp_path: Path) -> None:
    saved(tmp_path)
    write_torch(tmp_path / "pytorch_model-00001-of-00001.bin", tiny())
    names = dict.fromkeys(["bias", "weight"], "pytorch_model-00001-of-00001.bin")
    write_index(tmp_path / "pytorch_model.bin.index.json", names)
    assert opened_as(tmp_path) == INDEX
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert opened_as(tmp_path) == "pytorch_model.bin.index.json"


def test_several_checkpoints_are_listed(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        write_safetensors(tmp_path / name, tiny())
    write_torch(tmp_path / "c.pt", tiny())
    refused(tmp_path, r"is a directory of 2 checkpoints: 'a.safetensors', 'b.safetensors'; push one of these files")
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "b.safetensors").unlink()
    write_torch(tmp_path / "d.pt", tiny())
    refused(tmp_path, r"is a directory of 2 checkpoints: 'c.pt', 'd.pt'; push one of these files")


def test_a_checkpoint_beside_a_sharded_one_is_another(tmp_path: Path) -> None:
    saved(tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", tiny())
    refused(tmp_path, f"is a directory of 2 checkpoints: 'adapter_model.safetensors', '{INDEX}'")


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "has 'model-00001-of-.* of a checkpoint in 3 files, and no index that says which file has which")
    for number in (1, 2):
        (tmp_path / f"model-{number:05}-of-00003.safetensors").unlink()
        missing = f"{number} are missing .numbers {', '.join(map(str, range(1, number + 1)))}."
        told = refused(tmp_path, f"of a checkpoint in 3 files, of which {missing}, and no index")
        assert told.endswith("fetch all of them and the index (such as model.safetensors.index.json)")


def test_a_set_of_one_file_is_whole(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-00001-of-00001.safetensors", tiny())
    assert opened_as(tmp_path) == "model-00001-of-00001.safetensors"


def test_a_damaged_index_is_told_also_by_its_directory(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {')
    refused(tmp_path, f"{INDEX}' is the index of a checkpoint in several files, and damaged")


@pytest.mark.parametrize(
    ("content", "why"), [("", "is empty: its save or download was interrupted"), ('{"error": 1}', "is a JSON text")]
)
def test_what_is_only_called_an_index_is_told(tmp_path: Path, content: str, why: str) -> None:
    """Rather than that there is nothing in the directory."""
    (tmp_path / INDEX).write_text(content)
    refused(tmp_path, f"no file in it can be read as one: '.*{INDEX}' {why}")


def test_an_index_without_its_files_is_told_by_its_directory(tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, {row.name: name for name, part in shards(version()).items() for row in part.rows})
    refused(tmp_path, "3 of 3 are missing")


def test_a_directory_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory and not a checkpoint; it has none; name a file$")
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path, "is a directory and not a checkpoint; it has none; name a file$")
    for name in ("b.safetensors", "a.pt", "config.json"):
        (tmp_path / name).touch()
    refused(tmp_path, r"no file in it can be read as one: '.*a.pt' is empty: its save .*, and neither can 1 more$")
    (tmp_path / "a.pt").unlink()
    refused(tmp_path, r"no file in it can be read as one: '.*b.safetensors' is empty: its save [a-z ]*$")


def test_a_distributed_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    refused(tmp_path, r"is a directory; it looks like a torch.distributed checkpoint")


def test_a_crowded_directory_is_not_searched(tmp_path: Path) -> None:
    for at in range(1001):
        (tmp_path / str(at)).touch()
    refused(tmp_path, "is a directory of more than 1000 entries; push the checkpoint's file or its index")


def test_a_directory_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.scandir", broken)
    refused(tmp_path, "the directory .* cannot be read: Input/output error")


def test_a_directory_inside_an_index_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    refused(write_index(tmp_path / INDEX, {"w": "shard"}), "'.*shard' is a directory and not a file")


def test_shards_in_a_subdirectory_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    whole = content([Tensor("w", "float32", (3,))])
    write_safetensors(tmp_path / "weights" / "1", Content(whole.rows, whole.data))
    write_index(tmp_path / INDEX, {"w": "weights/1"})
    source = open_source(tmp_path)
    assert digest_of(source) == whole.digest
    source.close()


def test_what_is_no_path_of_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_source(tmp_path / "absent")
    with pytest.raises(TypeError, match="must be the path of a checkpoint"):
        open_source(io.BytesIO())  # type: ignore[arg-type]  # what the test is about
