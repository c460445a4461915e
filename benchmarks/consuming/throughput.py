"""A stream with a backlog, emptied by one process: each side decodes a message, calls a handler, acknowledges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from uuid import uuid4

import msgspec
import redis.asyncio

from pipeline_mediator import Codec, Consumer, EventMap, IntegrationEvent, Mediator, Middleware, Pipeline, message
from pipeline_mediator.codec import Facts
from pipeline_mediator.message_brokers import Outgoing, RedisStreamBroker
from pipeline_mediator.middlewares import (
    DeadLetterMiddleware,
    LoggingMiddleware,
    MetricsMiddleware,
    RedeliveryMiddleware,
    RetryMiddleware,
    TracingMiddleware,
)

__all__ = ["BY_HAND", "FASTSTREAM", "OURS", "OURS_ALONE", "SIDES", "OrderPlaced", "measure"]

BY_HAND = "by hand"
OURS = "this library, recommended"
OURS_ALONE = "this library, no middlewares"
FASTSTREAM = "FastStream"
SIDES = (BY_HAND, OURS_ALONE, OURS, FASTSTREAM)

STREAM = "orders"
GROUP = "warehouse"
AT_ONCE = 100
KEYS = 1000
FILLING = "x" * 900


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    """About 1 KiB on the wire."""

    order_id: int
    filling: str


class Counter:
    """Knows when the last one was handled."""

    def __init__(self, wanted: int) -> None:
        self.left = wanted
        self.done = asyncio.Event()

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.set()


async def measure(side: str, url: str, count: int) -> float:
    """Messages per second."""
    # Any: redis-py's annotations are partial.
    client_class: Any = redis.asyncio.Redis
    async with client_class.from_url(url, protocol=2) as client:
        await client.flushdb()
        if side == FASTSTREAM:
            return await _by_faststream(url, count)
        await _fill(url, count)
        if side == BY_HAND:
            return await _by_hand(client, count)
        took = await _by_ours(url, count, _RECOMMENDED if side == OURS else Pipeline())
        pending = await client.xpending(STREAM, GROUP)
        if pending["pending"]:
            raise RuntimeError(f"{pending['pending']} messages were not acknowledged")
        return took


async def _fill(url: str, count: int) -> None:
    """As the relay publishes them."""
    codec = Codec(OrderPlaced, source="shop")
    async with RedisStreamBroker(url) as broker:
        for begin in range(0, count, 1000):
            batch: list[Outgoing] = []
            for number in range(begin, min(begin + 1000, count)):
                name, key = str(uuid4()), str(number % KEYS)
                encoded = codec.encode(OrderPlaced(number, FILLING), Facts(name, name, key=key), binary=True)
                batch.append(
                    Outgoing(STREAM, encoded.body, encoded.content_type, name, encoded.name, key, encoded.headers)
                )
            if any(await broker.publish(batch)):
                raise RuntimeError("not everything was published")


async def _by_hand(client: Any, count: int) -> float:
    """XREADGROUP for a hundred, decode, call, one XACK: what a careful person writes."""
    counter = Counter(count)
    decoder = msgspec.json.Decoder(OrderPlaced)

    async def handle(event: OrderPlaced) -> None:
        counter.count()

    await client.xgroup_create(STREAM, GROUP, id="0")
    began = perf_counter()
    while not counter.done.is_set():
        ((_, entries),) = await client.xreadgroup(GROUP, "one", {STREAM: ">"}, count=AT_ONCE)
        for _, fields in entries:
            await handle(decoder.decode(fields[b"data"]))
        await client.xack(STREAM, GROUP, *(number for number, _ in entries))
    return count / (perf_counter() - began)


_RECOMMENDED = Pipeline(
    TracingMiddleware(),
    MetricsMiddleware(),
    LoggingMiddleware(),
    DeadLetterMiddleware(),
    RedeliveryMiddleware(),
    RetryMiddleware(3),
)
"""What `Pipeline.recommended` has where there is no database, without a limit of time, which costs 7 µs more."""


async def _by_ours(url: str, count: int, pipeline: Pipeline) -> float:
    counter = Counter(count)

    async def handle(event: OrderPlaced) -> None:
        counter.count()

    async with consuming(url, handle, *pipeline):
        began = perf_counter()
        await counter.done.wait()
        took = perf_counter() - began
    return count / took


@asynccontextmanager
async def consuming(url: str, handler: Any, *middlewares: Middleware) -> AsyncGenerator[Consumer]:
    """A consumer beside whoever asks."""
    mediator = Mediator(event_map=EventMap().bind(OrderPlaced, handler), middlewares=middlewares)
    broker = RedisStreamBroker(url)
    subscription = broker.subscribe(STREAM, name=GROUP)
    async with broker, mediator, Consumer(mediator, subscription, concurrency=64) as consumer:
        yield consumer


async def _by_faststream(url: str, count: int) -> float:
    """Its subscriber for a stream and a group, a hundred at a time; in its own format, JSON that stays a dict."""
    from faststream.redis import RedisBroker, StreamSub

    counter = Counter(count)
    broker_class: Any = RedisBroker  # its annotations do not know that no logger is allowed
    broker = broker_class(url, logger=None)

    async def handle(event: dict[str, Any]) -> None:
        counter.count()

    await broker.connect()
    for begin in range(0, count, 50):
        numbers = range(begin, min(begin + 50, count))
        await asyncio.gather(
            *(broker.publish({"order_id": number, "filling": FILLING}, stream=STREAM) for number in numbers)
        )
    client = broker._connection
    await client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    broker.subscriber(stream=StreamSub(STREAM, group=GROUP, consumer="one", max_records=AT_ONCE))(handle)
    began = perf_counter()
    await broker.start()
    try:
        await counter.done.wait()
        return count / (perf_counter() - began)
    finally:
        await broker.stop()
