"""Hearing of commits of other processes: PostgreSQL's LISTEN, on a connection of its own."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from logging import getLogger
from typing import TYPE_CHECKING, Any

import anyio

from pipeline_mediator.concurrency import Beside, finish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Listening", "channel_of"]

logger = getLogger(__name__)

_LONGEST = 63
"""Bytes of a name in PostgreSQL."""
_CLOSE_SECONDS = 5.0
_PAUSES = (0.2, 1.0, 5.0, 30.0)
"""Seconds before it is tried again; the last one for ever."""


def channel_of(table: str) -> str:
    """The channel on which commits to this table are told."""
    channel = f"outbox:{table}"
    if len(channel.encode()) <= _LONGEST:
        return channel
    return f"outbox:{sha256(table.encode()).hexdigest()[:32]}"


class Listening:
    """Calls `wake` for each notification, and after each connection that had to be made again: some may be missed."""

    def __init__(self, engine: AsyncEngine, channel: str, wake: Callable[[], None]) -> None:
        self._engine = engine
        self._channel = channel
        self._wake = wake
        self._tried = anyio.Event()
        self._failures = 0

    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[None]:
        """Open once it listens, or could not: then it goes on trying, and polling has to do."""
        self._tried = anyio.Event()
        beside = Beside(self._keep_listening)
        await beside.start()
        try:
            await self._tried.wait()
            yield
        finally:
            beside.cancel()
            await beside.end()

    async def _keep_listening(self) -> None:
        while True:
            try:
                await self._listen_once()
                problem: object = "the connection ended"
            except Exception as error:  # noqa: BLE001 - whatever it is, polling goes on
                problem = type(error).__name__
            if self._failures == 0:
                logger.warning("outbox: does not hear of commits of other processes, and polls: %s", problem)
            pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
            self._failures += 1
            self._tried.set()
            await anyio.sleep(pause)

    async def _listen_once(self) -> None:
        """Until the connection ends."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            # Out of the pool: it is used up for as long as the relay runs, and must not go back listening.
            await connection.run_sync(lambda it: it.detach())
            try:
                await (self._listen_by_asyncpg if hasattr(driver, "add_listener") else self._listen_by_psycopg)(driver)
            finally:
                with suppress(Exception):
                    await finish(_close(driver), seconds=_CLOSE_SECONDS)
                await connection.invalidate()

    async def _listen_by_asyncpg(self, driver: Any) -> None:
        ended = anyio.Event()

        def on_end(*_: object) -> None:
            ended.set()

        def on_notification(*_: object) -> None:
            self._wake()

        driver.add_termination_listener(on_end)
        await driver.add_listener(self._channel, on_notification)
        self._listens()
        await ended.wait()

    async def _listen_by_psycopg(self, driver: Any) -> None:
        await driver.set_autocommit(True)
        await driver.execute(f'LISTEN "{self._channel}"')
        self._listens()
        async for _ in driver.notifies():
            self._wake()

    def _listens(self) -> None:
        if self._failures:
            logger.info("outbox: hears of commits of other processes again")
            self._wake()
        self._failures = 0
        self._tried.set()


async def _close(driver: Any) -> None:
    await driver.close()
