"""The shipd protocol without I/O: bytes in, events out. Normative description: protocol/SPEC.md."""
