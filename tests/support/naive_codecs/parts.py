"""What the codecs have in common: words, keys and steps, numbers and bit strings, zstd frames, packed planes."""

import struct

import zstandard


class Payload:
    """The bytes of a payload from the first on."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if not 0 <= count <= self.left:
            raise ValueError(f"{count} bytes are due, and {self.left} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def u32(self) -> int:
        """The next four bytes as a number."""
        return int(struct.unpack("<I", self.take(4))[0])

    def number(self) -> int:
        """The next number of 7 bits a byte."""
        value = 0
        for index in range(4):
            byte = self.u8()
            value += (byte & 0x7F) << 7 * index
            if not byte & 0x80:
                if byte == 0 and index > 0:
                    raise ValueError("a number has more bytes than it needs")
                return value
        raise ValueError("a number has more than four bytes")

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise ValueError(f"{self.left} bytes are left over")


def words_of(data: bytes, width: int) -> list[int]:
    """Little-endian words of ``width`` bytes."""
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def bytes_of(words: list[int], width: int) -> bytes:
    """The opposite of ``words_of``."""
    return b"".join(word.to_bytes(width, "little") for word in words)


def key_of(word: int, bits: int) -> int:
    """The key of a word."""
    half = 1 << bits - 1
    return word + half if word < half else (1 << bits) - 1 - word


def word_of(key: int, bits: int) -> int:
    """The word of a key."""
    half = 1 << bits - 1
    return key - half if key >= half else (1 << bits) - 1 - key


def moved(word: int, step: int, bits: int) -> int:
    """The word that is ``step`` from this one."""
    return word_of((key_of(word, bits) + step) % (1 << bits), bits)


def step_of(zigzag: int) -> int:
    """The step whose zigzag this is."""
    return zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2


def bit_string(data: bytes, count: int) -> list[int]:
    """The ``count`` bits of a bit string."""
    if len(data) != (count + 7) // 8:
        raise ValueError(f"{len(data)} bytes for {count} bits")
    bits = [data[index // 8] >> index % 8 & 1 for index in range(8 * len(data))]
    if any(bits[count:]):
        raise ValueError("a bit behind the end of a bit string is set")
    return bits[:count]


def zstd_content(frame: bytes, due: int) -> bytes:
    """The content of a zstd frame, of ``due`` bytes."""
    header = Payload(frame)
    if header.take(4) != b"\x28\xb5\x2f\xfd":
        raise ValueError("not a zstd frame")
    descriptor = header.u8()
    single_segment = descriptor >> 5 & 1
    if descriptor >> 3 & 1:
        raise ValueError("the reserved bit of a zstd frame is set")
    window = 0
    if not single_segment:
        exponent, mantissa = divmod(header.u8(), 8)
        window = (8 + mantissa) << 7 + exponent
    if any(header.take((0, 1, 2, 4)[descriptor & 3])):
        raise ValueError("a zstd frame with a dictionary")
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    if width == 0:
        raise ValueError("a zstd frame that does not declare its size")
    content_size = int.from_bytes(header.take(width), "little") + (256 if width == 2 else 0)
    if content_size != due:
        raise ValueError(f"a zstd frame declares {content_size} bytes, and {due} are due")
    if window > max(8 << 20, content_size):
        raise ValueError(f"a zstd frame has a window of {window} bytes")
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=due, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from error
    if len(content) != due:
        raise ValueError(f"a zstd frame has {len(content)} bytes, and declares {due}")
    return content


def unpack_plane(packed: bytes, size: int) -> bytes:
    """A packed plane of ``size`` bytes."""
    if len(packed) > size:
        raise ValueError(f"a plane of {size} bytes is packed in {len(packed)}")
    if len(packed) == size:
        return packed
    return zstd_content(packed, size)


def unpack_codes(packed: bytes, count: int) -> list[int]:
    """Packed codes, each from 0 to 15."""
    plane = unpack_plane(packed, (count + 1) // 2)
    codes = [plane[index // 2] >> 4 * (index % 2) & 15 for index in range(2 * len(plane))]
    if any(codes[count:]):
        raise ValueError("the upper four bits of the last byte are set")
    return codes[:count]
