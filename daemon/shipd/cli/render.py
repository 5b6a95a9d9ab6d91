"""What ``shipctl`` prints for people."""

import math
import time
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shipd.checkpoints.remote.location import is_url, shown
from shipd.client.choice import Choice
from shipd.client.doctor import Finding, why_as_it_is
from shipd.client.planning import model_class
from shipd.client.profile import Profile
from shipd.client.receipt import Receipt
from shipd.matching.diagnosis import explain, summary
from shipd.matching.plan import Plan
from shipd.units import count_tensors, format_bytes, format_seconds
from shipproto.description import Description
from shipproto.names import harmless
from shipproto.status import ModelStatus, ProcessStatus, Status, Verification

_SHOWN: Final = 3
"""Names that are listed where there may be very many."""

_RECEIVER = ("receiver_receive", "receiver_check", "receiver_digest", "receiver_decode")
_WORDS = {
    "digest": "checks",
    "check": "frames",
    "write": "send",
    "wait": "wait for room",
    "receiver_receive": "receive",
    "receiver_check": "CRC32C",
    "receiver_digest": "digest",
    "receiver_decode": "decode",
}


def render_receipt(receipt: Receipt) -> str:
    """A push in a few lines."""
    if receipt.already:
        return f"{receipt.model} is at {receipt.label} already, digest {receipt.digest}: nothing to send"
    content = f"{count_tensors(receipt.tensors)} of {format_bytes(receipt.bytes_total)}"
    size = f"{format_bytes(receipt.bytes_sent)} for {content}"
    if receipt.bytes_lent:
        size += f", of which the daemon has read {format_bytes(receipt.bytes_lent)} from the file itself"
    elif receipt.bytes_sent < receipt.bytes_total * 0.95:
        size += f" ({receipt.bytes_total / receipt.bytes_sent:.1f} times fewer)"
    times = f"wire {format_seconds(receipt.wire_seconds)}, stage {format_seconds(receipt.stage_seconds)}"
    lines = [
        f"{receipt.model} is at {receipt.label}",
        f"  digest   {receipt.live_digest}",
        *([f"           {receipt.digest} of what was sent"] if receipt.digest != receipt.live_digest else ()),
        f"  sent     {size}, in {format_seconds(receipt.seconds)} ({times})",
    ]
    if receipt.frames_resent:
        names = ", ".join(receipt.resent_tensors[:3]) or "no tensor"
        more = f" and {len(receipt.resent_tensors) - 3} more" if len(receipt.resent_tensors) > 3 else ""
        lines.append(f"  resent   {receipt.frames_resent} damaged frame(s): {names}{more}")
    lines += [f"  renamed  {how}" for how in receipt.renamed]
    lines += [f"  cast     {how}" for how in receipt.cast]
    if receipt.ignored:
        lines.append(f"  ignored  {_some(receipt.ignored)}: the model does not have them")
    if receipt.kept:
        lines.append(f"  kept     {_some(receipt.kept)}: not sent, with the values that they had")
    if receipt.skipped:
        lines.append(f"  skipped  {_some(receipt.skipped)}: kept in non-persistent buffers of the model")
    if receipt.pause_seconds is None:
        lines.append("  swapped  nothing is attached: the next process that attaches gets it")
    else:
        noun = "process" if receipt.swapped == 1 else "processes"
        lines.append(f"  swapped  {receipt.swapped} {noun}, paused for at most {format_seconds(receipt.pause_seconds)}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    """Few names as they are, and of many some and their number."""
    shown = ", ".join(map(harmless, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"


def render_plan(plan: Plan | None, description: Description | None, model: str, checkpoint: str) -> str:
    """What a push would do, or what stands in its way. ``description`` is what the daemon says of the model."""
    checkpoint = shown(checkpoint) if is_url(checkpoint) else checkpoint
    if plan is None:
        return f"{checkpoint} would be taken as it is: {why_as_it_is(description)}"
    if plan.problems:
        return explain(plan, model=model, origin=checkpoint, model_class=model_class(description))
    return "\n".join((f"{checkpoint} fits model {model}", *(f"  {line}" for line in summary(plan))))


def render_findings(findings: Sequence[Finding]) -> str:
    """What a look at a daemon has found, by what was looked at."""
    lines: list[str] = []
    subject = ""
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            lines.append(harmless(subject))
        first, *others = finding.text.splitlines()
        lines.append(f"  {finding.level:<8} {first}")
        lines += [f"           {line}" for line in others]
        if finding.help:
            lines.append(f"           help: {finding.help}")
    return "\n".join(lines)


def plan_as_dict(plan: Plan | None, description: Description | None, model: str, checkpoint: str) -> dict[str, Any]:
    """For ``--json``; ``message`` is what people are told."""
    message = render_plan(plan, description, model, checkpoint)
    if plan is None:
        return {"model": model, "known": False, "message": message}
    return {
        "model": model,
        "known": True,
        "fits": not plan.problems,
        "message": message,
        "policy": plan.rules.policy,
        "cast": plan.rules.cast,
        "tensors": len(plan.structure),
        "bytes": plan.structure.total_bytes,
        "partial": plan.partial,
        "renamed": [list(pair) for pair in plan.renamed],
        "rules": list(plan.how),
        "casts": [
            {"from": given, "to": wanted, "tensors": cast.tensors, "bytes": cast.nbytes}
            for (given, wanted), cast in plan.casts.items()
        ],
        "tied": [list(pair) for pair in plan.tied],
        "skipped": list(plan.skipped),
        "shared": list(plan.shared),
        "ignored": list(plan.ignored),
        "kept": list(plan.kept),
        "notes": list(plan.notes),
        "problems": [
            {"kind": problem.kind, "tensor": problem.tensor, "text": problem.text, "notes": list(problem.notes)}
            for problem in plan.problems
        ],
    }


def render_choices(receipt: Receipt) -> str:
    """How the chunks of a push were coded, and what that was decided by."""
    if not receipt.codecs:
        if receipt.bytes_lent:
            return "nothing was coded: the daemon, on this host, has read the file itself"
        return "everything was sent as it is, but for what the daemon had already: " + (
            "nothing is faster on this link"
            if receipt.base or receipt.choices
            else "the daemon takes nothing else, or is on this host"
        )
    lines = [f"coded against {receipt.base[:16]}" if receipt.base else "coded without a base"]
    for use in receipt.codecs:
        ratio = f", {use.content_bytes / use.payload_bytes:,.1f} times fewer" if use.payload_bytes else ""
        noun = "run" if use.runs == 1 else "runs"
        lines.append(
            f"  {use.codec:<7} {use.runs} {noun} of {format_bytes(use.content_bytes)} in "
            f"{format_bytes(use.payload_bytes)}{ratio}"
        )
    for choice in _distinct(receipt.choices):
        density = "" if choice.density is None else f", {100 * choice.density:.2g} % of it changed"
        link = f"{format_bytes(choice.link)}/s" if math.isfinite(choice.link) else "no limit"
        others = ", ".join(
            f"{name} {format_seconds(seconds)} ({format_bytes(size)})" for name, seconds, size in choice.others
        )
        lines.append(
            f"  {choice.codec.name} for {format_bytes(choice.size)}{density}, link {link}: expected "
            f"{format_seconds(choice.seconds)} ({format_bytes(choice.size * choice.codec.share)}); not {others or '-'}"
        )
    return "\n".join(lines)


def _distinct(choices: Sequence[Choice]) -> list[Choice]:
    """The first choice of each codec, in their order: what follows differs in figures only."""
    return list({choice.codec.name: choice for choice in reversed(choices)}.values())[::-1]


def render_profile(profile: Profile, receipt: Receipt) -> str:
    """Where a push's time went: its stages one after the other, and what each side did on the wire."""
    named = (
        profile.open,
        profile.plan,
        profile.connect,
        profile.agree,
        profile.wire,
        profile.verify,
        profile.stage,
        profile.commit,
    )
    lanes = "1 connection" if profile.lanes == 1 else f"{profile.lanes} connections"
    moved = receipt.bytes_sent + receipt.bytes_lent
    rate = format_bytes(moved / profile.wire) + "/s" if profile.wire else "nothing sent"
    stages = (
        ("open", profile.open, "the checkpoint"),
        ("plan", profile.plan, "what becomes of its tensors"),
        ("connect", profile.connect, "and shake hands"),
        ("agree", profile.agree, "on structure and chunks"),
        ("wire", profile.wire, f"{rate} over {lanes}" + (", and from the file" if receipt.bytes_lent else "")),
        ("  sender", None, _split(profile, ("read", "encode", "digest", "check", "write", "wait"))),
        ("  receiver", None, _split(profile, _RECEIVER)),
        ("verify", profile.verify, "digests compared"),
        ("stage", profile.stage, "serving processes made ready"),
        ("commit", profile.commit, _pause(profile, receipt)),
        ("between", max(0.0, profile.total - sum(named)), "messages on their way"),
    )
    lines = [f"where {format_seconds(profile.total)} went"]
    for name, seconds, what in stages:
        time_and_share = ""
        if seconds is not None:
            time_and_share = f"{format_seconds(seconds)} {100 * seconds / max(profile.total, 1e-9):4.0f} %"
        lines.append(f"  {name:<11}{time_and_share:>15}   {what}")
    return "\n".join(lines)


def _split(profile: Profile, names: tuple[str, ...]) -> str:
    return ", ".join(f"{_WORDS.get(name, name)} {format_seconds(getattr(profile, name))}" for name in names)


def _pause(profile: Profile, receipt: Receipt) -> str:
    if receipt.pause_seconds is None:
        return "nothing is attached"
    parts = f"{format_seconds(profile.hold_wait)} until holds ended, copy {format_seconds(profile.copy)}"
    return f"pause {format_seconds(profile.pause)}: {parts}"


def print_status(status: Status, address: str) -> None:
    """Models, their processes and what is under way."""
    console = Console(highlight=False, markup=False)
    console.print(
        f"{address}: {harmless(status.agent)}, pid {status.pid}, up {format_seconds(status.uptime_seconds)}, images "
        f"{format_bytes(status.memory_used)} of {format_bytes(status.memory_limit)}",
        soft_wrap=True,
    )
    if status.codecs not in ("", "compiled"):
        # What they are where all is well is nobody's concern.
        console.print(
            f"deltas are decoded more slowly than they could be, by {harmless(status.codecs)}", soft_wrap=True
        )
    if not status.models:
        console.print("no models: nothing is attached, and the configuration declares none")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("MODEL", "VERSION", "DIGEST", "TENSORS", "SIZE", "PROCESSES", "COMMITTED"):
        table.add_column(heading, justify="right" if heading in ("TENSORS", "SIZE") else "left", overflow="fold")
    for model in status.models:
        table.add_row(
            harmless(model.name),
            harmless(model.label) or "none",
            model.digest[:16] or "-",
            str(model.tensors),
            format_bytes(model.bytes),
            _processes(model),
            _when(model),
        )
    console.print(table)
    for model in status.models:
        name = harmless(model.name)
        if model.failed is not None:
            failed = model.failed
            console.print(
                f"{name}: the last push, {harmless(failed.label or failed.transfer_id)} from {harmless(failed.peer)}, "
                f"ended without effect {format_seconds(max(0.0, time.time() - failed.at))} ago: "
                f"{harmless(failed.reason)}",
                soft_wrap=True,
            )
        if model.transfer is not None:
            transfer = model.transfer
            share = 100 * transfer.bytes_held / max(1, transfer.bytes_total)
            state = "" if transfer.connected else ", sender gone, waiting for it"
            console.print(
                f"{name}: {harmless(transfer.stage)} a push from {harmless(transfer.peer)}: "
                f"{format_bytes(transfer.bytes_held)} of {format_bytes(transfer.bytes_total)} ({share:.0f} %){state}"
            )


def _processes(model: ModelStatus) -> Text:
    text = Text(", ".join(f"{process.pid} {process.state}{_mode(process)}" for process in model.processes) or "none")
    if any(process.state == "stale" for process in model.processes):
        text.stylize("red")
    return text


def _mode(process: ProcessStatus) -> str:
    return f" ({harmless(process.mode)})" if process.mode else ""


def _when(model: ModelStatus) -> str:
    if not model.committed_at:
        return "came with its process" if model.label else "-"
    return f"{format_seconds(max(0.0, time.time() - model.committed_at))} ago"


def print_verification(answer: Verification) -> None:
    """The committed digest beside what every process read back."""
    console = Console(highlight=False, markup=False)
    if not answer.label:
        console.print(f"{answer.model} has no version yet")
        return
    console.print(f"{answer.model} {answer.label}\ncommitted       {answer.digest}")
    if not answer.processes:
        console.print("nothing is attached")
    for process in answer.processes:
        verdict = "DIFFERS"
        if process.matches:
            verdict = "delivered, not read back" if process.delivered else "the same"
        console.print(
            f"process {process.pid:<7} {process.digest or '-'}  {harmless(process.error) or verdict}",
            style=None if process.matches else "red",
        )
