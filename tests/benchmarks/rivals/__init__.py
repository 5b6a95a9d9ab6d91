"""How other systems send the next version, re-implemented from the idea that they published: bytes in, bytes out.

One file each, with what a Rival (rival.py) needs and where the idea is from. None of their code is here. Where a layout
leaves a choice, the one that makes the smaller payload is taken: no names, no headers beyond what decoding needs, and
one zstd frame over everything. Payloads are trusted: nothing of this is fit for a network.
"""
