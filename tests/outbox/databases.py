"""The databases that the outbox's own tests run on, as `OutboxDatabase` sees them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio
from sqlalchemy import MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from pipeline_mediator.outbox.protocol import OutboxStore

__all__ = ["Database", "mariadb", "postgresql", "sqlite"]

Resource: TypeAlias = Literal["session", "connection"]

_SECONDS = 10.0


class Database:
    """A database, empty but for the tables of an outbox; the application writes through sessions or connections."""

    def __init__(self, url: str, through: Resource, **connect_args: Any) -> None:
        self._url = url
        self._through = through
        self._connect_args = connect_args
        self._engine_of: dict[int, AsyncEngine] = {}
        self._sessions_of: dict[int, _Sessions] = {}
        self._engine = self._new_engine()
        self._tables = outbox_tables(MetaData())
        self._dialect = self._engine.dialect.name

    async def create(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(self._tables.rows.metadata.create_all)

    async def close(self) -> None:
        for engine in (self._engine, *self._engine_of.values()):
            await engine.dispose()

    async def clear(self) -> None:
        """As it was created."""
        for table in ("outbox", "outbox_lanes"):
            await self._execute(f"DELETE FROM {table}")

    async def forget(self, store: OutboxStore) -> None:
        """The process of this store is no more."""
        await self._engine_of.pop(id(store)).dispose()

    def store(
        self, *, max_pending: int | None = None, keep: timedelta = timedelta(0), notify: bool = False
    ) -> SQLAlchemyOutbox:
        engine = self._new_engine()
        store = SQLAlchemyOutbox(engine, self._tables, max_pending=max_pending, keep=keep, notify=notify)
        self._engine_of[id(store)] = engine
        return store

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession | AsyncConnection]:
        if self._through == "session":
            async with async_sessionmaker(self._engine).begin() as session:
                yield session
        else:
            async with self._engine.begin() as connection:
                yield connection

    async def kill(self, store: OutboxStore) -> None:
        if self._dialect == "sqlite":
            # Nothing is open, so there is nothing to cut off; the process that has the lease began at another time.
            changed = "json_set(owner, '$.process.started', '0')"
            await self._execute(f"UPDATE outbox_lanes SET owner = {changed} WHERE owner IS NOT NULL")
        else:
            await self._end_sessions(self._sessions_of[id(self._engine_of[id(store)])].all)

    async def end_lease(self, store: OutboxStore) -> None:
        """What the database does when a relay says nothing for too long."""
        if self._dialect == "sqlite":
            await self._execute(
                "UPDATE outbox_lanes SET expires_at = '2000-01-01 00:00:00.000' WHERE owner IS NOT NULL"
            )
        else:
            await self._end_sessions(self._sessions_of[id(self._engine_of[id(store)])].in_use)

    @property
    def lease_outlives_its_end(self) -> bool:
        """Whether a relay whose lease is over may still settle, if nobody has taken over."""
        return self._dialect == "sqlite"

    async def pass_time(self, seconds: float) -> None:
        columns = ("created_at", "available_at", "sent_at")
        moved = {
            "sqlite": "strftime('%Y-%m-%d %H:%M:%f', {0}, '-{1:f} seconds')",
            "postgresql": "{0} - interval '{1:f} seconds'",
            "mariadb": "{0} - INTERVAL {1:f} SECOND",
        }[self._dialect]
        await self._execute(f"UPDATE outbox SET {', '.join(f'{it} = {moved.format(it, seconds)}' for it in columns)}")

    async def damage(self, row_id: int) -> None:
        await self._execute(f"UPDATE outbox SET headers = '{{\"broken' WHERE id = {row_id}")

    async def alter(self) -> Sequence[str]:
        await self._execute(f"DROP INDEX ix_outbox_sent{' ON outbox' * (self._dialect == 'mariadb')}")
        await self._execute("ALTER TABLE outbox DROP COLUMN content_type")
        return ["ix_outbox_sent", "content_type"]

    async def drop(self) -> None:
        await self._execute("DROP TABLE outbox")
        await self._execute("DROP TABLE outbox_lanes")

    async def _end_sessions(self, sessions: set[int]) -> None:
        ending, looking = {
            "postgresql": ("SELECT pg_terminate_backend({})", "SELECT count(*) FROM pg_stat_activity WHERE pid = {}"),
            "mariadb": ("KILL {}", "SELECT count(*) FROM information_schema.processlist WHERE id = {}"),
        }[self._dialect]
        for session in sorted(sessions):
            if await self._execute(looking.format(session)):
                await self._execute(ending.format(session))
            with anyio.fail_after(_SECONDS):
                while await self._execute(looking.format(session)):  # noqa: ASYNC110 - the server tells nobody
                    await anyio.sleep(0.002)

    async def _execute(self, statement: str) -> Any:
        async with self._engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None

    def _new_engine(self) -> AsyncEngine:
        engine = create_async_engine(self._url, connect_args=self._connect_args)
        self._sessions_of[id(engine)] = _Sessions(engine)
        if engine.dialect.name == "sqlite":
            prepare_sqlite(engine)
        return engine


class _Sessions:
    """The server's sessions of an engine, by the server's numbers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.all: set[int] = set()
        self.in_use: set[int] = set()
        asking = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()", "sqlite": "SELECT 0"}
        self._asking = asking[engine.dialect.name]
        event.listen(engine.sync_engine, "connect", self._connected)
        event.listen(engine.sync_engine, "checkout", self._taken)
        event.listen(engine.sync_engine, "checkin", self._returned)

    def _connected(self, connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(self._asking)
        record.info["session"] = cursor.fetchone()[0]
        cursor.close()
        connection.rollback()
        self.all.add(record.info["session"])

    def _taken(self, _connection: object, record: Any, _proxy: object) -> None:
        self.in_use.add(record.info["session"])

    def _returned(self, _connection: object, record: Any) -> None:
        self.in_use.discard(record.info.get("session"))


@asynccontextmanager
async def _created(database: Database) -> AsyncGenerator[Database]:
    await database.create()
    try:
        yield database
    finally:
        await database.close()


def sqlite(path: object, through: Resource = "session") -> Any:
    return _created(Database(f"sqlite+aiosqlite:///{path}", through))


# A server's own zone may be anything, so here it is one that is never UTC.


def postgresql(url: str, through: Resource = "session") -> Any:
    if "+asyncpg" in url:
        return _created(Database(url, through, server_settings={"timezone": "Asia/Kolkata"}))
    return _created(Database(url, through, options="-c timezone=Asia/Kolkata"))


def mariadb(url: str, through: Resource = "session") -> Any:
    return _created(Database(url, through, init_command="SET time_zone = '+05:30'"))
