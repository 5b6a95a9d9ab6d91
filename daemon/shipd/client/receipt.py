"""What a push came to."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from shipd.client.choice import Choice
from shipd.client.profile import Profile


@dataclass(frozen=True, slots=True)
class CodecUse:
    """What one way to send chunks did in a push: "same", "raw", or a codec's name.

    Chunks that were sent as they are on their own, without a look at any codec, are not among the runs of "raw".
    """

    codec: str
    runs: int
    content_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof and account of one push.

    model, label     what was committed
    digest           version digest of what was sent, hexadecimal
    live_digest      that of all that is live now: what the serving processes read back is compared with this. The same
                     as ``digest``, unless tensors have kept their values
    transfer_id      hexadecimal
    tensors          tensors of the version
    bytes_total      bytes of those tensors
    bytes_sent       everything written to sockets, manifest, frames and what was sent again included
    bytes_unchanged  bytes of chunks that were left out, since the receiver's version had the same
    bytes_lent       bytes of chunks that the receiver, on the same host, has read from the checkpoint's files itself
    frames_resent    frames that went again because they had arrived damaged
    resent_tensors   the tensors that those frames carried
    policy           "strict", "subset" or "partial": what was allowed to differ between the checkpoint and the model
    renamed          how the checkpoint's names became the model's, a line for each rule; empty where they are the same
    cast             what was cast, a line for each pair of dtypes
    kept             tensors of the model that were not sent and keep their values
    ignored          tensors of the checkpoint that the model does not have; not sent
    skipped          tensors of the checkpoint that the model keeps in non-persistent buffers; not sent
    swapped          serving processes that swapped
    stale            those that could not follow, by process id; they are fenced until they have caught up
    already          the version had been the current one: nothing was sent
    seconds          the whole push, with the opening of the checkpoint
    wire_seconds     first DATA byte written until the last frame was verified at the receiver
    stage_seconds    serving processes making ready
    pause_seconds    the longest time that any serving process held back its readers; None where none is attached
    base             digest of the version that deltas were made from, or chunks were the same as, hexadecimal; empty
                     where nothing was
    base_unused      why the ``base`` that was asked for was of no use; empty where it was, or was not looked at
    codecs           how often coded runs, and chunks as they are beside them, were sent, by codec
    choices          what was chosen and why: for the first run, and wherever that changed
    keep_seconds     keeping the version as a base for the next push, which is not part of ``seconds``
    not_kept         why that was not possible, by each place that did not
    profile          where the time went, stage by stage
    """

    model: str
    label: str
    digest: str
    live_digest: str
    transfer_id: str
    tensors: int
    bytes_total: int
    bytes_sent: int
    bytes_unchanged: int
    bytes_lent: int
    frames_resent: int
    resent_tensors: tuple[str, ...]
    policy: str
    skipped: tuple[str, ...]
    renamed: tuple[str, ...]
    cast: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    swapped: int
    stale: tuple[str, ...]
    already: bool
    seconds: float
    wire_seconds: float
    stage_seconds: float
    pause_seconds: float | None
    base: str
    base_unused: str
    codecs: tuple[CodecUse, ...]
    choices: tuple[Choice, ...]
    keep_seconds: float
    not_kept: tuple[str, ...]
    profile: Profile

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and for logs."""
        return dataclasses.asdict(self)
