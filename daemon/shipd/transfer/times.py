"""Where the time of moving frames goes, by kind of work. Two clock readings for each piece of half a megabyte."""

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Times:
    """Seconds of one side, over its connections; on several threads they may add up to more than passed.

    read      getting chunks out of the source
    encode    finding what has changed, and saying it in fewer bytes; processor time
    digest    xxh3 of chunks; at the sender, with the CRC32C of large tensors' chunks
    check     CRC32C of frames otherwise, and their parsing or spelling
    write     handing bytes to the kernel
    receive   taking bytes from the kernel
    wait      until the kernel takes or has bytes
    """

    read: float = 0.0
    encode: float = 0.0
    digest: float = 0.0
    check: float = 0.0
    write: float = 0.0
    receive: float = 0.0
    wait: float = 0.0

    def add(self, other: "Times") -> None:
        """Count what ``other`` has counted as well."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
