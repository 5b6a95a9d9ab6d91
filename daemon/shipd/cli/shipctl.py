"""The command ``shipctl``: push a version, ask what is being served, have it proved.

stdout is data, stderr is talk. Exit codes are a contract: 0 done, 1 failed, 2 wrong usage, 3 partly done,
10 no such model, 11 busy, 12 refused, 13 integrity, 78 configuration, 130 interrupted.
Nothing heavy is imported before a command needs it: ``shipctl --help`` answers at once.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from shipd.errors import ConfigError, MappingError, ShipError, TensorMismatch
from shipd.release import VERSION
from shipd.units import parse_rate
from shipproto.limits import MAX_LANES

if TYPE_CHECKING:
    from shipd.bases.base import Keeper
    from shipd.client.client import Client
    from shipd.matching.plan import Plan
    from shipd.matching.renames import Rename
    from shipproto.description import Description

Policy = Literal["strict", "subset", "partial"]

_DEFAULT = "127.0.0.1:7447"
PARTLY_DONE = 3
_OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_PATH_OR_URL = click.Path(path_type=str)
"""As text: a Path would take one of the two slashes of a URL away."""

_to = click.option(
    "--to",
    "address",
    metavar="HOST[:PORT]",
    default=_DEFAULT,
    show_default=True,
    envvar="SHIPD_HOST",
    show_envvar=True,
    help="The daemon, or the path of its Unix socket.",
)
_token = click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    envvar="SHIPD_TOKEN_FILE",
    show_envvar=True,
    help="File with the token that the daemon asks for.",
)
_policy = click.option(
    "--policy",
    type=click.Choice(["strict", "subset", "partial"]),
    help="What may differ: nothing; CHECKPOINT may lack tensors, as an adapter does; it may also have some that the "
    "model lacks. What is not sent keeps its value. By default what the daemon's configuration says, or strict.",
)
_cast = click.option(
    "--cast/--no-cast",
    default=None,
    help="Cast to the model's dtypes before sending; by default where the daemon's configuration says so.",
)
_map = click.option(
    "--map",
    "rules",
    multiple=True,
    metavar="REGEX=REPLACEMENT",
    help='Rewrite the names of CHECKPOINT into the model\'s; may be given several times. Prefixes such as "module." '
    "need none.",
)
_map_file = click.option(
    "--map-file",
    type=click.Path(path_type=Path),
    multiple=True,
    callback=lambda context, _option, files: _only_one(context, files),
    metavar="FILE",
    help='JSON or TOML with "name in CHECKPOINT" = "name in the model".',
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line, each with a type.")


def _only_one(context: click.Context, files: tuple[Path, ...]) -> Path | None:
    """Of several the last one would count, and nobody would be told."""
    if len(files) > 1:
        raise click.UsageError("--map-file is given twice: one file has all names", context)
    return files[0] if files else None


def _check_rate(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """Wrong usage is told before anything is connected to."""
    if text is not None:
        try:
            parse_rate(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return text


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="shipctl")
def shipctl() -> None:
    """Ship new versions of PyTorch models into the processes that serve them."""


@shipctl.command()
@click.argument("checkpoint", type=_PATH_OR_URL)
@_to
@click.option("--model", required=True, metavar="NAME", help="The name that the model is served under.")
@click.option("--label", metavar="LABEL", help="Name of the version; by default UTC time and digits of its digest.")
@click.option(
    "--key",
    metavar="KEY",
    help='Where in CHECKPOINT the state dict is, as in "model.ema"; needed where there are several; they are listed.',
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for the whole push; none by default."
)
@click.option(
    "--stall",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds without a sign of life after which to give up.",
)
@click.option(
    "--lanes",
    type=click.IntRange(1, MAX_LANES),
    help="TCP connections to send on at once; by default as many as make it faster.",
)
@click.option(
    "--base",
    type=_PATH_OR_URL,
    metavar="OLD",
    help="Checkpoint of the version that the daemon has: only what differs is sent. By default versions that were "
    "pushed from here before, where the link is slow enough.",
)
@click.option("--base-key", metavar="KEY", help="As --key, in OLD.")
@click.option("--whole", is_flag=True, help="Send everything as it is, also what the daemon has already.")
@click.option(
    "--prefer",
    type=click.Choice(["time", "bytes"]),
    default="time",
    show_default=True,
    help="What to save: time until the version is committed, or bytes on the link.",
)
@click.option(
    "--limit", metavar="RATE", callback=_check_rate, help='Send at most this much, such as "100Mbit" or "10MB/s".'
)
@_policy
@_cast
@_map
@_map_file
@click.option("--dry-run", is_flag=True, help="Print what would become of each tensor, and push nothing.")
@click.option("--explain", is_flag=True, help="Print how chunks were coded, and why.")
@click.option("--profile", is_flag=True, help="Print where the time went, stage by stage.")
@_token
@_json
def push(
    checkpoint: str,
    address: str,
    model: str,
    label: str | None,
    key: str | None,
    timeout: float | None,
    stall: float,
    lanes: int | None,
    base: str | None,
    base_key: str | None,
    whole: bool,
    prefer: Literal["time", "bytes"],
    limit: str | None,
    policy: Policy | None,
    cast: bool | None,
    rules: tuple[str, ...],
    map_file: Path | None,
    dry_run: bool,
    explain: bool,
    profile: bool,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Ship CHECKPOINT as the next version of a model.

    CHECKPOINT is a file of safetensors, torch.save, torch.jit.save, numpy.savez or HDF5, the index of several files, or
    a directory with one of these; or the URL of one (https://, s3:// and others). It is recognised by what is in it,
    whatever it is called.

    Until the whole version has arrived and is proved to be what was sent, nothing that is being served changes.
    """
    if whole and base is not None:
        raise click.UsageError("--whole sends everything as it is: there is no use for --base")
    if base_key is not None and base is None:
        raise click.UsageError("--base-key says where in --base to look: there is no --base")
    if dry_run and (explain or profile):
        raise click.UsageError(f"--dry-run sends nothing: there is no {'--explain' if explain else '--profile'} of it")
    renames = _renames(rules, map_file, as_json)
    if dry_run:
        _dry_run(checkpoint, address, model, key, policy, cast, renames, token_file, as_json)
        return
    from shipd.bases.cache import VersionCache
    from shipd.cli.running import run_push

    receipt = _run(
        lambda client: run_push(
            client,
            checkpoint,
            quiet=as_json,
            model=model,
            label=label,
            key=key,
            timeout=timeout,
            stall=stall,
            lanes=lanes,
            base=False if whole else base,
            base_key=base_key,
            prefer=prefer,
            limit=limit,
            policy=policy,
            cast=cast,
            renames=renames,
        ),
        address,
        token_file,
        as_json,
        VersionCache.default(),
    )
    if as_json:
        _emit("receipt", receipt.as_dict())
    else:
        from shipd.cli.render import render_choices, render_profile, render_receipt

        click.echo(render_receipt(receipt))
        if explain:
            click.echo(render_choices(receipt))
        if profile:
            click.echo(render_profile(receipt.profile, receipt))
    if receipt.stale:
        click.echo(
            f"shipctl: processes {', '.join(receipt.stale)} could not follow; they have stopped answering (fenced) and "
            "come back by themselves once they have caught up",
            err=True,
        )
        sys.exit(PARTLY_DONE)


