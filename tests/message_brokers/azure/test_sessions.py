"""Receiving from Azure Service Bus with sessions: in order per key, over an AMQP peer, and how that can fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError
from pipeline_mediator.message_brokers import Ack, AzureMessageBroker, Dead, Delivery, Later, Outgoing
from pipeline_mediator.message_brokers.azure.subscription import AzureSubscription
from tests.amqp_peer import AmqpPeer, Queue
from tests.message_brokers.azure.steps import SECONDS, ids, put, receive, receive_in_spite, settle, until


@pytest.fixture
def broker(peer: AmqpPeer) -> AzureMessageBroker:
    return AzureMessageBroker(peer.connection_string, timeout=SECONDS)


@pytest.fixture
def orders(peer: AmqpPeer) -> Queue:
    return peer.queue("orders", sessions=True)


@pytest.fixture
async def subscription(broker: AzureMessageBroker, orders: Queue) -> AsyncIterator[AzureSubscription]:
    async with broker.subscribe("orders", sessions=True, session_idle=0.1) as subscription:
        yield subscription


async def test_a_session_s_messages_come_one_by_one_in_order(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, *range(5), key="a")
    for number in range(5):
        (delivery,) = await receive(subscription, 1)
        assert (delivery.message_id, delivery.key, delivery.attempt) == (f"id-{number}", "a", 1)
        assert len(orders.locked) == 1
        await settle(subscription, [delivery], Ack())
    assert not orders.ready


async def test_several_sessions_are_out_at_a_time_one_message_of_each(
    peer: AmqpPeer, broker: AzureMessageBroker
) -> None:
    orders = peer.queue("orders", sessions=True)
    for number, key in enumerate("aabbccdd"):
        put(peer, orders, number, key=key)
    async with broker.subscribe("orders", sessions=True, max_sessions=3, session_idle=0.1) as subscription:
        deliveries = await receive(subscription, 3)
        assert sorted(delivery.key or "" for delivery in deliveries) == ["a", "b", "c"]
        receiving = asyncio.ensure_future(subscription.receive(3))
        await asyncio.sleep(0.2)
        assert not receiving.done()
        await settle(subscription, deliveries, Ack())
        more = [*await receiving]
        seen = [*deliveries, *more]
        # The fourth gets its turn when one of the first is idle.
        while len(seen) < 8:
            await settle(subscription, more, Ack())
            more = await receive(subscription, 1)
            seen += more
        await settle(subscription, more, Ack())
    for key, order in {"a": [0, 1], "b": [2, 3], "c": [4, 5], "d": [6, 7]}.items():
        assert ids([one for one in seen if one.key == key]) == [f"id-{number}" for number in order]
    assert not orders.ready


async def test_what_comes_later_is_overtaken_by_nothing_of_its_session(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, 2, key="a")
    put(peer, orders, 3, key="b")
    first = [one for one in await receive(subscription, 2) if one.key == "a"]
    loop = asyncio.get_running_loop()
    began = loop.time()
    await settle(subscription, first, Later(0.5))
    (again,) = await receive(subscription, 1)
    assert loop.time() - began >= 0.5
    assert (again.message_id, again.attempt) == ("id-1", 2)
    await settle(subscription, [again], Ack())
    (second,) = await receive(subscription, 1)
    assert (second.message_id, second.attempt) == ("id-2", 1)


async def test_sessions_that_wait_take_nobody_s_place(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", sessions=True, lock=0.8)
    for key in "ab":
        put(peer, orders, 1, 2, key=key)
    async with broker.subscribe("orders", sessions=True, max_sessions=1) as subscription:
        await settle(subscription, await receive(subscription, 1), Later(3))
        (other,) = await receive(subscription, 1)
        assert other.key == "b"
        await settle(subscription, [other], Ack())
        await receive(subscription, 1)
        assert set(orders.session_locks) == {"a", "b"}
        # The one that waits is kept locked.
        await until(lambda: orders.renewed >= 4)
        assert set(orders.session_locks) == {"a", "b"}


async def test_a_session_that_is_lost_while_it_waits_is_received_again(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, key="a")
    await settle(subscription, await receive(subscription, 1), Later(0.2))
    orders.lose_locks()
    (again,) = await receive(subscription, 1)
    assert (again.message_id, again.attempt) == ("id-1", 2)


async def test_dead_letters_let_the_session_go_on(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, 2, key="a")
    await settle(subscription, await receive(subscription, 1), Dead("why"))
    assert ids(await receive(subscription, 1)) == ["id-2"]
    (dead,) = await subscription.dead_letters.list(10)
    assert (dead.delivery.message_id, dead.delivery.key, dead.reason) == ("id-1", "a", "why")
    assert await subscription.dead_letters.retry([dead.id]) == 1
    assert [(stored.message.group_id, stored.message.id[:5]) for stored in orders.ready] == [("a", "id-1~")]


async def test_what_is_given_back_gives_its_session_up(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, 2, key="a")
    await settle(subscription, await receive(subscription, 1), None)
    (again,) = await receive(subscription, 1)
    assert (again.message_id, again.attempt) == ("id-1", 1)


async def test_a_session_is_kept_locked_as_long_as_its_handler_takes(
    peer: AmqpPeer, broker: AzureMessageBroker
) -> None:
    orders = peer.queue("orders", sessions=True, lock=0.6)
    put(peer, orders, 1, key="a")
    async with broker.subscribe("orders", sessions=True) as subscription:
        (delivery,) = await receive(subscription, 1)
        await until(lambda: orders.renewed >= 5)
        assert not delivery.lost
        assert await settle(subscription, [delivery], Ack()) == [None]
    assert orders.settled == [("complete", "id-1")]


@pytest.mark.parametrize("how", ["lock", "cut", "detach", "hang", "lock again"])
async def test_a_delivery_is_told_that_its_session_is_lost(
    peer: AmqpPeer, broker: AzureMessageBroker, how: str
) -> None:
    orders = peer.queue("orders", sessions=True, lock=0.8)
    put(peer, orders, 1, 2, key="a")
    async with broker.subscribe("orders", sessions=True, max_sessions=1) as subscription:
        (delivery,) = await receive(subscription, 1)
        lost = asyncio.Event()
        delivery.on_lost = lost.set
        ways: dict[str, Any] = {"lock": orders.lose_locks, "cut": peer.cut, "hang": peer.pause}
        # After this one the client gives the session up, and locks it again by itself.
        ways["lock again"] = lambda: orders.next_request("reject", "com.microsoft:entity-disabled")
        ways.get(how, lambda: peer.detach(orders))()
        async with asyncio.timeout(SECONDS):
            await lost.wait()
        peer.resume()
        (error,) = await settle(subscription, [delivery], Ack())
        assert isinstance(error, BrokerRefusedError)
        again = await receive_in_spite(subscription)
        assert ids(again) == ["id-1"]
        assert await settle(subscription, again, Ack()) == [None]


async def test_a_settlement_that_fails_ends_the_session(
    peer: AmqpPeer, subscription: AzureSubscription, orders: Queue
) -> None:
    put(peer, orders, 1, 2, key="a")
    orders.next_settlement("drop")
    (error,) = await settle(subscription, await receive(subscription, 1), Ack())
    assert isinstance(error, BrokerRefusedError | BrokerUnavailableError)
    again = await receive_in_spite(subscription)
    assert ids(again) == ["id-1"]
    assert await settle(subscription, again, Ack()) == [None]
    assert ids(await receive(subscription, 1)) == ["id-2"]


async def test_leaving_gives_sessions_up(peer: AmqpPeer, broker: AzureMessageBroker, orders: Queue) -> None:
    put(peer, orders, 1, key="a")
    async with broker.subscribe("orders", sessions=True) as subscription:
        await receive(subscription, 1)
        assert orders.session_locks
    await until(lambda: not orders.session_locks and not peer.connections)
    assert [stored.deliveries for stored in orders.ready] == [0]


async def test_a_message_that_comes_later_than_its_subscriber(
    peer: AmqpPeer, broker: AzureMessageBroker, subscription: AzureSubscription
) -> None:
    receiving = asyncio.ensure_future(subscription.receive(5))
    await asyncio.sleep(0.2)
    await broker.publish([Outgoing("orders", b"x", "t", "1", "n", "a")])
    assert ids(await receiving) == ["1"]


async def test_order_and_completeness_with_many_sessions(peer: AmqpPeer, broker: AzureMessageBroker) -> None:
    orders = peer.queue("orders", sessions=True)
    for number in range(60):
        put(peer, orders, number, key=f"k{number % 6}")
    done: list[Delivery] = []
    async with (
        broker.subscribe("orders", sessions=True, max_sessions=3, session_idle=0.1) as first,
        broker.subscribe("orders", sessions=True, max_sessions=3, session_idle=0.1) as second,
    ):

        async def consume(subscription: AzureSubscription) -> None:
            while True:
                deliveries = await subscription.receive(4)
                for delivery in deliveries:
                    again = delivery.attempt == 1 and (delivery.message_id or "").endswith("7")
                    delivery.outcome = Later(0.05) if again else Ack()
                    if not again:
                        done.append(delivery)
                assert not any(await subscription.settle(deliveries))

        consuming = [asyncio.ensure_future(consume(one)) for one in (first, second)]
        await until(lambda: len(done) == 60)
        for task in consuming:
            task.cancel()
    for key in range(6):
        mine = [int((one.message_id or "").removeprefix("id-")) for one in done if one.key == f"k{key}"]
        assert mine == list(range(key, 60, 6))
