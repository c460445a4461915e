"""FastStream over RabbitMQ: a fanout exchange for each destination, a quorum queue for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiormq import exceptions as rabbit
from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitExchange, RabbitQueue

from pipeline_mediator.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
)
from pipeline_mediator.message_brokers.faststream.handler import as_it_is, handler_of
from pipeline_mediator.message_brokers.faststream.held import Held
from pipeline_mediator.message_brokers.faststream.wire import attributes_of, decode_values
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Delivery

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["Rabbit"]

_FEATURES: Final = BrokerFeatures(system="rabbitmq", durable=True, headers=True, ordered_by_key=True)
_LOST_SECONDS: Final = 2.0
"""How long after its channel has closed a message is lost: RabbitMQ delivers it again then."""
_SHORT: Final = 255
"""Bytes of a routing key, at most."""
_TRANSPORT: Final = ("x-", "content-type", "correlation_id")


class Rabbit:
    """Publishes to durable fanout exchanges: accepted is what the server confirmed.

    Groups that RabbitMQ has not seen yet get nothing of it.
    """

    features = _FEATURES

    def __init__(self, broker: Any, timeout: float) -> None:
        self.broker = broker
        self.timeout = timeout
        self._declared: set[str] = set()

    async def publish(self, message: Outgoing) -> None:
        """Hand it to its exchange."""
        if message.destination not in self._declared:
            # FastStream declares what is published to only passively: it has to be there.
            await self.broker.declare_exchange(exchange_of(message.destination))
            self._declared.add(message.destination)
        key = message.key or ""
        await self.send(
            message.body,
            attributes_of(message),
            message.content_type,
            exchange=exchange_of(message.destination),
            routing_key=key if len(key.encode()) <= _SHORT else "",
            message_type=message.name if len(message.name.encode()) <= _SHORT else None,
        )

    async def send(self, body: bytes, headers: dict[str, str], content_type: str | None, **where: Any) -> None:
        """Publish, and wait for the confirmation."""
        identity = headers.get("correlationid") or headers.get("id") or ""
        await self.broker.publish(
            body,
            headers=headers,
            content_type=content_type,
            # An empty one would be replaced by a random one; a short string of AMQP is all it may be.
            correlation_id=identity if 0 < len(identity.encode()) <= _SHORT else None,
            persist=True,
            mandatory=False,
            timeout=self.timeout,
            **where,
        )

    def consume(self, destinations: Sequence[str], name: str, *, hold: float, prefetch: int) -> RabbitConsuming:
        """What a subscription needs of it."""
        return RabbitConsuming(self, destinations, name, prefetch)

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of aio-pika as one of ours."""
        if isinstance(error, BrokerError | ConfigurationError):
            return error
        if isinstance(error, rabbit.ChannelNotFoundEntity):
            self._declared.clear()  # somebody deleted it; the next one makes it again
        ours: MediatorError
        if isinstance(error, rabbit.ChannelPreconditionFailed):
            ours = DestinationError(
                f"could not {doing}: RabbitMQ has an exchange or queue of that name with other properties. Exchanges "
                "are durable and of type fanout, queues quorum queues; delete it, or choose another name."
            )
        elif isinstance(error, rabbit.ChannelAccessRefused | rabbit.ProbableAuthenticationError):
            ours = BrokerRefusedError(
                f"RabbitMQ does not let this client {doing}: check its rights (configure, write, read)"
            )
        else:
            ours = BrokerUnavailableError(f"could not {doing}: {type(error).__name__}. Does RabbitMQ answer?")
        ours.__cause__ = error
        return ours


class RabbitConsuming:
    """A quorum queue `<destination>.<name>` for each destination, shared by all processes of the group."""

    waits = False
    dead_letters = None

    def __init__(self, rabbit_: Rabbit, destinations: Sequence[str], name: str, prefetch: int) -> None:
        self._rabbit = rabbit_
        self._destinations = destinations
        self._name = name
        self._prefetch = prefetch
        self._subscribers: list[Any] = []
        self.hold: float | None = _LOST_SECONDS

    @property
    def connected(self) -> bool:
        """Whether the client has a connection at this moment."""
        connection = self._rabbit.broker._connection  # FastStream has no public word for it
        return connection is not None and not connection.is_closed and connection.connected.is_set()

    async def open(self, take: Callable[[Any, str], Awaitable[None]]) -> None:
        """Exchanges and queues are made where they are missing."""
        channel = Channel(prefetch_count=self._prefetch)
        for destination in self._destinations:
            subscriber = self._rabbit.broker.subscriber(
                RabbitQueue(f"{destination}.{self._name}", queue_type=QueueType.QUORUM, durable=True),
                exchange_of(destination),
                channel=channel,
                ack_policy=AckPolicy.MANUAL,
                no_reply=True,
                persistent=False,
                include_in_schema=False,
            )
            subscriber(handler_of(take, destination), decoder=as_it_is)
            self._subscribers.append(subscriber)
            await subscriber.start()

    async def close(self) -> None:
        """Stop FastStream's subscribers."""
        while self._subscribers:
            await self._subscribers.pop().stop()

    def read(self, raw: Any, destination: str, now: float) -> Held:
        """A message of AMQP 0-9-1 as a delivery."""
        message = raw.raw_message
        carried: dict[str, object] = message.headers or {}
        delivered = carried.get("x-delivery-count")
        headers = {
            name: value for name, value in decode_values(carried).items() if not name.lower().startswith(_TRANSPORT)
        }
        delivery = Delivery(
            destination=destination,
            body=message.body,
            content_type=headers.get("datacontenttype") or message.content_type,
            headers=headers,
            message_id=headers.get("id") or message.message_id,
            key=headers.get("partitionkey"),
            attempt=1 + (delivered if isinstance(delivered, int) else bool(message.redelivered)),
            subscription=self._name,
            system=_FEATURES.system,
        )
        place = int(message.delivery_tag or 0)
        return Held(raw, (id(message.channel), place), place, delivery, now)

    async def keep(self, held: Held) -> None:
        """RabbitMQ keeps it for us as long as its channel is open."""
        if held.raw.raw_message.channel.is_closed:
            raise rabbit.ChannelInvalidStateError

    async def ack(self, held: Held) -> None:
        """Acknowledge it."""
        await held.raw.raw_message.ack()

    async def back(self, held: Held, delay: float) -> bool:
        """It is kept here: requeued it would come at once, behind or before others of its key."""
        return False

    async def release(self, held: Held) -> None:
        """Put it back into its queue."""
        await held.raw.raw_message.nack(requeue=True)

    async def bury(self, held: Held, reason: str) -> None:
        """Write it to the group's queue of dead letters; a rejection would carry no reason."""
        delivery = held.delivery
        queue = RabbitQueue(f"{delivery.destination}.{self._name}.dead", queue_type=QueueType.QUORUM, durable=True)
        await self._rabbit.broker.declare_queue(queue)
        dead = {"deadreason": reason, "deadattempt": str(delivery.attempt)}
        await self._rabbit.send(delivery.body, {**delivery.headers, **dead}, delivery.content_type, queue=queue)

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of aio-pika as one of ours."""
        if isinstance(error, rabbit.ChannelInvalidStateError):
            ours = BrokerRefusedError(f"could not {doing}: its channel is closed, so RabbitMQ delivers it again")
            ours.__cause__ = error
            return ours
        return self._rabbit.explain(error, doing)


def exchange_of(destination: str) -> RabbitExchange:
    """Where messages for a destination go."""
    return RabbitExchange(destination, type=ExchangeType.FANOUT, durable=True)
