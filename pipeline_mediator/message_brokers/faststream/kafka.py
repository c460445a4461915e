"""FastStream over Kafka: one message of a subscription is out at a time, since a group's progress is a position."""

# aiokafka has neither types nor stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from aiokafka import errors as kafka
from faststream import AckPolicy

from pipeline_mediator.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
    MessageTooLargeError,
)
from pipeline_mediator.message_brokers.faststream.handler import as_it_is, handler_of
from pipeline_mediator.message_brokers.faststream.held import Held
from pipeline_mediator.message_brokers.faststream.wire import attributes_of, decode_values
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Delivery

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["Kafka"]

_FEATURES: Final = BrokerFeatures(system="kafka", durable=True, headers=True, ordered_by_key=True)
_TRANSPORT: Final = ("content-type", "correlation_id", "reply_to")


class Kafka:
    """Publishes to topics: accepted is what the partition's leader has, or all replicas, as the client is set up."""

    features = _FEATURES

    def __init__(self, broker: Any, timeout: float) -> None:
        self.broker = broker
        self.timeout = timeout

    async def publish(self, message: Outgoing) -> None:
        """Append it to the partition of its key."""
        try:
            await self.send(
                message.destination, message.body, attributes_of(message), message.content_type, message.key
            )
        except kafka.MessageSizeTooLargeError as error:
            raise BrokerRefusedError(
                f"{message.name} is larger than Kafka takes ({len(message.body)} bytes): send a reference to the "
                "content instead of the content, or raise max_request_size and max.message.bytes"
            ) from error

    async def send(
        self, topic: str, body: bytes, headers: dict[str, str], content_type: str | None, key: str | None
    ) -> None:
        """Publish, and wait for the answer."""
        await self.broker.publish(
            body,
            topic,
            key=None if key is None else key.encode("utf-8", "backslashreplace"),
            headers={**headers, "content-type": content_type or ""},
            correlation_id=headers.get("correlationid") or headers.get("id"),
        )

    def consume(self, destinations: Sequence[str], name: str, *, hold: float, prefetch: int) -> KafkaConsuming:
        """What a subscription needs of it."""
        return KafkaConsuming(self, destinations, name)

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of aiokafka as one of ours."""
        if isinstance(error, BrokerError | ConfigurationError | MessageTooLargeError):
            return error
        ours: MediatorError
        if isinstance(error, kafka.UnknownTopicOrPartitionError | kafka.InvalidTopicError):
            ours = DestinationError(f"could not {doing}: Kafka has no such topic; create it")
        elif isinstance(error, kafka.CommitFailedError | kafka.IllegalStateError):
            ours = BrokerRefusedError(f"could not {doing}: its partition is another consumer's by now")
        elif isinstance(
            error,
            kafka.TopicAuthorizationFailedError | kafka.GroupAuthorizationFailedError | kafka.AuthenticationFailedError,
        ):
            ours = BrokerRefusedError(f"Kafka does not let this client {doing}: check its credentials and rights")
        else:
            ours = BrokerUnavailableError(f"could not {doing}: {type(error).__name__}. Does Kafka answer?")
        ours.__cause__ = error
        return ours


class KafkaConsuming:
    """A member of the consumer group."""

    waits = True
    dead_letters = None
    connected = True
    """aiokafka connects again by itself, and does not tell."""

    def __init__(self, kafka_: Kafka, destinations: Sequence[str], name: str) -> None:
        self._kafka = kafka_
        self._destinations = destinations
        self._name = name
        self._subscriber: Any = None
        self.hold: float | None = None

    async def open(self, take: Callable[[Any, str], Awaitable[None]]) -> None:
        """Join the group; a new one begins with the oldest message there is."""
        self._subscriber = self._kafka.broker.subscriber(
            *self._destinations,
            group_id=self._name,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
            persistent=False,
            include_in_schema=False,
        )
        self._subscriber(handler_of(take, ""), parser=readable, decoder=as_it_is)
        await self._subscriber.start()

    async def close(self) -> None:
        """Leave the group."""
        if self._subscriber is not None:
            await self._subscriber.stop()

    def read(self, raw: Any, destination: str, now: float) -> Held:
        """A record as a delivery."""
        record = raw.raw_message
        headers = {name: value for name, value in decode_values(dict(record.headers)).items() if name not in _TRANSPORT}
        key = record.key.decode("utf-8", "backslashreplace") if isinstance(record.key, bytes) else None
        delivery = Delivery(
            destination=record.topic,
            body=record.value or b"",
            content_type=headers.get("datacontenttype") or raw.content_type or None,
            headers=headers,
            message_id=headers.get("id"),
            key=headers.get("partitionkey", key),
            attempt=1,
            subscription=self._name,
            system=_FEATURES.system,
        )
        return Held(raw, (record.topic, record.partition, record.offset), record.offset, delivery, now)

    async def keep(self, held: Held) -> None:
        """Its partition is ours until the group says otherwise."""

    async def ack(self, held: Held) -> None:
        """Commit the position behind it."""
        await held.raw.ack()

    async def back(self, held: Held, delay: float) -> bool:
        """It is kept here, and all behind it wait."""
        return False

    async def release(self, held: Held) -> None:
        """It was not committed, so the group gets it again."""

    async def bury(self, held: Held, reason: str) -> None:
        """Write it to the group's topic of dead letters; Kafka itself has nothing of the kind."""
        delivery = held.delivery
        dead = {"deadreason": reason, "deadattempt": str(delivery.attempt)}
        await self._kafka.send(
            f"{delivery.destination}.{self._name}.dead",
            delivery.body,
            {**delivery.headers, **dead},
            delivery.content_type,
            delivery.key,
        )

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of aiokafka as one of ours."""
        return self._kafka.explain(error, doing)


async def readable(record: Any, original: Any) -> Any:
    """FastStream's parser fails for headers that are not UTF-8, and a failed one is skipped for good."""
    headers = [(name, (value or b"").decode("utf-8", "backslashreplace").encode()) for name, value in record.headers]
    return await original(replace(record, headers=headers))
