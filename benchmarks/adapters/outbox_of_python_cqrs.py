"""python-cqrs's outbox and its EventProducer, in the loop that its documentation shows.

The producer hands the broker one message at a time and updates each row by a statement of its own. Its events hold the
same 1 KiB, and fewer attributes than ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import cqrs
import redis.asyncio
from cqrs.message_brokers.protocol import Message, MessageBroker
from cqrs.outbox.sqlalchemy import Base, SqlAlchemyOutboxedEventRepository
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.outbox.events import KEYS, STREAM, OrderPlaced, order

__all__ = ["fill", "relay_of"]

_NAME: Final = "orders.placed"
_FILL: Final = 1000
_SECONDS: Final = 0.01
"""Between batches."""


class Placed(cqrs.NotificationEvent[dict[str, Any]]):
    """What its outbox stores."""


class Streams(MessageBroker):
    """A broker of ours for it: it has none for Redis."""

    def __init__(self, url: str) -> None:
        client_class: Any = redis.asyncio.Redis
        self.client: Any = client_class.from_url(url, protocol=2, socket_timeout=None)

    async def send_message(self, message: Message) -> None:
        fields = {"id": str(message.message_id), "type": message.message_name, "data": json.dumps(message.payload)}
        await self.client.xadd(message.topic, fields)


@asynccontextmanager
async def relay_of(url: str, redis_url: str, limit: int) -> AsyncGenerator[Callable[[], Coroutine[Any, Any, None]]]:
    """Yields its loop, which runs until it is cancelled."""
    logging.getLogger("cqrs").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
    cqrs.OutboxedEventMap.register(_NAME, Placed)
    engine = create_async_engine(url)
    broker = Streams(redis_url)
    await broker.client.ping()

    async def relay() -> None:
        async with async_sessionmaker(engine)() as session:
            repository = SqlAlchemyOutboxedEventRepository(session)
            producer = cqrs.EventProducer(broker, repository)
            async for events in producer.event_batch_generator(limit):
                for event in events:
                    await producer.send_message(event)
                await repository.commit()
                await asyncio.sleep(0 if events else _SECONDS)

    yield relay
    await broker.client.aclose()
    await engine.dispose()


async def fill(url: str, count: int) -> None:
    """An empty table, and `count` rows in it."""
    if cqrs.OutboxedEventMap.get(_NAME) is None:
        cqrs.OutboxedEventMap.register(_NAME, Placed)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        # Ours may have that name too, and other columns.
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    for begin in range(0, count, _FILL):
        async with async_sessionmaker(engine)() as session:
            repository = SqlAlchemyOutboxedEventRepository(session)
            for number in range(begin, min(begin + _FILL, count)):
                repository.add(_event(order(number, KEYS)))
            await repository.commit()
    await engine.dispose()


def _event(placed: OrderPlaced) -> Placed:
    return Placed(event_name=_NAME, topic=STREAM, payload={"order_id": placed.order_id, "note": placed.note})
