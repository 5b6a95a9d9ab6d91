"""What workers have imported when they start: importing torch takes seconds, once instead of always.

Nothing here may start a thread: workers are forked from this. What cannot be imported is missed by whoever needs it.
"""

import contextlib
import importlib

for name in (
    *("numpy", "torch", "torch.distributed", "crc32c", "xxhash", "safetensors.torch"),
    *("shipd.client.client", "shipd.client.push", "shipd.checkpoints.opened", "shipd.serving.resident"),
):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
