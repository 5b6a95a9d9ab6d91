"""Where each millisecond of a push of one gigabyte goes, and beside a stage the least that it could take.

    python -m tests.benchmarks stages

The stages are those of ``shipctl push --profile``, as medians over the rounds, with sender and daemon pinned to a core
each and a serving process on the daemon's side. What a stage is compared with is measured in the same rounds: the same
bytes over a raw socket, through the checks alone, and copied from memory to memory alone.
"""

import time
from typing import Any, Final

import numpy as np

from shipproto.digests import digest_and_crc
from shipproto.limits import LEAF_SIZE
from tests.benchmarks import machine, payload, shipd_side
from tests.benchmarks.pair import Pair
from tests.benchmarks.rows import Row, median, spread
from tests.benchmarks.shipd_side import Host, push
from tests.benchmarks.workers import Worker

STAGES: Final = (
    ("open", "open the checkpoint"),
    ("connect", "connect and shake hands"),
    ("agree", "agree on structure and chunks"),
    ("wire", "wire, first chunk written to last one verified"),
    ("read", "wire, sender: read"),
    ("digest", "wire, sender: digest and CRC32C"),
    ("check", "wire, sender: frames"),
    ("write", "wire, sender: send"),
    ("wait", "wire, sender: wait for room"),
    ("receiver_receive", "wire, receiver: receive"),
    ("receiver_check", "wire, receiver: CRC32C"),
    ("receiver_digest", "wire, receiver: digest"),
    ("verify", "compare digests"),
    ("stage", "serving process makes ready"),
    ("commit", "commit"),
    ("hold_wait", "commit: wait for holds"),
    ("copy", "commit: move the weights"),
    ("total", "whole push"),
)
"""Fields of a profile, and what they are called in the table."""

LEAST: Final = {"wire": "raw", "digest": "checks", "copy": "memcpy"}
"""What a stage is compared with."""


class Sender(shipd_side.Sender):
    """The sender, which can also do its checks alone."""

    def check(self) -> float:
        """Seconds to digest and check every byte of the state, with nothing beside it."""
        views = [memoryview(payload.bits(tensor)).cast("B") for tensor in self.state.values()]
        began = time.monotonic()
        for view in views:
            for start in range(0, len(view), LEAF_SIZE):
                digest_and_crc(view[start : start + LEAF_SIZE])
        return time.monotonic() - began


class Serving(shipd_side.Serving):
    """The serving process, which can also copy memory alone."""

    def copy(self, total: int) -> float:
        """Seconds to copy ``total`` bytes, all of them touched before."""
        # Not zeros: those would have no memory yet.
        one, other = np.full(total, 1, dtype=np.uint8), np.full(total, 2, dtype=np.uint8)
        began = time.monotonic()
        np.copyto(other, one)
        return time.monotonic() - began


def measure(rounds: int, total: int = payload.GB) -> list[Row]:
    """A row for each stage."""
    setting = machine.settings()[0]
    found: list[dict[str, Any]] = []
    least: list[dict[str, float]] = []
    with (
        Pair("tests.benchmarks.peers.raw", total=total) as raw,
        Host({"model": total}) as host,
        Worker("tests.benchmarks.stages:Sender", total=total) as sender,
    ):
        raw.place(setting)
        raw.transfer()
        host.place(setting.receiver)
        sender.call("pin", cores=setting.sender)
        serving = host.serve("model", total, kind="tests.benchmarks.stages:Serving")
        for _ in range(2):
            # Each of the two images once.
            push(host, sender)
        for _ in range(rounds):
            least.append(
                {"raw": raw.transfer(), "checks": sender.call("check"), "memcpy": serving.call("copy", total=total)}
            )
            found.append(push(host, sender)["profile"])
    return [_row(field, name, found, least) for field, name in STAGES]


def _row(field: str, name: str, found: list[dict[str, Any]], least: list[dict[str, float]]) -> Row:
    values = [profile[field] for profile in found]
    row = Row(name=name, value=median(values), unit="s", spread=spread(values))
    if (other := LEAST.get(field)) is not None:
        row.reference = median(one[other] for one in least)
        row.ratio = median(value / one[other] for value, one in zip(values, least, strict=True))
        row.note = {"raw": "against a raw socket", "checks": "against the checks alone", "memcpy": "against memcpy"}[
            other
        ]
    return row
