"""Redis Streams against real servers: what an entry holds, and that nothing of a key follows what was refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from anyio import to_thread

from pipeline_mediator.codec import Codec, Decoded, Facts
from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError
from pipeline_mediator.message_brokers import Outgoing, RedisStreamBroker
from pipeline_mediator.message_brokers.redis import RedisStreamBroker as FromRedis
from pipeline_mediator.messages import message
from tests.proxy import Proxy
from tests.redis_view import Client, batch, command, outgoing, through, watching, whole_text
from tests.servers import RedisServer, Running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def broker(own_redis: RedisServer) -> AsyncIterator[RedisStreamBroker]:
    async with RedisStreamBroker(own_redis.url) as broker:
        yield broker


@message("orders.placed", version=2, key="order_id")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    note: str


async def entries(url: str, stream: str = "orders") -> list[dict[str, bytes]]:
    """What the stream holds, as any client reads it."""
    found = await command(url, "XRANGE", stream, "-", "+")
    # redis-py's own reading of XRANGE: pairs of id and fields.
    return [{name.decode(): value for name, value in fields.items()} for _, fields in found]


async def bodies(url: str, stream: str = "orders") -> list[bytes]:
    return [entry["data"] for entry in await entries(url, stream)]


def kinds(answers: Sequence[Exception | None]) -> list[type]:
    return [type(answer) for answer in answers]


def decode(codec: Codec, entry: dict[str, bytes]) -> Decoded:
    fields = dict(entry)
    body, content_type = fields.pop("data"), fields.pop("datacontenttype")
    return codec.decode(body, content_type.decode(), {name: value.decode() for name, value in fields.items()})


# What an entry holds


async def test_an_entry_is_the_event_with_its_attributes_as_fields(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    codec = Codec(OrderPlaced, source="shop")
    facts = Facts("42", "conversation", "cause", "7", {"tenant": "a", "traceparent": "00-0a-0b-01"}, sequence="003")
    encoded = codec.encode(OrderPlaced(7, "für dich"), facts, binary=True)
    sent = Outgoing("orders", encoded.body, encoded.content_type, "42", encoded.name, "7", encoded.headers)
    assert await broker.publish([sent]) == [None]
    (entry,) = await entries(own_redis.url)
    time = entry.pop("time").decode()
    assert entry == {
        "specversion": b"1.0",
        "id": b"42",
        "source": b"shop",
        "type": b"orders.placed",
        "dataversion": b"2",
        "correlationid": b"conversation",
        "causationid": b"cause",
        "partitionkey": b"7",
        "sequence": b"003",
        "traceparent": b"00-0a-0b-01",
        "headers": b'{"tenant":"a"}',
        "datacontenttype": b"application/json",
        "data": '{"order_id":7,"note":"für dich"}'.encode(),
    }
    decoded = decode(codec, {**entry, "time": time.encode()})
    assert decoded.message == OrderPlaced(7, "für dich")
    assert decoded.source == "shop"
    assert (decoded.facts.message_id, decoded.facts.correlation_id) == ("42", "conversation")
    assert (decoded.facts.causation_id, decoded.facts.key, decoded.facts.sequence) == ("cause", "7", "003")
    assert decoded.facts.headers == {"tenant": "a", "traceparent": "00-0a-0b-01"}
    assert decoded.facts.time is not None
    assert decoded.facts.time.isoformat() == time


async def test_a_structured_event_decodes_too(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    codec = Codec(OrderPlaced, source="shop")
    encoded = codec.encode(OrderPlaced(7, "x"), Facts("42", key="7"))
    assert await broker.publish([Outgoing("orders", encoded.body, encoded.content_type, "42", "n", "7")]) == [None]
    (entry,) = await entries(own_redis.url)
    assert (entry["id"], entry["partitionkey"]) == (b"42", b"7")
    assert decode(codec, entry).message == OrderPlaced(7, "x")


async def test_id_key_and_bytes_are_kept_of_what_is_no_event(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    odd = Outgoing("orders", b"\x00\xff\r\n", "application/octet-stream", "id ä", "n", "k\n", {"data": "not this"})
    assert await broker.publish([odd, outgoing(2)]) == [None, None]
    first, second = await entries(own_redis.url)
    assert first == {
        "id": "id ä".encode(),
        "partitionkey": b"k\n",
        "datacontenttype": b"application/octet-stream",
        "data": b"\x00\xff\r\n",
    }
    assert "partitionkey" not in second


async def test_entries_stand_in_the_order_of_the_batch(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    assert await broker.publish(batch(300)) == [None] * 300
    assert await broker.publish([outgoing(300)]) == [None]
    assert await bodies(own_redis.url) == [outgoing(number).body for number in range(301)]


async def test_a_prefix_goes_before_the_destination(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url, stream_prefix="shop:") as broker:
        await broker.publish([outgoing(1)])
    assert await bodies(own_redis.url, "shop:orders") == [b"secret body 1"]


async def test_a_batch_is_one_transaction_for_each_stream_and_one_message_is_none(redis_server: Running) -> None:
    async with RedisStreamBroker(redis_server.url) as broker, watching(redis_server.url) as seen:
        await broker.publish([outgoing(1, "a"), outgoing(2, "b"), outgoing(3, "a")])
        await broker.publish([outgoing(4, "a")])
    sent = [" ".join(words.split()[:2]) for _, words in seen if words.startswith(("MULTI", "XADD", "EXEC"))]
    assert sent == ["MULTI", "XADD a", "XADD a", "EXEC", "XADD b", "XADD a"]
    assert len({client for client, words in seen if words.startswith("XADD")}) == 1


# What is refused, and what may not follow it


async def test_what_is_no_stream_refuses_its_messages_and_no_others(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await command(own_redis.url, "SET", "payments", "a string")
    answers = await broker.publish([outgoing(1, "payments"), outgoing(2), outgoing(3, "payments"), outgoing(4)])
    assert kinds(answers) == [BrokerRefusedError, type(None), BrokerRefusedError, type(None)]
    assert "something else under the name 'payments'" in str(answers[0])
    assert await bodies(own_redis.url) == [b"secret body 2", b"secret body 4"]


async def test_a_message_does_not_follow_a_refused_one_of_its_key_in_another_stream(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await command(own_redis.url, "SET", "payments", "a string")
    answers = await broker.publish(
        [
            outgoing(1, "orders", "k"),
            outgoing(2, "payments", "k"),
            outgoing(3, "orders", "k"),
            outgoing(4, "orders", "other"),
            outgoing(5, "orders"),
        ]
    )
    assert kinds(answers) == [
        type(None),
        BrokerRefusedError,
        BrokerUnavailableError,
        type(None),
        type(None),
    ]
    assert "an earlier message of its key" in str(answers[2])
    assert await bodies(own_redis.url) == [b"secret body 1", b"secret body 4", b"secret body 5"]


async def test_a_full_server_takes_a_batch_whole_or_not_at_all(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url) as broker:
        assert await broker.publish(batch(2)) == [None, None]
        used = (await command(own_redis.url, "INFO", "memory"))["used_memory"]
        # Full somewhere within the batch, or before it, and never again empty enough for what follows.
        await command(own_redis.url, "CONFIG", "SET", "maxmemory", used + 200_000)
        big = [Outgoing("orders", b"x" * 10_000, "text/plain", f"{n}", "n", "k") for n in range(50)]
        answers = await broker.publish(big)
        assert kinds(answers) == [BrokerUnavailableError] * 50
        assert "at the moment: command not allowed when used memory" in str(answers[0])
        assert len(await bodies(own_redis.url)) == 2
        await command(own_redis.url, "CONFIG", "SET", "maxmemory", 0)
        assert await broker.publish(big) == [None] * 50
        assert len(await bodies(own_redis.url)) == 52


async def test_a_demoted_server_takes_nothing_and_its_successor_is_looked_up(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisStreamBroker(through(proxy)) as broker:
            assert await broker.publish(batch(2)) == [None, None]
            await command(own_redis.url, "REPLICAOF", "127.0.0.1", 1)
            for _ in range(2):
                assert kinds(await broker.publish(batch(2))) == [BrokerUnavailableError] * 2
            opened = proxy.opened
            await command(own_redis.url, "REPLICAOF", "NO", "ONE")
            assert await broker.publish(batch(2)) == [None, None]
            assert proxy.opened == opened + 1
    assert len(await bodies(own_redis.url)) == 4


async def test_a_server_that_lacks_replicas_is_no_reason_to_give_up(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url) as broker:
        await command(own_redis.url, "CONFIG", "SET", "min-replicas-to-write", 1)
        answers = await broker.publish(batch(2))
        assert kinds(answers) == [BrokerUnavailableError] * 2
        assert "NOREPLICAS" in str(answers[0])


async def test_a_user_without_transactions_is_refused_at_the_start(own_redis: RedisServer) -> None:
    await command(own_redis.url, "ACL", "SETUSER", "shop", "on", ">right", "+xadd", "+ping", "~*")
    url = own_redis.url.replace("redis://", "redis://shop:right@")
    with pytest.raises(BrokerRefusedError, match=r"\+xadd \+multi \+exec"):
        await RedisStreamBroker(url).__aenter__()
    # Not entered, it would not be known that nothing of a key follows what was refused.
    async with Client.from_url(url) as client:
        assert kinds(await RedisStreamBroker(client).publish(batch(2))) == [BrokerRefusedError] * 2


async def test_a_refused_batch_does_not_show_what_was_in_it() -> None:
    with RedisServer("--rename-command", "XADD", "") as server:
        async with RedisStreamBroker(server.url) as broker:
            answers = await broker.publish(batch(2))
    assert kinds(answers) == [BrokerRefusedError] * 2
    assert "secret" not in "".join(whole_text(answer) for answer in answers if answer is not None)


async def test_a_line_that_dies_within_a_batch_leaves_nothing_of_it(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisStreamBroker(through(proxy)) as broker:
            # So much that it needs many packets: the last is cut off.
            large = [Outgoing("orders", bytes(100_000), "text/plain", f"{n}", "n") for n in range(20)]
            proxy.when(b"the last one", "cut")
            answers = await broker.publish([*large, Outgoing("orders", b"the last one", "text/plain", "l", "n")])
            assert kinds(answers) == [BrokerUnavailableError] * 21
            assert await entries(own_redis.url) == []
            assert await broker.publish(batch(2)) == [None, None]
    assert len(await entries(own_redis.url)) == 2


async def test_an_answer_that_is_lost_is_no_acceptance_and_nothing_is_sent_twice(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisStreamBroker(through(proxy)) as broker:
            proxy.when(b"EXEC", "cut reply")
            answers = await broker.publish(batch(3))
            assert kinds(answers) == [BrokerUnavailableError] * 3
            assert len({id(answer) for answer in answers}) == 3
            assert await broker.publish([outgoing(3)]) == [None]
    assert await bodies(own_redis.url) == [outgoing(number).body for number in range(4)]


async def test_the_timeout_is_for_the_whole_call(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url, timeout=0.3) as broker:
        own_redis.pause()
        between = [outgoing(number, f"stream {number % 2}", "k") for number in range(20)]
        async with asyncio.timeout(3):
            answers = await broker.publish([*between, outgoing(20, "stream 0")])
        assert kinds(answers) == [BrokerUnavailableError] * 21
        own_redis.resume()


async def test_what_was_accepted_is_there_after_a_restart_of_a_server_that_keeps_a_log() -> None:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        async with RedisStreamBroker(server.url) as broker:
            assert await broker.publish(batch(3)) == [None] * 3
            await to_thread.run_sync(server.restart)
            assert await broker.publish([outgoing(3)]) == [None]
        assert await bodies(server.url) == [outgoing(number).body for number in range(4)]


async def test_many_publishers_lose_nothing_while_the_server_restarts() -> None:
    accepted: set[str] = set()
    begun = asyncio.Event()

    async def publish(broker: RedisStreamBroker, publisher: int) -> None:
        for number in range(10):
            ids = [f"{publisher} {number} {n}" for n in range(5)]
            messages = [Outgoing("orders", b"", "text/plain", one, "n", f"{publisher}") for one in ids]
            for _ in range(200):
                answers = await broker.publish(messages)
                accepted.update(one for one, answer in zip(ids, answers, strict=True) if answer is None)
                if len(accepted) > 100:
                    begun.set()
                if not any(answers):
                    break
                await asyncio.sleep(0.01)

    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        async with RedisStreamBroker(server.url, timeout=1.0) as broker:
            publishing = asyncio.gather(*[publish(broker, publisher) for publisher in range(10)])
            await begun.wait()
            await to_thread.run_sync(server.restart)
            await publishing
        found = [entry["id"].decode() for entry in await entries(server.url)]
    assert len(accepted) == 500
    assert set(found) == accepted
    for publisher in range(10):
        first_copies = [one for one in dict.fromkeys(found) if one.startswith(f"{publisher} ")]
        assert first_copies == [f"{publisher} {number} {n}" for number in range(10) for n in range(5)]


def test_its_features_say_what_a_stream_is() -> None:
    features = RedisStreamBroker("redis://localhost").features
    assert (features.system, features.durable, features.headers, features.ordered_by_key) == ("redis", True, True, True)
    assert FromRedis is RedisStreamBroker


def test_it_names_itself_where_something_else_than_a_client_is_given() -> None:
    client: Any = 7
    with pytest.raises(Exception, match="RedisStreamBroker takes a URL"):
        RedisStreamBroker(client)
