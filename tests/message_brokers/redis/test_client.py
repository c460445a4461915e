"""What both Redis brokers do alike, against real servers: how they begin and end, and how they fail and recover."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import redis.asyncio
from anyio import to_thread

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers import Outgoing, RedisMessageBroker, RedisStreamBroker
from pipeline_mediator.message_brokers.redis import client as redis_client
from tests.proxy import Proxy
from tests.redis_view import Client, batch, command, outgoing, through, watching, whole_text
from tests.servers import RedisServer, Running, free_port

Sentinel: Any = redis.asyncio.Sentinel


@dataclass(frozen=True)
class Kind:
    make: Any
    word: str
    """The command by which it publishes."""
    rights: tuple[str, ...]


@pytest.fixture(
    params=[
        Kind(RedisMessageBroker, "PUBLISH", ("+publish", "resetchannels", "&orders")),
        Kind(RedisStreamBroker, "XADD", ("+xadd", "+multi", "+exec", "~orders")),
    ],
    ids=lambda kind: kind.word,
)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def during(seconds: float, running: asyncio.Future[Any]) -> None:
    """Let it run, and see that it does not end."""
    done, _ = await asyncio.wait([running], timeout=seconds)
    assert not done


async def test_an_empty_batch_sends_nothing(kind: Kind) -> None:
    assert await kind.make("redis://127.0.0.1:1").publish([]) == []


async def test_concurrent_batches_share_few_connections(kind: Kind, own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with kind.make(through(proxy), max_connections=2) as broker:
            answers = await asyncio.gather(*[broker.publish(batch(2)) for _ in range(20)])
    assert answers == [[None, None]] * 20
    assert proxy.opened == 2


async def test_without_hiredis_the_same_bytes_are_sent(
    kind: Kind, redis_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def publish() -> list[str]:
        long = Outgoing("ö" * 40, b"\x00\xff" * 40_000, "text/plain", "id", "n", "k", {"a": "ä"})
        async with watching(redis_server.url) as seen, kind.make(redis_server.url) as broker:
            assert await broker.publish([long, long, outgoing(1)]) == [None] * 3
        return [text for _, text in seen if kind.word in text]

    with_it = await publish()
    monkeypatch.setattr(redis_client, "pack_command", None)
    assert await publish() == with_it
    assert len(with_it) == 3


# At the start


async def test_an_unreachable_server_is_an_error_at_the_start_that_names_it(kind: Kind) -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailableError, match=f"Redis at 127.0.0.1:{port}/3 cannot be reached") as caught:
        await kind.make(f"redis://user:secret@127.0.0.1:{port}/3").__aenter__()
    assert "secret" not in whole_text(caught.value)
    assert isinstance(caught.value.__cause__, redis.ConnectionError)


async def test_a_server_that_hangs_is_an_error_at_the_start_after_the_timeout(
    kind: Kind, own_redis: RedisServer
) -> None:
    own_redis.pause()
    with pytest.raises(BrokerUnavailableError, match=r"did not answer within 0\.2 s"):
        await kind.make(own_redis.url, timeout=0.2).__aenter__()


@pytest.mark.parametrize("credentials", ["", ":secret@", "nobody:secret@"])
async def test_wrong_credentials_are_refused_at_the_start(kind: Kind, own_redis: RedisServer, credentials: str) -> None:
    await command(own_redis.url, "CONFIG", "SET", "requirepass", "right")
    url = own_redis.url.replace("redis://", f"redis://{credentials}")
    with pytest.raises(BrokerRefusedError, match="refused the credentials") as caught:
        await kind.make(url).__aenter__()
    assert "secret" not in whole_text(caught.value)
    assert f"127.0.0.1:{own_redis.port}/0" in str(caught.value)


async def test_a_server_that_speaks_something_else_is_an_error_at_the_start(kind: Kind) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}"):
            await kind.make(f"redis://127.0.0.1:{port}").__aenter__()


async def test_a_user_who_may_only_publish_can_and_only_where_it_may(kind: Kind, own_redis: RedisServer) -> None:
    await command(own_redis.url, "ACL", "SETUSER", "shop", "on", ">right", *kind.rights)
    url = own_redis.url.replace("redis://", "redis://shop:right@")
    async with kind.make(url) as broker:
        first, refused, last = await broker.publish([outgoing(1), outgoing(2, "payments"), outgoing(3)])
    assert (first, last) == (None, None)
    assert isinstance(refused, BrokerRefusedError)
    assert "publish to 'payments'" in str(refused)
    assert f"ACL SETUSER <user> {kind.rights[0]}" in str(refused)


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://user:sec/ret@localhost"])
def test_what_is_no_redis_url_is_refused_without_being_repeated(kind: Kind, url: str) -> None:
    with pytest.raises(ConfigurationError, match="no Redis URL") as caught:
        kind.make(url)
    assert "sec" not in whole_text(caught.value)


def test_a_blocking_client_is_refused(kind: Kind) -> None:
    client: Any = redis.Redis()
    with pytest.raises(ConfigurationError, match=r"a redis\.asyncio\.Redis, not redis\.client\.Redis"):
        kind.make(client)


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"max_connections": 0}])
def test_limits_that_let_nothing_through_are_refused(kind: Kind, settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        kind.make("redis://localhost", **settings)


# In the middle


async def test_a_killed_server_refuses_each_message_and_a_restarted_one_takes_them_again(
    kind: Kind, own_redis: RedisServer
) -> None:
    async with kind.make(own_redis.url) as broker:
        assert await broker.publish(batch(2)) == [None, None]
        own_redis.kill()
        answers = await broker.publish(batch(2))
        assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 2
        assert answers[0] is not answers[1]
        await to_thread.run_sync(own_redis.start)
        assert await broker.publish(batch(2)) == [None, None]


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced(kind: Kind, own_redis: RedisServer) -> None:
    async with kind.make(own_redis.url) as broker:
        assert await broker.publish([outgoing(1)]) == [None]
        await to_thread.run_sync(own_redis.restart)
        assert await broker.publish([outgoing(2)]) == [None]


async def test_a_server_that_hangs_refuses_after_the_timeout_and_takes_messages_when_it_wakes(
    kind: Kind, own_redis: RedisServer
) -> None:
    async with kind.make(own_redis.url, timeout=0.3) as broker:
        own_redis.pause()
        (answer,) = await broker.publish([outgoing(1)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "did not answer within 0.3 s" in str(answer)
        own_redis.resume()
        assert await broker.publish([outgoing(2)]) == [None]


async def test_waiting_for_a_connection_counts_against_the_timeout(kind: Kind, own_redis: RedisServer) -> None:
    async with kind.make(own_redis.url, timeout=0.3, max_connections=1) as broker:
        own_redis.pause()
        answers = await asyncio.gather(*[broker.publish([outgoing(1)]) for _ in range(3)])
        assert [type(answer) for (answer,) in answers] == [BrokerUnavailableError] * 3
        own_redis.resume()
        assert await broker.publish([outgoing(2)]) == [None]


async def test_a_cancelled_publish_leaves_no_answer_behind_for_the_next_command(
    kind: Kind, own_redis: RedisServer
) -> None:
    with Proxy(own_redis.port) as proxy:
        async with Client.from_url(through(proxy), max_connections=1) as client, kind.make(client) as broker:
            moment = proxy.when(kind.word.encode(), "hold")
            publishing = asyncio.ensure_future(broker.publish(batch(5)))
            await moment.was_answered()
            await during(0.05, publishing)
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
            proxy.release()
            assert await client.echo("mine") == b"mine"
            assert await broker.publish(batch(2)) == [None, None]


async def test_a_publish_cancelled_at_any_step_gives_its_connection_back_clean(
    kind: Kind, redis_server: Running
) -> None:
    async with Client.from_url(redis_server.url, max_connections=1, protocol=2) as client:
        broker = kind.make(client)
        for steps in range(20):
            await client.connection_pool.disconnect()
            publishing = asyncio.ensure_future(broker.publish(batch(5)))
            for _ in range(steps):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            assert await client.echo("mine") == b"mine"


async def test_a_refused_command_does_not_show_the_payload_that_the_server_repeats(kind: Kind) -> None:
    with RedisServer("--rename-command", kind.word, "") as server:
        async with kind.make(server.url) as broker:
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
async def test_what_a_server_cannot_do_at_the_moment_is_no_reason_to_give_up(kind: Kind, reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"*"):
                writer.write(reply)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerUnavailableError):
            await kind.make(f"redis://127.0.0.1:{port}").__aenter__()


# Whose client it is


async def test_a_client_that_was_handed_over_is_not_closed(kind: Kind, redis_server: Running) -> None:
    async with Client.from_url(redis_server.url) as client:
        number = await client.client_id()
        async with kind.make(client) as broker:
            assert await broker.publish([outgoing(1)]) == [None]
        assert await client.client_id() == number


async def test_its_own_client_is_closed_by_the_last_user(kind: Kind, own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with kind.make(through(proxy)) as broker:
            async with broker:
                await broker.publish([outgoing(1)])
            assert proxy.opened == 1
            assert await broker.publish([outgoing(1)]) == [None]
            assert proxy.opened == 1
        (answer,) = await broker.publish([outgoing(2)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "was closed" in str(answer)
        async with asyncio.timeout(10):
            # The server hears of it by way of the proxy; what is left is who asks.
            while len((await command(own_redis.url, "CLIENT", "LIST")).splitlines()) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with broker:
            assert await broker.publish([outgoing(3)]) == [None]


async def test_a_broker_that_was_not_entered_connects_when_it_is_used(kind: Kind, redis_server: Running) -> None:
    async with Client.from_url(redis_server.url) as client:
        assert await kind.make(client).publish([outgoing(1)]) == [None]


async def test_a_user_who_cannot_enter_takes_nothing_from_the_one_who_is_in(kind: Kind, own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with kind.make(through(proxy)) as broker:
            moment = proxy.when(kind.word.encode(), "hold")
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
async def test_servers_without_host_and_port_are_named_too(kind: Kind, client: Any, place: str) -> None:
    with pytest.raises(BrokerUnavailableError, match=place):
        await kind.make(client, timeout=0.05).__aenter__()
