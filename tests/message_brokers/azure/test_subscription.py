"""Receiving from Azure Service Bus with the real client, over an AMQP peer, and how that can fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

import pytest
from azure.servicebus import ServiceBusMessage
from azure.servicebus.aio import ServiceBusClient

from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
)
from pipeline_mediator.message_brokers import Ack, AzureMessageBroker, Dead, Delivery, Later, Outgoing, Subscription
from pipeline_mediator.message_brokers.azure.subscription import AzureSubscription
from tests.amqp_peer import AmqpPeer, Queue
from tests.message_brokers.azure.steps import (
    SECONDS,
    ids,
    proton_message,
    put,
    receive,
    receive_in_spite,
    settle,
    until,
)


@pytest.fixture
def orders(peer: AmqpPeer) -> Queue:
    return peer.queue("orders")


@pytest.fixture
def broker(peer: AmqpPeer) -> AzureMessageBroker:
    return AzureMessageBroker(peer.connection_string, timeout=SECONDS)


@pytest.fixture
async def subscription(broker: AzureMessageBroker, orders: Queue) -> AsyncIterator[AzureSubscription]:
    async with broker.subscribe("orders", name="warehouse") as subscription:
        yield subscription


# What is received


async def test_what_is_published_is_received_and_completed(
    broker: AzureMessageBroker, subscription: AzureSubscription, orders: Queue
) -> None:
    sent = Outgoing("orders", b"{}", "application/json", "42", "orders.placed", "7", {"type": "orders.placed"})
    assert await broker.publish([sent]) == [None]
    (delivery,) = await receive(subscription, 1)
    assert (delivery.destination, delivery.body, delivery.content_type) == ("orders", b"{}", "application/json")
    assert (delivery.message_id, delivery.key, delivery.attempt) == ("42", "7", 1)
    assert delivery.headers == {"cloudEvents_type": "orders.placed"}
    assert delivery.subscription == subscription.name == "warehouse"
    assert await settle(subscription, [delivery], Ack()) == [None]
    assert orders.settled == [("complete", "42")]
    # Again does no harm.
    assert await subscription.settle([delivery]) == [None]
    assert orders.settled == [("complete", "42")]


async def test_all_that_is_there_is_received_in_few_calls(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, *range(50))
    deliveries = await receive(subscription, 50)
    assert ids(deliveries) == [f"id-{number}" for number in range(50)]
    assert await settle(subscription, deliveries, Ack()) == [None] * 50
    assert not orders.locked
    assert not orders.ready


async def test_no_more_is_locked_than_was_asked_for(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, *range(10))
    await receive(subscription, 3)
    assert len(orders.locked) == 3


async def test_bodies_of_any_kind_are_bytes(peer: AmqpPeer, subscription: AzureSubscription, orders: Queue) -> None:
    proton: Any = import_module("proton")
    identity = import_module("uuid").UUID(int=1)
    bodies: list[tuple[Any, bytes]] = [
        ("text", b"text"),
        (b"\xff", b"\xff"),
        ({"a": [1, None, True], "b": b"\xff", "c": identity}, b'{"a": [1, null, true], "b": "\\\\xff", "c": "%s"}'),
        ([1, "two"], b'[1, "two"]'),
        (None, b""),
    ]
    peer.put(orders, *[proton.Message(body=body, id=f"id-{index}") for index, (body, _) in enumerate(bodies)])
    peer.put(orders, proton.Message(body=["a", {"b": 2}], inferred=True))
    deliveries = await receive(subscription, 6)
    expected = [body.replace(b"%s", str(identity).encode()) for _, body in bodies]
    assert [delivery.body for delivery in deliveries] == [*expected, b'["a", {"b": 2}]']


async def test_properties_of_any_kind_are_headers(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    properties = {"cloudEvents:type": "a", "cloudEvents_id": "ü", "n": 1, "t": True, "raw": b"\xff", "nothing": None}
    peer.put(orders, proton_message(1, properties=properties, id=7, content_type=None))
    (delivery,) = await receive(subscription, 1)
    assert delivery.headers == {
        "cloudEvents:type": "a",
        "cloudEvents_id": "ü",
        "n": "1",
        "t": "true",
        "raw": "\\xff",
        "nothing": "None",
    }
    assert (delivery.message_id, delivery.content_type) == ("7", None)


async def test_the_partition_key_is_the_key_where_there_is_no_session(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    peer.put(orders, proton_message(1, annotations={"x-opt-partition-key": "p"}))
    (delivery,) = await receive(subscription, 1)
    assert delivery.key == "p"


# Outcomes


async def test_dead_letters_carry_the_reason(peer: AmqpPeer, subscription: AzureSubscription, orders: Queue) -> None:
    put(peer, orders, 1)
    (delivery,) = await receive(subscription, 1)
    assert await settle(subscription, [delivery], Dead("no such order\nnumber 7")) == [None]
    assert orders.dead is not None
    (dead,) = orders.dead.ready
    assert dead.message.properties["DeadLetterReason"] == "no such order"
    assert dead.message.properties["DeadLetterErrorDescription"] == "no such order\nnumber 7"


@pytest.mark.parametrize("detects_duplicates", [False, True])
async def test_later_is_a_copy_that_the_service_keeps_until_then(
    peer: AmqpPeer, broker: AzureMessageBroker, detects_duplicates: Any
) -> None:
    orders = peer.queue("orders", detects_duplicates=detects_duplicates)
    kept = {"properties": {"cloudEvents_type": "a", "n": 1}, "subject": "s", "correlation_id": "c", "content_type": "t"}
    peer.put(orders, proton_message(1, "k", **kept))
    async with broker.subscribe("orders") as subscription:
        (first,) = await receive(subscription, 1)
        then = datetime.now(UTC)
        assert await settle(subscription, [first], Later(0.3)) == [None]
        assert orders.settled == [("complete", "id-1")]
        (copy,) = orders.ready
        assert 0.2 < copy.due - then.timestamp() < 1.0
        assert (copy.message.subject, copy.message.correlation_id, copy.message.group_id) == ("s", "c", "k")
        assert copy.message.id != "id-1"
        (second,) = await receive(subscription, 1)
        assert datetime.now(UTC).timestamp() - then.timestamp() >= 0.3
    assert (second.message_id, second.attempt, second.key) == ("id-1", 2, "k")
    assert (second.body, second.content_type, second.headers) == (first.body, "t", {"cloudEvents_type": "a", "n": "1"})


@pytest.mark.parametrize("body", [{"a": [1, "two"]}, ["a", {"b": 2}], "text", b"raw"])
@pytest.mark.parametrize("inferred", [True, False])
async def test_a_copy_has_the_body_and_the_time_to_live(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue, body: Any, inferred: Any
) -> None:
    peer.put(orders, proton_message(1, body=body, inferred=inferred, ttl=60, properties={"raw": b"\xff", "t": "ü"}))
    (first,) = await receive(subscription, 1)
    assert await settle(subscription, [first], Later(0.05)) == [None]
    (again,) = await receive(subscription, 1)
    assert (again.body, again.headers) == (first.body, first.headers)
    (stored,) = orders.locked.values()
    assert type(stored.message.body) is type(body) or body == b"raw"
    assert stored.message.ttl == 60


async def test_attempts_are_counted_over_copies_and_deliveries(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    attempts: list[int] = []
    for outcome in (Later(0.05), Later(), Later(), Later(0.05), Ack()):
        (delivery,) = await receive(subscription, 1)
        attempts.append(delivery.attempt)
        await settle(subscription, [delivery], outcome)
    assert attempts == [1, 2, 3, 4, 5]
    assert [action for action, _ in orders.settled] == ["complete", "abandon", "abandon", "complete", "complete"]


async def test_what_is_given_back_counts_as_no_attempt(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    for _ in range(3):
        (delivery,) = await receive(subscription, 1)
        assert delivery.attempt == 1
        assert await settle(subscription, [delivery], None) == [None]
    assert orders.settled == [("release", "id-1")] * 3


async def test_what_came_over_a_link_that_is_gone_is_given_back_all_the_same(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    (delivery,) = await receive(subscription, 1)
    peer.cut()
    await settle(subscription, [delivery], None)
    await settle(subscription, [delivery], None)
    assert orders.settled == [("abandon", "id-1")]


async def test_the_copy_is_stored_before_the_message_is_completed(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    (delivery,) = await receive(subscription, 1)
    orders.next("reject", "amqp:unauthorized-access")
    (error,) = await settle(subscription, [delivery], Later(10))
    assert isinstance(error, BrokerRefusedError | BrokerUnavailableError)
    assert not orders.settled
    # Tried again, the copy is sent once.
    orders.next_settlement("reject", "com.microsoft:server-busy")
    (error,) = await subscription.settle([delivery])
    assert error is None or isinstance(error, BrokerUnavailableError)
    assert await subscription.settle([delivery]) == [None]
    assert [stored.message.id.partition("~")[0] for stored in orders.ready] == ["id-1"]


# Locks


async def test_locks_are_renewed_as_long_as_the_handler_takes(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", lock=0.6)
    put(peer, orders, 1, 2)
    async with broker.subscribe("orders") as subscription:
        deliveries = await receive(subscription, 2)
        await until(lambda: orders.renewed >= 8)
        assert not any(delivery.lost for delivery in deliveries)
        assert await settle(subscription, deliveries, Ack()) == [None, None]
        renewed = orders.renewed
        await asyncio.sleep(0.7)
    assert orders.renewed == renewed
    assert orders.handed_over == 2


async def test_a_delivery_is_told_that_its_lock_is_lost(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", lock=0.6)
    put(peer, orders, 1)
    async with broker.subscribe("orders") as subscription:
        (delivery,) = await receive(subscription, 1)
        lost = asyncio.Event()
        delivery.on_lost = lost.set
        orders.lose_locks()
        async with asyncio.timeout(SECONDS):
            await lost.wait()
        (error,) = await settle(subscription, [delivery], Ack())
        assert isinstance(error, BrokerRefusedError)
        assert "lock" in str(error)
        (again,) = await receive(subscription, 1)
        assert (again.message_id, again.attempt) == ("id-1", 2)


async def test_a_lock_that_cannot_be_renewed_in_time_is_lost(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", lock=1.0)
    put(peer, orders, 1)
    async with broker.subscribe("orders") as subscription:
        (delivery,) = await receive(subscription, 1)
        peer.pause()
        try:
            await until(lambda: delivery.lost)
        finally:
            peer.resume()


async def test_a_renewal_that_fails_is_tried_again(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", lock=2.0)
    put(peer, orders, 1)
    async with broker.subscribe("orders") as subscription:
        (delivery,) = await receive(subscription, 1)
        orders.next_request("drop")
        await until(lambda: orders.renewed >= 1)
        assert not delivery.lost
        assert await settle(subscription, [delivery], Ack()) == [None]
    assert orders.settled == [("complete", "id-1")]


async def test_a_lock_that_is_lost_when_it_is_settled(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, 2)
    deliveries = await receive(subscription, 2)
    orders.next_settlement("reject", "com.microsoft:message-lock-lost")
    refused, fine = await settle(subscription, deliveries, Ack())
    assert isinstance(refused, BrokerRefusedError)
    assert fine is None


# Read ahead


async def test_so_many_are_read_ahead(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", lock=0.6)
    put(peer, orders, *range(10))
    async with broker.subscribe("orders", prefetch=4) as subscription:
        first = await receive(subscription, 2)
        await until(lambda: len(orders.locked) == 6)
        # Kept locked, and no more are taken meanwhile.
        await until(lambda: orders.renewed >= 12)
        await settle(subscription, first, Ack())
        rest = await receive(subscription, 1)
        await asyncio.sleep(0.2)
        assert orders.handed_over == 6
        rest += await receive(subscription, 3)
        assert not any(delivery.lost for delivery in rest)
        assert ids(first + rest) == [f"id-{number}" for number in range(6)]
    # What was not settled is given back, without having been counted.
    await until(lambda: not orders.locked)
    assert {stored.deliveries for stored in orders.ready} == {0}


# Cancelling and leaving


async def test_cancelling_receive_loses_no_message(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    received: list[Delivery] = []
    putting = asyncio.ensure_future(_put_slowly(peer, orders, 150))
    async with asyncio.timeout(SECONDS * 2):
        while len(received) < 150:
            receiving = asyncio.ensure_future(subscription.receive(7))
            await asyncio.wait((receiving,), timeout=0.003 * (len(received) % 5))
            if not receiving.done():
                receiving.cancel()
            try:
                fresh = list(await receiving)
            except asyncio.CancelledError:
                continue
            received += fresh
            assert await settle(subscription, fresh, Ack()) == [None] * len(fresh)
    await putting
    assert sorted(ids(received), key=str) == sorted((f"id-{number}" for number in range(150)), key=str)
    assert {delivery.attempt for delivery in received} == {1}


async def _put_slowly(peer: AmqpPeer, queue: Queue, count: int) -> None:
    for number in range(count):
        put(peer, queue, number)
        await asyncio.sleep(0.001 * (number % 4))


async def test_settling_does_not_wait_for_a_receive_that_waits(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    deliveries = await receive(subscription, 1)
    receiving = asyncio.ensure_future(subscription.receive(1))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        assert await settle(subscription, deliveries, Ack()) == [None]
    assert not receiving.done()
    put(peer, orders, 2)
    assert ids(await receiving) == ["id-2"]


async def test_a_settlement_that_nobody_waits_for_is_carried_out(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, *range(20))
    deliveries = await receive(subscription, 20)
    settling = asyncio.ensure_future(settle(subscription, deliveries, Ack()))
    await asyncio.sleep(0)
    settling.cancel()
    await until(lambda: len(orders.settled) == 20)


async def test_leaving_gives_back_what_is_not_settled(
    peer: AmqpPeer, broker: AzureMessageBroker, orders: Queue
) -> None:
    put(peer, orders, 1, 2, 3)
    async with broker.subscribe("orders") as subscription:
        deliveries = await receive(subscription, 3)
        await settle(subscription, deliveries[:1], Ack())
    assert orders.settled == [("complete", "id-1"), ("release", "id-2"), ("release", "id-3")]
    await until(lambda: not peer.connections)
    with pytest.raises(BrokerUnavailableError, match="async with"):
        await subscription.receive(1)
    (error,) = await subscription.settle(deliveries[1:2])
    assert isinstance(error, BrokerUnavailableError)
    async with subscription:
        again = await receive(subscription, 2)
    assert [(delivery.message_id, delivery.attempt) for delivery in again] == [("id-2", 1), ("id-3", 1)]


async def test_a_client_that_was_handed_over_is_not_closed(peer: AmqpPeer, orders: Queue) -> None:
    client = ServiceBusClient.from_connection_string(peer.connection_string, retry_total=0)
    put(peer, orders, 1)
    async with client, client.get_queue_sender("orders") as own:
        async with AzureMessageBroker(client).subscribe("orders") as subscription:
            await settle(subscription, await receive(subscription, 1), Ack())
        await own.send_messages(ServiceBusMessage(b"mine"))
    assert orders.settled == [("complete", "id-1")]
    assert orders.bodies == [b"mine"]


# When the service, or the network, fails


async def test_a_dropped_connection_is_replaced(peer: AmqpPeer, subscription: AzureSubscription, orders: Queue) -> None:
    put(peer, orders, 1)
    first = await receive(subscription, 1)
    peer.cut()
    put(peer, orders, 2)
    second = await receive_in_spite(subscription)
    assert ids(second) == ["id-2"]
    # What was received over the old connection is settled over the new one.
    assert await settle(subscription, first + second, Ack()) == [None, None]
    assert sorted(orders.settled) == [("complete", "id-1"), ("complete", "id-2")]


async def test_a_detached_link_is_replaced(peer: AmqpPeer, subscription: AzureSubscription, orders: Queue) -> None:
    receiving = asyncio.ensure_future(receive_in_spite(subscription))
    await until(lambda: orders.links)
    await asyncio.sleep(0.05)
    peer.detach(orders)
    put(peer, orders, 1)
    assert ids(await receiving) == ["id-1"]


async def test_a_service_that_is_away_is_an_error_until_it_is_back(peer: AmqpPeer, orders: Queue) -> None:
    async with AzureMessageBroker(peer.connection_string, timeout=1.0).subscribe("orders") as subscription:
        receiving = asyncio.ensure_future(subscription.receive(1))
        await until(lambda: orders.links)
        peer.refuse()
        for _ in range(2):
            with pytest.raises(BrokerUnavailableError, match="'orders' at Service Bus"):
                async with asyncio.timeout(SECONDS):
                    await receiving
            receiving = asyncio.ensure_future(subscription.receive(1))
        receiving.cancel()
        peer.accept()
        put(peer, orders, 1)
        assert ids(await receive_in_spite(subscription)) == ["id-1"]


@pytest.mark.parametrize("fault", ["drop", "settle and drop", "ignore"])
async def test_a_settlement_without_an_answer(peer: AmqpPeer, orders: Queue, fault: Any) -> None:
    put(peer, orders, 1, 2)
    async with AzureMessageBroker(peer.connection_string, timeout=2.0).subscribe("orders") as subscription:
        deliveries = await receive(subscription, 2)
        orders.next_settlement(fault)
        answers = await settle(subscription, deliveries, Ack())
        for _ in range(3):
            if BrokerUnavailableError in map(type, answers):
                answers = await subscription.settle(deliveries)
        # Where it was settled already, the service does not know the message any more.
        assert answers[1] is None
        assert answers[0] is None or (fault == "settle and drop" and isinstance(answers[0], BrokerRefusedError))
    assert sorted(set(orders.settled)) == [("complete", "id-1"), ("complete", "id-2")]
    assert not orders.ready


async def test_an_entity_that_vanished_is_refused(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    peer.delete(orders)
    with pytest.raises(BrokerRefusedError, match="there is no queue or subscription 'orders'"):
        await subscription.receive(1)


# At the start


@pytest.mark.parametrize("unknown", ["token", "attach"])
async def test_an_entity_that_does_not_exist(peer: AmqpPeer, broker: AzureMessageBroker, unknown: Any) -> None:
    peer.unknown = unknown
    with pytest.raises(DestinationError, match="there is no queue or subscription 'ordres' at Service Bus 127"):
        await broker.subscribe("ordres").__aenter__()
    await until(lambda: not peer.connections)


async def test_an_entity_of_the_other_kind(peer: AmqpPeer, broker: AzureMessageBroker, orders: Queue) -> None:
    peer.queue("payments", sessions=True)
    peer.topic("news")
    for wrong in (broker.subscribe("orders", sessions=True), broker.subscribe("payments"), broker.subscribe("news")):
        with pytest.raises(DestinationError, match="sessions=True, any other sessions=False, and a topic the name"):
            await wrong.__aenter__()


async def test_wrong_credentials(peer: AmqpPeer, orders: Queue) -> None:
    wrong = peer.connection_string.replace(peer.key, "the wrong secret")
    with pytest.raises(BrokerRefusedError, match="the right to receive") as caught:
        await AzureMessageBroker(wrong).subscribe("orders").__aenter__()
    assert "secret" not in str(caught.value)


async def test_a_namespace_that_hangs(peer: AmqpPeer, orders: Queue) -> None:
    peer.pause()
    with pytest.raises(BrokerUnavailableError, match=r"did not answer within 0\.3 s"):
        await AzureMessageBroker(peer.connection_string, timeout=0.3).subscribe("orders").__aenter__()


async def test_a_connection_string_for_another_entity(peer: AmqpPeer, orders: Queue) -> None:
    broker = AzureMessageBroker(f"{peer.connection_string}EntityPath=payments")
    with pytest.raises(DestinationError, match="EntityPath"):
        await broker.subscribe("orders").__aenter__()


async def test_an_entering_that_is_cancelled_leaves_no_link_behind(
    peer: AmqpPeer, broker: AzureMessageBroker, orders: Queue
) -> None:
    peer.pause()
    entering = asyncio.ensure_future(broker.subscribe("orders").__aenter__())
    await asyncio.sleep(0.05)
    entering.cancel()
    peer.resume()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await until(lambda: not peer.connections)


@pytest.mark.parametrize("settings", [{"max_sessions": 0}, {"session_idle": 0.0}, {"prefetch": -1}])
def test_settings_that_let_nothing_through(broker: AzureMessageBroker, settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        broker.subscribe("orders", **settings)


def test_it_is_a_subscription(broker: AzureMessageBroker) -> None:
    subscription: Subscription = broker.subscribe("orders", "warehouse")
    assert subscription.name == "orders/warehouse"


async def test_asking_for_nothing_is_an_error(subscription: AzureSubscription) -> None:
    with pytest.raises(ValueError, match="at least one"):
        await subscription.receive(0)


async def test_deliveries_of_others_are_not_settled(subscription: AzureSubscription) -> None:
    stranger = Delivery("orders", b"", None, {}, "1", None, 1, "other", outcome=Ack())
    (error,) = await subscription.settle([stranger])
    assert isinstance(error, BrokerRefusedError)


# Topics


async def test_a_topic_s_subscriptions_each_get_what_is_published(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    news = peer.topic("news")
    for name in ("a", "b"):
        peer.subscription(news, name)
    async with broker.subscribe("news", "a") as first, broker.subscribe("news", "b") as second:
        assert (first.name, second.name) == ("news/a", "news/b")
        assert await broker.publish([Outgoing("news", b"x", "t", "1", "n")]) == [None]
        assert ids([*await receive(first, 1), *await receive(second, 1)]) == ["1", "1"]


async def test_a_copy_for_one_subscription_is_handled_by_no_other(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    news = peer.topic("news")
    queues = [peer.subscription(news, name) for name in ("a", "b")]
    async with broker.subscribe("news", "a") as first, broker.subscribe("news", "b") as second:
        await broker.publish([Outgoing("news", b"x", "t", "1", "n")])
        await settle(second, await receive(second, 1), Ack())
        await settle(first, await receive(first, 1), Later(0.05))
        (again,) = await receive(first, 1)
        assert (again.message_id, again.attempt, again.headers) == ("1", 2, {})
        waiting = asyncio.ensure_future(second.receive(1))
        await until(lambda: len(queues[1].settled) == 2)
        assert not waiting.done()
        waiting.cancel()


# Dead letters


async def test_dead_letters_are_counted_listed_retried_and_dropped(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    peer.put(orders, *[proton_message(number, properties={"a": "b"}) for number in range(5)])
    await settle(subscription, await receive(subscription, 5), Dead("why"))
    letters = subscription.dead_letters
    assert await letters.count() == 5
    first = await letters.list(2)
    rest = await letters.list(10, after=first[-1].id)
    assert [dead.delivery.message_id for dead in (*first, *rest)] == [f"id-{number}" for number in range(5)]
    assert (first[0].reason, first[0].delivery.headers, first[0].delivery.body) == ("why", {"a": "b"}, b"body 0")
    assert first[0].delivery.attempt == 1
    assert await letters.drop([first[1].id, "77"]) == 1
    assert await letters.retry([rest[0].id, rest[2].id]) == 2
    assert await letters.count() == 2
    again = await receive(subscription, 2)
    assert [(one.message_id, one.attempt, one.headers) for one in again] == [
        ("id-2", 1, {"a": "b"}),
        ("id-4", 1, {"a": "b"}),
    ]


async def test_what_the_service_gave_up_on_has_its_reason(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", max_deliveries=2)
    put(peer, orders, 1)
    async with broker.subscribe("orders") as subscription:
        for _ in range(2):
            await settle(subscription, await receive(subscription, 1), Later())
    # Outside of the subscription as well.
    (dead,) = await subscription.dead_letters.list(10)
    assert dead.reason == "MaxDeliveryCountExceeded: 2 attempts"


async def test_a_retry_that_cannot_be_sent_leaves_the_dead_letter(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1)
    await settle(subscription, await receive(subscription, 1), Dead("why"))
    (dead,) = await subscription.dead_letters.list(1)
    orders.next("reject", "com.microsoft:entity-disabled")
    orders.next("reject", "com.microsoft:entity-disabled")
    with pytest.raises(BrokerUnavailableError):
        await subscription.dead_letters.retry([dead.id])
    assert await subscription.dead_letters.count() == 1
    assert await subscription.dead_letters.retry([dead.id]) == 1


async def test_a_retry_is_not_taken_for_a_duplicate(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", detects_duplicates=True)
    put(peer, orders, 1)
    async with broker.subscribe("orders") as subscription:
        for _ in range(3):
            (delivery,) = await receive(subscription, 1)
            assert (delivery.message_id, delivery.attempt) == ("id-1", 1)
            await settle(subscription, [delivery], Dead("why"))
            (dead,) = await subscription.dead_letters.list(1)
            assert await subscription.dead_letters.retry([dead.id]) == 1


async def test_dead_letters_of_what_does_not_exist(broker: AzureMessageBroker, orders: Queue) -> None:
    with pytest.raises(BrokerRefusedError, match="there is no queue or subscription the dead letters of 'ordres'"):
        await broker.subscribe("ordres").dead_letters.count()
