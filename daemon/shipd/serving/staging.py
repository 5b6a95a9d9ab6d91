"""What every way of swapping does alike: filling an image, refusing to stage, telling of failures.

Belongs here: what is neither about integers nor about one way of swapping.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from shipd.errors import AttachError, StageFailed
from shipd.images.memory import Access, ImageMapping
from shipd.serving import bits
from shipd.serving.readback import version_digest
from shipd.serving.tensors import ModelTensors
from shipproto.layout import Layout

_SHOWN: Final = 3
"""Changed tensors that an error names; a model that was moved has all of them changed."""


def never() -> bool:
    """Nothing is cancelled."""
    return False


class Torn(Exception):
    """The swap failed halfway and the old version could not be restored: the live tensors are a mix of two versions.

    The caller must fence the process, inside the closed gate.
    """


def fill_image(layout: Layout, live: Sequence[Tensor], image: memoryview) -> None:
    """Write the live tensors, one for each row of the structure, into an image, and zeros between them."""
    rows = bits.primary_rows(layout)
    targets = bits.image_integers(bits.flat_bytes(image), layout, rows)
    bits.copy_all(targets, [bits.integers(live[row]) for row in rows])
    clear_padding(layout, image)


def clear_padding(layout: Layout, image: memoryview) -> None:
    """Zero what lies between the tensors of an image and after the last one."""
    order = np.concatenate((layout.large, layout.small))
    ends = layout.offsets[order] + layout.structure.nbytes[order]
    following = np.append(layout.offsets[order][1:], layout.size)
    gaps = following > ends
    for start, stop in zip(ends[gaps].tolist(), following[gaps].tolist(), strict=True):
        image[start:stop] = bytes(stop - start)


def check_stage(mapping: ImageMapping, layout: Layout, access: Access, tensors: ModelTensors) -> None:
    """Refuse an image that does not fit, and a model that no longer uses the tensors that would be swapped."""
    if mapping.size != layout.size or (mapping.access is not access and mapping.access is not Access.READ_WRITE):
        raise StageFailed(
            f"cannot stage an image of {mapping.size} bytes ({mapping.access.value}): "
            f"{layout.size} are needed ({access.value})"
        )
    if problem := changed(tensors):
        raise StageFailed(problem)


def changed(tensors: ModelTensors) -> str | None:
    """What to tell a user whose model has been changed behind shipd's back; None where it has not."""
    problems = tensors.changed()
    if not problems:
        return None
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"the model was changed after it was attached: {'; '.join(problems[:_SHOWN])}{more}. "
        "Detach before moving or converting a model, and attach it again"
    )


def read_digest(layout: Layout, tensors: ModelTensors) -> bytes:
    """Version digest of the live values; AttachError where the model was changed."""
    check_unchanged(tensors)
    return version_digest(layout, tensors.live)


def check_unchanged(tensors: ModelTensors) -> None:
    """AttachError where what is live is not what the model uses."""
    if problem := changed(tensors):
        raise AttachError(problem)
