"""A subscriber to what the service publishes: it decodes every message and writes it down."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.codec import Codec
from pipeline_mediator.examples.orders.messages import OrderCancelled, OrderPlaced
from pipeline_mediator.message_brokers.protocol import Ack

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from pipeline_mediator.message_brokers.protocol import Subscription

__all__ = ["Received", "listen_to_redis", "listen_to_subscription"]

SECONDS = 10.0
"""How long the last message may take after everything was published."""

END = b"end"


class Received:
    """What arrived."""

    def __init__(self) -> None:
        self.placed: dict[int, OrderPlaced] = {}
        self.cancelled: dict[int, OrderCancelled] = {}
        self.messages: Counter[str] = Counter()
        """Every copy counts."""
        self._codec = Codec(OrderPlaced, OrderCancelled)

    def take(self, body: bytes, content_type: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Decode one message and keep it."""
        message = self._codec.decode(body, content_type, headers).message
        self.messages[type(message).__name__] += 1
        if isinstance(message, OrderPlaced):
            self.placed[message.order_id] = message
        elif isinstance(message, OrderCancelled):
            self.cancelled[message.order_id] = message


@asynccontextmanager
async def listen_to_subscription(subscription: Subscription, received: Received) -> AsyncGenerator[None]:
    """Listen as long as the block lasts; whoever publishes in this process waits until its message is settled."""

    async def listen() -> None:
        # Inside the task: if it fails, the subscription ends, and nobody waits for it.
        async with subscription:
            while True:
                deliveries = await subscription.receive(100)
                for delivery in deliveries:
                    received.take(delivery.body, delivery.content_type, delivery.headers)
                    delivery.outcome = Ack()
                await subscription.settle(deliveries)

    async with _in_background(listen()):
        yield


@asynccontextmanager
async def listen_to_redis(url: str, channel: str, received: Received) -> AsyncGenerator[None]:
    """Subscribe; when the block ends, wait for everything that was published on the channel before."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    redis: Any = Redis  # its annotations are partial
    client = redis.from_url(url)
    failures = (RedisError, OSError)
    try:
        subscription = client.pubsub()
        try:
            await subscription.subscribe(channel)
        except failures as error:
            raise _lost(error) from error
        async with _in_background(_listen(subscription, received)) as listening:
            yield
            try:
                # One channel is in order: what was published before this arrives before this.
                await client.publish(channel, END)
                await asyncio.wait_for(asyncio.shield(listening), SECONDS)
            except failures as error:
                raise _lost(error) from error
    finally:
        await client.aclose()


async def _listen(subscription: Any, received: Received) -> None:
    async with subscription:
        async for message in subscription.listen():
            if message["data"] == END:
                return
            if message["type"] == "message":
                received.take(message["data"])


@asynccontextmanager
async def _in_background(coroutine: Any) -> AsyncGenerator[asyncio.Task[None]]:
    """Run it beside the block, and end it with the block; its error is raised then."""
    task: asyncio.Task[None] = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        failure = None if task.cancelled() else task.exception()
    if failure is not None:
        raise failure


def _lost(error: Exception) -> CommandError:
    return CommandError(f"the subscriber lost Redis: {str(error) or type(error).__name__}")
