"""A push with a progress bar on a terminal, that Ctrl-C ends cleanly."""

import asyncio
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shipd.client import options
from shipd.client.client import Client
from shipd.client.receipt import Receipt


async def run_push(
    client: Client,
    checkpoint: Path,
    *,
    model: str,
    label: str | None,
    timeout: float | None,
    stall: float,
    lanes: int | None,
    quiet: bool,
) -> Receipt:
    """Push, showing progress on stderr where that is a terminal. Cancelled too late, it says so and succeeds."""
    bar = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=36),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    task = bar.add_task("connecting", total=None)

    def show(progress: options.Progress) -> None:
        bar.update(task, description=progress.stage, completed=progress.bytes_done, total=progress.bytes_total)

    with bar:
        receipt = await client.push(
            checkpoint, model=model, label=label, timeout=timeout, stall=stall, lanes=lanes, on_progress=show
        )
    running = asyncio.current_task()
    if running is not None and running.cancelling():
        click.echo("shipctl: too late to interrupt: the commit was under way", err=True)
    return receipt
