"""Consuming Redis Streams against real servers: who gets what, when again, and what survives whose death."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anyio import to_thread

from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
)
from pipeline_mediator.message_brokers import Ack, Dead, Delivery, Later, Outcome, Outgoing, RedisStreamBroker
from pipeline_mediator.message_brokers.redis.scripts import COUNT
from tests.proxy import Proxy
from tests.redis_view import Client, batch, command, outgoing, through, watching
from tests.servers import RedisServer

IDLE = 0.6
"""Seconds; short enough to wait for, long enough for a machine that does other things too."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def broker(own_redis: RedisServer) -> AsyncIterator[RedisStreamBroker]:
    async with RedisStreamBroker(own_redis.url) as broker:
        yield broker


class Dying:
    """A consumer whose process ends between two steps: nothing is given back, nothing is said."""

    def __init__(self, subscription: Any) -> None:
        self.subscription = subscription

    async def die(self) -> None:
        for task in self.subscription._tasks:
            task.cancel()
        await asyncio.wait(self.subscription._tasks)
        await self.subscription._hang_up()
        self.subscription._begun = False


@asynccontextmanager
async def doomed(subscription: Any) -> AsyncGenerator[Any]:
    """Entered, and never left."""
    await subscription.__aenter__()
    try:
        yield subscription
    finally:
        if subscription._begun:
            await Dying(subscription).die()


