"""SQLAlchemyInbox keeps the promises of InboxStore on every database."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox, inbox_table
from pipeline_mediator.testing.inbox_suite import InboxFeatures, InboxStoreSuite
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Database:
    """One of SQLAlchemy's; `session` or connections as what the application writes through."""

    url: str
    through: str = "session"
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    table = inbox_table(MetaData())

    def __post_init__(self) -> None:
        self._engines: list[AsyncEngine] = []
        self._engine = self._new_engine()

    def store(self, retention: timedelta) -> SQLAlchemyInbox:
        return SQLAlchemyInbox(self.table, self._new_engine(), retention=retention)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession | AsyncConnection]:
        if self.through == "session":
            async with async_sessionmaker(self._engine).begin() as session:
                yield session
        else:
            async with self._engine.begin() as connection:
                yield connection

    async def pass_time(self, seconds: float) -> None:
        moved = {
            "sqlite": f"strftime('%Y-%m-%d %H:%M:%f', handled_at, '-{seconds} seconds') || '000'",
            "postgresql": f"handled_at - interval '{seconds} seconds'",
            "mariadb": f"handled_at - INTERVAL {seconds} SECOND",
        }
        await self.execute(f"UPDATE inbox SET handled_at = {moved[self._engine.dialect.name]}")

    async def alter(self) -> Sequence[str]:
        await self.execute(f"DROP INDEX ix_inbox_handled_at{' ON inbox' * (self._engine.dialect.name == 'mariadb')}")
        await self.execute("ALTER TABLE inbox DROP COLUMN source")
        return ["source", "ix_inbox_handled_at"]

    async def drop(self) -> None:
        await self.execute("DROP TABLE inbox")

    async def execute(self, statement: str) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(text(statement))

    async def create(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(self.table.metadata.create_all)

    async def close(self) -> None:
        for engine in self._engines:
            await engine.dispose()

    def _new_engine(self) -> AsyncEngine:
        engine = create_async_engine(self.url, **self.options)
        if engine.dialect.name == "sqlite":
            prepare_sqlite(engine)
        self._engines.append(engine)
        return engine


@asynccontextmanager
async def created(database: Database) -> AsyncGenerator[Database]:
    await database.create()
    yield database
    await database.close()


class TestOnSQLite(InboxStoreSuite):
    features = InboxFeatures(one_writer=True)

    @pytest.fixture(params=["session", "connection"])
    async def database(self, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncGenerator[Database]:
        async with created(Database(f"sqlite+aiosqlite:///{tmp_path}/inbox.db", request.param)) as database:
            yield database


class TestOnPostgreSQLByAsyncpg(InboxStoreSuite):
    @pytest.fixture(params=["session", "connection"])
    async def database(self, postgres_database: str, request: pytest.FixtureRequest) -> AsyncGenerator[Database]:
        # A server's zone may be anything.
        options = {"connect_args": {"server_settings": {"timezone": "Asia/Kolkata"}}}
        async with created(Database(postgres_database, request.param, options)) as database:
            yield database


class TestOnPostgreSQLByPsycopg(InboxStoreSuite):
    @pytest.fixture
    async def database(self, postgres_database: str) -> AsyncGenerator[Database]:
        url = postgres_database.replace("+asyncpg", "+psycopg")
        async with created(
            Database(url, options={"connect_args": {"options": "-c timezone=Asia/Kolkata"}})
        ) as database:
            yield database


class TestOnMariaDB(InboxStoreSuite):
    features = InboxFeatures(deadlocks=True)

    @pytest.fixture(params=["session", "connection"])
    async def database(self, mariadb_database: str, request: pytest.FixtureRequest) -> AsyncGenerator[Database]:
        options = {"connect_args": {"init_command": "SET time_zone = '+05:30'"}}
        async with created(Database(mariadb_database, request.param, options)) as database:
            yield database
