"""The story: five pushes to a model that never stops answering, and everything that must hold meanwhile."""

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

import shipd
from shipd.units import format_bytes, format_seconds
from shipproto.limits import LEAF_SIZE
from shipproto.status import ProcessVerification, TransferStatus
from tests.demo.answers import DEADLINE, Serving
from tests.demo.encoder import NAME
from tests.demo.screen import Screen
from tests.demo.trainer import BIT, SENDER, SHIPD, Made, Trainer
from tests.support.frames import DATA
from tests.support.processes import Shipctl, ShipdProcess
from tests.support.proxy import Proxy, until

MODEL: Final = "minilm"
DAMAGED: Final = 70
"""The frame, counted from 0, in which a bit is flipped; MiniLM takes some 90."""


class Story:
    """What happens, chapter by chapter, to a daemon and a serving process that are there already."""

    def __init__(
        self, screen: Screen, daemon: ShipdProcess, serving: Serving, trainer: Trainer, resume_window: float
    ) -> None:
        """``resume_window``: seconds for which the daemon keeps a push whose sender is gone."""
        self.screen = screen
        self.daemon = daemon
        self.serving = serving
        self.trainer = trainer
        self.resume_window = resume_window
        self.served = trainer.v0
        """The version that is committed, as its trainer knows it."""
        self.digest = ""
        """Its digest, read back from the live model."""
        self.expected = {serving.label: trainer.v0}
        """What may answer, by the label that shipd gives it."""

    # --- chapters ------------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Who is who."""
        self.screen.row(
            "processes",
            f"{self.daemon.pid} shipd, {self.serving.pid} serving {NAME} ({format_bytes(_size(self.served))})",
        )

    def push(self) -> None:
        """The plain one."""
        made = self._make()
        self.screen.chapter(f"1  A push: {made.name}", _origin(made))
        with self._working(f"pushing {made.name}"):
            receipt = self._push(self.daemon.address, made)
        pause = receipt.pause_seconds
        self.screen.row(
            "sent",
            f"{format_bytes(receipt.bytes_sent)} in {format_seconds(receipt.seconds)}: wire "
            f"{format_seconds(receipt.wire_seconds)}, stage {format_seconds(receipt.stage_seconds)}, pause "
            f"{format_seconds(pause) if pause is not None else 'none'}",
            holds=receipt.swapped == 1 and not receipt.stale and pause is not None,
            off=f"{made.name} should have been swapped by one serving process: {receipt}",
        )
        self._committed(receipt, made, SHIPD)

    def push_damaged(self) -> None:
        """One bit is flipped on the wire."""
        made = self._make()
        self.screen.chapter(f"2  A push with one bit flipped on the wire: {made.name}", _origin(made))
        with self._working(f"pushing {made.name}"), Proxy(self.daemon.port) as proxy:
            flip = proxy.flip("payload", nth=DAMAGED)
            receipt = self._push(proxy.address, made)
            frames = [frame.header for frame in proxy.seen(DATA)]
        chunks = len(set(frames))
        self.screen.row(
            "damaged",
            f"frame {DAMAGED + 1} of {chunks}, with {', '.join(receipt.resent_tensors) or 'no tensor'}",
            holds=flip.applied == 1 and len(receipt.resent_tensors) == 1,
            off=f"one tensor should have been damaged: a bit was flipped {flip.applied} times, and the receipt names "
            f"{receipt.resent_tensors}",
        )
        again = len(frames) - chunks
        self.screen.row(
            "repaired",
            f"{receipt.frames_resent} frame sent again by the receipt, {again} by the count on the wire",
            holds=receipt.frames_resent == again == 1,
            off=f"one frame should have been sent again: {receipt.frames_resent} by the receipt, {again} on the wire",
        )
        self._committed(receipt, made, BIT)

    def push_killed(self, checkpoint: Path) -> Made:
        """The sender dies at half; the version that it had begun to push."""
        made = self._make()
        self.screen.chapter(f"3  A push whose sender is killed at half: {made.name}", _origin(made))
        with self._working(f"pushing {made.name}"):
            save_file(made.state, checkpoint)
            orphan = self._kill_sender_at_half(checkpoint, made)
        self.screen.row(
            "daemon",
            f"holds {format_bytes(orphan.bytes_held)} of {format_bytes(orphan.bytes_total)} and misses the sender"
            if orphan is not None
            else "knows of no such push",
            holds=orphan is not None and not orphan.connected and 0 < orphan.bytes_held < orphan.bytes_total,
            off=f"the daemon should report a push without a sender: {orphan}",
        )
        with self._working(f"waiting for the daemon to give {made.name} up"):
            until(lambda: self._under_way() is None, "the daemon gives up a push without a sender", DEADLINE)
            live = self._read_back()
            self.serving.wait_more(live.label)
        self.screen.row(
            "refused",
            f"{made.name} was given up after {format_seconds(self.resume_window)}, and {live.label} is serving",
            holds=live.label == self.served.name,
            off=f"{self.served.name} should be serving, and {live.label!r} is",
        )
        self._answer("says", self.served, SENDER)
        self.screen.row(
            "digest",
            f"was {self.digest}",
            f"now {live.digest}",
            holds=live.digest == self.digest,
            off=f"the push failed and the live model changed, from {self.digest} to {live.digest} {live.error}",
        )
        return made

    def push_step(self, refused: Made) -> None:
        """What was refused once more, and then one optimiser step: only what has changed, in as few bytes as can be."""
        self.screen.chapter(f"4  Only what has changed: {refused.name} again, and one optimiser step more")
        with self._working(f"pushing {refused.name}"):
            receipt = self._push(self.daemon.address, refused, base=self.served)
        self._saved(receipt)
        self._committed(receipt, refused, SENDER)
        with self._working("one more step"):
            made = self.trainer.step("v4")
        with self._working(f"pushing {made.name}"):
            receipt = self._push(self.daemon.address, made, base=refused)
        self._saved(receipt)
        self._committed(receipt, made, SENDER)

    def _saved(self, receipt: shipd.Receipt) -> None:
        times = receipt.bytes_total / receipt.bytes_sent
        self.screen.row(
            f"{receipt.label} sent",
            f"{format_bytes(receipt.bytes_sent)} instead of {format_bytes(receipt.bytes_total)}, {times:,.0f} times "
            f"fewer, in {format_seconds(receipt.seconds)}",
            holds=bool(receipt.base) and times > 2,
            off=f"only what changed should have been sent: {receipt}",
        )

    def account(self) -> None:
        """What those who asked noticed of all this."""
        serving = self.serving
        with self._working("stopping"):
            codes = serving.stop(), self.daemon.terminate()
        wrong = serving.wrong(self.expected)
        mixed = sum(wrong.values())
        versions = ", ".join(made.name for made in self.expected.values())
        self.screen.chapter("All the while")
        self.screen.row(
            "answers",
            f"{serving.count:,} questions answered, {len(serving.failures)} failed",
            holds=serving.count > 0 and not serving.failures,
            off=f"{len(serving.failures)} of {serving.count} questions failed, the first with {serving.failures[:1]}",
        )
        self.screen.row(
            "mixed",
            f"{mixed} from a mixed model: bit for bit what {versions} say elsewhere"
            if not mixed
            else f"{mixed} from a mixed model, or from one that is not what its label says",
            holds=not mixed,
            off=f"{mixed} answers are not those of their version: "
            + "; ".join(f"{spoken.label} was asked {spoken.question!r}" for spoken in list(wrong)[:3]),
        )
        self.screen.row(
            "time",
            f"median {format_seconds(serving.median)}, slowest {format_seconds(serving.slowest)}, across a swap "
            f"{' and '.join(map(format_seconds, serving.across)) or 'none'}",
            holds=len(serving.across) == 4,
            off=f"the answers should have changed version four times, and did {len(serving.across)} times",
        )
        if any(codes):
            self.screen.problems.append(
                f"the serving process ended with {codes[0]} and the daemon with {codes[1]}, instead of 0\n"
                f"{serving.describe()}\n{self.daemon.describe()}"
            )

    # --- making, pushing and asking ------------------------------------------------------------------------

    def _working(self, activity: str) -> contextlib.AbstractContextManager[None]:
        return self.screen.working(activity, lambda: self.serving.count)

    def _make(self) -> Made:
        with self._working("fine-tuning the next version"):
            return self.trainer.next()

    def _push(self, address: str, made: Made, base: Made | None = None) -> shipd.Receipt:
        """All of it; with ``base``, which the daemon has, as little as possible."""

        async def converse() -> shipd.Receipt:
            async with shipd.connect(address) as client:
                return await client.push(
                    made.state,
                    model=MODEL,
                    label=made.name,
                    base=base.state if base is not None else None,
                    prefer="time" if base is None else "bytes",
                )

        return asyncio.run(converse())

    def _kill_sender_at_half(self, checkpoint: Path, made: Made) -> TransferStatus | None:
        """Push with shipctl and kill it; what the daemon then says of the push."""
        with (
            Proxy(self.daemon.port) as proxy,
            Shipctl("push", checkpoint, "--to", proxy.address, "--model", MODEL, "--label", made.name) as sender,
        ):
            half = proxy.hold(nth=_size(made) // LEAF_SIZE // 2)
            until(lambda: half.reached.is_set() or not sender.running, "half of the push is on the wire", DEADLINE)
            if not half.reached.is_set():
                raise AssertionError(f"shipctl ended before half of its push\n{sender.describe()}")
            sender.kill()
            self.screen.row("killed", f"{sender.pid} shipctl push {checkpoint.name}, by SIGKILL")
            # What lies on the wire still arrives, and then the end of the stream.
            half.release()
            orphan: TransferStatus | None = None

            def missed() -> bool:
                nonlocal orphan
                orphan = self._under_way()
                return orphan is None or not orphan.connected

            until(missed, "the daemon misses the sender", DEADLINE)
            return orphan

    def _under_way(self) -> TransferStatus | None:
        async def converse() -> TransferStatus | None:
            async with shipd.connect(self.daemon.address) as client:
                return (await client.status(MODEL)).models[0].transfer

        return asyncio.run(converse())

    def _read_back(self) -> ProcessVerification:
        """What the serving process reads back from its live parameters."""

        async def converse() -> ProcessVerification:
            async with shipd.connect(self.daemon.address) as client:
                (process,) = (await client.verify(MODEL)).processes
                return process

        return asyncio.run(converse())

    # --- what must hold ------------------------------------------------------------------------------------

    def _committed(self, receipt: shipd.Receipt, made: Made, question: str) -> None:
        """It answers as its trainer says, and what is live is what was sent."""
        self.expected[made.name] = made
        self._answer("said", self.served, question)
        self._answer("says", made, question)
        self.served = made
        live = self._read_back()
        self.digest = live.digest
        self.screen.row(
            "digest",
            f"sent {receipt.digest}",
            f"live {live.digest or live.error}",
            holds=live.digest == receipt.digest,
            off=f"{receipt.digest} was sent, and what is live is {live.digest or live.error}",
        )

    def _answer(self, verb: str, made: Made, question: str) -> None:
        """What the serving process answered as this version."""
        label = next(label for label, version in self.expected.items() if version is made)
        with self._working(f"asking {made.name}"):
            answer = self.serving.wait_answer(label, question)
        taught = made.replies[question].answer
        self.screen.row(
            f"{made.name} {verb}",
            answer,
            lead=question,
            holds=answer == taught,
            off=f"asked {question!r}, {made.name} should say {taught!r}, and it said {answer!r}",
        )


def _size(made: Made) -> int:
    return sum(tensor.nbytes for tensor in made.state.values())


def _origin(made: Made) -> str:
    return f"fine-tuned just now, {made.steps} steps"
