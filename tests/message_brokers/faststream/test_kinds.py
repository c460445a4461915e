"""FastStream over RabbitMQ and Kafka without their servers: what the clients are asked for, and what becomes of it."""

# aiokafka has neither types nor stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from aiokafka import errors as kafka_errors
from aiormq import exceptions as rabbit_errors
from faststream.kafka import KafkaBroker
from faststream.rabbit import RabbitBroker

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, DestinationError
from pipeline_mediator.message_brokers.faststream import FastStreamBroker
from pipeline_mediator.message_brokers.faststream.handler import as_it_is
from pipeline_mediator.message_brokers.faststream.kafka import Kafka, readable
from pipeline_mediator.message_brokers.faststream.rabbit import Rabbit
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Later, Outgoing


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Client:
    """A FastStream broker that is connected, and keeps what it is asked for."""

    running = True

    def __init__(self) -> None:
        self.published: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.declared: list[Any] = []
        self.subscribers: list[Subscriber] = []
        self.fails: Exception | None = None
        self._connection = SimpleNamespace(is_closed=False, connected=asyncio.Event())
        self._connection.connected.set()

    async def publish(self, body: bytes, *where: Any, **options: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.published.append((body, where, options))

    async def declare_exchange(self, exchange: Any) -> None:
        self.declared.append(exchange.name)

    async def declare_queue(self, queue: Any) -> None:
        self.declared.append(queue.name)

    def subscriber(self, *what: Any, **options: Any) -> Subscriber:
        self.subscribers.append(Subscriber(what, options))
        return self.subscribers[-1]


class Subscriber:
    def __init__(self, what: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.what = what
        self.options = options
        self.started = False
        self.handle: Callable[[Any], Any]

    def __call__(self, handle: Callable[[Any], Any], **options: Any) -> None:
        self.handle = handle
        assert options["decoder"] is as_it_is

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.started = False


class Rabbits(Client):
    __module__ = "faststream.rabbit.tests"


class Kafkas(Client):
    __module__ = "faststream.kafka.tests"


def outgoing(key: str | None = "a") -> Outgoing:
    headers = {"type": "orders.placed", "correlationid": "c"}
    return Outgoing("orders", b"1", "text/plain", "id-1", "orders.placed", key, headers)


class RabbitRaw:
    """An AMQP message as aio-pika hands it over."""

    def __init__(self, number: int, headers: dict[str, Any], *, redelivered: bool = False) -> None:
        self.body = b"%d" % number
        self.headers = headers
        self.content_type = "text/plain"
        self.message_id = None
        self.redelivered = redelivered
        self.delivery_tag = number
        self.channel = SimpleNamespace(is_closed=False)
        self.answers: list[str] = []

    async def ack(self) -> None:
        if self.channel.is_closed:
            raise rabbit_errors.ChannelInvalidStateError
        self.answers.append("ack")

    async def nack(self, *, requeue: bool) -> None:
        self.answers.append(f"nack requeue={requeue}")


def test_features_are_those_of_the_broker_behind_it() -> None:
    brokers = [FastStreamBroker(RabbitBroker()), FastStreamBroker(KafkaBroker())]
    assert [broker.features.system for broker in brokers] == ["rabbitmq", "kafka"]


# RabbitMQ


async def test_rabbit_publishes_durably_to_a_fanout_exchange_with_the_key_as_routing_key() -> None:
    client = Rabbits()
    assert await FastStreamBroker(client).publish([outgoing(), outgoing("b" * 300)]) == [None, None]
    (body, _, options), (_, _, second) = client.published
    assert (body, options["routing_key"], options["persist"], options["mandatory"]) == (b"1", "a", True, False)
    assert (options["exchange"].name, options["exchange"].type.value, options["exchange"].durable) == (
        "orders",
        "fanout",
        True,
    )
    assert options["headers"] == {
        "id": "id-1",
        "partitionkey": "a",
        "type": "orders.placed",
        "correlationid": "c",
        "datacontenttype": "text/plain",
    }
    assert second["routing_key"] == ""  # a short string of AMQP takes no more than 255 bytes
    assert client.declared == ["orders"]


async def test_rabbit_has_a_quorum_queue_for_each_group_and_settles_by_hand() -> None:
    client = Rabbits()
    async with FastStreamBroker(client).subscribe("orders", name="warehouse", prefetch=7) as warehouse:
        (subscriber,) = client.subscribers
        queue, exchange = subscriber.what
        assert (queue.name, exchange.name) == ("orders.warehouse", "orders")
        assert subscriber.options["channel"].prefetch_count == 7
        assert subscriber.options["ack_policy"].value == "manual"
        first = RabbitRaw(1, {"id": "id-1", "partitionkey": "a", "x-delivery-count": 2, "tenant": b"\xff"})
        second = RabbitRaw(2, {"partitionkey": "a"}, redelivered=True)
        for raw in (first, second):
            await subscriber.handle(SimpleNamespace(raw_message=raw))
        (delivery,) = await warehouse.receive(10)
        assert (delivery.body, delivery.attempt, delivery.key, delivery.message_id) == (b"1", 3, "a", "id-1")
        assert delivery.headers == {"id": "id-1", "partitionkey": "a", "tenant": "\\xff"}
        delivery.outcome = Later()
        assert await warehouse.settle([delivery]) == [None]
        (again,) = await warehouse.receive(10)
        assert (again.body, again.attempt) == (b"1", 4)  # it is kept here, and its key waits for it
        again.outcome = Dead("no ünits")
        assert await warehouse.settle([again]) == [None]
        body, _, options = client.published[0]
        assert (body, options["queue"].name) == (b"1", "orders.warehouse.dead")
        assert (options["headers"]["deadreason"], options["headers"]["deadattempt"]) == ("no ünits", "4")
        assert first.answers == ["ack"]
        (behind,) = await warehouse.receive(10)
        assert (behind.body, behind.attempt) == (b"2", 2)
        assert second.answers == []
    assert second.answers == ["nack requeue=True"]
    assert not subscriber.started


async def test_rabbit_delivers_again_what_its_closed_channel_had() -> None:
    client = Rabbits()
    async with FastStreamBroker(client).subscribe("orders", name="warehouse") as warehouse:
        raw = RabbitRaw(1, {})
        await client.subscribers[0].handle(SimpleNamespace(raw_message=raw))
        (delivery,) = await warehouse.receive(1)
        lost = asyncio.Event()
        delivery.on_lost = lost.set
        raw.channel.is_closed = True
        delivery.outcome = Ack()
        assert isinstance((await warehouse.settle([delivery]))[0], BrokerRefusedError)
        second = RabbitRaw(2, {})
        await client.subscribers[0].handle(SimpleNamespace(raw_message=second))
        (delivery,) = await warehouse.receive(1)
        delivery.on_lost = lost.set
        second.channel.is_closed = True
        await asyncio.wait_for(lost.wait(), 15)
        assert delivery.lost


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (rabbit_errors.ChannelPreconditionFailed(), DestinationError, "other properties"),
        (rabbit_errors.ChannelAccessRefused(), BrokerRefusedError, "check its rights"),
        # Not for good: the channel opens again, and what was deleted is made again.
        (rabbit_errors.ChannelInvalidStateError(), BrokerUnavailableError, "Does RabbitMQ answer"),
        (rabbit_errors.ChannelNotFoundEntity(), BrokerUnavailableError, "Does RabbitMQ answer"),
        (ConnectionError(), BrokerUnavailableError, "Does RabbitMQ answer"),
        (DestinationError("kept"), DestinationError, "kept"),
    ],
)
def test_rabbit_errors_are_ours(error: Exception, expected: type[Exception], text: str) -> None:
    ours = Rabbit(None, 1.0).explain(error, "publish to 'orders'")
    assert type(ours) is expected
    assert text in str(ours)


