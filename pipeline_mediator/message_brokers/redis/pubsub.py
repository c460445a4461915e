"""Redis Pub/Sub: every subscriber that listens at this moment gets the message, nobody else ever does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipeline_mediator.message_brokers.protocol import BrokerFeatures
from pipeline_mediator.message_brokers.redis.channels import RedisChannelSubscription
from pipeline_mediator.message_brokers.redis.client import MAX_MESSAGE_SIZE, RedisClient
from pipeline_mediator.message_brokers.redis.entries import SYSTEM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from redis.asyncio import Redis

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["RedisMessageBroker"]

_FEATURES: Final = BrokerFeatures(
    system=SYSTEM, durable=False, headers=False, ordered_by_key=False, max_message_size=MAX_MESSAGE_SIZE
)


class RedisMessageBroker:
    """Publishes by Redis Pub/Sub and listens, at most once: a message that nobody listens for is gone.

        broker = RedisMessageBroker("redis://localhost:6379/0")
        async with broker:
            ...

    One PUBLISH per message to the channel named like its destination (`channel_prefix` goes before it), the messages of
    a batch in one pipeline, at most `max_connections` batches at a time. With a URL the client is the broker's own and
    never retries; it is closed at the end of the last `async with`. A client that is handed over is used as it is and
    never closed; mind that one which retries, as `Redis(...)` does by default, may publish a batch twice when a
    connection drops.

    `timeout` is in seconds, for connecting and for a batch; after it every message of the batch is a
    `BrokerUnavailableError`, although the server may have had some of them. asyncio only. redis-py >= 5.1.

    Entering raises `BrokerUnavailableError` if the server cannot be reached, `BrokerRefusedError` if it does not take
    the credentials. Raises `ConfigurationError` for what is no Redis URL and no `redis.asyncio.Redis`.
    """

    def __init__(
        self,
        client_or_url: Redis | str,
        *,
        channel_prefix: str | None = None,
        timeout: float = 10.0,
        max_connections: int = 16,
    ) -> None:
        self._client = RedisClient(
            client_or_url,
            "RedisMessageBroker",
            "+publish &<channel>",
            timeout=timeout,
            max_connections=max_connections,
        )
        self._prefix = channel_prefix or ""

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises."""
        return _FEATURES

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what the server answered; see `MessageBroker.publish`."""
        commands = [("PUBLISH", self._prefix + message.destination, message.body) for message in batch]
        replies = await self._client.execute(commands)
        return [
            self._client.explain(reply, message.destination) if isinstance(reply, Exception) else None
            for message, reply in zip(batch, replies, strict=True)
        ]

    def subscribe(self, *channels: str, name: str, capacity: int = 1000) -> RedisChannelSubscription:
        """What is published to these channels from when it is entered until it is left, at most once.

        `name` is the inbox's, not the server's: two subscriptions of one name both get everything. At most `capacity`
        messages wait in memory. Raises `ConfigurationError` for a subscription without channel or name.
        """
        return RedisChannelSubscription(self._client, channels, prefix=self._prefix, name=name, capacity=capacity)

    async def __aenter__(self) -> Self:
        await self._client.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._client.leave()
