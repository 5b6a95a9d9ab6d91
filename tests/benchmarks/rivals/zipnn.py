"""ZipNN, by its own package and on one thread: the exponents as a plane of their own, through a Huffman code.

Source: arXiv 2411.05239 ("ZipNN: Lossless Compression for AI Models"); the package zipnn 0.5.4. It is built from source
and need not be there; importing this raises ImportError then.
"""

from collections.abc import Sequence
from typing import Final

from zipnn import ZipNN

from shipproto.frame import Buffer
from tests.benchmarks.rivals.rival import Matrix, Rival


def encode(content: Buffer, _base: Buffer, _tensors: Sequence[Matrix]) -> bytes:
    """Without the base. The package works in the memory that it is given, which is therefore a copy."""
    packed: bytes = _coder().compress(bytearray(content))
    return packed


def apply(payload: Buffer, target: memoryview, _tensors: Sequence[Matrix]) -> None:
    """Write the content. The package decodes into memory of its own."""
    target[:] = _coder().decompress(payload)


def _coder() -> ZipNN:
    return ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)


RIVAL: Final = Rival("ZipNN", delta=False, encode=encode, apply=apply)