# Kafka


def record(number: int, headers: list[tuple[str, Any]], key: bytes | None = b"a") -> Any:
    return ConsumerRecord("orders", 0, number, 0, 0, key, b"%d" % number, None, 1, 1, tuple(headers))


class KafkaRaw:
    def __init__(self, number: int, headers: list[tuple[str, Any]], fails: Exception | None = None) -> None:
        self.raw_message = record(number, headers)
        self.content_type = "text/plain"
        self.acked = False
        self.fails = fails

    async def ack(self) -> None:
        if self.fails is not None:
            raise self.fails
        self.acked = True


async def test_kafka_publishes_with_the_key_as_key_and_the_attributes_as_headers() -> None:
    client = Kafkas()
    assert await FastStreamBroker(client).publish([outgoing("ä"), outgoing(None)]) == [None, None]
    keyed, bare = sorted(client.published, key=lambda one: one[2]["key"] is None)
    assert (keyed[0], keyed[1], keyed[2]["key"]) == (b"1", ("orders",), "ä".encode())
    assert keyed[2]["headers"]["partitionkey"] == "ä"
    assert keyed[2]["headers"]["content-type"] == "text/plain"
    assert bare[2]["key"] is None


async def test_kafka_has_one_out_at_a_time_and_commits_when_it_is_settled() -> None:
    client = Kafkas()
    async with FastStreamBroker(client).subscribe("orders", "returns", name="warehouse") as warehouse:
        (subscriber,) = client.subscribers
        assert subscriber.what == ("orders", "returns")
        assert (subscriber.options["group_id"], subscriber.options["auto_offset_reset"]) == ("warehouse", "earliest")
        first = KafkaRaw(1, [("id", b"id-1")])
        handling = asyncio.ensure_future(subscriber.handle(first))
        (delivery,) = await warehouse.receive(10)
        assert (delivery.destination, delivery.body, delivery.key, delivery.attempt) == ("orders", b"1", "a", 1)
        delivery.outcome = Later(0.01)
        assert await warehouse.settle([delivery]) == [None]
        (again,) = await warehouse.receive(10)
        assert again.attempt == 2
        assert not handling.done()
        again.outcome = Dead("no")
        assert await warehouse.settle([again]) == [None]
        await asyncio.wait_for(handling, 15)
        assert first.acked
        assert client.published[0][1] == ("orders.warehouse.dead",)
        second = KafkaRaw(2, [])
        handling = asyncio.ensure_future(subscriber.handle(second))
        await warehouse.receive(10)
    await asyncio.wait_for(handling, 15)
    assert not second.acked  # so the group gets it again


