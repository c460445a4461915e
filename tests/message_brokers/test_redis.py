"""Redis Pub/Sub against real servers: what goes over the wire, who gets it, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import redis.asyncio
from anyio import to_thread

from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers import MessageBroker, Outgoing, RedisMessageBroker
from pipeline_mediator.messages import message
from tests.proxy import Proxy
from tests.servers import RedisServer, Running, free_port

Client: Any = redis.asyncio.Redis
Sentinel: Any = redis.asyncio.Sentinel


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


def outgoing(number: int, destination: str = "orders") -> Outgoing:
    return Outgoing(destination, b"secret body %d" % number, "text/plain", f"id-{number}", "n")


def batch(size: int) -> list[Outgoing]:
    return [outgoing(number) for number in range(size)]


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


@asynccontextmanager
async def watching(url: str) -> AsyncGenerator[list[tuple[str, str]]]:
    """Every command that the server gets meanwhile, as (client, command)."""
    seen: list[tuple[str, str]] = []
    async with Client.from_url(url) as client, Client.from_url(url) as end, client.monitor() as monitor:
        yield seen
        await end.echo("that was all")
        while "that was all" not in (entry := await monitor.next_command())["command"]:
            seen.append((f"{entry['client_address']}:{entry['client_port']}", entry["command"]))


async def during(seconds: float, running: asyncio.Future[Any]) -> None:
    """Let it run, and see that it does not end."""
    done, _ = await asyncio.wait([running], timeout=seconds)
    assert not done


def whole_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=0))


# What goes over the wire


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
        async with RedisMessageBroker(_through(proxy)) as broker, listening(own_redis.url, "orders") as arriving:
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


async def test_concurrent_batches_share_few_connections(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(_through(proxy), max_connections=2) as broker:
            answers = await asyncio.gather(*[broker.publish(batch(2)) for _ in range(20)])
    assert answers == [[None, None]] * 20
    assert proxy.opened == 2


async def test_an_empty_batch_sends_nothing(redis_server: Running) -> None:
    broker: MessageBroker = RedisMessageBroker("redis://127.0.0.1:1")
    assert await broker.publish([]) == []


# At the start


async def test_an_unreachable_server_is_an_error_at_the_start_that_names_it() -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailableError, match=f"Redis at 127.0.0.1:{port}/3 cannot be reached") as caught:
        await RedisMessageBroker(f"redis://user:secret@127.0.0.1:{port}/3").__aenter__()
    assert "secret" not in whole_text(caught.value)
    assert isinstance(caught.value.__cause__, redis.ConnectionError)


async def test_a_server_that_hangs_is_an_error_at_the_start_after_the_timeout(own_redis: RedisServer) -> None:
    own_redis.pause()
    with pytest.raises(BrokerUnavailableError, match=r"did not answer within 0\.2 s"):
        await RedisMessageBroker(own_redis.url, timeout=0.2).__aenter__()


@pytest.mark.parametrize("credentials", ["", ":secret@", "nobody:secret@"])
async def test_wrong_credentials_are_refused_at_the_start(own_redis: RedisServer, credentials: str) -> None:
    await _command(own_redis.url, "CONFIG", "SET", "requirepass", "right")
    url = own_redis.url.replace("redis://", f"redis://{credentials}")
    with pytest.raises(BrokerRefusedError, match="refused the credentials") as caught:
        await RedisMessageBroker(url).__aenter__()
    assert "secret" not in whole_text(caught.value)
    assert f"127.0.0.1:{own_redis.port}/0" in str(caught.value)


async def test_a_server_that_speaks_something_else_is_an_error_at_the_start() -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}"):
            await RedisMessageBroker(f"redis://127.0.0.1:{port}").__aenter__()


async def test_a_user_who_may_only_publish_can_and_only_where_it_may(own_redis: RedisServer) -> None:
    rule = ["+publish", "resetchannels", "&orders"]
    await _command(own_redis.url, "ACL", "SETUSER", "shop", "on", ">right", *rule)
    url = own_redis.url.replace("redis://", "redis://shop:right@")
    async with RedisMessageBroker(url) as broker:
        first, refused, last = await broker.publish([outgoing(1), outgoing(2, "payments"), outgoing(3)])
    assert (first, last) == (None, None)
    assert isinstance(refused, BrokerRefusedError)
    assert "ACL SETUSER" in str(refused)


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://user:sec/ret@localhost"])
def test_what_is_no_redis_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no Redis URL") as caught:
        RedisMessageBroker(url)
    assert "sec" not in whole_text(caught.value)


def test_a_blocking_client_is_refused() -> None:
    client: Any = redis.Redis()
    with pytest.raises(ConfigurationError, match=r"a redis\.asyncio\.Redis, not redis\.client\.Redis"):
        RedisMessageBroker(client)


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"max_connections": 0}])
def test_limits_that_let_nothing_through_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        RedisMessageBroker("redis://localhost", **settings)


# In the middle


async def test_a_killed_server_refuses_each_message_and_a_restarted_one_takes_them_again(
    own_redis: RedisServer,
) -> None:
    async with RedisMessageBroker(own_redis.url) as broker:
        assert await broker.publish(batch(2)) == [None, None]
        own_redis.kill()
        answers = await broker.publish(batch(2))
        assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 2
        assert answers[0] is not answers[1]
        await to_thread.run_sync(own_redis.start)
        assert await broker.publish(batch(2)) == [None, None]


async def test_a_connection_that_dies_before_the_answer_refuses_each_message_once(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(_through(proxy)) as broker, watching(own_redis.url) as seen:
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


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced(own_redis: RedisServer) -> None:
    async with RedisMessageBroker(own_redis.url) as broker:
        assert await broker.publish([outgoing(1)]) == [None]
        await to_thread.run_sync(own_redis.restart)
        assert await broker.publish([outgoing(2)]) == [None]


async def test_a_server_that_hangs_refuses_after_the_timeout_and_takes_messages_when_it_wakes(
    own_redis: RedisServer,
) -> None:
    async with RedisMessageBroker(own_redis.url, timeout=0.3) as broker:
        own_redis.pause()
        (answer,) = await broker.publish([outgoing(1)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "did not answer within 0.3 s" in str(answer)
        own_redis.resume()
        assert await broker.publish([outgoing(2)]) == [None]


async def test_waiting_for_a_connection_counts_against_the_timeout(own_redis: RedisServer) -> None:
    async with RedisMessageBroker(own_redis.url, timeout=0.3, max_connections=1) as broker:
        own_redis.pause()
        answers = await asyncio.gather(*[broker.publish([outgoing(1)]) for _ in range(3)])
        assert [type(answer) for (answer,) in answers] == [BrokerUnavailableError] * 3
        own_redis.resume()
        assert await broker.publish([outgoing(2)]) == [None]


async def test_a_cancelled_publish_leaves_no_answer_behind_for_the_next_command(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with Client.from_url(_through(proxy), max_connections=1) as client, RedisMessageBroker(client) as broker:
            moment = proxy.when(b"PUBLISH", "hold")
            publishing = asyncio.ensure_future(broker.publish(batch(5)))
            await moment.was_answered()
            await during(0.05, publishing)
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
            proxy.release()
            assert await client.echo("mine") == b"mine"
            assert await broker.publish(batch(2)) == [None, None]


async def test_a_publish_cancelled_at_any_step_gives_its_connection_back_clean(redis_server: Running) -> None:
    async with Client.from_url(redis_server.url, max_connections=1, protocol=2) as client:
        broker = RedisMessageBroker(client)
        for steps in range(20):
            await client.connection_pool.disconnect()
            publishing = asyncio.ensure_future(broker.publish(batch(5)))
            for _ in range(steps):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            assert await client.echo("mine") == b"mine"


async def test_a_refused_command_does_not_show_the_payload_that_the_server_repeats() -> None:
    with RedisServer("--rename-command", "PUBLISH", "") as server:
        async with RedisMessageBroker(server.url) as broker:
            (answer,) = await broker.publish([outgoing(1)])
    assert isinstance(answer, BrokerRefusedError)
    assert "secret" not in whole_text(answer)


@pytest.mark.parametrize(
    "reply",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
    ],
)
async def test_what_a_server_cannot_do_at_the_moment_is_no_reason_to_give_up(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"*"):
                writer.write(reply)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerUnavailableError):
            await RedisMessageBroker(f"redis://127.0.0.1:{port}").__aenter__()


# Whose client it is


async def test_a_client_that_was_handed_over_is_not_closed(redis_server: Running) -> None:
    async with Client.from_url(redis_server.url) as client:
        number = await client.client_id()
        async with RedisMessageBroker(client) as broker:
            assert await broker.publish([outgoing(1)]) == [None]
        assert await client.client_id() == number


async def test_its_own_client_is_closed_by_the_last_user(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(_through(proxy)) as broker:
            async with broker:
                await broker.publish([outgoing(1)])
            assert proxy.opened == 1
            assert await broker.publish([outgoing(1)]) == [None]
            assert proxy.opened == 1
        (answer,) = await broker.publish([outgoing(2)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "was closed" in str(answer)
        clients = await _command(own_redis.url, "CLIENT", "LIST")
        assert len(clients.splitlines()) == 1
        async with broker:
            assert await broker.publish([outgoing(3)]) == [None]


async def test_a_broker_that_was_not_entered_connects_when_it_is_used(redis_server: Running) -> None:
    async with Client.from_url(redis_server.url) as client:
        assert await RedisMessageBroker(client).publish([outgoing(1)]) == [None]


async def test_a_user_who_cannot_enter_takes_nothing_from_the_one_who_is_in(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisMessageBroker(_through(proxy)) as broker:
            moment = proxy.when(b"PUBLISH", "hold")
            publishing = asyncio.ensure_future(broker.publish([outgoing(1)]))
            await moment.was_answered()
            proxy.refuse()
            with pytest.raises(BrokerUnavailableError):
                await broker.__aenter__()
            proxy.release()
            assert await publishing == [None]


@pytest.mark.parametrize(
    ("client", "place"),
    [
        (Client(unix_socket_path="/nowhere/redis.sock"), "Redis at /nowhere/redis.sock"),
        (Sentinel([("127.0.0.1", 1)]).master_for("shop"), "Redis service 'shop'"),
    ],
)
async def test_servers_without_host_and_port_are_named_too(client: Any, place: str) -> None:
    with pytest.raises(BrokerUnavailableError, match=place):
        await RedisMessageBroker(client, timeout=0.05).__aenter__()


def test_its_features_say_what_pub_sub_is() -> None:
    features = RedisMessageBroker("redis://localhost").features
    assert (features.system, features.durable, features.headers, features.ordered_by_key) == (
        "redis",
        False,
        False,
        False,
    )


def _through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


async def _command(url: str, *words: str) -> Any:
    async with Client.from_url(url) as client:
        return await client.execute_command(*words)
