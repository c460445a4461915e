"""The broker within the process: copies, order, redelivery, dead letters, full queues and endings."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers import (
    Ack,
    Dead,
    Delivery,
    Later,
    MemoryBroker,
    MemorySubscription,
    MessageBroker,
    Outcome,
    Outgoing,
    Subscription,
)


def outgoing(number: int, key: str | None = None, destination: str = "orders") -> Outgoing:
    return Outgoing(destination, b"%d" % number, "text/plain", f"id-{number}", "n", key, {"header": "value"})


@asynccontextmanager
async def publishing(broker: MemoryBroker, *batch: Outgoing) -> AsyncGenerator[list[Exception | None]]:
    """Publish in the background; the answers are there when the block ends."""
    answers: list[Exception | None] = []

    async def publish() -> None:
        answers.extend(await broker.publish(batch))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        yield answers


async def let_others_run() -> None:
    for _ in range(5):
        await checkpoint()


async def settle(subscription: MemorySubscription, outcome: Outcome | None, limit: int = 100) -> list[Delivery]:
    deliveries = list(await subscription.receive(limit))
    for delivery in deliveries:
        delivery.outcome = outcome
    assert await subscription.settle(deliveries) == [None] * len(deliveries)
    return deliveries


async def nothing_comes(subscription: MemorySubscription) -> bool:
    with anyio.move_on_after(0.02) as scope:
        await subscription.receive(1)
    return scope.cancelled_caught


def test_it_is_a_broker_and_its_subscriptions_are_subscriptions() -> None:
    memory = MemoryBroker()
    broker: MessageBroker = memory
    subscription: Subscription = memory.subscribe("orders", name="warehouse")
    assert (broker.features.system, broker.features.durable, broker.features.ordered_by_key) == ("memory", False, True)
    assert subscription.name == "warehouse"


async def test_every_subscription_of_the_destination_gets_a_copy() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", "returns", name="warehouse")
    mail = broker.subscribe("orders", name="mail")
    other = broker.subscribe("payments", name="other")
    async with publishing(broker, outgoing(1), outgoing(2, destination="returns")):
        first, second = await settle(warehouse, Ack())
        (copy,) = await settle(mail, Ack())
    assert (first.body, first.destination, first.subscription) == (b"1", "orders", "warehouse")
    assert (second.body, second.destination) == (b"2", "returns")
    assert (copy.body, copy.subscription, copy.attempt) == (b"1", "mail", 1)
    assert (copy.message_id, copy.content_type, copy.headers) == ("id-1", "text/plain", {"header": "value"})
    assert await nothing_comes(other)


async def test_publish_returns_when_every_subscription_is_done_with_the_message() -> None:
    broker = MemoryBroker()
    subscriptions = [broker.subscribe("orders", name=name) for name in ("warehouse", "mail")]
    async with publishing(broker, outgoing(1)) as answers:
        for subscription in subscriptions:
            await let_others_run()
            assert not answers
            await settle(subscription, Ack())
    assert answers == [None]


async def test_a_destination_without_subscription_accepts_at_once() -> None:
    assert await MemoryBroker().publish([outgoing(1), outgoing(2)]) == [None, None]


async def test_what_is_not_settled_in_time_is_refused_by_name_and_the_rest_is_not() -> None:
    broker = MemoryBroker(timeout=0.3)
    warehouse = broker.subscribe("orders", name="warehouse")
    broker.subscribe("returns", name="nobody-home")
    async with publishing(broker, outgoing(1), outgoing(2, destination="returns")) as answers:
        await settle(warehouse, Ack())
    accepted, refused = answers
    assert accepted is None
    assert isinstance(refused, BrokerUnavailableError)
    assert "'nobody-home' did not settle the message within 0.3 s" in str(refused)


async def test_publishing_again_what_still_waits_adds_no_copy() -> None:
    broker = MemoryBroker(timeout=0.3)
    warehouse = broker.subscribe("orders", name="warehouse")
    assert isinstance((await broker.publish([outgoing(1)]))[0], BrokerUnavailableError)
    async with publishing(broker, outgoing(1)) as answers:
        await let_others_run()
        await settle(warehouse, Ack())
    assert answers == [None]
    assert await nothing_comes(warehouse)


async def test_a_full_subscription_makes_publishers_wait_for_room() -> None:
    broker = MemoryBroker(capacity=2)
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, *[outgoing(number) for number in range(3)]) as answers:
        both = await warehouse.receive(100)
        assert await nothing_comes(warehouse)
        for delivery in both:
            delivery.outcome = Ack()
        await warehouse.settle(both)
        (third,) = await settle(warehouse, Ack())
    assert [delivery.body for delivery in (*both, third)] == [b"0", b"1", b"2"]
    assert answers == [None] * 3


async def test_what_found_no_room_in_time_is_refused_and_so_is_what_comes_behind_it() -> None:
    broker = MemoryBroker(capacity=1, timeout=0.05)
    broker.subscribe("orders", name="warehouse")
    broker.subscribe("returns", name="idle")
    answers = await broker.publish([outgoing(1), outgoing(2), outgoing(3, destination="returns")])
    assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 3
    assert "did not settle" in str(answers[0])
    assert "'warehouse' is full" in str(answers[1])
    assert "'warehouse' is full" in str(answers[2])


async def test_later_delivers_again_and_counts() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1), outgoing(2)) as answers:
        (first,) = await settle(warehouse, Later(0.05), limit=1)
        (second,) = await settle(warehouse, Ack())
        assert not answers
        (again,) = await settle(warehouse, Ack())
    assert [first.body, second.body, again.body] == [b"1", b"2", b"1"]
    assert [first.attempt, second.attempt, again.attempt] == [1, 1, 2]
    assert answers == [None, None]


async def test_what_has_no_outcome_is_given_back_and_counts_as_no_attempt() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1)):
        await settle(warehouse, None)
        (again,) = await settle(warehouse, Ack())
    assert again.attempt == 1


async def test_of_one_key_the_next_is_handed_over_when_the_one_before_is_settled() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1, "a"), outgoing(2, "a"), outgoing(3, "b")):
        first, other = await warehouse.receive(100)
        assert await nothing_comes(warehouse)
        first.outcome = other.outcome = Ack()
        await warehouse.settle([first, other])
        (second,) = await settle(warehouse, Ack())
    assert (first.body, other.body, second.body) == (b"1", b"3", b"2")


async def test_a_delayed_message_is_not_overtaken_by_the_next_of_its_key() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1, "a"), outgoing(2, "a")):
        seen = [(await settle(warehouse, outcome))[0].body for outcome in (Later(0.02), Ack(), Ack())]
    assert seen == [b"1", b"1", b"2"]


async def test_what_is_given_up_on_is_kept_with_the_reason_and_counts_as_accepted() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1)) as answers:
        await settle(warehouse, Dead("no such product"))
    assert answers == [None]
    (letter,) = broker.dead_letters
    assert (letter.body, letter.subscription, letter.outcome) == (b"1", "warehouse", Dead("no such product"))


async def test_the_latest_dead_letters_are_kept_and_a_dropped_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker(capacity=2)
    warehouse = broker.subscribe("orders", name="warehouse")
    with caplog.at_level(logging.WARNING):
        async with publishing(broker, *[outgoing(number) for number in range(3)]):
            for _ in range(3):
                await settle(warehouse, Dead("no"), limit=1)
    assert [letter.body for letter in broker.dead_letters] == [b"1", b"2"]
    assert "id-0" in caplog.text


async def test_settling_twice_is_refused_and_does_not_settle_the_next_attempt() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1)) as answers:
        (first,) = await settle(warehouse, Later())
        (again,) = await warehouse.receive(1)
        first.outcome = again.outcome = Ack()
        assert isinstance((await warehouse.settle([first]))[0], BrokerRefusedError)
        await let_others_run()
        assert not answers
        assert await warehouse.settle([again]) == [None]
    assert isinstance((await warehouse.settle([again]))[0], BrokerRefusedError)


async def test_a_cancelled_receive_loses_nothing() -> None:
    broker = MemoryBroker()
    warehouse = broker.subscribe("orders", name="warehouse")
    async with publishing(broker, outgoing(1)):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await warehouse.receive(1)
        (delivery,) = await settle(warehouse, Ack())
    assert delivery.attempt == 1


async def test_leaving_a_subscription_tells_those_who_wait_for_it() -> None:
    broker = MemoryBroker()
    async with broker.subscribe("orders", name="warehouse") as warehouse, publishing(broker, outgoing(1)) as answers:
        await let_others_run()
        await warehouse.__aexit__(None, None, None)
    assert isinstance(answers[0], BrokerUnavailableError)
    assert await broker.publish([outgoing(1)]) == [None]
    broker.subscribe("orders", name="warehouse")


async def test_closing_tells_waiting_publishers_and_receivers_and_all_who_come_later() -> None:
    told: list[Exception] = []

    async def receive(subscription: MemorySubscription) -> None:
        try:
            await subscription.receive(1)
        except BrokerUnavailableError as error:
            told.append(error)

    async with anyio.create_task_group() as tasks, MemoryBroker(capacity=1) as broker:
        busy = broker.subscribe("orders", name="busy")
        tasks.start_soon(receive, broker.subscribe("returns", name="idle"))
        async with publishing(broker, outgoing(1), outgoing(2)) as answers:
            (out,) = await busy.receive(1)
            await broker.__aexit__(None, None, None)
        assert [type(answer) for answer in answers] == [BrokerUnavailableError] * 2
        await let_others_run()
        assert len(told) == 1
        assert isinstance((await broker.publish([outgoing(3)]))[0], BrokerUnavailableError)
        assert isinstance((await busy.settle([out]))[0], BrokerRefusedError)
        with pytest.raises(BrokerUnavailableError):
            broker.subscribe("orders", name="late")


async def test_it_stays_open_until_its_last_user_leaves() -> None:
    broker = MemoryBroker()
    async with broker:
        async with broker:
            pass
        assert await broker.publish([outgoing(1)]) == [None]
    async with broker:
        assert await broker.publish([outgoing(1)]) == [None]


def test_a_name_that_is_taken_is_refused() -> None:
    broker = MemoryBroker()
    broker.subscribe("orders", name="warehouse")
    with pytest.raises(ConfigurationError, match="already has a subscription 'warehouse'"):
        broker.subscribe("returns", name="warehouse")


def test_a_subscription_needs_a_destination() -> None:
    with pytest.raises(ConfigurationError, match="'warehouse' has no destination"):
        MemoryBroker().subscribe(name="warehouse")


@pytest.mark.parametrize(("capacity", "timeout"), [(0, 1.0), (1, 0.0)])
def test_limits_that_let_nothing_through_are_refused(capacity: int, timeout: float) -> None:
    with pytest.raises(ConfigurationError):
        MemoryBroker(capacity=capacity, timeout=timeout)


async def test_at_least_one_delivery_is_asked_for() -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        await MemoryBroker().subscribe("orders", name="warehouse").receive(0)


@given(
    keys=st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=12),
    outcomes=st.lists(st.sampled_from([Ack(), Later(), Dead("no"), None]), max_size=30),
    limit=st.integers(1, 4),
)
def test_each_message_is_settled_once_and_each_key_in_order_whatever_the_outcomes(
    keys: list[str | None], outcomes: list[Outcome | None], limit: int
) -> None:
    published: dict[str | None, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        published[key].append(number)
    settled: dict[str | None, list[int]] = defaultdict(list)

    async def run() -> None:
        broker = MemoryBroker()
        subscription = broker.subscribe("orders", name="warehouse")
        remaining = iter(outcomes)
        async with publishing(broker, *[outgoing(number, key) for number, key in enumerate(keys)]) as answers:
            while sum(map(len, settled.values())) < len(keys):
                deliveries = await subscription.receive(limit)
                for delivery in deliveries:
                    delivery.outcome = next(remaining, Ack())
                    if isinstance(delivery.outcome, Ack | Dead):
                        settled[delivery.key].append(int(delivery.body))
                await subscription.settle(deliveries)
                await checkpoint()
        assert answers == [None] * len(keys)

    anyio.run(run)
    settled[None].sort()
    published[None].sort()
    assert settled == published
