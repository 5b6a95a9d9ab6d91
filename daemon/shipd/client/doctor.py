"""What would and would not work between this machine and a daemon, found out before anything is sent.

``examine`` asks; each ``Finding`` is one thing that was looked at. Nothing is offered and nothing changes.
"""

import importlib.util
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from shipd.checkpoints.remote.location import is_url, shown
from shipd.client.client import Client
from shipd.client.planning import Policy, Renames, model_class
from shipd.environment import environment
from shipd.errors import ShipError, UnknownModel
from shipd.matching.diagnosis import explain, summary
from shipd.release import AGENT
from shipd.units import count_tensors, format_bytes, format_seconds
from shipproto.description import Description, ProcessDescription
from shipproto.names import harmless
from shipproto.status import ModelStatus, Status

if TYPE_CHECKING:
    from shipd.checkpoints.source import Checkpoint

Level = Literal["ok", "note", "warning", "error"]

_EXTRAS: Final = (("h5py", "hdf5", "HDF5 files"), ("fsspec", "fsspec", "s3:// and other URLs of fsspec"))
"""Packages that are optional: what each is installed by, and what for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``subject`` is what was looked at: "daemon", "here", a model's name or "checkpoint". ``help`` says what to do."""

    level: Level
    subject: str
    text: str
    help: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"level": self.level, "subject": self.subject, "text": self.text, "help": self.help}


async def examine(
    client: Client,
    *,
    model: str | None = None,
    checkpoint: "Checkpoint | None" = None,
    key: str | None = None,
    policy: Policy | None = None,
    cast: bool | None = None,
    renames: Renames | None = None,
) -> list[Finding]:
    """Everything that can be told of the daemon of a connected ``client``, of its models, or of one, and of a push of
    ``checkpoint`` to that. Raises ShipError where the daemon does not answer; what else fails is a finding.
    """
    findings = list(_here())
    status = await client.status()
    began = time.perf_counter()
    await client.status()
    trip = time.perf_counter() - began
    names = [each.name for each in status.models]
    described: dict[str, Description | None] = {}
    for name in names if model is None else [model] if model in names else []:
        try:
            described[name] = await client.describe(name)
        except UnknownModel:
            if model is not None:
                raise
            # It was detached from meanwhile, and is no model any more.
            status.models[:] = [each for each in status.models if each.name != name]
    findings += _daemon(status, trip, described)
    if model is not None and model not in names:
        known = f"there are {', '.join(map(harmless, names))}" if names else "there are none"
        findings.append(
            Finding(
                "error",
                model,
                f"the daemon has no model of that name; {known}",
                f"attach it in the serving process: shipd.attach(model, {model!r}); or declare it in the daemon's "
                f'configuration: [models."{model}"]',
            )
        )
        return findings
    for each in status.models:
        if each.name in described:
            findings += _model(each, described[each.name])
    if checkpoint is not None and model is not None:
        findings += await _checkpoint(client, checkpoint, model, described[model], key, policy, cast, renames)
    return findings


def _here() -> Iterator[Finding]:
    own = environment()
    versions = ", ".join(f"{name} {own[name]}" for name in ("python", "torch", "cuda") if name in own)
    yield Finding("ok", "here", f"{AGENT} on {own.get('platform', 'an unknown platform')}: {versions}")
    if "torch" not in own:
        yield Finding(
            "warning",
            "here",
            "no torch: only safetensors, .npz and HDF5 can be read",
            "pip install torch",
        )
    for package, extra, what in _EXTRAS:
        if importlib.util.find_spec(package) is None:
            yield Finding("note", "here", f"{what} cannot be read", f"pip install 'shipd[{extra}]'")


def _daemon(status: Status, trip: float, described: Mapping[str, Description | None]) -> Iterator[Finding]:
    used = f"images {format_bytes(status.memory_used)} of {format_bytes(status.memory_limit)}"
    since = f"up {format_seconds(status.uptime_seconds)}, answers in {format_seconds(trip)}"
    yield Finding("ok", "daemon", f"{harmless(status.agent)}, {since}, {used}")
    if status.agent != AGENT:
        yield Finding(
            "note",
            "daemon",
            f"it is of another release than this side ({harmless(status.agent)}, {AGENT}); what one of them does not "
            "know is not used",
        )
    if any(description is None for description in described.values()):
        yield Finding(
            "warning",
            "daemon",
            "its release cannot tell what its models consist of: names are not matched, nothing is cast, and a "
            "checkpoint must fit exactly",
            "update the daemon",
        )
    if status.codecs not in ("", "compiled"):
        yield Finding(
            "note", "daemon", f"deltas are decoded more slowly than they could be, by {harmless(status.codecs)}"
        )


