"""This library's outbox as an application sets it up: the recommended pipeline, and a relay."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from time import monotonic
from typing import Final

from sqlalchemy import MetaData, Table
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.outbox.events import KEYS, STREAM, OrderPlaced, stored
from pipeline_mediator import Mediator, Pipeline, RequestMap
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.middlewares import PublishMiddleware
from pipeline_mediator.outbox.protocol import StoredMessage
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.outbox.sqlalchemy.tables import SENT
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

__all__ = ["METADATA", "OUTBOX", "Ours", "engine_of", "ours"]

METADATA: Final = MetaData()
OUTBOX: Final = outbox_tables(METADATA, name="ours")
_FILL: Final = 1000


@dataclass(frozen=True, slots=True)
class Ours:
    """All that belongs together."""

    engine: AsyncEngine
    store: SQLAlchemyOutbox
    mediator: Mediator

    async def write(self, message: StoredMessage) -> float:
        """In a transaction of its own; when the commit was asked for.

        After it `store.committed()` wakes the relay, as OutboxMiddleware does it.
        """
        async with self.engine.begin() as connection:
            await self.store.add(connection, [message])
            return monotonic()

    async def empty(self) -> None:
        """Tables of our own, with nothing in them."""
        async with self.engine.begin() as connection:
            await connection.run_sync(METADATA.drop_all)
            await connection.run_sync(METADATA.create_all)

    async def fill(self, count: int, keys: int = KEYS) -> None:
        for some in _batches(stored(count, keys)):
            async with self.engine.begin() as connection:
                await self.store.add(connection, some)

    async def mark(self) -> None:
        """As if all of them had been sent, and were kept."""
        rows: Table = OUTBOX.rows
        async with self.engine.begin() as connection:
            await connection.execute(rows.update().values(state=SENT, sent_at=rows.c.created_at))


@asynccontextmanager
async def ours(
    database_url: str, redis_url: str, *, notify: bool = False, keep: bool = False, requests: RequestMap | None = None
) -> AsyncGenerator[Ours]:
    """With the mediator entered: connected to the broker, and no relay yet."""
    engine = engine_of(database_url)
    store = SQLAlchemyOutbox(engine, OUTBOX, notify=notify, keep=timedelta(days=7) if keep else timedelta(0))
    publish = PublishMiddleware(RedisStreamBroker(redis_url), {OrderPlaced: STREAM})
    pipeline = Pipeline.recommended(engine.begin, store, publish)
    async with Mediator(requests or RequestMap(), PlainContainer(), middlewares=pipeline) as mediator:
        yield Ours(engine, store, mediator)
    await engine.dispose()


def engine_of(url: str) -> AsyncEngine:
    if url.startswith("sqlite"):
        return prepare_sqlite(create_async_engine(url))
    return create_async_engine(url)


def _batches(messages: Iterable[StoredMessage]) -> Iterator[list[StoredMessage]]:
    iterator = iter(messages)
    while some := list(islice(iterator, _FILL)):
        yield some