def _renames(rules: tuple[str, ...], file: Path | None, as_json: bool) -> "tuple[Rename, ...]":
    """What --map and --map-file say; the file comes first, since it names what is in the checkpoint."""
    from shipd.matching.renames import load_renames, parse_rename

    try:
        return (*((load_renames(file),) if file is not None else ()), *map(parse_rename, rules))
    except MappingError as error:
        _fail(error, error.exit_code, as_json)


def _dry_run(
    checkpoint: str,
    address: str,
    model: str,
    key: str | None,
    policy: Policy | None,
    cast: bool | None,
    renames: "tuple[Rename, ...]",
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Print the plan of a push. Exits with 12 where the checkpoint does not fit."""
    from shipd.cli.render import plan_as_dict, render_plan

    async def ask(client: "Client") -> "tuple[Plan | None, Description | None]":
        plan = await client.plan(checkpoint, model=model, key=key, policy=policy, cast=cast, renames=renames)
        # Of a plan that can be pushed nothing else is to be told.
        return plan, await client.describe(model) if plan is None or plan.problems else None

    plan, description = _run(ask, address, token_file, as_json)
    if as_json:
        _emit("plan", plan_as_dict(plan, description, model, checkpoint))
    else:
        click.echo(render_plan(plan, description, model, checkpoint))
    if plan is not None and plan.problems:
        sys.exit(TensorMismatch.exit_code)


@shipctl.command()
@_to
@click.option("--model", metavar="NAME", help="Only this model.")
@_token
@_json
def status(address: str, model: str | None, token_file: Path | None, as_json: bool) -> None:
    """Show what a daemon serves: models, versions, processes, pushes under way."""
    import msgspec

    answer = _run(lambda client: client.status(model), address, token_file, as_json)
    if as_json:
        _emit("status", msgspec.to_builtins(answer))
    else:
        from shipd.cli.render import print_status

        print_status(answer, address)


@shipctl.command()
@_to
@click.option("--model", required=True, metavar="NAME", help="The model to verify.")
@_token
@_json
def verify(address: str, model: str, token_file: Path | None, as_json: bool) -> None:
    """Have every serving process read its live parameters back and compare their digest with the committed one.

    Exits with 13 if one differs.
    """
    import msgspec

    answer = _run(lambda client: client.verify(model), address, token_file, as_json)
    if as_json:
        _emit("verification", msgspec.to_builtins(answer))
    else:
        from shipd.cli.render import print_verification

        print_verification(answer)
    if not answer.matches:
        sys.exit(13)


@shipctl.command()
@click.argument("address", metavar="HOST[:PORT]", default=_DEFAULT, envvar="SHIPD_HOST")
@click.argument("checkpoint", required=False)
@click.option("--model", metavar="NAME", help="Only this model; needed to look at CHECKPOINT.")
@click.option("--key", metavar="KEY", help="As of push.")
@_policy
@_cast
@_map
@_map_file
@_token
@_json
def doctor(
    address: str,
    checkpoint: str | None,
    model: str | None,
    key: str | None,
    policy: Policy | None,
    cast: bool | None,
    rules: tuple[str, ...],
    map_file: Path | None,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Tell what would and would not work between here and the daemon at HOST, without sending anything.

    Compares releases and environments, looks at its models and the processes that serve them, and at whether
    CHECKPOINT would fit. Exits with 1 where something would not work.
    """
    if checkpoint is None and Path(address).is_file():
        raise click.UsageError(f"{address} is a file: the daemon comes first, as in: shipctl doctor HOST {address}")
    if checkpoint is not None and model is None:
        raise click.UsageError("CHECKPOINT is looked at for a model: name it with --model")
    if checkpoint is None and (key or policy or cast is not None or rules or map_file):
        raise click.UsageError("--key, --policy, --cast, --map and --map-file are of a CHECKPOINT: there is none")
    renames = _renames(rules, map_file, as_json)
    from shipd.client.doctor import examine, worst

    findings = _run(
        lambda client: examine(
            client, model=model, checkpoint=checkpoint, key=key, policy=policy, cast=cast, renames=renames
        ),
        address,
        token_file,
        as_json,
    )
    if as_json:
        for finding in findings:
            _emit("finding", finding.as_dict())
    else:
        from shipd.cli.render import render_findings

        click.echo(render_findings(findings))
    if worst(findings) == "error":
        sys.exit(1)


def _run(ask: Any, address: str, token_file: Path | None, as_json: bool, keeper: "Keeper | None" = None) -> Any:
    """Connect and run one conversation; every failure becomes one message and one exit code.

    SIGTERM ends it like Ctrl-C. ``keeper`` keeps the version that a push has committed.
    """
    import asyncio
    import contextlib
    import signal

    from shipd.client.client import connect

    answers: list[Any] = []

    async def converse() -> Any:
        client: Client
        running = asyncio.current_task()
        assert running is not None
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        async with connect(address, token=_read_token(token_file), keep=keeper or False) as client:
            answers.append(await ask(client))
            return answers[0]

    try:
        return asyncio.run(converse())
    except ShipError as error:
        _fail(error, error.exit_code, as_json)
    except ValueError as error:
        _fail(str(error), 2, as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        if answers:
            # Interrupted once too late: it was done by then.
            return answers[0]
        _fail("interrupted; nothing was swapped", 130, as_json)


def _read_token(path: Path | None) -> bytes | None:
    if path is None:
        return None
    from shipd.service.config import read_token

    return read_token(path)


def _emit(kind: str, values: dict[str, Any]) -> None:
    click.echo(json.dumps({"type": kind, **values}))


def _fail(error: ShipError | str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        kind = type(error).__name__ if isinstance(error, ShipError) else "Error"
        details: dict[str, Any] = {"error": kind, "message": str(error), "exit_code": code}
        if isinstance(error, ShipError):
            fields = {name: getattr(error, name) for name in ("peer", "model", "tensor", "transfer_id")}
            details.update({name: value for name, value in fields.items() if value is not None})
        if isinstance(error, TensorMismatch):
            details["problems"] = list(error.problems)
        _emit("error", details)
    click.echo(f"shipctl: {error}", err=True)
    sys.exit(code)


def _drop_output() -> None:
    """Else what is still buffered would fail once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point. A reader of our output that goes away is no error of ours."""
    try:
        shipctl()
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OUTPUT_FULL:
            raise
        _drop_output()
        click.echo(f"shipctl: cannot write to standard output: {error.strerror}", err=True)
        sys.exit(1)
    except ConfigError as error:
        click.echo(f"shipctl: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
