import importlib.util
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from shipd.checkpoints import script_file
from shipd.checkpoints.source import Source, open_source
from shipd.errors import CheckpointError, UnsupportedTensor
from tests.support.checkpoints import Content, edge_cases
from tests.support.containers import CONTAINERS
from tests.support.naive import Tensor
from tests.support.reading import content_of, digest_of, refused

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit:DeprecationWarning")


def save(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), path)
    return path


def test_silero_is_read_as_it_is_loaded() -> None:
    found = importlib.util.find_spec("silero_vad")
    if found is None or found.origin is None:
        pytest.skip("silero-vad is not installed: pip install --no-deps silero-vad")
    path = Path(found.origin).parent / "data" / "silero_vad.jit"
    state = torch.jit.load(path, map_location="cpu").state_dict()
    source, memory = open_source(path), open_source(state)
    assert isinstance(source, Source)
    assert source.origin == str(path)
    assert len(source.structure) == len(state) > 20
    assert source.structure.digest == memory.structure.digest
    for row, name in enumerate(source.structure.names):
        assert content_of(source, row) == state[name].contiguous().view(torch.uint8).numpy().tobytes()
    assert digest_of(source) == digest_of(memory)
    source.close()


def every_dtype() -> Content:
    """Under names that TorchScript can spell."""
    made = edge_cases()
    names = {row.name: f"tensor{at:02}" for at, row in enumerate(made.rows)}
    rows = tuple(Tensor(names[row.name], row.dtype, row.shape) for row in made.rows)
    return Content(rows, {names[name]: data for name, data in made.data.items()})


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "no suffix"])
def test_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    source = open_source(CONTAINERS["TorchScript"](tmp_path / name, every_dtype()))
    assert digest_of(source) == every_dtype().digest
    assert source.changed() is None
    source.close()


def test_parameters_buffers_and_ties_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1))
    model[2].weight = model[0].weight
    source, memory = open_source(save(model, tmp_path / "w")), open_source(model)
    assert source.structure.digest == memory.structure.digest
    assert digest_of(source) == digest_of(memory)


def test_an_archive_is_in_memory_once_it_is_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    path = CONTAINERS["TorchScript"](tmp_path / "w", every_dtype())
    source = open_source(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    path.write_bytes(b"")
    assert source.changed() is None
    assert digest_of(source) == every_dtype().digest
    source.close()
    source.close()


TRACE = "this ran while the archive was read"


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(2))
        self.weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("this ran while the archive was read")
        self.weight = state[0]
        self.training = state[1]


def rename(path: Path, old: str, new: str) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for member, raw in members:
            archive.writestr(zipfile.ZipInfo(member.filename.replace(old, new)), raw)


def test_code_that_would_run_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(Stateful(), tmp_path / "model.pt")
    torch.jit.load(path)
    assert TRACE in capfd.readouterr().out, "the test tests something"
    told = refused(path, "has a __setstate__ method in 'model/code/__torch__.*', code that would run while it is read")
    assert "save torch.save(torch.jit.load(path).state_dict(), other_path) where you trust it, and push that" in told
    rename(path, "/code/", "/CODE/")
    refused(path, "has a __setstate__ method in 'model/CODE/")
    assert TRACE not in capfd.readouterr().out


def test_code_out_of_proportion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(nn.Linear(2, 2), tmp_path / "model.pt")
    monkeypatch.setattr(script_file, "_MAX_CODE", 100)
    refused(path, "has more than 100 B of code; save torch.save")


def test_a_frozen_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is a TorchScript program without parameters and buffers: torch.jit.freeze and")


def test_tensors_that_cannot_be_shipped_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("scales", torch.eye(3).to_sparse())
    save(model, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "tensor 'scales' of '.*model.pt' has the layout torch.sparse_coo", UnsupportedTensor)


def test_it_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which has no parts to choose from"):
        open_source(save(nn.Linear(2, 2), tmp_path / "model.pt"), key="model")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_archives_are_refused(tmp_path: Path, part: float) -> None:
    path = save(nn.Linear(200, 200), tmp_path / "model.pt")
    os.truncate(path, int(path.stat().st_size * part))
    refused(path, "no readable table of contents at its end")


def test_no_damage_is_worse_than_an_error(tmp_path: Path) -> None:
    path = save(nn.Linear(3, 2), tmp_path / "model.pt")
    whole = path.read_bytes()
    told = []
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            open_source(path).close()
        except (CheckpointError, UnsupportedTensor) as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(repr(str(path)) in text and len(text) < 900 for text in told)


def test_an_archive_that_is_written_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(nn.Linear(2, 2), tmp_path / "model.pt")
    load = torch.jit.load

    def write_after(*arguments, **options):
        loaded = load(*arguments, **options)
        with path.open("ab") as file:
            file.write(b"more")
        return loaded

    monkeypatch.setattr(torch.jit, "load", write_after)
    refused(path, r"the file '.*' \(it had \d+ bytes and now has \d+\) changed while it was being opened")
