"""A push with a progress bar on a terminal, that Ctrl-C ends cleanly."""

import asyncio
import sys
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shipd.checkpoints.remote.location import is_url, shown
from shipd.client import options as pushing
from shipd.client.client import Client
from shipd.client.receipt import Receipt
from shipd.units import format_bytes


async def run_push(
    client: Client, checkpoint: str, *, quiet: bool, base: str | Literal[False] | None, **options: Any
) -> Receipt:
    """Push, showing progress on stderr where that is a terminal. Cancelled too late, it says so and succeeds.

    ``options`` as those of ``Client.push``.
    """
    bar = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=36),
        DownloadColumn(),
        TextColumn("{task.fields[saved]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    task = bar.add_task("connecting", total=None, saved="")

    def show(progress: pushing.Progress) -> None:
        saved = progress.bytes_done - progress.bytes_sent
        bar.update(
            task,
            description=progress.stage,
            completed=progress.bytes_done,
            total=progress.bytes_total or None,
            saved=f"{format_bytes(saved)} saved" if saved > progress.bytes_done // 20 else "",
        )

    with bar:
        receipt = await client.push(checkpoint, base=base, on_progress=show, **options)
    if receipt.base_unused:
        named = shown(base) if base and is_url(base) else base
        click.echo(f"shipctl: --base {named} is of no use here: {receipt.base_unused}", err=True)
    for why in receipt.not_kept:
        click.echo(f"shipctl: the next push will send everything: this version is not kept, since {why}", err=True)
    running = asyncio.current_task()
    if running is not None and running.cancelling():
        click.echo("shipctl: too late to interrupt: the commit was under way", err=True)
    return receipt
