"""From a send to its effect elsewhere, with nothing else to do: outbox, relay, stream, consumer, inbox.

The service stores an event in its transaction; the consumer's handler writes a row, in the transaction in which the
inbox remembers the message, and rings a bell after the commit.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import redis.asyncio
from sqlalchemy import Column, Integer, MetaData, Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from benchmarks.consuming.throughput import FILLING, GROUP, STREAM, OrderPlaced
from pipeline_mediator import Codec, Command, Consumer, Context, EventMap, Mediator, Pipeline, RequestMap
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox, inbox_table
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.middlewares import PublishMiddleware
from pipeline_mediator.outbox import OutboxRelay
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables

__all__ = ["latencies"]

METADATA = MetaData()
OUTBOX = outbox_tables(METADATA)
INBOX = inbox_table(METADATA)
EFFECTS = Table("effects", METADATA, Column("number", Integer, primary_key=True))
_BELL = "effects"


class PlaceOrder(Command):
    """What is sent."""

    def __init__(self, number: int) -> None:
        self.number = number


async def place_order(command: PlaceOrder, context: Context) -> None:
    context.emit(OrderPlaced(command.number, FILLING))


def _service(engine: AsyncEngine, redis_url: str) -> Mediator:
    outbox = SQLAlchemyOutbox(engine, OUTBOX, notify=True)
    publish = PublishMiddleware(RedisStreamBroker(redis_url), {OrderPlaced: STREAM})
    requests = RequestMap().bind(PlaceOrder, place_order)
    return Mediator(requests, middlewares=Pipeline.recommended(engine.begin, outbox, publish))


def _warehouse(engine: AsyncEngine, redis_url: str, client: Any) -> Consumer:
    async def handle(event: OrderPlaced, connection: AsyncConnection, context: Context) -> None:
        await connection.execute(insert(EFFECTS), {"number": event.order_id})
        context.after_commit(lambda: client.rpush(_BELL, event.order_id))

    outbox = SQLAlchemyOutbox(engine, OUTBOX)
    broker = RedisStreamBroker(redis_url)
    mediator = Mediator(
        event_map=EventMap().bind(OrderPlaced, handle),
        middlewares=Pipeline.recommended(
            engine.begin, outbox, PublishMiddleware(broker, {}), inbox=SQLAlchemyInbox(INBOX, engine)
        ),
        codec=Codec(OrderPlaced),
    )
    return Consumer(mediator, broker.subscribe(STREAM, name=GROUP))


async def latencies(database: str, redis_url: str, count: int, *, processes: bool) -> list[float]:
    """Seconds, one send after the other; with `processes`, relay and consumer each in one of its own."""
    engine = create_async_engine(database)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        async with engine.begin() as connection:
            await connection.run_sync(METADATA.drop_all)
            await connection.run_sync(METADATA.create_all)
        client_class: Any = redis.asyncio.Redis
        client = await stack.enter_async_context(client_class.from_url(redis_url, protocol=2))
        await client.flushdb()
        service = await stack.enter_async_context(_service(engine, redis_url))
        if processes:
            for target in (_relay_in_process, _consume_in_process):
                await stack.enter_async_context(_beside(target, database, redis_url))
        else:
            await stack.enter_async_context(OutboxRelay(service))
            await stack.enter_async_context(_warehouse(engine, redis_url, client))
        found: list[float] = []
        for number in range(-20, count):
            began = perf_counter()
            await service.send(PlaceOrder(number))
            _, rung = await client.blpop(_BELL, timeout=30)
            if number >= 0:
                found.append(perf_counter() - began)
            if int(rung) != number:
                raise RuntimeError(f"the effect of {number} was that of {rung}")
            await asyncio.sleep(0.01)  # idle
        return found


@asynccontextmanager
async def _beside(target: Any, database: str, redis_url: str) -> AsyncGenerator[None]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(database, redis_url, there))
    process.start()
    try:
        await asyncio.to_thread(here.recv)
        yield
    finally:
        here.send("that was all")
        await asyncio.to_thread(process.join)


def _relay_in_process(database: str, redis_url: str, pipe: Connection[str, str]) -> None:
    async def run() -> None:
        engine = create_async_engine(database)
        mediator = _service(engine, redis_url)
        async with mediator, OutboxRelay(mediator):
            pipe.send("started")
            await asyncio.to_thread(pipe.recv)
        await engine.dispose()

    asyncio.run(run())


def _consume_in_process(database: str, redis_url: str, pipe: Connection[str, str]) -> None:
    async def run() -> None:
        engine = create_async_engine(database)
        client_class: Any = redis.asyncio.Redis
        async with client_class.from_url(redis_url, protocol=2) as client, _warehouse(engine, redis_url, client):
            pipe.send("started")
            await asyncio.to_thread(pipe.recv)
        await engine.dispose()

    asyncio.run(run())
