"""Whole transactions of SQLite in one hop to its thread: the hops cost more than the statements."""

from __future__ import annotations

from threading import local
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["OneHop"]

T = TypeVar("T")

_HAND_OVER = "_execute"
"""aiosqlite's private method that runs a function in the connection's thread."""


class OneHop:
    """Runs transactions on the connections of an aiosqlite engine, in their threads, as synchronous code.

    aiosqlite hands each single call to its thread, some four for a statement. It has no public way to hand over more at
    once; if a later version has lost the private one, every statement makes its hops, and all goes on more slowly.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._options = engine.sync_engine.get_execution_options()
        self._here = local()
        self._engine_here = create_engine("sqlite://", creator=lambda: _Borrowed(self._here.driver), poolclass=NullPool)
        event.listen(self._engine_here, "begin", _begin)

    async def write(self, step: Callable[[Connection], T]) -> T:
        """With the write lock from the beginning."""
        return await self._run(step, "IMMEDIATE")

    async def read(self, step: Callable[[Connection], T]) -> T:
        """Without keeping anybody from writing."""
        return await self._run(step, "DEFERRED")

    async def _run(self, step: Callable[[Connection], T], begin: str) -> T:
        options = {**self._options, "sqlite_begin": begin}
        async with self._engine.execution_options(**options).connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            hand_over = getattr(driver, _HAND_OVER, None)
            if hand_over is not None:
                result: T = await hand_over(self._transact, driver, step, options)
                return result
            async with connection.begin():
                return await connection.run_sync(step)

    def _transact(self, driver: Any, step: Callable[[Connection], T], options: dict[str, Any]) -> T:
        self._here.driver = driver._conn
        with self._engine_here.execution_options(**options).begin() as connection:
            return step(connection)


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