async def receive(subscription: Any, number: int, limit: int = 50) -> list[Delivery]:
    """That many deliveries, whatever it takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(20):
        while len(found) < number:
            try:
                found += await subscription.receive(min(limit, number - len(found)))
            except BrokerUnavailableError:
                await asyncio.sleep(0.02)
    return found


async def settle(subscription: Any, deliveries: Iterable[Delivery], outcome: Outcome | None) -> None:
    settling = list(deliveries)
    for delivery in settling:
        delivery.outcome = outcome
    assert await subscription.settle(settling) == [None] * len(settling)


async def nothing(subscription: Any, seconds: float = 0.3) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await subscription.receive(1)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def pending(url: str, group: str = "warehouse", stream: str = "orders") -> int:
    number: int = (await command(url, "XPENDING", stream, group))["pending"]
    return number


def lost(deliveries: Sequence[Delivery]) -> Callable[[], bool]:
    return lambda: all(one.lost for one in deliveries)


def ids(deliveries: Sequence[Delivery]) -> list[str | None]:
    return [delivery.message_id for delivery in deliveries]


def keyed(*numbers_and_keys: tuple[int, str]) -> list[Outgoing]:
    return [outgoing(number, key=key) for number, key in numbers_and_keys]


# Reading and acknowledging


async def test_what_was_published_before_and_after_it_began_is_delivered_once(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(200))
    async with broker.subscribe("orders", name="warehouse") as subscription:
        first = await receive(subscription, 200)
        await settle(subscription, first, Ack())
        await broker.publish([outgoing(200)])
        (last,) = await receive(subscription, 1)
        await settle(subscription, [last], Ack())
        await nothing(subscription)
    assert ids([*first, last]) == [f"id-{number}" for number in range(201)]
    assert await pending(own_redis.url) == 0


async def test_a_delivery_says_what_the_entry_says(broker: RedisStreamBroker) -> None:
    sent = Outgoing("orders", b"\x00\xff", "application/json", "42", "n", "7", {"type": "t", "source": "shop"})
    await broker.publish([sent])
    async with broker.subscribe("orders", name="warehouse") as subscription:
        (delivery,) = await receive(subscription, 1)
    assert (delivery.destination, delivery.subscription, delivery.attempt) == ("orders", "warehouse", 1)
    assert (delivery.body, delivery.content_type) == (b"\x00\xff", "application/json")
    assert (delivery.message_id, delivery.key) == ("42", "7")
    assert delivery.headers == {"id": "42", "partitionkey": "7", "type": "t", "source": "shop"}


async def test_a_destination_is_named_without_the_prefix(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url, stream_prefix="shop:") as broker:
        await broker.publish([outgoing(1)])
        async with broker.subscribe("orders", name="warehouse") as subscription:
            assert [one.destination for one in await receive(subscription, 1)] == ["orders"]


async def test_several_streams_and_two_groups_that_do_not_know_each_other(broker: RedisStreamBroker) -> None:
    await broker.publish([outgoing(1, "a"), outgoing(2, "b")])
    for name in ("warehouse", "mail"):
        async with broker.subscribe("a", "b", name=name) as subscription:
            found = await receive(subscription, 2)
            assert sorted((one.destination, one.message_id) for one in found) == [("a", "id-1"), ("b", "id-2")]
            await settle(subscription, found, Ack())


async def test_a_group_may_begin_with_what_comes(broker: RedisStreamBroker) -> None:
    await broker.publish([outgoing(1)])
    async with broker.subscribe("orders", name="warehouse", start="$") as subscription:
        await broker.publish([outgoing(2)])
        assert ids(await receive(subscription, 1)) == ["id-2"]


async def test_acknowledgements_of_one_call_are_one_command(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    await broker.publish(batch(40))
    async with broker.subscribe("orders", name="warehouse") as subscription:
        found = await receive(subscription, 40)
        async with watching(own_redis.url) as seen:
            await settle(subscription, found, Ack())
    assert len([words for _, words in seen if words.startswith("XACK")]) == 1


async def test_what_somebody_else_wrote_is_handed_over_as_it_is(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await command(own_redis.url, "XADD", "orders", "*", "what", "is this")
    await command(own_redis.url, "XADD", "orders", "*", b"\xff", b"\xfe", "id", b"\xe9", "data", b"\x80")
    await command(own_redis.url, "XADD", "orders", "*", "data", "one", "data", "two", "partitionkey", "")
    async with broker.subscribe("orders", name="warehouse") as subscription:
        odd, broken, double = await receive(subscription, 3)
        assert (odd.body, odd.content_type, odd.headers, odd.message_id) == (b"", None, {"what": "is this"}, None)
        assert broken.headers == {"\\xff": "\\xfe", "id": "\\xe9"}
        assert (broken.message_id, broken.body) == ("\\xe9", b"\x80")
        assert (double.body, double.key) == (b"two", "")
        await settle(subscription, [odd, broken, double], Dead("no event"))
        dead = await subscription.dead_letters.list(10)
        assert [one.delivery.headers for one in dead] == [one.headers for one in (odd, broken, double)]


async def test_three_copies_of_one_id_are_three_deliveries_and_one_key_lets_one_out_at_a_time(
    broker: RedisStreamBroker,
) -> None:
    await broker.publish([outgoing(1, key="a")] * 3)
    async with broker.subscribe("orders", name="warehouse") as subscription:
        for _ in range(3):
            (copy,) = await subscription.receive(10)
            assert copy.message_id == "id-1"
            await nothing(subscription, 0.1)
            await settle(subscription, [copy], Ack())
        await nothing(subscription, 0.1)


@pytest.mark.parametrize("outcome", [Ack(), Dead("no"), Later(60), None])
async def test_the_next_of_a_key_is_handed_over_after_the_one_before(
    broker: RedisStreamBroker, outcome: Outcome | None
) -> None:
    await broker.publish(keyed((1, "a"), (2, "a"), (3, "b"), (4, "a")))
    async with broker.subscribe("orders", name="warehouse") as subscription:
        first = await receive(subscription, 2)
        assert ids(first) == ["id-1", "id-3"]
        await nothing(subscription, 0.1)
        await settle(subscription, first[:1], outcome)
        (following,) = await receive(subscription, 1)
        assert following.message_id == "id-2"


async def test_reading_ahead_is_bounded(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    await broker.publish(batch(2000))
    async with broker.subscribe("orders", name="warehouse") as subscription:
        await receive(subscription, 2, limit=2)
        await asyncio.sleep(0.2)
        assert await pending(own_redis.url) < 600


async def test_a_cancelled_receive_loses_nothing(broker: RedisStreamBroker) -> None:
    async with broker.subscribe("orders", name="warehouse") as subscription:
        receiving = asyncio.ensure_future(subscription.receive(1))
        await asyncio.sleep(0.05)
        receiving.cancel()
        await broker.publish(batch(3))
        found = await receive(subscription, 3)
        assert ids(found) == ["id-0", "id-1", "id-2"]
        assert {one.attempt for one in found} == {1}


# Outcomes


async def test_a_postponed_delivery_comes_again_when_it_is_due_and_its_attempts_count(
    broker: RedisStreamBroker,
) -> None:
    await broker.publish([outgoing(1)])
    loop = asyncio.get_running_loop()
    async with broker.subscribe("orders", name="warehouse") as subscription:
        for attempt in (1, 2, 3):
            (delivery,) = await receive(subscription, 1)
            assert delivery.attempt == attempt
            begin = loop.time()
            await settle(subscription, [delivery], Later(0.2))
        await receive(subscription, 1)
        assert loop.time() - begin >= 0.19


async def test_what_is_given_back_is_another_consumers_at_once_and_counts_as_no_attempt(
    broker: RedisStreamBroker,
) -> None:
    await broker.publish([outgoing(1)])
    async with broker.subscribe("orders", name="warehouse") as one:
        (delivery,) = await receive(one, 1)
        await settle(one, [delivery], Later())
        (delivery,) = await receive(one, 1)
        assert delivery.attempt == 2
        await settle(one, [delivery], None)
    async with broker.subscribe("orders", name="warehouse") as two:
        assert (await receive(two, 1))[0].attempt == 2


async def test_what_was_not_settled_when_it_ended_is_there_at_once_for_others(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(30))
    async with broker.subscribe("orders", name="warehouse") as one:
        await receive(one, 10, limit=10)
    async with broker.subscribe("orders", name="warehouse") as two:
        found = await receive(two, 30)
        # Those that were out were attempted, those that were only read ahead were not.
        assert {one.message_id: one.attempt for one in found} == {
            f"id-{number}": 2 if number < 10 else 1 for number in range(30)
        }
        await settle(two, found, Ack())
    assert await pending(own_redis.url) == 0


async def test_postponed_deliveries_survive_the_death_of_server_and_consumer() -> None:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        async with RedisStreamBroker(server.url) as broker:
            await broker.publish(batch(3))
            async with doomed(broker.subscribe("orders", name="warehouse", min_idle=IDLE)) as one:
                found = await receive(one, 3)
                await settle(one, found[:2], Later(1.5))
                await settle(one, found[2:], Ack())
            await to_thread.run_sync(server.restart)
        async with (
            RedisStreamBroker(server.url) as broker,
            broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two,
        ):
            await nothing(two, 0.5)
            found = await receive(two, 2)
            assert [(one.message_id, one.attempt) for one in found] == [("id-0", 2), ("id-1", 2)]


async def test_of_two_consumers_one_gets_what_is_due(broker: RedisStreamBroker) -> None:
    await broker.publish(batch(50))
    seen: list[tuple[str | None, int]] = []

    async def consume(subscription: Any) -> None:
        while len(seen) < 150:
            for delivery in await subscription.receive(5):
                seen.append((delivery.message_id, delivery.attempt))
                outcome = Later(0.02) if delivery.attempt < 3 else Ack()
                await settle(subscription, [delivery], outcome)

    async with (
        broker.subscribe("orders", name="warehouse", min_idle=IDLE) as one,
        broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two,
    ):
        consuming = [asyncio.ensure_future(consume(one)), asyncio.ensure_future(consume(two))]
        await until(lambda: len(seen) >= 150)
        await asyncio.sleep(0.3)
        for task in consuming:
            task.cancel()
        await asyncio.wait(consuming)
    assert sorted(seen) == sorted((f"id-{number}", attempt) for number in range(50) for attempt in (1, 2, 3))


async def test_a_time_of_which_the_note_is_gone_does_not_lose_the_entry(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish([outgoing(1)])
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        await settle(subscription, await receive(subscription, 1), Later(3600))
        await command(own_redis.url, "DEL", "{orders}:warehouse:later")
        (delivery,) = await receive(subscription, 1)
        assert delivery.attempt == 2


async def test_settling_again_what_is_settled_does_no_harm(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    await broker.publish(batch(4))
    async with broker.subscribe("orders", name="warehouse") as subscription:
        found = await receive(subscription, 4)
        outcomes: list[Outcome | None] = [Ack(), Later(60), Dead("no"), None]
        for delivery, outcome in zip(found, outcomes, strict=True):
            delivery.outcome = outcome
        assert await subscription.settle(found) == [None] * 4
        assert await subscription.settle(found) == [None] * 4
        assert await subscription.dead_letters.count() == 1
    assert await pending(own_redis.url) == 2


@pytest.mark.parametrize("action", ["cut", "cut reply"])
async def test_settling_may_be_tried_again_when_no_answer_came(own_redis: RedisServer, action: Any) -> None:
    with Proxy(own_redis.port) as proxy:
        async with RedisStreamBroker(through(proxy), timeout=2) as broker:
            await broker.publish(batch(4))
            async with broker.subscribe("orders", name="warehouse") as subscription:
                found = await receive(subscription, 4)
                outcomes: list[Outcome] = [Ack(), Later(60), Dead("no"), Ack()]
                for delivery, outcome in zip(found, outcomes, strict=True):
                    delivery.outcome = outcome
                proxy.when(b"XACK\r\n", action)  # the command, not a script that has the word
                answers = await subscription.settle(found)
                assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 4
                assert await subscription.settle(found) == [None] * 4
                assert await subscription.dead_letters.count() == 1
                await nothing(subscription)
    assert await pending(own_redis.url) == 1


async def test_a_delivery_of_somebody_else_is_refused(broker: RedisStreamBroker) -> None:
    await broker.publish([outgoing(1)])
    async with (
        broker.subscribe("orders", name="warehouse") as one,
        broker.subscribe("orders", name="mail") as two,
    ):
        strange = Delivery("orders", b"", None, {}, "1", None, 1, "warehouse", outcome=Ack())
        (answer,) = await two.settle([strange])
        assert isinstance(answer, BrokerRefusedError)
        await settle(one, await receive(one, 1), Ack())


# Dead letters


async def test_a_dead_letter_keeps_what_came_and_says_why_and_where_from(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish([Outgoing("orders", b"body", "text/plain", "42", "n", "7", {"type": "t"})])
    async with broker.subscribe("orders", name="warehouse") as subscription:
        await settle(subscription, await receive(subscription, 1), Later())
        (delivery,) = await receive(subscription, 1)
        await settle(subscription, [delivery], Dead("tried twice"))
        assert await subscription.dead_letters.count() == 1
        (dead,) = await subscription.dead_letters.list(10)
    assert dead.reason == "tried twice"
    assert dead.died_at is not None
    assert dead.died_at.tzinfo is not None
    kept = dead.delivery
    assert (kept.destination, kept.subscription, kept.attempt) == ("orders", "warehouse", 2)
    assert (kept.body, kept.content_type, kept.message_id, kept.key) == (b"body", "text/plain", "42", "7")
    assert kept.headers == {"id": "42", "partitionkey": "7", "type": "t"}
    ((_, fields),) = await command(own_redis.url, "XRANGE", "{orders}:warehouse:dead", "-", "+")
    assert (fields[b"dead-stream"], fields[b"dead-group"], fields[b"data"]) == (b"orders", b"warehouse", b"body")
    assert await pending(own_redis.url) == 0


async def test_dead_letters_are_listed_retried_and_dropped_without_a_subscription_that_runs(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish([outgoing(number, "ab"[number % 2], "k") for number in range(10)])
    subscription = broker.subscribe("a", "b", name="warehouse")
    mail = broker.subscribe("a", "b", name="mail")
    async with subscription:
        for _ in range(5):
            await settle(subscription, await receive(subscription, 2), Dead("no"))
    letters = subscription.dead_letters
    assert await letters.count() == 10
    everything = await letters.list(100)
    pages = [*(await letters.list(4))]
    while further := await letters.list(4, after=pages[-1].id):
        pages += further
    assert [one.id for one in pages] == [one.id for one in everything]
    assert len({one.id for one in pages}) == 10
    assert await letters.drop([everything[0].id, "1-1/a"]) == 1
    assert await letters.retry([everything[1].id, everything[1].id, everything[0].id]) == 1
    assert await letters.count() == 8
    async with subscription, mail:
        (again,) = await receive(subscription, 1)
        assert again.message_id == everything[1].delivery.message_id
        assert (again.destination, again.attempt) == (everything[1].delivery.destination, 1)
        await settle(subscription, [again], Later())
        (again,) = await receive(subscription, 1)
        assert again.attempt == 2
        await settle(subscription, [again], Dead("still no"))
        assert await letters.count() == 9
        assert (await letters.list(100))[-1].delivery.headers == everything[1].delivery.headers
        assert len(await receive(mail, 2)) == 2  # only the first of each key: nothing of ours
    assert await command(own_redis.url, "XLEN", f"{{{again.destination}}}:warehouse:again") == 0
    with pytest.raises(ValueError, match="is no dead letter"):
        await letters.drop(["7"])


async def test_a_dead_letter_that_cannot_be_written_leaves_the_message_where_it_was(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish([outgoing(1), outgoing(2)])
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        (first, second) = await receive(subscription, 2)
        await command(own_redis.url, "SET", "{orders}:warehouse:dead", "something else")
        first.outcome, second.outcome = Dead("no"), Ack()
        refused, fine = await subscription.settle([first, second])
        assert isinstance(refused, BrokerRefusedError)
        assert fine is None
        assert await pending(own_redis.url) == 1
        await command(own_redis.url, "DEL", "{orders}:warehouse:dead")
        (again,) = await receive(subscription, 1)
        assert again.message_id == "id-1"
        await settle(subscription, [again], Dead("no"))
        assert await subscription.dead_letters.count() == 1


async def test_an_entry_of_thousands_of_fields_dies_like_any_other(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    words = [word for number in range(6000) for word in (f"name{number}", "value")]
    await command(own_redis.url, "XADD", "orders", "*", *words)
    async with broker.subscribe("orders", name="warehouse") as subscription:
        await settle(subscription, await receive(subscription, 1), Dead("too wide"))
        (dead,) = await subscription.dead_letters.list(1)
        assert len(dead.delivery.headers) == 6000
        assert await subscription.dead_letters.retry([dead.id]) == 1
        assert len((await receive(subscription, 1))[0].headers) == 6000


# Who is dead, slow or cut off


async def test_what_a_dead_consumer_had_goes_to_another_after_min_idle_and_its_name_goes(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(40))
    async with doomed(broker.subscribe("orders", name="warehouse", min_idle=IDLE)) as one:
        await receive(one, 20)
        consumer = one.consumer
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two:
        found = await receive(two, 40)
        assert sorted(one.attempt for one in found) == [2] * 40
        await settle(two, found, Ack())

        async def names() -> list[bytes]:
            return [one[b"name"] for one in await command(own_redis.url, "XINFO", "CONSUMERS", "orders", "warehouse")]

        for _ in range(200):
            if consumer.encode() not in await names():
                break
            await asyncio.sleep(0.05)
    assert await names() in ([], [b"~later"])


CONSUMER = """
import asyncio, sys
from pipeline_mediator.message_brokers import Ack, Dead, Later, RedisStreamBroker

