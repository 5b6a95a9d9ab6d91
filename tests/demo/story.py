"""The story: three pushes to a model that never stops answering, and everything that must hold meanwhile."""

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

import shipd
from shipd.units import format_bytes, format_seconds
from shipproto.status import TransferStatus, Verification
from tests.demo.answers import Serving
from tests.demo.encoder import NAME
from tests.demo.screen import Screen
from tests.demo.trainer import BIT, SENDER, SHIPD, Made, make_versions
from tests.support.processes import ShipdProcess, Shipctl
from tests.support.proxy import DATA, Proxy, until

MODEL: Final = "minilm"
DAMAGED: Final = 150
"""The frame, counted from 0, in which a bit is flipped; MiniLM takes some 180."""
RESUME_WINDOW: Final = 2.0
"""Seconds for which the daemon keeps a push whose sender is gone. A minute by default: too long for a demo."""


def tell(screen: Screen) -> None:
    """Start everything, tell the story, stop everything."""
    started = time.monotonic()
    screen.title("shipd ships the next version of a model into the process that is serving it")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shipd-demo-")))
        with screen.working("starting shipd"):
            daemon = stack.enter_context(
                ShipdProcess(directory, models={}, resume_window=RESUME_WINDOW, memory_limit="1GiB")
            )
        serving = stack.enter_context(Serving(daemon.socket))
        with screen.working("fine-tuning three versions, while the serving process starts", lambda: serving.count):
            versions = make_versions()
            serving.wait_ready()
        story = Story(screen, daemon, serving, versions)
        story.introduce()
        story.push()
        story.push_damaged()
        story.push_killed(directory / "v3.safetensors")
        story.account()
    screen.verdict(f"Everything held, in {format_seconds(time.monotonic() - started)}.")


