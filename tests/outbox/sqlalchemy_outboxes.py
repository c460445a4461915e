"""An outbox over tables of its own, and what is sent to its database."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pipeline_mediator.outbox.protocol import Policy, StoredMessage
from pipeline_mediator.outbox.sqlalchemy import OutboxTables, SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

__all__ = ["Outbox", "Sent", "message", "opened", "recorded"]


@dataclass
class Outbox:
    """One store, with the engine and the tables that it was made with."""

    engine: AsyncEngine
    tables: OutboxTables
    store: SQLAlchemyOutbox

    async def add(self, *messages: StoredMessage) -> None:
        async with self.engine.begin() as connection:
            await self.store.add(connection, messages)

    async def send(self, limit: int = 1000, policy: Policy | None = None) -> list[str]:
        """Send what one batch has; the ids of its messages."""
        async with self.store.take(limit, policy or Policy()) as batch:
            if batch is None:
                return []
            batch.sent([row.id for row in batch.rows])
            return [row.message.message_id for row in batch.rows]

    async def execute(self, statement: str) -> Any:
        async with self.engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None


def message(message_id: str, key: str | None = None, destination: str = "orders", body: bytes = b"{}") -> StoredMessage:
    return StoredMessage(message_id, "OrderPlaced", 1, destination, "application/json", body, {"id": message_id}, key)


@asynccontextmanager
async def opened(
    url: str, *, name: str = "outbox", schema: str | None = None, **options: Any
) -> AsyncGenerator[Outbox]:
    """With its tables created; `options` are the store's."""
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        prepare_sqlite(engine)
    try:
        tables = outbox_tables(MetaData(), name=name, schema=schema)
        async with engine.begin() as connection:
            await connection.run_sync(tables.rows.metadata.create_all)
        yield Outbox(engine, tables, SQLAlchemyOutbox(engine, tables, **options))
    finally:
        await engine.dispose()


@dataclass
class Sent:
    """What was sent to a database."""

    statements: list[str] = field(default_factory=list[str])
    executemany: list[int] = field(default_factory=list[int])
    """How many rows each of them had."""


@contextmanager
def recorded(engine: AsyncEngine) -> Generator[Sent]:
    sent = Sent()

    def before(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: object) -> None:
        if statement.startswith("BEGIN "):  # by which SQLite is prepared
            return
        sent.statements.append(statement)
        if many:
            sent.executemany.append(len(parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    try:
        yield sent
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", before)
