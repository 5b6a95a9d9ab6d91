"""TorchScript archives (torch.jit.save), of which the parameters and buffers are read, by torch's own loader.

An archive is a program. Its code is compiled when it is loaded, and none of it runs but ``__setstate__`` methods; so an
archive that has any is refused. It cannot be mapped: torch reads it whole, and it costs its size in memory.
"""

import struct
import warnings
import zipfile
import zlib
from typing import Final

import torch

from shipd.checkpoints.opened import OpenFile
from shipd.checkpoints.state_dict import StateDict
from shipd.checkpoints.wording import quoted
from shipd.errors import CheckpointError
from shipd.units import format_bytes

_MAX_CODE: Final = 64 * 1024 * 1024
"""Bytes of code that are looked through, unpacked. Large models have a few megabytes."""

_SAVE: Final = "torch.save(torch.jit.load(path).state_dict(), other_path)"


class ScriptFile(StateDict):
    """A ``Source`` over a TorchScript archive, in memory as soon as it is open. Closes ``file`` then."""

    def __init__(self, file: OpenFile) -> None:
        _refuse_code_that_would_run(file)
        state = _load(file).state_dict()
        if what := file.changed():
            raise CheckpointError(f"{what} changed while it was being opened; push it when it is complete")
        if not state:
            raise CheckpointError(
                f"{quoted(file.path)} is a TorchScript program without parameters and buffers: torch.jit.freeze and "
                "optimize_for_inference turn them into constants. Push what was saved before that"
            )
        super().__init__(state, origin=quoted(file.path))
        self.origin = file.path
        file.close()


def _refuse_code_that_would_run(file: OpenFile) -> None:
    left = _MAX_CODE
    try:
        with open(file.descriptor, "rb", closefd=False) as raw, zipfile.ZipFile(raw) as archive:
            for member in archive.infolist():
                # torch finds members whatever their case.
                if "/code/" not in member.filename.lower():
                    continue
                with archive.open(member) as code:
                    text = code.read(left + 1)
                left -= len(text)
                if left < 0:
                    raise CheckpointError(
                        f"{quoted(file.path)} has more than {format_bytes(_MAX_CODE)} of code; save {_SAVE} where you "
                        "trust it, and push that"
                    )
                if b"__setstate__" in text:
                    raise CheckpointError(
                        f"{quoted(file.path)} has a __setstate__ method in {quoted(member.filename)}, code that would "
                        f"run while it is read (quantised modules have one); save {_SAVE} where you trust it, and "
                        "push that"
                    )
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{quoted(file.path)} has code that cannot be read ({quoted(str(error))}): it is damaged; fetch or save it "
            "again"
        ) from error


def _load(file: OpenFile) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # torch recommends to export models instead; who has an archive can push it all the same.
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            module: torch.jit.ScriptModule = torch.jit.load(file.stable_path, map_location="cpu")
    except Exception as error:  # The loader meets damage with whatever the damage provokes.
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"{quoted(file.path)} cannot be read by torch.jit.load, so it is probably truncated or damaged, or was "
            f"written by a later torch ({type(error).__name__}: {quoted(first)}); fetch or save it again"
        ) from error
    return module
