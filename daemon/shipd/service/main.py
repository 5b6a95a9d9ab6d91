"""The command ``shipd``: the daemon as a system service."""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from pathlib import Path

import click
import uvloop

from shipd.errors import ConfigError
from shipd.release import VERSION
from shipd.service.config import Config, load
from shipd.service.logs import configure
from shipd.service.notify import Notifier
from shipd.service.server import Server

log = logging.getLogger("shipd.service")


class Service:
    """The daemon with its signals: TERM and INT drain (the second one aborts), HUP reloads."""

    def __init__(self, path: Path | None, config: Config) -> None:
        self._path = path
        self._server = Server(config)
        self._notifier = Notifier()
        self._stop = asyncio.Event()
        self._abort = asyncio.Event()

    async def run(self) -> None:
        """Until a signal ends it. Raises ConfigError where it cannot listen."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        await self._server.start()
        # What there is now stays: a full collection that looks at it again stops the loop for 15 to 35 ms.
        gc.collect()
        gc.freeze()
        watchdog = loop.create_task(self._feed_watchdog())
        self._notifier.ready()
        try:
            await self._stop.wait()
            log.info("stopping: no new pushes, those under way may finish; another signal aborts them")
            self._notifier.stopping()
            drain = loop.create_task(self._server.drain())
            aborted = loop.create_task(self._abort.wait())
            await asyncio.wait({drain, aborted}, return_when=asyncio.FIRST_COMPLETED)
            for task in (drain, aborted):
                task.cancel()
            await self._server.stop()
        finally:
            watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watchdog
        log.info("stopped")

    def _on_stop(self) -> None:
        (self._abort if self._stop.is_set() else self._stop).set()

    def _on_reload(self) -> None:
        """Read the configuration again; a wrong one changes nothing."""
        self._notifier.reloading()
        try:
            config = load(self._path)
            fixed = self._server.reload(config)
        except ConfigError as error:
            log.error("the configuration was not reloaded", extra={"why": str(error)})  # noqa: TRY400
        else:
            logging.getLogger("shipd").setLevel(config.log_level.upper())
            log.info("configuration reloaded", extra={"needs_restart": fixed} if fixed else None)
        self._notifier.ready()

    async def _feed_watchdog(self) -> None:
        """From the event loop, so that a loop that hangs starves it."""
        interval = self._notifier.watchdog_seconds
        while interval is not None:
            self._notifier.watchdog()
            await asyncio.sleep(interval / 3)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="TOML file; without one, the defaults and SHIPD_* variables.",
)
@click.option("--check", is_flag=True, help="Check the configuration and exit.")
@click.version_option(VERSION, prog_name="shipd")
def main(path: Path | None, check: bool) -> None:
    """Receive new versions of models over TCP and lead the processes that serve them from one to the next.

    Exits with 78 where the configuration is wrong.
    """
    try:
        config = load(path)
        config.read_token()
        configure(config.log_level, config.log_format)
        if not check:
            uvloop.run(Service(path, config).run())
    except ConfigError as error:
        click.echo(f"shipd: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
