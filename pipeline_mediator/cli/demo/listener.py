"""Who listens to what the service publishes, decodes every message, and writes down what came and what came again."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.codec import Codec
from pipeline_mediator.examples.orders.messages import OrderCancelled, OrderPlaced
from pipeline_mediator.message_brokers.protocol import Ack

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from pipeline_mediator.message_brokers.protocol import Subscription

__all__ = ["Received", "Taker", "listen_to_stream", "listen_to_subscription"]

PAGE = 500
"""Entries of a stream that are read at a time."""

E = TypeVar("E", bound=OrderPlaced | OrderCancelled)


class Taker(Protocol):
    """Takes what a subscriber gets."""

    def take(self, body: bytes, content_type: str | None, headers: Mapping[str, str]) -> None:
        """Take one message; when this returns, it may be acknowledged."""
        ...


class Received:
    """What arrived: at least once was promised, so a message counts by its id, and its further copies apart."""

    def __init__(self) -> None:
        self.messages: dict[str, OrderPlaced | OrderCancelled] = {}
        """By message id, in the order in which the first copies came."""
        self.again: Counter[type] = Counter()
        """Further copies."""
        self._codec = Codec(OrderPlaced, OrderCancelled)

    def take(self, body: bytes, content_type: str | None, headers: Mapping[str, str]) -> None:
        """Decode one message and keep it."""
        decoded = self._codec.decode(body, content_type, headers)
        message_id = decoded.facts.message_id
        if message_id in self.messages:
            self.again[type(decoded.message)] += 1
        else:
            self.messages[message_id] = decoded.message

    def of(self, kind: type[E]) -> dict[str, E]:
        """The messages of this type."""
        return {message_id: message for message_id, message in self.messages.items() if isinstance(message, kind)}

    def cents(self, kind: type[OrderPlaced | OrderCancelled]) -> dict[int, int]:
        """What the messages of this type say: cents by order."""
        return {message.order_id: message.total_cents for message in self.of(kind).values()}


@asynccontextmanager
async def listen_to_subscription(subscription: Subscription, taker: Taker) -> AsyncGenerator[None]:
    """Listen as long as the block lasts; whoever publishes in this process waits until its message is settled."""

    async def listen() -> None:
        # Inside the task: if it fails, the subscription ends, and nobody waits for it.
        async with subscription:
            while True:
                deliveries = await subscription.receive(100)
                for delivery in deliveries:
                    taker.take(delivery.body, delivery.content_type, delivery.headers)
                    delivery.outcome = Ack()
                await subscription.settle(deliveries)

    listening = asyncio.create_task(listen())
    try:
        yield
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        failure = None if listening.cancelled() else listening.exception()
    if failure is not None:
        raise failure


@asynccontextmanager
async def listen_to_stream(url: str, stream: str, taker: Taker) -> AsyncGenerator[None]:
    """When the block ends, take all that was written to the stream, and delete it."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    redis: Any = Redis  # its annotations are partial
    client = redis.from_url(url)
    failures = (RedisError, OSError)
    try:
        yield
        try:
            await _read(client, stream, taker)
        except failures as error:
            raise CommandError(f"the subscriber lost Redis: {str(error) or type(error).__name__}") from error
    finally:
        with suppress(*failures):
            await client.delete(stream)
        await client.aclose()


async def _read(client: Any, stream: str, taker: Taker) -> None:
    last = "-"
    while entries := await client.xrange(stream, last, count=PAGE):
        for _, fields in entries:
            headers = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
            taker.take(fields[b"data"], headers.pop("datacontenttype", None), headers)
        last = f"({entries[-1][0].decode()}"