class Story:
    """What happens, chapter by chapter."""

    def __init__(self, screen: Screen, daemon: ShipdProcess, serving: Serving, versions: list[Made]) -> None:
        self.screen = screen
        self.daemon = daemon
        self.serving = serving
        self.v0, self.v1, self.v2, self.v3 = versions
        self.expected = {serving.label: self.v0, "v1": self.v1, "v2": self.v2}
        """What may answer, by the label that shipd gives it. Not v3."""
        self.live_digest = ""

    # --- chapters ------------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Who is who."""
        size = format_bytes(sum(tensor.nbytes for tensor in self.v0.state.values()))
        steps = ", ".join(f"{made.name} ({made.steps} steps)" for made in (self.v1, self.v2, self.v3))
        self.screen.row("model", f"{NAME}, {size}, answering questions without a break from here on")
        self.screen.row("versions", f"{steps}, each fine-tuned just now from the one before")

    def push(self) -> None:
        """The plain one."""
        self.screen.chapter("1  A push: v1", f"asked all the while: {SHIPD}")
        with self._working("pushing v1"):
            receipt = self._push(self.daemon.address, self.v1)
        pause = receipt.pause_seconds
        self.screen.row(
            "sent",
            f"{format_bytes(receipt.bytes_sent)} in {format_seconds(receipt.seconds)}: wire "
            f"{format_seconds(receipt.wire_seconds)}, stage {format_seconds(receipt.stage_seconds)}, serving paused for "
            f"{format_seconds(pause) if pause is not None else 'no time known'}",
            holds=receipt.swapped == 1 and not receipt.stale and pause is not None,
            off=f"v1 was not swapped by the one serving process: {receipt}",
        )
        self._answer_changed(SHIPD, self.v0, self.v1)
        self._digests(receipt)

    def push_damaged(self) -> None:
        """One bit is flipped on the wire."""
        self.screen.chapter("2  A push with one bit flipped on the wire: v2", f"asked: {BIT}")
        with self._working("pushing v2"), Proxy(self.daemon.port) as proxy:
            flip = proxy.flip("payload", nth=DAMAGED)
            receipt = self._push(proxy.address, self.v2)
            frames = [frame.header for frame in proxy.seen(DATA)]
        chunks = len(set(frames))
        self.screen.row(
            "damaged",
            f"{', '.join(receipt.resent_tensors) or 'no tensor'}, in frame {DAMAGED + 1} of {chunks}",
            holds=flip.applied == 1 and len(receipt.resent_tensors) == 1,
            off=f"one tensor should have been damaged: the bit was flipped {flip.applied} times, and the receipt names "
            f"{receipt.resent_tensors}",
        )
        again = len(frames) - chunks
        self.screen.row(
            "repaired",
            f"{_count(receipt.frames_resent, 'frame')} sent again, says the receipt; {again}, says the wire",
            holds=receipt.frames_resent == again == 1,
            off=f"exactly one frame should have been sent again: {receipt.frames_resent} by the receipt, {again} on the wire",
        )
        self._answer_changed(BIT, self.v1, self.v2)
        self._digests(receipt)

    def push_killed(self, checkpoint: Path) -> None:
        """The sender dies at half."""
        self.screen.chapter("3  A push whose sender is killed at half: v3", f"asked: {SENDER}")
        with self._working("pushing v3"):
            save_file(self.v3.state, checkpoint)
            left = self._kill_sender_at_half(checkpoint)
        self.screen.row(
            "daemon",
            f"{format_bytes(left.bytes_held)} of {format_bytes(left.bytes_total)} arrived, the sender is gone"
            if left is not None
            else "knows of no such push",
            holds=left is not None and 0 < left.bytes_held < left.bytes_total,
            off=f"the daemon should have reported a push without a sender: {left}",
        )
        with self._working("waiting for the daemon to give v3 up"):
            until(lambda: self._under_way() is None, "the daemon gives up a push whose sender is gone")
            answered = self._verify()
            self.serving.wait_more(answered.label)
        live = self._live(answered)
        self.screen.row(
            "refused",
            f"v3 was given up after {format_seconds(RESUME_WINDOW)}; {answered.label} is serving",
            holds=answered.label == "v2",
            off=f"v2 should be serving, not {answered.label!r}",
        )
        answer = self.serving.wait_answer("v2", SENDER)
        self.screen.row(f"{answered.label} says", f"“{answer}” as before", holds=answer == self._reply(self.v2, SENDER))
        self.screen.row(
            "digest",
            f"live before {self.live_digest}, after {live}",
            holds=live == self.live_digest,
            off=f"the live model changed although the push failed: {self.live_digest} before, {live} after",
        )

    def account(self) -> None:
        """What those who asked noticed of all this."""
        serving = self.serving
        with self._working("stopping"):
            codes = serving.stop(), self.daemon.terminate()
        wrong = serving.wrong(self.expected)
        mixed = sum(wrong.values())
        self.screen.chapter("All the while")
        self.screen.row(
            "answers",
            f"{serving.count:,} questions answered, {len(serving.failures)} failed",
            holds=serving.count > 0 and not serving.failures,
            off=f"{len(serving.failures)} of {serving.count} questions failed, the first with {serving.failures[:1]}",
        )
        self.screen.row(
            "mixed",
            f"{mixed} answers from a mixed model: each was compared bit for bit with v0, v1 or v2 asked here",
            holds=not mixed,
            off=f"{mixed} answers are not what their version says: {[(s.label, s.question, s.answer) for s in wrong][:3]}",
        )
        self.screen.row(
            "time",
            f"median {format_seconds(serving.median)}, slowest {format_seconds(max(serving.seconds))}, across a swap "
            f"{' and '.join(map(format_seconds, serving.across)) or 'none'}",
            holds=len(serving.across) == 2,
            off=f"the answers should have changed version twice, and did {len(serving.across)} times",
        )
        if any(codes):
            self.screen.problems.append(
                f"the serving process ended with {codes[0]} and the daemon with {codes[1]}, instead of 0\n"
                f"{serving.describe()}\n{self.daemon.describe()}"
            )

    # --- pushing and asking --------------------------------------------------------------------------------

    def _working(self, activity: str) -> contextlib.AbstractContextManager[None]:
        return self.screen.working(activity, lambda: self.serving.count)

    def _push(self, address: str, made: Made) -> shipd.Receipt:
        async def converse() -> shipd.Receipt:
            async with shipd.connect(address) as client:
                return await client.push(made.state, model=MODEL, label=made.name)

        return asyncio.run(converse())

    def _kill_sender_at_half(self, checkpoint: Path) -> TransferStatus | None:
        """Push with shipctl and kill it; what the daemon then says of the push."""
        size = sum(tensor.nbytes for tensor in self.v3.state.values())
        with (
            Proxy(self.daemon.port) as proxy,
            Shipctl("push", checkpoint, "--to", proxy.address, "--model", MODEL, "--label", "v3") as sender,
        ):
            half = proxy.hold(nth=size // 2 // (512 * 1024))
            until(lambda: half.reached.is_set() or not sender.running, "half of the push has gone over the wire")
            if not half.reached.is_set():
                raise AssertionError(f"shipctl ended before half of its push\n{sender.describe()}")
            self.screen.row("killed", f"shipctl, process {sender.pid}, by SIGKILL in the middle of its push")
            sender.kill()
            half.release()
            until(lambda: (push := self._under_way()) is None or not push.connected, "the daemon misses the sender")
            return self._under_way()

    def _under_way(self) -> TransferStatus | None:
        async def converse() -> TransferStatus | None:
            async with shipd.connect(self.daemon.address) as client:
                return (await client.status(MODEL)).models[0].transfer

        return asyncio.run(converse())

    def _verify(self) -> Verification:
        async def converse() -> Verification:
            async with shipd.connect(self.daemon.address) as client:
                return await client.verify(MODEL)

        return asyncio.run(converse())

    # --- what must hold ------------------------------------------------------------------------------------

    def _live(self, verification: Verification) -> str:
        """The digest that the serving process has read back."""
        (process,) = verification.processes
        return process.digest or process.error

    def _digests(self, receipt: shipd.Receipt) -> None:
        self.live_digest = self._live(self._verify())
        self.screen.row(
            "digest",
            f"sent {receipt.digest}, live {self.live_digest}",
            holds=self.live_digest == receipt.digest,
            off=f"{receipt.digest} was sent, and the live model has {self.live_digest}",
        )

    def _answer_changed(self, question: str, old: Made, new: Made) -> None:
        label = next(label for label, made in self.expected.items() if made is old)
        before = self.serving.wait_answer(label, question)
        with self._working(f"asking {new.name}"):
            after = self.serving.wait_answer(new.name, question)
        self.screen.row(f"{old.name} said", f"“{before}”")
        self.screen.row(
            f"{new.name} says",
            f"“{after}”",
            holds=(before, after) == (self._reply(old, question), self._reply(new, question)) and before != after,
            off=f"asked {question!r}, {new.name} should have said {self._reply(new, question)!r}, not {after!r}",
        )

    @staticmethod
    def _reply(made: Made, question: str) -> str:
        return made.replies[question].answer


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