def _model(model: ModelStatus, description: Description | None) -> Iterator[Finding]:
    name = model.name
    if model.label:
        yield Finding(
            "ok",
            name,
            f"at {harmless(model.label)}: {count_tensors(model.tensors)} of {format_bytes(model.bytes)}, digest "
            f"{harmless(model.digest)}",
        )
    else:
        yield Finding("note", name, "no version yet: the first push decides what it consists of")
    if not model.processes:
        yield Finding(
            "note",
            name,
            "nothing is attached: a push is kept for the next process that attaches",
            f"shipd.attach(model, {name!r})",
        )
    for process in model.processes:
        if process.state == "stale":
            yield Finding(
                "error",
                name,
                f"process {process.pid} is fenced: it could not follow a commit, and serves nothing until it has "
                "caught up",
                "it comes back by itself; restart it where it does not",
            )
    if model.failed is not None:
        yield Finding("note", name, f"the last push ended without effect: {harmless(model.failed.reason)}")
    if description is not None:
        yield from _described(name, description)


def _described(name: str, description: Description) -> Iterator[Finding]:
    own = environment()
    for process in description.processes:
        yield Finding("ok", name, _process(process))
        theirs = process.environment.get("torch")
        if theirs and own.get("torch") and theirs != own["torch"]:
            yield Finding(
                "note",
                name,
                f"torch {harmless(theirs)} there and {own['torch']} here: that makes no difference, since tensors "
                "travel as bytes and nothing is unpickled",
            )
    if description.policy or description.cast is not None:
        policy = description.policy or "strict, or what a push asks for"
        casts = {None: "where a push asks for it", True: "yes", False: "never"}[description.cast]
        yield Finding("ok", name, f"policy {harmless(policy)}; casts: {casts}")
    if description.delivered:
        yield Finding(
            "note", name, "versions are handed to load_weights, which takes any names and cannot be read back"
        )


def _process(process: ProcessDescription) -> str:
    runs = ", ".join(
        f"{word} {harmless(process.environment[key])}"
        for key, word in (("torch", "torch"), ("cuda", "CUDA"), ("python", "Python"), ("shipd", "shipd"))
        if key in process.environment
    )
    what = harmless(process.model_class) or "a model"
    return f"process {process.pid} serves {what} in mode {harmless(process.mode)}" + (f" ({runs})" if runs else "")


async def _checkpoint(
    client: Client,
    checkpoint: "Checkpoint",
    model: str,
    description: Description | None,
    key: str | None,
    policy: Policy | None,
    cast: bool | None,
    renames: Renames | None,
) -> list[Finding]:
    try:
        plan = await client.plan(checkpoint, model=model, key=key, policy=policy, cast=cast, renames=renames)
    except ShipError as error:
        return [Finding("error", "checkpoint", str(error))]
    if plan is None:
        return [
            Finding("note", "checkpoint", f"it can be read, and would be taken as it is: {why_as_it_is(description)}")
        ]
    if plan.problems:
        text = explain(plan, model=model, origin=_origin(checkpoint), model_class=model_class(description))
        return [Finding("error", "checkpoint", text)]
    findings = [Finding("ok", "checkpoint", line) for line in summary(plan)]
    if plan.partial and description is not None:
        room = max(0, description.memory_limit - description.memory_used)
        if plan.nbytes > room:
            findings.append(
                Finding(
                    "error",
                    "checkpoint",
                    f"what is sent of a part is received beside the model's images: that takes "
                    f"{format_bytes(plan.nbytes)}, and of the daemon's memory_limit {format_bytes(room)} are left",
                    "raise memory_limit in the daemon's configuration, and reload it",
                )
            )
    return findings


def why_as_it_is(description: Description | None) -> str:
    """Why there is no plan: what a daemon says of the model, None where its release says nothing."""
    if description is None:
        return "the daemon's release cannot tell what its models consist of"
    if not description.structure_digest:
        return f"nothing is known yet of what model {harmless(description.model)} consists of"
    return (
        f"nothing serves model {harmless(description.model)}, whose version {harmless(description.label)} consists of "
        "other tensors, and it would be replaced"
    )


def _origin(checkpoint: "Checkpoint") -> str:
    """What a finding calls the checkpoint."""
    if isinstance(checkpoint, str) and is_url(checkpoint):
        return shown(checkpoint)
    return str(checkpoint) if isinstance(checkpoint, str | os.PathLike) else "state dict"


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the most serious of them; "ok" where there are none."""
    order: tuple[Level, ...] = ("ok", "note", "warning", "error")
    return max((finding.level for finding in findings), key=order.index, default="ok")