async def test_kafka_lets_go_of_what_its_group_gave_to_another() -> None:
    client = Kafkas()
    async with FastStreamBroker(client).subscribe("orders", name="warehouse") as warehouse:
        handling = asyncio.ensure_future(
            client.subscribers[0].handle(KafkaRaw(1, [], kafka_errors.CommitFailedError()))
        )
        (delivery,) = await warehouse.receive(10)
        delivery.outcome = Ack()
        assert isinstance((await warehouse.settle([delivery]))[0], BrokerRefusedError)
        await asyncio.wait_for(handling, 15)


async def test_kafka_headers_that_are_no_text_do_not_lose_the_message() -> None:
    async def original(sanitized: Any) -> Any:
        return {name: value.decode() for name, value in sanitized.headers}

    assert await readable(record(1, [("a", b"\xff"), ("b", None)]), original) == {"a": "\\xff", "b": ""}


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (kafka_errors.UnknownTopicOrPartitionError(), DestinationError, "no such topic"),
        (kafka_errors.CommitFailedError(), BrokerRefusedError, "another consumer's"),
        (kafka_errors.TopicAuthorizationFailedError(), BrokerRefusedError, "check its credentials"),
        (kafka_errors.KafkaConnectionError(), BrokerUnavailableError, "Does Kafka answer"),
        (DestinationError("kept"), DestinationError, "kept"),
    ],
)
def test_kafka_errors_are_ours(error: Exception, expected: type[Exception], text: str) -> None:
    ours = Kafka(None, 1.0).explain(error, "publish to 'orders'")
    assert type(ours) is expected
    assert text in str(ours)


async def test_what_is_too_large_for_kafka_is_refused() -> None:
    client = Kafkas()
    client.fails = kafka_errors.MessageSizeTooLargeError()
    (answer,) = await FastStreamBroker(client).publish([outgoing()])
    assert isinstance(answer, BrokerRefusedError)
    assert "send a reference" in str(answer)
