"""The serving process: a loop that answers questions, and three lines of shipd in it.

    python -m tests.demo.serving SOCKET

What it does is reported on stdout, a JSON object a line; it ends when its stdin does.
"""

import itertools
import json
import os
import sys
import threading
import time
from typing import Any

import torch

import shipd
from tests.demo.encoder import QUESTIONS, Encoder, nearest, raw


def serve(socket: str) -> None:
    """Answer until told to stop."""
    encoder = Encoder(torch.bfloat16)
    index = encoder.index()
    resident = shipd.attach(encoder.model, "minilm", socket=socket)
    report("ready", label=resident.label, digest=resident.digest)

    known: dict[tuple[str, int, bytes], int] = {}
    told = until_told()
    for number in itertools.cycle(range(len(QUESTIONS))):
        if told.is_set():
            break
        started = time.perf_counter()
        try:
            with resident.hold() as version:
                embedding = encoder.ask(QUESTIONS[number])
            answer = nearest(index, embedding)
        except Exception as error:  # noqa: BLE001  each is counted, and one is too many
            report("failed", error=repr(error))
            continue
        seconds = time.perf_counter() - started
        # Equal answers are spelt out once.
        key = (version.label, number, raw(embedding))
        if key not in known:
            known[key] = len(known)
            report("new", id=known[key], label=key[0], question=QUESTIONS[number], answer=answer, bits=key[2].hex())
        report("answered", id=known[key], seconds=seconds)

    resident.detach()
    report("done")


def report(event: str, **values: Any) -> None:
    """One line for whoever started this process."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def until_told() -> threading.Event:
    """Set when stdin ends, also because whoever started this process has died."""
    told = threading.Event()

    def wait() -> None:
        while os.read(0, 64):
            pass
        told.set()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
    return told


if __name__ == "__main__":
    serve(sys.argv[1])
