"""Redis Pub/Sub against real servers: what goes over the wire, and who gets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import pytest

from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import BrokerUnavailableError
from pipeline_mediator.message_brokers import Outgoing, RedisMessageBroker
from pipeline_mediator.messages import message
from tests.proxy import Proxy
from tests.redis_view import Client, batch, outgoing, through, watching
from tests.servers import RedisServer, Running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def broker(redis_server: Running) -> AsyncIterator[RedisMessageBroker]:
    async with RedisMessageBroker(redis_server.url) as broker:
        yield broker


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int


@asynccontextmanager
async def listening(url: str, *channels: str) -> AsyncGenerator[AsyncGenerator[tuple[str, bytes]]]:
    """What arrives on the channels, as a subscriber of its own sees it."""

    async def arrivals() -> AsyncGenerator[tuple[str, bytes]]:
        async for entry in subscriber.listen():
            if entry["type"] == "message":
                yield entry["channel"].decode(), entry["data"]

    async with Client.from_url(url) as client, client.pubsub() as subscriber:
        await subscriber.subscribe(*channels)
        for _ in channels:
            await subscriber.get_message(timeout=5)
        async with aclosing(arrivals()) as arriving:
            yield arriving


async def test_one_publish_per_message_on_one_connection_and_nothing_else(redis_server: Running) -> None:
    async with RedisMessageBroker(redis_server.url) as broker, watching(redis_server.url) as seen:
        assert await broker.publish(batch(3)) == [None, None, None]
        assert await broker.publish([outgoing(3, "payments")]) == [None]
    assert [command for _, command in seen if not command.startswith(("HELLO", "CLIENT SETINFO", "ECHO"))] == [
        "PUBLISH orders secret body 0",
        "PUBLISH orders secret body 1",
        "PUBLISH orders secret body 2",
        "PUBLISH payments secret body 3",
    ]
    assert len({client for client, command in seen if command.startswith("PUBLISH")}) == 1


async def test_a_batch_is_on_its_way_before_the_first_answer(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(through(proxy)) as broker, listening(own_redis.url, "orders") as arriving:
            proxy.hold()
            publishing = asyncio.ensure_future(broker.publish(batch(50)))
            bodies = [(await anext(arriving))[1] for _ in range(50)]
            assert not publishing.done()
            proxy.release()
            assert await publishing == [None] * 50
    assert bodies == [message.body for message in batch(50)]


async def test_a_subscriber_of_the_destination_gets_an_event_that_decodes(
    broker: RedisMessageBroker, redis_server: Running
) -> None:
    codec = Codec(OrderPlaced, source="shop")
    facts = Facts("42", correlation_id="conversation", key="7", headers={"tenant": "a"})
    encoded = codec.encode(OrderPlaced(7), facts)
    async with listening(redis_server.url, "orders") as arriving:
        outgoing = Outgoing("orders", encoded.body, encoded.content_type, "42", encoded.name, "7", encoded.headers)
        assert await broker.publish([outgoing]) == [None]
        channel, body = await anext(arriving)
    decoded = codec.decode(body)
    assert channel == "orders"
    assert decoded.message == OrderPlaced(7)
    assert decoded.facts.correlation_id == "conversation"
    assert decoded.facts.headers == {"tenant": "a"}


async def test_a_prefix_goes_before_the_destination(redis_server: Running) -> None:
    async with (
        RedisMessageBroker(redis_server.url, channel_prefix="shop:") as broker,
        listening(redis_server.url, "shop:orders") as arriving,
    ):
        await broker.publish([outgoing(1)])
        assert await anext(arriving) == ("shop:orders", b"secret body 1")


async def test_a_connection_that_dies_before_the_answer_refuses_each_message_once(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(through(proxy)) as broker, watching(own_redis.url) as seen:
            proxy.when(b"PUBLISH", "cut reply")
            answers = await broker.publish(batch(2))
            assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 2
            assert await broker.publish([outgoing(2)]) == [None]
    # Not published a second time: what became of the first is not known.
    assert [command for _, command in seen if command.startswith("PUBLISH")] == [
        "PUBLISH orders secret body 0",
        "PUBLISH orders secret body 1",
        "PUBLISH orders secret body 2",
    ]


def test_its_features_say_what_pub_sub_is() -> None:
    features = RedisMessageBroker("redis://localhost").features
    assert (features.system, features.durable, features.headers, features.ordered_by_key) == (
        "redis",
        False,
        False,
        False,
    )
