"""Every limit of the protocol, each with its reason. Nothing from the wire is believed beyond these.

All sizes are in bytes unless the name says otherwise.
"""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""The one version of the protocol that this release speaks."""

LEAF_SIZE: Final = 512 * 1024
"""Unit of digests and of DATA payloads: half of a core's L2, so that bytes are checked while they are hot."""

MAX_HEADER_DEPTH: Final = 16
"""Nesting of what a later release may put into a header; nothing here goes deeper than 3."""

MAX_PAYLOAD: Final = LEAF_SIZE
"""Largest payload of any frame. A damaged frame never costs more than this to send again."""

MAX_HEADER: Final = 16 * 1024
"""Largest msgpack header. Anything that can grow with the model travels as a body, in payloads."""

TENSOR_ALIGNMENT: Final = 64
"""Every tensor starts on a cache line of the image, which also satisfies every dtype and vector width."""

PAGE_SIZE: Final = 4096
"""Images are whole pages, so that they can be mapped and page-locked."""

MAX_TENSORS: Final = 1 << 20
"""Tensors in one structure: fifty times the largest mixture-of-experts checkpoints of today."""

MAX_NAME: Final = 512
"""Characters in a tensor's name; the longest in public checkpoints are below 200."""

MAX_DIMENSIONS: Final = 32
"""Dimensions of a tensor. torch itself allows 64, and nobody serves a model that needs more than 8."""

MAX_TENSOR_BYTES: Final = 1 << 42
"""4 TiB for one tensor; keeps every sum of MAX_TENSORS of them inside a signed 64-bit integer."""

MAX_IMAGE_BYTES: Final = 1 << 44
"""16 TiB for one version. The daemon's memory limit is what bounds a transfer; this bounds arithmetic."""

MAX_STRUCTURE_BODY: Final = 64 * 1024 * 1024
"""An encoded structure: MAX_TENSORS of ordinary names fit."""

MAX_LANES: Final = 16
"""Connections of one transfer: more than fill any link that ordinary TCP is used on."""

MAX_LENT_FILES: Final = 128
"""Descriptors that come with one LEND; the kernel passes at most 253 with a message. Of a checkpoint in more files the
rest travels as bytes."""

MAX_RANGES: Final = 1 << 16
"""Ranges in one WANT. A receiver with a more ragged set asks for a superset: resending is harmless."""

MAX_DIGESTS_BODY: Final = MAX_TENSORS * 16
"""One 16-byte digest for each tensor; in HELD, one for each of as many chunks, which are 512 GiB."""

MAX_BASES: Final = 8
"""Versions that a sender keeps to make deltas from: receivers that have missed more steps get whole chunks."""

MAX_CODECS: Final = 32
"""Codecs that a receiver names; there are eight."""

MAX_RUN_BYTES: Final = 16 * 1024 * 1024
"""Decoded bytes of one coded run. Measured on deltas of bfloat16, runs of 16 MiB take a sixtieth less than runs of
4 MiB; and it is what has to come again, whole, where one does not decode."""

MAX_DETAIL_BODY: Final = 4 * 1024 * 1024
"""What an ABORT or a STATUS may carry: some tens of thousands of mismatched tensors by name."""

MAX_LABEL: Final = 128
"""Characters in the name of a model or in the label of a version."""

MAX_TEXT: Final = 2048
"""Characters in a human-readable message inside a header."""

MAX_METADATA_ENTRIES: Final = 32
MAX_METADATA_TEXT: Final = 256
"""Free metadata of a version: 32 pairs of at most 256 characters, all of which must also fit into one header."""

MAX_CAPABILITIES: Final = 32
MAX_ENVIRONMENT: Final = 16
"""Entries in what a side says of what it runs on."""

MAX_CLASS_NAME: Final = 256
"""Characters in the qualified name of a model's class; transformers has some of 90."""

MAX_PROCESSES: Final = 64
"""Serving processes attached to one model, and so entries in a list of them."""

MAX_SLOTS: Final = 16
"""Images of one model; far below the kernel's 253 descriptors in one message."""

NONCE_SIZE: Final = 32
DIGEST_SIZE: Final = 16
TRANSFER_ID_SIZE: Final = 16

MAX_NACK: Final = 256
"""Sequence numbers in one NACK."""

RETAINED_CONTROL_FRAMES: Final = 256
"""Control frames a side keeps so that the peer can ask for one again. A peer that asks for an older one
has lost its place, and the connection starts over."""

MAX_CHUNK_ATTEMPTS: Final = 5
"""How often one chunk is sent before the transfer is given up: a path that damages the same half megabyte
five times is broken, not unlucky."""

MAX_VERIFY_ROUNDS: Final = 3
"""How often a receiver asks again for tensors whose digests differ although every frame was intact."""

MIN_TOKEN: Final = 16
"""Characters in a token. A shorter one could be guessed from a recorded handshake."""
