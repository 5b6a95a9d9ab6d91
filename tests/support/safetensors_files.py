"""Files of the safetensors format, written by hand so that they can be wrong."""

import json

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def packed(header, data=b"", length=None):
    """A file of the format: its header as an object, a text or bytes, and whatever length it claims."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
