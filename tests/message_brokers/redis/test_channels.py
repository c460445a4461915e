"""Listening to Redis Pub/Sub against real servers: who hears what, what is dropped, and what comes again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from anyio import to_thread

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers import Ack, Dead, Delivery, Later, Outgoing, RedisMessageBroker
from tests.proxy import Proxy
from tests.redis_view import batch, command, outgoing, through
from tests.servers import RedisServer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def broker(own_redis: RedisServer) -> AsyncIterator[RedisMessageBroker]:
    async with RedisMessageBroker(own_redis.url) as broker:
        yield broker


async def receive(subscription: Any, number: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(15):
        while len(found) < number:
            found += await subscription.receive(number - len(found))
    return found


async def nothing(subscription: Any, seconds: float = 0.2) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await subscription.receive(1)


async def heard(subscription: Any, url: str) -> None:
    """Wait until it listens again: somebody has subscribed to its channel."""
    async with asyncio.timeout(15):
        while True:
            with_error = asyncio.ensure_future(subscription.receive(1))
            await asyncio.wait([with_error], timeout=0.05)
            if not with_error.done():
                with_error.cancel()
            elif with_error.exception() is None:
                raise AssertionError("nothing was published")
            await asyncio.wait([with_error])
            try:
                if (await command(url, "PUBSUB", "NUMSUB", "orders"))[1] == 1:
                    return
            except OSError:
                pass


async def test_each_subscription_hears_what_is_published_while_it_listens(broker: RedisMessageBroker) -> None:
    await broker.publish([outgoing(0)])
    async with (
        broker.subscribe("orders", "payments", name="a") as one,
        broker.subscribe("orders", name="a") as two,
    ):
        await broker.publish([Outgoing("orders", b"\xff", "text/plain", "1", "n", "k"), outgoing(2, "payments")])
        first, second = await receive(one, 2)
        assert (first.destination, first.body, first.attempt, first.subscription) == ("orders", b"\xff", 1, "a")
        assert (first.content_type, first.headers, first.message_id, first.key) == (None, {}, None, None)
        assert second.destination == "payments"
        assert [delivery.body for delivery in await receive(two, 1)] == [b"\xff"]
        await nothing(two)
        assert one.dead_letters is None


async def test_a_destination_is_named_without_the_prefix(own_redis: RedisServer) -> None:
    async with (
        RedisMessageBroker(own_redis.url, channel_prefix="shop:") as broker,
        broker.subscribe("orders", name="a") as subscription,
    ):
        await broker.publish([outgoing(1)])
        assert [one.destination for one in await receive(subscription, 1)] == ["orders"]


async def test_outcomes_are_carried_out_in_memory(broker: RedisMessageBroker, caplog: pytest.LogCaptureFixture) -> None:
    async with broker.subscribe("orders", name="a") as subscription:
        await broker.publish(batch(4))
        acked, later, dead, back = await receive(subscription, 4)
        acked.outcome, later.outcome, dead.outcome = Ack(), Later(0.2), Dead("no good")
        assert await subscription.settle([acked, later, dead, back]) == [None] * 4
        assert await subscription.settle([later, dead, back]) == [None] * 3  # once more does no harm
        (again,) = await receive(subscription, 1)
        assert (again.body, again.attempt) == (back.body, 1)
        await nothing(subscription, 0.05)
        (again,) = await receive(subscription, 1)
        assert (again.body, again.attempt) == (later.body, 2)
        await nothing(subscription, 0.3)
    assert "given up after 1 attempts, and Pub/Sub keeps none: no good" in caplog.text
    assert "secret" not in caplog.text


async def test_what_does_not_fit_is_dropped_counted_and_logged_once_for_each_burst(
    broker: RedisMessageBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with broker.subscribe("orders", name="a", capacity=10) as subscription:
        for burst in (1, 2):
            await broker.publish(batch(30))
            for _ in range(1000):
                if subscription.dropped == 20 * burst:
                    break
                await asyncio.sleep(0.01)
            found = await receive(subscription, 10)
            assert [one.body for one in found] == [message.body for message in batch(10)]
            for delivery in found:
                delivery.outcome = Ack()
            await subscription.settle(found)
    assert subscription.dropped == 40
    assert caplog.text.count("what comes now is dropped") == 2
    assert caplog.text.count("20 were dropped") == 1


async def test_what_is_out_or_postponed_counts_against_the_capacity(broker: RedisMessageBroker) -> None:
    async with broker.subscribe("orders", name="a", capacity=2) as subscription:
        await broker.publish(batch(2))
        first, _ = await receive(subscription, 2)
        first.outcome = Later(60)
        await subscription.settle([first])
        await broker.publish([outgoing(3)])
        await nothing(subscription)
        assert subscription.dropped == 1


async def test_it_listens_again_after_the_connection_dropped(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisMessageBroker(own_redis.url) as broker,
            RedisMessageBroker(through(proxy)) as far,
            far.subscribe("orders", name="a") as subscription,
        ):
            proxy.cut()
            with pytest.raises(BrokerUnavailableError):
                await subscription.receive(1)
            await broker.publish([outgoing(1)])  # nobody hears this one
            await heard(subscription, own_redis.url)
            await broker.publish([outgoing(2)])
            assert [one.body for one in await receive(subscription, 1)] == [b"secret body 2"]


async def test_while_the_server_is_away_each_call_says_so(own_redis: RedisServer) -> None:
    async with RedisMessageBroker(own_redis.url) as broker, broker.subscribe("orders", name="a") as subscription:
        await to_thread.run_sync(own_redis.kill)
        for _ in range(3):
            with pytest.raises(BrokerUnavailableError):
                async with asyncio.timeout(5):
                    await subscription.receive(1)
        await to_thread.run_sync(own_redis.start)
        await heard(subscription, own_redis.url)


async def test_a_line_that_is_dead_without_a_word_is_noticed(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline_mediator.message_brokers.redis.channels._QUIET", 0.1)
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisMessageBroker(through(proxy), timeout=0.3) as broker,
            broker.subscribe("orders", name="a") as subscription,
        ):
            await nothing(subscription, 0.5)  # silence alone is no trouble
            proxy.stall()
            with pytest.raises(BrokerUnavailableError):
                async with asyncio.timeout(5):
                    await subscription.receive(1)
            proxy.release()


async def test_a_cancelled_receive_loses_nothing(broker: RedisMessageBroker) -> None:
    async with broker.subscribe("orders", name="a") as subscription:
        await nothing(subscription, 0.05)
        await broker.publish([outgoing(1)])
        assert len(await receive(subscription, 1)) == 1


async def test_missing_rights_are_an_error_at_the_start(own_redis: RedisServer) -> None:
    await command(own_redis.url, "ACL", "SETUSER", "few", "on", ">pw", "resetchannels", "&payments", "+@all")
    url = own_redis.url.replace("redis://", "redis://few:pw@")
    async with RedisMessageBroker(url) as broker:
        with pytest.raises(BrokerRefusedError, match=r"consume.*\+subscribe \+ping &<channel>"):
            await broker.subscribe("orders", name="a").__aenter__()
        async with broker.subscribe("payments", name="a"):
            pass


async def test_nothing_stays_open(own_redis: RedisServer) -> None:
    async with RedisMessageBroker(own_redis.url).subscribe("orders", name="a"):
        assert (await command(own_redis.url, "PUBSUB", "NUMSUB", "orders"))[1] == 1
    assert (await command(own_redis.url, "PUBSUB", "NUMSUB", "orders"))[1] == 0


@pytest.mark.parametrize("given", [{"channels": ()}, {"name": ""}, {"capacity": 0}])
def test_what_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"channels": ("orders",), "name": "a", "capacity": 1, **given}
    channels = settings.pop("channels")
    with pytest.raises(ConfigurationError, match="subscription"):
        RedisMessageBroker("redis://localhost").subscribe(*channels, **settings)
