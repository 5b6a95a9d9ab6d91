"""A daemon inside a process, for tests and notebooks: a thread with a uvloop of its own.

It never runs on the caller's loop: receiving would compete with whatever that loop does.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

import uvloop

from shipd.service.config import Config
from shipd.service.server import Server

_T = TypeVar("_T")


class Daemon:
    """``async with Daemon(config) as daemon`` (or ``with``): listens at ``daemon.port`` until the block ends.

    Raises ConfigError where the configuration is wrong or the addresses are taken.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running = threading.Event()

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return self._server.port if self._server is not None else 0

    @property
    def server(self) -> Server:
        """The server, which lives on the daemon's own thread."""
        assert self._server is not None, "the daemon is not running"
        return self._server

    def start(self) -> None:
        """Start the thread and return once it listens."""
        failure: list[BaseException] = []
        self._running.clear()
        self._thread = threading.Thread(target=self._run, args=(failure,), name="shipd", daemon=True)
        self._thread.start()
        self._running.wait()
        if failure:
            self._thread.join()
            self._thread = None
            raise failure[0]

    def stop(self) -> None:
        """Stop listening, end what is under way and join the thread."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the daemon's loop and wait for its result."""
        assert self._loop is not None, "the daemon is not running"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self, failure: list[BaseException]) -> None:
        loop = self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            self._server = Server(self.config)
            loop.run_until_complete(self._server.start())
        except BaseException as error:  # noqa: BLE001  raised again, in the thread that called start()
            failure.append(error)
        else:
            self._running.set()
            loop.run_forever()
            loop.run_until_complete(self._server.stop())
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            loop.close()
            self._running.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)
