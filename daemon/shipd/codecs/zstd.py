"""zstd frames inside payloads: made so that they say their size, and read so that they cannot say another one.

zstandard's ``max_output_size`` is ignored where a frame declares its content's size, so eight kilobytes can ask for
gigabytes: the declared size is looked at before anything is decompressed, and frames that declare none are refused.
Format: RFC 8878.
"""

import threading
from typing import Final

import zstandard

from shipd.codecs.codec import CodecError
from shipproto.frame import Buffer

_HUFFMAN: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_content_size=True,
    write_checksum=False,
    write_dict_id=False,
)
"""Next to no search for repetitions, which weights do not have; all that is spent is Huffman's code."""

_MAX_WINDOW: Final = 8 << 20
"""Bytes; what level 1 makes of a run's worth of anything needs less."""

# Neither may be used by two threads at once.
_kept = threading.local()


def squeeze(content: Buffer) -> bytes:
    """A zstd frame of level 1: for what has repetitions."""
    compressor = getattr(_kept, "level_1", None)
    if compressor is None:
        compressor = _kept.level_1 = zstandard.ZstdCompressor(level=1, write_checksum=False)
    frame: bytes = compressor.compress(content)
    return frame


def squeeze_entropy(content: Buffer) -> bytes:
    """A zstd frame that has almost nothing but Huffman's code: for bytes of uneven frequency and no repetitions."""
    compressor = getattr(_kept, "huffman", None)
    if compressor is None:
        compressor = _kept.huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
    frame: bytes = compressor.compress(content)
    return frame


def unsqueeze(frame: Buffer, size: int) -> bytes:
    """The content of one zstd frame, which must declare to be of ``size`` bytes, and be, with nothing after it.

    ``size`` is not 0: of a frame without content zstandard looks at nothing else, so that anything could follow it.
    Takes ``size`` bytes of memory and no window beside them. Raises CodecError.
    """
    if not size:
        raise CodecError("a zstd frame where nothing is due")
    try:
        declared = zstandard.get_frame_parameters(frame)
        if declared.content_size != size:
            raise CodecError(f"a zstd frame declares {declared.content_size} bytes where {size} are due")
        if declared.window_size > max(_MAX_WINDOW, size):
            raise CodecError(f"a zstd frame wants a window of {declared.window_size} bytes")
        decompressor = getattr(_kept, "decompressor", None)
        if decompressor is None:
            decompressor = _kept.decompressor = zstandard.ZstdDecompressor()
        content: bytes = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"a zstd frame cannot be read: {error}") from error
    if len(content) != size:
        raise CodecError(f"a zstd frame has {len(content)} bytes where {size} are due")
    return content