async def main():
    async with RedisStreamBroker(sys.argv[1]).subscribe("orders", name="warehouse", min_idle=0.6) as subscription:
        while True:
            deliveries = await subscription.receive(7)
            await asyncio.sleep(0.01)  # or the first of them has handled all before it can be killed
            for delivery in deliveries:
                number = int(delivery.message_id.removeprefix("id-"))
                delivery.outcome = Ack() if delivery.attempt > 1 else (Ack(), Later(0.1), None, Dead("no"))[number % 4]
                if isinstance(delivery.outcome, (Ack, Dead)):
                    print(delivery.message_id, flush=True)
            await subscription.settle(deliveries)

asyncio.run(main())
"""


async def test_consumers_that_are_killed_at_any_moment_lose_nothing(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    handled: set[str | None] = set()
    await broker.publish(batch(400))
    for kill in range(4):
        words = (sys.executable, "-c", CONSUMER, own_redis.url)
        process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(20):
            for _ in range(20 + 11 * kill):
                handled.add((await process.stdout.readline()).decode().strip())
            process.kill()
            handled.update((await process.stdout.read()).decode().split())
            await process.wait()
    assert 80 < len(handled) < 400
    async with asyncio.timeout(20), broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        while len(handled) < 400:
            found = await receive(subscription, 1)
            await settle(subscription, found, Ack())
            handled.update(ids(found))
    assert handled == {f"id-{number}" for number in range(400)}


async def test_a_slow_handler_keeps_its_message(broker: RedisStreamBroker, own_redis: RedisServer) -> None:
    await broker.publish(batch(2))
    async with (
        broker.subscribe("orders", name="warehouse", min_idle=0.3) as one,
        broker.subscribe("orders", name="warehouse", min_idle=0.3) as two,
    ):
        found = await receive(one, 1)
        found += await receive(two if await pending(own_redis.url) < 2 else one, 1)
        await nothing(one, 0.6)
        await nothing(two, 0.6)
        assert [delivery.lost for delivery in found] == [False, False]
        async with Client.from_url(own_redis.url) as client:
            details = await client.xpending_range("orders", "warehouse", "-", "+", 10)
        assert [one["times_delivered"] for one in details] == [1, 1]


async def test_a_consumer_that_is_cut_off_loses_its_messages_and_another_has_them(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(own_redis.url) as broker,
            RedisStreamBroker(through(proxy), timeout=0.5) as far,
        ):
            await broker.publish(keyed((1, "a"), (2, "a")))
            async with (
                far.subscribe("orders", name="warehouse", min_idle=IDLE) as one,
                broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two,
            ):
                (first,) = await receive(one, 1)
                told = asyncio.Event()
                first.on_lost = told.set
                proxy.stall()
                async with asyncio.timeout(10):
                    await told.wait()
                assert first.lost
                (taken,) = await receive(two, 1)
                assert (taken.message_id, taken.attempt) == ("id-1", 2)
                proxy.release()
                first.outcome = Ack()
                (answer,) = await one.settle([first])
                assert isinstance(answer, BrokerRefusedError)
                await settle(two, [taken], Ack())
                assert ids(await receive(two, 1)) == ["id-2"]


@pytest.mark.parametrize("ordered", [False, True])
async def test_entries_of_which_the_answer_was_lost_are_found_again_in_their_place(
    own_redis: RedisServer, *, ordered: bool
) -> None:
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(own_redis.url) as broker,
            RedisStreamBroker(through(proxy)) as far,
            far.subscribe("orders", name="warehouse", ordered=ordered) as subscription,
        ):
            lost = proxy.when(b"XREADGROUP\r\n", "cut reply")
            receiving = asyncio.ensure_future(subscription.receive(3))
            await lost.happened()
            await broker.publish([outgoing(number, key="a") for number in range(3)])
            with pytest.raises(BrokerUnavailableError):
                await receiving
            await broker.publish([outgoing(number, key="a") for number in range(3, 6)])
            for number in range(6):
                (delivery,) = await receive(subscription, 1)
                assert (delivery.message_id, delivery.attempt) == (f"id-{number}", 1)
                await settle(subscription, [delivery], Ack())


async def test_a_read_that_arrives_late_takes_nothing_out_of_its_turn(own_redis: RedisServer) -> None:
    """A network kept it back; carried out at last, it would be given entries that nobody hears of."""
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(own_redis.url) as broker,
            RedisStreamBroker(through(proxy), timeout=1.0) as far,
            far.subscribe("orders", name="warehouse", ordered=True, min_idle=20.0) as subscription,
        ):
            late = proxy.when(b"XREADGROUP\r\n", "late")
            receiving = asyncio.ensure_future(subscription.receive(3))
            await late.happened()
            after = proxy.when(b"XREADGROUP\r\n", "late")
            with pytest.raises(BrokerUnavailableError):
                await receiving
            receiving = asyncio.ensure_future(subscription.receive(3))
            await after.happened()
            await broker.publish([outgoing(0, key="a")])
            late.release()
            await asyncio.sleep(0.1)  # it is at the server now, if anybody there still listens
            await broker.publish([outgoing(1, key="a")])
            after.release()
            found = list(await receiving)
            await settle(subscription, found, Ack())
            found += await receive(subscription, 1)
            assert ids(found) == ["id-0", "id-1"]


async def test_what_an_operator_acknowledged_is_lost_and_what_was_trimmed_away_is_handled(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(2))
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        first, second = await receive(subscription, 2)
        entries = await command(own_redis.url, "XRANGE", "orders", "-", "+")
        await command(own_redis.url, "XDEL", "orders", entries[1][0])
        await command(own_redis.url, "XACK", "orders", "warehouse", entries[0][0])
        await until(lambda: first.lost)
        await asyncio.sleep(IDLE)
        assert not second.lost  # nobody else can have it
        await settle(subscription, [second], Dead("kept all the same"))
        assert await subscription.dead_letters.count() == 1


async def test_pending_entries_that_were_deleted_are_passed_over(
    broker: RedisStreamBroker, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish(batch(3))
    async with doomed(broker.subscribe("orders", name="warehouse", min_idle=IDLE)) as one:
        await receive(one, 3)
    entries = await command(own_redis.url, "XRANGE", "orders", "-", "+")
    await command(own_redis.url, "XDEL", "orders", entries[0][0], entries[2][0])
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two:
        assert ids(await receive(two, 1)) == ["id-1"]
        await nothing(two)
        assert await pending(own_redis.url) == 1
    assert "of 'orders' were deleted before group 'warehouse' had handled them" in caplog.text


async def test_a_name_that_stays_gets_at_once_what_it_had(broker: RedisStreamBroker) -> None:
    await broker.publish(batch(5))
    async with doomed(broker.subscribe("orders", name="warehouse", consumer="pod-1")) as one:
        await receive(one, 5)
    async with broker.subscribe("orders", name="warehouse", consumer="pod-1") as again:
        assert {one.attempt for one in await receive(again, 5)} == {2}


async def test_connections_that_the_server_kills_are_made_again(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        seen: set[str | None] = set()
        for number in range(0, 100, 10):
            await broker.publish([outgoing(number + one) for one in range(10)])
            async with Client.from_url(own_redis.url) as client:
                await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            (some,) = await receive(subscription, 1)
            seen.add(some.message_id)
            some.outcome = Ack()
            await subscription.settle([some])
        async with asyncio.timeout(20):
            while len(seen) < 100:
                for delivery in await receive(subscription, 1):
                    seen.add(delivery.message_id)
                    delivery.outcome = Ack()
                    await subscription.settle([delivery])


async def test_nothing_is_lost_while_the_server_is_killed_and_starts_again() -> None:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        async with RedisStreamBroker(server.url, timeout=2) as broker:
            await broker.publish(batch(300))
            seen: list[str | None] = []
            kills = {60, 160}
            async with (
                broker.subscribe("orders", name="warehouse", min_idle=IDLE) as one,
                broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two,
            ):
                subscriptions = (one, two)
                turn = 0
                async with asyncio.timeout(40):
                    while len(set(seen)) < 300:
                        turn += 1
                        subscription = subscriptions[turn % 2]
                        try:
                            async with asyncio.timeout(0.5):
                                found = await subscription.receive(7)
                        except (BrokerUnavailableError, TimeoutError):
                            await asyncio.sleep(0.02)
                            continue
                        for delivery in found:
                            delivery.outcome = Ack()
                        if kills and len(set(seen)) > min(kills):
                            kills.remove(min(kills))
                            await to_thread.run_sync(server.restart)
                        answers = await subscription.settle(found)
                        seen += [one.message_id for one, answer in zip(found, answers, strict=True) if answer is None]
            assert len(set(seen)) == 300
            assert await pending(server.url) == 0


async def test_receiving_while_the_server_is_away_says_so_each_time_and_goes_on_when_it_is_back(
    own_redis: RedisServer,
) -> None:
    async with (
        RedisStreamBroker(own_redis.url) as broker,
        broker.subscribe("orders", name="warehouse") as subscription,
    ):
        await to_thread.run_sync(own_redis.kill)
        for _ in range(3):
            with pytest.raises(BrokerUnavailableError):
                async with asyncio.timeout(5):
                    await subscription.receive(1)
        await to_thread.run_sync(own_redis.start)
        for _ in range(100):
            if await broker.publish([outgoing(1)]) == [None]:
                break
            await asyncio.sleep(0.02)
        # The server has forgotten stream and group; they are made again.
        assert ids(await receive(subscription, 1)) == ["id-1"]


@pytest.mark.parametrize("loss", [("XGROUP", "DESTROY", "orders", "warehouse"), ("DEL", "orders"), ("FLUSHALL",)])
async def test_a_group_that_vanishes_is_made_again_and_leaves_nothing_out(
    broker: RedisStreamBroker, own_redis: RedisServer, caplog: pytest.LogCaptureFixture, loss: tuple[str, ...]
) -> None:
    async with broker.subscribe("orders", name="warehouse", start="$", min_idle=IDLE) as subscription:
        await broker.publish([outgoing(0)])
        await settle(subscription, await receive(subscription, 1), Ack())
        await command(own_redis.url, *loss)
        await broker.publish([outgoing(1)])
        seen: list[str | None] = []
        while "id-1" not in seen:
            seen += ids(await receive(subscription, 1))
    assert "has vanished" in caplog.text


# Beginning


async def test_something_else_under_the_name_is_an_error_at_the_start(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await command(own_redis.url, "SET", "orders", "x")
    with pytest.raises(DestinationError, match="something else under the name 'orders'"):
        await broker.subscribe("orders", name="warehouse").__aenter__()
    await command(own_redis.url, "SET", "{payments}:warehouse:later", "x")
    with pytest.raises(DestinationError, match="payments}:warehouse:later"):
        await broker.subscribe("payments", name="warehouse").__aenter__()


async def test_missing_rights_are_an_error_at_the_start_that_lists_them(own_redis: RedisServer) -> None:
    await command(own_redis.url, "ACL", "SETUSER", "few", "on", ">pw", "~*", "+xreadgroup", "+multi", "+exec", "+ping")
    url = own_redis.url.replace("redis://", "redis://few:pw@")
    with pytest.raises(BrokerRefusedError, match=r"does not let this user consume.*\+xreadgroup"):
        await RedisStreamBroker(url).subscribe("orders", name="warehouse").__aenter__()


async def test_the_rights_that_the_error_lists_are_enough(own_redis: RedisServer) -> None:
    await command(own_redis.url, "ACL", "SETUSER", "few", "on", ">pw", "+ping")
    url = own_redis.url.replace("redis://", "redis://few:pw@")
    with pytest.raises(BrokerRefusedError) as caught:
        await RedisStreamBroker(url).subscribe("orders", name="warehouse").__aenter__()
    rights = str(caught.value).partition("<user> ")[2].split()
    rights = [one.replace("<stream>", "orders").replace("<group>", "warehouse") for one in rights]
    await command(own_redis.url, "ACL", "SETUSER", "few", *rights)
    async with RedisStreamBroker(url) as broker:
        await broker.publish(batch(4))
        for ordered in (False, True):
            async with broker.subscribe("orders", name="warehouse", min_idle=0.3, ordered=ordered) as subscription:
                found = await receive(subscription, 2)
                await asyncio.sleep(0.4)
                await settle(subscription, found[:1], Dead("no"))
                await settle(subscription, found[1:], Later())
                (dead,) = await subscription.dead_letters.list(1)
                await subscription.dead_letters.retry([dead.id])
                again = await receive(subscription, 2)
                assert sorted(one.attempt for one in again) in ([1, 1], [1, 2])


async def test_a_server_that_is_away_is_an_error_at_the_start_and_nothing_stays_open(own_redis: RedisServer) -> None:
    own_redis.kill()
    subscription = RedisStreamBroker(own_redis.url).subscribe("orders", name="warehouse")
    with pytest.raises(BrokerUnavailableError):
        await subscription.__aenter__()
    own_redis.start()
    async with subscription:
        await nothing(subscription, 0.05)
    assert (await command(own_redis.url, "CLIENT", "LIST")).count(b"addr=127") == 2  # its own, and its own address


async def test_it_lives_without_its_broker_being_entered_and_after_it_was_left(own_redis: RedisServer) -> None:
    broker = RedisStreamBroker(own_redis.url)
    async with broker.subscribe("orders", name="warehouse") as subscription:
        async with broker:
            await broker.publish([outgoing(1)])
        await settle(subscription, await receive(subscription, 1), Ack())


async def test_a_client_that_decodes_or_speaks_resp3_makes_no_difference(own_redis: RedisServer) -> None:
    for settings in ({"decode_responses": True}, {"protocol": 3}, {"health_check_interval": 1}):
        async with Client.from_url(own_redis.url, **settings) as client:
            broker = RedisStreamBroker(client)
            sent = Outgoing("orders", b"\xff", "text/plain", "1", "n", headers={"a": "ä"})
            assert await broker.publish([sent]) == [None]
            async with broker.subscribe("orders", name="warehouse") as subscription:
                (delivery,) = await receive(subscription, 1)
                assert (delivery.body, delivery.headers["a"]) == (b"\xff", "ä")
                await settle(subscription, [delivery], Dead("no"))
                assert (await subscription.dead_letters.list(1))[-1].delivery.body == b"\xff"


@pytest.mark.parametrize(
    ("streams", "settings"),
    [
        ((), {}),
        (("a", "a"), {}),
        (("a",), {"name": ""}),
        (("a",), {"min_idle": 0}),
        (("a",), {"consumer": "~later"}),
        (("a",), {"start": "5"}),
    ],
)
def test_what_makes_no_sense_is_refused(streams: tuple[str, ...], settings: dict[str, Any]) -> None:
    given: Any = {"name": "warehouse", **settings}
    with pytest.raises(ConfigurationError, match="subscription"):
        RedisStreamBroker("redis://localhost").subscribe(*streams, **given)


# Order over redelivery


async def test_ordered_a_postponed_head_holds_its_key_and_no_other(broker: RedisStreamBroker) -> None:
    await broker.publish(keyed((1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "a")))
    async with broker.subscribe("orders", name="warehouse", ordered=True) as subscription:
        first = await receive(subscription, 2)
        assert ids(first) == ["id-1", "id-3"]
        await settle(subscription, first[:1], Later(0.3))
        await settle(subscription, first[1:], Ack())
        await broker.publish(keyed((6, "a"), (7, "c")))
        order: list[tuple[str | None, int]] = []
        for _ in range(6):
            (one,) = await receive(subscription, 1)
            order.append((one.message_id, one.attempt))
            await settle(subscription, [one], None if order.count(("id-1", 2)) == 1 and one.attempt == 2 else Ack())
    assert [one for one in order if one[0] in {"id-1", "id-2", "id-5", "id-6"}][:2] == [("id-1", 2), ("id-1", 2)]
    assert {("id-4", 1), ("id-7", 1)} <= set(order)


async def test_ordered_one_consumer_serves_and_the_next_takes_over_in_order(broker: RedisStreamBroker) -> None:
    await broker.publish([outgoing(number, key="a") for number in range(6)])
    settings: Any = {"name": "warehouse", "min_idle": IDLE, "ordered": True}
    async with broker.subscribe("orders", **settings) as two:
        async with broker.subscribe("orders", **settings) as one:
            serving, other = (one, two) if await _serves(one, two) else (two, one)
            (first,) = await receive(serving, 1)
            waiting = asyncio.ensure_future(receive(other, 1))
            await settle(serving, [first], Ack())
            (second,) = await receive(serving, 1)
            await settle(serving, [second], Later(0.5))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            waiting.cancel()
        order: list[str | None] = []
        for _ in range(5):
            (delivery,) = await receive(two, 1)
            order.append(delivery.message_id)
            await settle(two, [delivery], Ack())
    assert order == [f"id-{number}" for number in range(1, 6)]


async def _serves(one: Any, two: Any) -> bool:
    await until(lambda: any(lease.held for lease in (*one._member.leases, *two._member.leases)))
    return any(lease.held for lease in one._member.leases)


async def test_ordered_the_dead_ones_entries_come_first_and_in_order(broker: RedisStreamBroker) -> None:
    settings: Any = {"name": "warehouse", "min_idle": IDLE, "ordered": True}
    await broker.publish([outgoing(number, key="ab"[number % 2]) for number in range(20)])
    async with doomed(broker.subscribe("orders", **settings)) as one:
        a, b = await receive(one, 2)
        await settle(one, [a], Later(1.0))
        assert b.message_id == "id-1"
    await broker.publish([outgoing(number, key="ab"[number % 2]) for number in range(20, 30)])
    order: list[str | None] = []
    async with broker.subscribe("orders", **settings) as two:
        for _ in range(30):
            (delivery,) = await receive(two, 1)
            order.append(delivery.message_id)
            await settle(two, [delivery], Ack())
    numbers = [int(str(one).removeprefix("id-")) for one in order]
    assert [one for one in numbers if one % 2 == 0] == list(range(0, 30, 2))
    assert [one for one in numbers if one % 2] == list(range(1, 30, 2))
    assert numbers[0] == 1  # the other key waits for its postponed head


async def test_ordered_a_lease_that_is_lost_takes_the_deliveries_along(own_redis: RedisServer) -> None:
    settings: Any = {"name": "warehouse", "min_idle": IDLE, "ordered": True}
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(own_redis.url) as broker,
            RedisStreamBroker(through(proxy), timeout=0.5) as far,
        ):
            await broker.publish([outgoing(number, key="a") for number in range(3)])
            async with far.subscribe("orders", **settings) as one:
                (first,) = await receive(one, 1)
                async with broker.subscribe("orders", **settings) as two:
                    proxy.stall()
                    (taken,) = await receive(two, 1)
                    assert (first.lost, taken.message_id) == (True, "id-0")
                    proxy.release()
                    await settle(two, [taken], Ack())
                    for number in (1, 2):
                        (taken,) = await receive(two, 1)
                        assert taken.message_id == f"id-{number}"
                        await settle(two, [taken], Ack())


async def test_ordered_more_than_memory_should_hold_waits_without_bodies(broker: RedisStreamBroker) -> None:
    await broker.publish([outgoing(number, key="a") for number in range(1500)])
    async with broker.subscribe("orders", name="warehouse", ordered=True) as subscription:
        (head,) = await subscription.receive(16)
        await settle(subscription, [head], Later(1.0))
        await broker.publish([outgoing(5000, key="b")])
        (other,) = await receive(subscription, 1)
        assert other.message_id == "id-5000"
        await settle(subscription, [other], Ack())
        order: list[str | None] = []
        while len(order) < 1500:
            (delivery,) = await receive(subscription, 1)
            order.append(delivery.message_id)
            await settle(subscription, [delivery], Ack())
    assert order == [f"id-{number}" for number in range(1500)]


async def test_ordered_a_postponed_head_comes_again_however_much_waits_behind_it(
    broker: RedisStreamBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline_mediator.message_brokers.redis.membership._MOST_HELD", 300)
    await broker.publish([outgoing(number, key="a") for number in range(2000)])
    async with broker.subscribe("orders", name="warehouse", ordered=True) as subscription:
        order: list[str | None] = []
        for attempt in (1, 2):
            (head,) = await receive(subscription, 1)
            assert (head.message_id, head.attempt) == ("id-0", attempt)
            await settle(subscription, [head], Later(0.5))
        while len(order) < 400:
            (delivery,) = await receive(subscription, 1)
            order.append(delivery.message_id)
            await settle(subscription, [delivery], Ack())
    assert order == [f"id-{number}" for number in range(400)]


async def test_ordered_taking_over_much_counts_each_once_however_long_it_takes(broker: RedisStreamBroker) -> None:
    settings: Any = {"name": "warehouse", "min_idle": 0.4, "ordered": True}
    await broker.publish([outgoing(number, key=f"{number}") for number in range(600)])
    async with doomed(broker.subscribe("orders", **settings)) as one:
        await receive(one, 120, limit=120)
    async with broker.subscribe("orders", **settings) as two:
        attempts: list[int] = []
        for _ in range(600):
            (delivery,) = await receive(two, 1)
            attempts.append(delivery.attempt)
            await settle(two, [delivery], Ack())
            if len(attempts) in {100, 200}:
                await asyncio.sleep(0.5)
    assert set(attempts) == {1, 2}


async def test_ordered_entries_that_are_deleted_while_they_wait_are_passed_over(
    broker: RedisStreamBroker, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([outgoing(0, key="a")])
    async with broker.subscribe("orders", name="warehouse", ordered=True) as subscription:
        await settle(subscription, await receive(subscription, 1), Later(0.5))
        await broker.publish([outgoing(number, key="a") for number in (1, 2)])
        async with Client.from_url(own_redis.url) as client:
            for _ in range(100):
                if await pending(own_redis.url) == 3:
                    break
                await asyncio.sleep(0.01)
            ((entry, _),) = (await client.xrange("orders"))[1:2]
            await client.xdel("orders", entry)
        order: list[str | None] = []
        for _ in range(2):
            (delivery,) = await receive(subscription, 1)
            order.append(delivery.message_id)
            await settle(subscription, [delivery], Ack())
    assert order == ["id-0", "id-2"]
    assert "was deleted before it was handled" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["due later", "due while the one before it is out"])
async def test_ordered_a_postponed_one_behind_others_of_its_key_is_still_in_its_place(
    broker: RedisStreamBroker, seconds: float
) -> None:
    settings: Any = {"name": "warehouse", "min_idle": IDLE}
    await broker.publish(keyed((0, "a"), (1, "a"), (2, "a")))
    # A group that kept no order before: its second is postponed while its first is out.
    async with doomed(broker.subscribe("orders", **settings)) as one:
        first = await receive(one, 1)
        await settle(one, first, Later(0.2))
        second = await receive(one, 1)
        await settle(one, second, Later(1.5))
        await receive(one, 1)
    order: list[str | None] = []
    async with broker.subscribe("orders", **settings, ordered=True) as two:
        for _ in range(3):
            (delivery,) = await receive(two, 1)
            order.append(delivery.message_id)
            if delivery.message_id == "id-0":
                await asyncio.sleep(seconds)
            await settle(two, [delivery], Ack())
    assert order == ["id-0", "id-1", "id-2"]


@pytest.mark.parametrize("end", ["XACK", "XDEL", "XGROUP DELCONSUMER", "XGROUP DESTROY"])
async def test_ordered_nothing_waits_for_one_that_an_operator_did_away_with(
    broker: RedisStreamBroker, own_redis: RedisServer, end: str
) -> None:
    await broker.publish(keyed((0, "a"), (1, "a")))
    async with broker.subscribe("orders", name="warehouse", ordered=True) as subscription:
        await settle(subscription, await receive(subscription, 1), Later(0.5))
        async with Client.from_url(own_redis.url) as client:
            entry = (await client.xrange("orders"))[0][0]
            match end:
                case "XACK":
                    await client.xack("orders", "warehouse", entry)
                case "XDEL":
                    await client.xdel("orders", entry)
                case "XGROUP DELCONSUMER":
                    await client.xgroup_delconsumer("orders", "warehouse", "~later")
                case _:
                    await client.delete("orders")
        await broker.publish(keyed((2, "a")))
        seen: list[str | None] = []
        while "id-2" not in seen:
            (delivery,) = await receive(subscription, 1)
            seen.append(delivery.message_id)
            await settle(subscription, [delivery], Ack())
    assert "id-0" not in seen


# Who dies of what


async def until_dead(subscription: Any, poison: str, attempts: int, handled: list[tuple[str | None, int]]) -> bool:
    """As a consumer does with RedeliveryMiddleware(attempts), until the poison is handled: what came, in `handled`.

    Whether the process died of it; else nothing came any more.
    """
    while True:
        try:
            async with asyncio.timeout(3 * IDLE):
                deliveries = await subscription.receive(32)
        except TimeoutError:
            return False
        for delivery in deliveries:
            if delivery.attempt > attempts:
                delivery.outcome = Dead("exhausted")
            elif delivery.message_id == poison:
                return True
            else:
                handled.append((delivery.message_id, delivery.attempt))
                delivery.outcome = Ack()
        await settle_as_they_are(subscription, deliveries)


async def settle_as_they_are(subscription: Any, deliveries: Sequence[Delivery]) -> None:
    assert await subscription.settle(deliveries) == [None] * len(deliveries)


@pytest.mark.parametrize("ordered", [False, True], ids=["competing", "ordered"])
@pytest.mark.parametrize("innocents", [5, 60, 300])
async def test_beside_a_message_that_processes_die_of_all_others_are_handled(
    broker: RedisStreamBroker, innocents: int, *, ordered: bool
) -> None:
    settings: Any = {"name": "warehouse", "min_idle": IDLE, "ordered": ordered}
    await broker.publish([outgoing(number, key=f"{number % 40}") for number in range(innocents + 1)])
    handled: list[tuple[str | None, int]] = []
    deaths = 0
    async with asyncio.timeout(40):
        while True:
            async with doomed(broker.subscribe("orders", **settings)) as one:
                if not await until_dead(one, "id-0", 3, handled):
                    break
                deaths += 1
    assert deaths == 3
    assert sorted({one for one, _ in handled}, key=str) == sorted(f"id-{one}" for one in range(1, innocents + 1))
    assert max(attempt for _, attempt in handled) <= 3
    (dead,) = await one.dead_letters.list(400)
    assert (dead.delivery.message_id, dead.delivery.attempt, dead.reason) == ("id-0", 4, "exhausted")


async def holding(subscription: Any, number: int) -> None:
    """Until it has so many in memory."""
    await until(lambda: len(subscription._member.sources[0].held) >= number)


async def counts(url: str) -> list[int]:
    async with Client.from_url(url) as client:
        return [one["times_delivered"] for one in await client.xpending_range("orders", "warehouse", "-", "+", 1000)]


@pytest.mark.parametrize("ordered", [False, True], ids=["competing", "ordered"])
async def test_what_is_claimed_and_not_handed_over_is_not_charged_with_any_number_of_deaths(
    broker: RedisStreamBroker, own_redis: RedisServer, *, ordered: bool
) -> None:
    settings: Any = {"name": "warehouse", "min_idle": IDLE, "ordered": ordered}
    await broker.publish(batch(40))
    for attempt in (1, 2, 3):
        await asyncio.sleep(1.5 * IDLE)  # the dead one's are nobody's, all of them
        async with doomed(broker.subscribe("orders", **settings)) as one:
            (first,) = await receive(one, 1)
            assert (first.message_id, first.attempt) == ("id-0", attempt)
            await holding(one, 32)
    assert await counts(own_redis.url) == [3, *[1] * 39]
    await asyncio.sleep(1.5 * IDLE)
    async with broker.subscribe("orders", **settings) as two:
        (alone,) = await two.receive(50)
        assert (alone.message_id, alone.attempt) == ("id-0", 4)
        await settle(two, [alone], Ack())
        others = await receive(two, 39)
        assert {one.attempt for one in others} == {2}
        assert await counts(own_redis.url) == [2] * 39  # before they are handed over


async def suspects(broker: RedisStreamBroker, *numbers_and_keys: tuple[int, str | None], **settings: Any) -> None:
    """Publish these, and have two processes die that had them."""
    await broker.publish([outgoing(number, key=key) for number, key in numbers_and_keys])
    for _ in range(2):
        async with doomed(broker.subscribe("orders", name="warehouse", min_idle=IDLE, **settings)) as one:
            await receive(one, len({key or str(number) for number, key in numbers_and_keys}))


async def test_what_two_processes_died_with_is_handed_over_alone(broker: RedisStreamBroker) -> None:
    await suspects(broker, (0, None), (1, None), (2, None))
    await broker.publish([outgoing(number) for number in (3, 4)])
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        first, second = await receive(subscription, 2)  # the dead ones' are nobody's yet
        await asyncio.sleep(1.5 * IDLE)
        await broker.publish([outgoing(5)])
        await nothing(subscription)
        await settle(subscription, [first], Ack())
        await nothing(subscription, 0.1)
        await settle(subscription, [second], Ack())
        for number in range(3):
            (alone,) = await subscription.receive(50)
            assert (alone.message_id, alone.attempt) == (f"id-{number}", 3)
            await nothing(subscription, 0.2)
            await settle(subscription, [alone], Ack())
        (last,) = await subscription.receive(50)
        assert (last.message_id, last.attempt) == ("id-5", 1)


async def test_ordered_one_that_is_handed_over_alone_holds_its_key_and_everything_else(
    broker: RedisStreamBroker,
) -> None:
    await suspects(broker, (0, "a"), (1, "a"), (2, "b"), ordered=True)
    await broker.publish(keyed((3, "b"), (4, "c")))
    order: list[tuple[str | None, int]] = []
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE, ordered=True) as subscription:
        (head,) = await subscription.receive(50)
        assert (head.message_id, head.attempt) == ("id-0", 3)
        await nothing(subscription, 0.2)
        await settle(subscription, [head], Later(0.5))
        while len(order) < 5:
            found = await subscription.receive(50)
            if ("id-2", 3) not in order:
                assert ids(found) == ["id-2"]
            order += [(one.message_id, one.attempt) for one in found]
            await settle(subscription, found, Ack())
    # Postponed, it holds its key and nothing else.
    assert order[0] == ("id-2", 3)
    assert order[-2:] == [("id-0", 4), ("id-1", 2)]
    assert sorted(order[1:3]) == [("id-3", 1), ("id-4", 1)]


async def test_one_that_was_handed_over_alone_and_is_postponed_comes_again_beside_others(
    broker: RedisStreamBroker,
) -> None:
    await suspects(broker, (0, None))
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        (alone,) = await receive(subscription, 1)
        await broker.publish([outgoing(1)])
        await nothing(subscription)
        await settle(subscription, [alone], Later(0.1))
        found = await receive(subscription, 2)
        assert sorted((one.message_id, one.attempt) for one in found) == [("id-0", 4), ("id-1", 1)]


async def test_what_comes_again_by_later_is_never_alone_however_often(broker: RedisStreamBroker) -> None:
    await broker.publish(batch(2))
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as one:
        for attempt in (1, 2, 3):
            found = await receive(one, 2)
            assert {delivery.attempt for delivery in found} == {attempt}
            await settle(one, found, Later())
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two:
        assert {delivery.attempt for delivery in await receive(two, 2)} == {4}


@pytest.mark.parametrize("how", ["given back", "left", "never handed over"])
async def test_a_stop_in_order_does_not_clear_what_processes_died_with(
    broker: RedisStreamBroker, own_redis: RedisServer, how: str
) -> None:
    await suspects(broker, (0, None), (1, None))
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as one:
        (alone,) = await receive(one, 1)
        if how == "given back":
            await settle(one, [alone], None)
        elif how == "never handed over":
            await settle(one, [alone], Ack())
    assert await counts(own_redis.url) == {"given back": [2, 2], "left": [3, 2], "never handed over": [2]}[how]
    rest = {"given back": [("id-0", 3), ("id-1", 3)], "left": [("id-0", 4), ("id-1", 3)]}.get(how, [("id-1", 3)])
    await broker.publish([outgoing(2)])
    seen: list[tuple[str | None, int]] = []
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as two:
        while len(seen) <= len(rest):
            (alone,) = await two.receive(50)
            if alone.message_id != "id-2":
                await nothing(two, 0.1)
            seen.append((alone.message_id, alone.attempt))
            await settle(two, [alone], Ack())
    assert sorted(seen) == [*rest, ("id-2", 1)]


async def test_who_dies_of_one_that_is_handed_over_alone_takes_nothing_with_it(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await suspects(broker, (0, None), (1, None))
    for attempt in (3, 4, 5):
        async with doomed(broker.subscribe("orders", name="warehouse", min_idle=IDLE)) as one:
            (alone,) = await receive(one, 1)
            assert (alone.message_id, alone.attempt) == ("id-0", attempt)
            await nothing(one, 0.1)
    assert await counts(own_redis.url) == [5, 2]


async def test_a_name_that_stays_gets_alone_what_two_processes_died_with(broker: RedisStreamBroker) -> None:
    await broker.publish(batch(2))
    for attempt in (1, 2):
        async with doomed(broker.subscribe("orders", name="warehouse", consumer="pod-1")) as one:
            assert {delivery.attempt for delivery in await receive(one, 2)} == {attempt}
    async with broker.subscribe("orders", name="warehouse", consumer="pod-1") as again:
        for number in range(2):
            (alone,) = await again.receive(50)
            assert (alone.message_id, alone.attempt) == (f"id-{number}", 3)
            await nothing(again, 0.2)
            await settle(again, [alone], Ack())


@pytest.mark.parametrize("which", ["what is out before it", "itself"])
async def test_nothing_waits_for_what_was_lost(broker: RedisStreamBroker, own_redis: RedisServer, which: str) -> None:
    await suspects(broker, (0, None), (1, None))
    if which == "what is out before it":
        await broker.publish([outgoing(2)])
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        (out,) = await receive(subscription, 1)
        assert out.message_id == ("id-0" if which == "itself" else "id-2")
        await asyncio.sleep(1.5 * IDLE)
        await nothing(subscription, 0.1)
        entries = await command(own_redis.url, "XRANGE", "orders", "-", "+")
        taken = entries[0 if which == "itself" else 2][0]
        await command(own_redis.url, "XACK", "orders", "warehouse", taken)
        (alone,) = await receive(subscription, 1)
        assert out.lost
        assert (alone.message_id, alone.attempt) == ("id-1" if which == "itself" else "id-0", 3)


async def test_one_that_was_lost_while_it_waited_to_be_alone_is_passed_over(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await suspects(broker, (0, None), (1, None))
    async with broker.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription:
        (first,) = await receive(subscription, 1)
        await holding(subscription, 2)
        entries = await command(own_redis.url, "XRANGE", "orders", "-", "+")
        await command(own_redis.url, "XACK", "orders", "warehouse", entries[1][0])
        await broker.publish([outgoing(2)])
        await settle(subscription, [first], Ack())
        assert ids(await receive(subscription, 1)) == ["id-2"]


COUNTING = COUNT.encode()[:60]
"""What no other script begins with."""


@pytest.mark.parametrize("action", ["cut", "cut reply"])
async def test_what_could_not_be_counted_is_not_handed_over_and_counts_once(
    broker: RedisStreamBroker, own_redis: RedisServer, action: Any
) -> None:
    await broker.publish(batch(3))
    async with broker.subscribe("orders", name="warehouse") as one:
        await settle(one, await receive(one, 3), Later())
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(through(proxy), timeout=2) as far,
            far.subscribe("orders", name="warehouse") as two,
        ):
            counting = proxy.when(COUNTING, action)
            with pytest.raises(BrokerUnavailableError):
                async with asyncio.timeout(5):
                    await two.receive(50)
            await counting.happened()
            found = await receive(two, 3)
            assert {one.attempt for one in found} == {2}
            assert await counts(own_redis.url) == [2] * 3


async def test_a_receive_that_is_cancelled_while_it_counts_has_counted_nothing_in_the_end(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(3))
    async with broker.subscribe("orders", name="warehouse") as one:
        await settle(one, await receive(one, 3), Later())
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(through(proxy), timeout=2) as far,
            far.subscribe("orders", name="warehouse") as two,
        ):
            counting = proxy.when(COUNTING, "hold")
            receiving = asyncio.ensure_future(two.receive(50))
            await counting.happened()
            receiving.cancel()
            await asyncio.wait([receiving])
            proxy.release()
    assert await counts(own_redis.url) == [1] * 3


@pytest.mark.parametrize("number", [1, 2])
async def test_what_was_claimed_and_the_answer_lost_counts_when_it_is_handed_over(
    broker: RedisStreamBroker, own_redis: RedisServer, number: int
) -> None:
    await broker.publish([outgoing(1)])
    async with broker.subscribe("orders", name="warehouse") as one:
        for _ in range(number):
            await settle(one, await receive(one, 1), Later())
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(through(proxy), timeout=2) as far,
            far.subscribe("orders", name="warehouse") as two,
        ):
            claiming = proxy.when(b"-- Claim what is due", "cut reply")
            (delivery,) = await receive(two, 1)
            await claiming.happened()
            assert delivery.attempt == number + 1
            assert await counts(own_redis.url) == [number + 1]


async def test_what_was_lost_and_found_again_counts_once_more(
    broker: RedisStreamBroker, own_redis: RedisServer
) -> None:
    await broker.publish(batch(3))
    with Proxy(own_redis.port) as proxy:
        async with (
            RedisStreamBroker(through(proxy), timeout=0.5) as far,
            far.subscribe("orders", name="warehouse", min_idle=IDLE) as subscription,
        ):
            for attempt in (1, 2):
                found = await receive(subscription, 3)
                assert {one.attempt for one in found} == {attempt}
                proxy.stall()
                await until(lost(found))
                proxy.release()
            (alone,) = await receive(subscription, 1)
            assert alone.attempt == 3


# Length


async def test_trimming_leaves_what_any_group_has_not_settled(own_redis: RedisServer) -> None:
    async with (
        RedisStreamBroker(own_redis.url, max_length=50) as broker,
        broker.subscribe("orders", name="fast") as fast,
        broker.subscribe("orders", name="slow") as slow,
    ):
        await broker.publish(batch(100))
        await settle(fast, await receive(fast, 100), Ack())
        held = await receive(slow, 30)
        await settle(slow, held[:10], Ack())
        await settle(slow, held[10:11], Later(3600))
        await broker.publish(batch(100))
        # The eleventh is postponed: nothing from there on goes.
        assert await command(own_redis.url, "XLEN", "orders") == 190
        await settle(fast, await receive(fast, 100), Ack())
        await settle(slow, held[11:], Ack())
        await settle(slow, await receive(slow, 170), Ack())
        await broker.publish(batch(10))
        assert await command(own_redis.url, "XLEN", "orders") == 200


async def test_trimming_keeps_the_bound_when_everybody_has_settled(own_redis: RedisServer) -> None:
    async with RedisStreamBroker(own_redis.url, max_length=50) as broker:
        await broker.publish(batch(200))
        assert await command(own_redis.url, "XLEN", "orders") == 200  # no group has read it yet
        async with broker.subscribe("orders", name="warehouse") as subscription:
            for _ in range(10):
                await settle(subscription, await receive(subscription, 20), Ack())
            await broker.publish(batch(10))
        assert await command(own_redis.url, "XLEN", "orders") == 50


async def test_a_stream_that_cannot_be_trimmed_takes_messages(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await command(own_redis.url, "ACL", "SETUSER", "few", "on", ">pw", "~*", "+xadd", "+multi", "+exec", "+ping")
    url = own_redis.url.replace("redis://", "redis://few:pw@")
    async with RedisStreamBroker(url, max_length=5) as broker:
        assert await broker.publish(batch(10)) == [None] * 10
    assert "'orders' was not trimmed" in caplog.text


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_length=0"):
        RedisStreamBroker("redis://localhost", max_length=0)
