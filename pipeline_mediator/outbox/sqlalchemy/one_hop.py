"""Whole transactions of SQLite in one hop to its thread: the hops cost more than the statements."""

from __future__ import annotations

from enum import StrEnum
from threading import local
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Begin", "OneHop"]

_HAND_OVER = "_execute"
"""aiosqlite's private method that runs a function in the connection's thread."""


class Begin(StrEnum):
    """What a transaction begins with."""

    READING = "DEFERRED"
    """Nobody is kept from writing."""
    WRITING = "IMMEDIATE"
    """It waits for the lock that it needs, so that it never has to be given up half-way."""


class OneHop:
    """Runs transactions on the connections of an aiosqlite engine, in their threads, as synchronous code.

    aiosqlite hands each single call to its thread, some four for a statement. It has no public way to hand over more at
    once; if a later version has lost the private one, every statement makes its hops, and all goes on more slowly.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._here = local()
        here = create_engine("sqlite://", creator=lambda: _Borrowed(self._here.driver), poolclass=NullPool)
        event.listen(here, "begin", _begin)
        options = engine.sync_engine.get_execution_options()
        self._engines_here = {how: here.execution_options(**options, sqlite_begin=how) for how in Begin}

    async def run(self, *steps: tuple[Begin, Callable[[Connection], bool]]) -> None:
        """Run transactions one after the other, up to the first that says no."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            hand_over = getattr(driver, _HAND_OVER, None)
            if hand_over is not None:
                await hand_over(self._run_here, driver, steps)
                return
            for begin, step in steps:
                connection = await connection.execution_options(sqlite_begin=begin)  # noqa: PLW2901 - itself
                async with connection.begin():
                    goes_on = await connection.run_sync(step)
                if not goes_on:
                    return

    def _run_here(self, driver: Any, steps: Iterable[tuple[Begin, Callable[[Connection], bool]]]) -> None:
        self._here.driver = driver._conn
        for begin, step in steps:
            with self._engines_here[begin].begin() as connection:
                goes_on = step(connection)
            if not goes_on:
                return


class _Borrowed:
    """A connection that is not ours to close."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def close(self) -> None:
        """Its owner does that."""


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options()['sqlite_begin']}")
