"""One version in every container that can be pushed, each written by its own library."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import h5py
import numpy as np
import torch
from torch import nn

from tests.support.checkpoints import Content, as_state_dict, write_safetensors, write_torch


def _dealt(whole: Content, count: int) -> list[Content]:
    """Its tensors in ``count`` parts, as cards are dealt."""
    return [Content(whole.rows[at::count], whole.data) for at in range(count)]


def _write_sharded(
    folder: Path, whole: Content, name: str, suffix: str, write: Callable[[Path, Content], Path]
) -> Path:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    count = min(3, len(whole.rows))
    for at, part in enumerate(_dealt(whole, count)):
        file = f"{name}-{at + 1:05}-of-{count:05}{suffix}"
        write(folder / file, part)
        weight_map |= {row.name: file for row in part.rows}
    (folder / f"{name}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def _sharded_safetensors(path: Path, whole: Content) -> Path:
    return _write_sharded(path, whole, "model", ".safetensors", write_safetensors)


def _sharded_torch(path: Path, whole: Content) -> Path:
    return _write_sharded(path, whole, "pytorch_model", ".bin", write_torch)


def _index(path: Path, whole: Content) -> Path:
    return _sharded_safetensors(path, whole) / "model.safetensors.index.json"


def _directory(path: Path, whole: Content) -> Path:
    path.mkdir()
    write_safetensors(path / "model.safetensors", whole)
    torch.save({"state": {}, "param_groups": []}, path / "optimizer.pt")
    return path


def _legacy(path: Path, whole: Content) -> Path:
    torch.save(as_state_dict(whole), path, _use_new_zipfile_serialization=False)
    return path


def _nested(path: Path, whole: Content) -> Path:
    state = as_state_dict(whole)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 3, "args": {"seed": 1}, "model": state, "optimizer": optimizer}, path)
    return path


def scripted(whole: Content) -> torch.jit.ScriptModule:
    """A TorchScript program with these tensors: modules of modules, by the dots in their names."""
    root = nn.Module()
    for name, tensor in as_state_dict(whole).items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return torch.jit.script(root)


def _torchscript(path: Path, whole: Content) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.save` is deprecated", DeprecationWarning)
        torch.jit.save(scripted(whole), path)
    return path


def as_arrays(whole: Content) -> dict[str, np.ndarray]:
    """Arrays with this content, each of its own."""
    return {
        row.name: np.frombuffer(bytes(whole.data[row.name]), dtype=row.dtype).reshape(row.shape) for row in whole.rows
    }


def _npz(path: Path, whole: Content) -> Path:
    with path.open("wb") as file:
        np.savez(file, **as_arrays(whole))  # type: ignore[arg-type]  # no tensor is called allow_pickle
    return path


def _npz_compressed(path: Path, whole: Content) -> Path:
    with path.open("wb") as file:
        np.savez_compressed(file, **as_arrays(whole))  # type: ignore[arg-type]  # as above
    return path


def _hdf5(path: Path, whole: Content) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in as_arrays(whole).items():
            file[name.replace(".", "/")] = array
    return path


def _hdf5_compressed(path: Path, whole: Content) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in as_arrays(whole).items():
            # HDF5 has no chunks of what has no dimensions.
            options = {"compression": "gzip", "compression_opts": 1} if array.ndim else {}
            file.create_dataset(name.replace(".", "/"), data=array, **options)
    return path


def _keras(path: Path, whole: Content) -> Path:
    """As Keras 2 saves a model and its optimizer."""
    with h5py.File(path, "w") as file:
        for name, array in as_arrays(whole).items():
            file[f"model_weights/{name.replace('.', '/')}"] = array
        file["optimizer_weights/adam/iterations:0"] = np.int64(7)
    return path


CONTAINERS: Final[Mapping[str, Callable[[Path, Content], Path]]] = {
    "safetensors": write_safetensors,
    "sharded safetensors": _sharded_safetensors,
    "index": _index,
    "directory": _directory,
    "torch.save": write_torch,
    "torch.save, legacy": _legacy,
    "torch.save, nested": _nested,
    "sharded torch.save": _sharded_torch,
    "TorchScript": _torchscript,
    "npz": _npz,
    "npz, compressed": _npz_compressed,
    "HDF5": _hdf5,
    "HDF5, compressed": _hdf5_compressed,
    "HDF5 of Keras": _keras,
}
"""Write a version into a path, and return the path to push."""

WITHOUT_TORCH: Final = frozenset(
    {"safetensors", "sharded safetensors", "index", "directory", "npz", "npz, compressed", "HDF5", "HDF5, compressed"}
)
"""Those that are read without torch."""
