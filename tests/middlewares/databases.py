"""The database that the tests of transactions write into, and what they may ask it from outside."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Database", "put"]

_SECONDS = 10.0


class Database:
    """A table `placed` with a column `n`, written through `engine` and `sessions`, looked at from other connections."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Before 2.0.38 SQLAlchemy has no pool for SQLite by itself, so that nobody could ask it what is checked out.
        self.engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool)
        if self.is_sqlite:
            prepare_sqlite(self.engine)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        # Not prepared: with BEGIN IMMEDIATE it would wait for whoever writes, though it only looks.
        self._outside = create_async_engine(url)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @asynccontextmanager
    async def other_connection(self) -> AsyncGenerator[AsyncConnection]:
        async with self._outside.begin() as connection:
            yield connection

    async def create(self) -> None:
        async with self.other_connection() as connection:
            await connection.execute(text("CREATE TABLE placed (n int)"))

    async def close(self) -> None:
        await self.engine.dispose()
        await self._outside.dispose()

    async def rows(self) -> list[int]:
        """What is committed, in the order of n."""
        async with self.other_connection() as connection:
            return list((await connection.execute(text("SELECT n FROM placed ORDER BY n"))).scalars())

    async def clear(self) -> None:
        async with self.other_connection() as connection:
            await connection.execute(text("DELETE FROM placed"))

    async def wait_until_left(self, engine: AsyncEngine | None = None) -> None:
        """Wait until nothing is checked out and no connection is in a transaction. Raises `TimeoutError`."""
        deadline = anyio.current_time() + _SECONDS
        while left := await self._left(engine or self.engine):
            if anyio.current_time() > deadline:
                raise TimeoutError(left)
            await anyio.sleep(0.002)

    async def _left(self, engine: AsyncEngine) -> str | None:
        pool = engine.pool
        assert isinstance(pool, QueuePool)
        if pool.checkedout():
            return f"{pool.checkedout()} connections are still checked out"
        if self.is_sqlite:
            return None
        async with self.other_connection() as connection:
            states = await connection.execute(
                text(
                    "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND state <> 'idle'"
                )
            )
            rows = states.all()
        return f"not idle: {rows}" if rows else None


async def put(session: AsyncSession | AsyncConnection, n: int) -> None:
    """Write a row."""
    await session.execute(text("INSERT INTO placed VALUES (:n)"), {"n": n})
