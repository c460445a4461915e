"""Azure Service Bus with the real client: what goes over the wire to an AMQP peer, and how it can fail."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import azure.servicebus
import pytest
from azure.servicebus.aio import ServiceBusClient
from azure.servicebus.exceptions import ServiceBusError
from cloudevents.core.bindings.amqp import AMQPMessage, from_binary_event

from pipeline_mediator import Mediator
from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    MessageTooLargeError,
)
from pipeline_mediator.events import IntegrationEvent
from pipeline_mediator.message_brokers import AzureMessageBroker, MessageBroker, Outgoing
from pipeline_mediator.messages import message
from pipeline_mediator.middlewares import PublishMiddleware
from tests.amqp_peer import AmqpPeer, Entity
from tests.servers import free_port

SECONDS = 15.0


@pytest.fixture
def orders(peer: AmqpPeer) -> Entity:
    return peer.entity("orders")


@pytest.fixture
async def broker(peer: AmqpPeer, orders: Entity) -> AsyncIterator[AzureMessageBroker]:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), timeout=SECONDS) as broker:
        yield broker


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: int


def outgoing(number: int, key: str | None = None, *, to: str = "orders", size: int = 0) -> Outgoing:
    body = b"secret body %d" % number
    return Outgoing(to, body.ljust(size), "text/plain", f"id-{number}", "n", key)


def batch(size: int) -> list[Outgoing]:
    return [outgoing(number) for number in range(size)]


def bodies(*numbers: int) -> list[bytes]:
    return [b"secret body %d" % number for number in numbers]


def kinds(answers: Any) -> list[type]:
    return [type(answer) for answer in answers]


def whole_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=0))


async def until(happened: Callable[[], bool]) -> None:
    """Wait for what the peer learns from the network."""
    for _ in range(1_500):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


# What goes over the wire


async def test_a_batch_is_one_transfer_in_order(broker: AzureMessageBroker, orders: Entity) -> None:
    assert await broker.publish(batch(100)) == [None] * 100
    assert [len(transfer) for transfer in orders.batches] == [100]
    assert orders.bodies == bodies(*range(100))


async def test_a_message_carries_what_service_bus_knows_of_it(broker: AzureMessageBroker, orders: Entity) -> None:
    sent = Outgoing(
        "orders",
        b"{}",
        "application/json",
        "42",
        "orders.placed",
        "7",
        {"correlationid": "c-1", "type": "orders.placed"},
    )
    assert await broker.publish([sent, outgoing(1)]) == [None, None]
    stored, plain = orders.messages
    assert (stored.id, stored.subject, stored.correlation_id) == ("42", "orders.placed", "c-1")
    assert (stored.group_id, stored.content_type, bytes(stored.body)) == ("7", "application/json", b"{}")
    assert stored.properties == {"cloudEvents_correlationid": "c-1", "cloudEvents_type": "orders.placed"}
    assert (plain.group_id, plain.correlation_id, plain.properties, plain.annotations) == (None, None, None, None)


async def test_a_message_can_be_kept_back_by_the_service(broker: AzureMessageBroker, orders: Entity) -> None:
    then = datetime(2030, 1, 1, 12, tzinfo=UTC)
    scheduled = Outgoing("orders", b"later", "text/plain", "1", "n", not_before=then)
    assert await broker.publish([scheduled, outgoing(2)]) == [None, None]
    (first, second) = orders.messages
    assert first.annotations["x-opt-scheduled-enqueue-time"] == then.timestamp() * 1000
    assert second.annotations is None


async def test_what_a_mediator_publishes_is_a_cloud_event_of_the_amqp_binding(
    broker: AzureMessageBroker, orders: Entity
) -> None:
    codec = Codec(OrderPlaced, source="shop")
    mediator = Mediator(middlewares=[PublishMiddleware(broker, {OrderPlaced: "orders"})], codec=codec)
    await mediator.emit(OrderPlaced(7))
    (stored,) = orders.messages
    properties = dict(stored.properties)
    # As we read it, and as the CloudEvents SDK does.
    decoded = codec.decode(bytes(stored.body), stored.content_type, properties)
    assert decoded.message == OrderPlaced(7)
    assert (stored.id, stored.group_id) == (decoded.facts.message_id, "7")
    event = from_binary_event(AMQPMessage({"content-type": str(stored.content_type)}, properties, bytes(stored.body)))
    assert (event.get_id(), event.get_type(), event.get_source()) == (stored.id, "orders.placed", "shop")
    assert event.get_data() == {"order_id": 7}


async def test_a_batch_that_is_too_large_for_a_transfer_goes_in_several(peer: AmqpPeer, orders: Entity) -> None:
    orders.max_batch_size = 5_000
    async with AzureMessageBroker(peer.connection_string) as broker:
        assert await broker.publish([outgoing(number, size=1_000) for number in range(10)]) == [None] * 10
    assert [len(transfer) for transfer in orders.batches] == [4, 4, 2]
    assert [body.rstrip() for body in orders.bodies] == bodies(*range(10))


async def test_what_is_published_at_the_same_time_shares_a_link_and_a_transfer(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    held = orders.next("hold")
    publishing = [asyncio.ensure_future(broker.publish([outgoing(0)]))]
    await held.struck()
    publishing += [asyncio.ensure_future(broker.publish([outgoing(number)])) for number in range(1, 50)]
    await asyncio.sleep(0)
    held.release()
    assert await asyncio.gather(*publishing) == [[None]] * 50
    assert [len(transfer) for transfer in orders.batches] == [1, 49]
    assert orders.bodies == bodies(*range(50))
    assert peer.opened == 1


async def test_each_entity_gets_its_own_messages(broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer) -> None:
    payments = peer.entity("payments")
    sent = [outgoing(1), outgoing(2, to="payments"), outgoing(3), outgoing(4, to="payments")]
    assert await broker.publish(sent) == [None] * 4
    assert orders.bodies == bodies(1, 3)
    assert payments.bodies == bodies(2, 4)


async def test_an_empty_batch_sends_nothing() -> None:
    broker: MessageBroker = AzureMessageBroker(_nowhere())
    assert await broker.publish([]) == []


# At the start


@pytest.mark.parametrize("unknown", ["token", "attach"])
async def test_unknown_entities_are_refused_at_the_start(peer: AmqpPeer, orders: Entity, unknown: Any) -> None:
    peer.unknown = unknown
    broker = AzureMessageBroker(peer.connection_string, entities=("orders", "ordres", "payment"))
    with pytest.raises(BrokerRefusedError, match=r"no queue or topic 'ordres' at Service Bus 127\.0\.0\.1") as caught:
        await broker.__aenter__()
    assert "'payment'" in whole_text(caught.value)
    assert isinstance(caught.value.__cause__, ServiceBusError)
    await until(lambda: not peer.connections)


@pytest.mark.parametrize("entities", [(), ("orders",)])
async def test_wrong_credentials_are_refused_at_the_start(peer: AmqpPeer, orders: Entity, entities: Any) -> None:
    connection_string = peer.connection_string.replace(peer.key, "the wrong secret")
    with pytest.raises(BrokerRefusedError, match="refused the credentials") as caught:
        await AzureMessageBroker(connection_string, entities=entities).__aenter__()
    assert f"127.0.0.1:{peer.port}" in str(caught.value)
    assert "secret" not in whole_text(caught.value)


@pytest.mark.parametrize("entities", [(), ("orders",)])
async def test_an_unreachable_namespace_is_an_error_at_the_start_that_names_it(entities: Any) -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port} cannot be reached"):
        await AzureMessageBroker(_nowhere(port), entities=entities).__aenter__()


@pytest.mark.parametrize("entities", [(), ("orders",)])
async def test_a_namespace_that_hangs_is_an_error_at_the_start_after_the_timeout(peer: AmqpPeer, entities: Any) -> None:
    peer.pause()
    tasks = asyncio.all_tasks()
    with pytest.raises(BrokerUnavailableError, match=r"did not answer within 0\.2 s"):
        await AzureMessageBroker(peer.connection_string, entities=entities, timeout=0.2).__aenter__()
    assert asyncio.all_tasks() == tasks


async def test_a_service_that_cannot_look_at_credentials_has_not_refused_them(peer: AmqpPeer, orders: Entity) -> None:
    peer.token_status = 503
    with pytest.raises(BrokerUnavailableError, match="did not get to look at the credentials"):
        await AzureMessageBroker(peer.connection_string, entities=("orders",)).__aenter__()


async def test_an_entering_that_is_cancelled_leaves_no_link_behind(peer: AmqpPeer, orders: Entity) -> None:
    peer.pause()
    broker = AzureMessageBroker(peer.connection_string, entities=("orders",))
    entering = asyncio.ensure_future(broker.__aenter__())
    await asyncio.sleep(0.05)
    entering.cancel()
    peer.resume()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await until(lambda: not peer.connections)
    async with broker:
        assert await broker.publish([outgoing(0)]) == [None]


async def test_a_namespace_that_answers_lets_a_broker_in_which_knows_no_entity(peer: AmqpPeer, orders: Entity) -> None:
    async with AzureMessageBroker(peer.connection_string) as broker:
        assert not peer.connections
        assert await broker.publish(batch(2)) == [None, None]
    assert orders.bodies == bodies(0, 1)


async def test_a_client_may_have_rights_for_some_entities_only(peer: AmqpPeer, orders: Entity) -> None:
    connection_string = peer.connection_string.replace(peer.key, "good for nothing that is known at the start")
    client = ServiceBusClient.from_connection_string(connection_string, retry_total=0)
    async with client, AzureMessageBroker(client) as broker:
        (answer,) = await broker.publish([outgoing(1)])
    assert isinstance(answer, BrokerRefusedError)
    assert "'orders'" in str(answer)
    assert "Data Sender" in str(answer)


async def test_a_connection_string_for_one_entity_is_good_for_that_one(peer: AmqpPeer, orders: Entity) -> None:
    async with AzureMessageBroker(f"{peer.connection_string}EntityPath=orders") as broker:
        assert peer.opened == 1
        accepted, refused = await broker.publish([outgoing(1), outgoing(2, to="payments")])
    assert accepted is None
    assert isinstance(refused, BrokerRefusedError)
    assert "message id-2 cannot go to 'payments'" in str(refused)
    assert "EntityPath" in str(refused)
    with pytest.raises(ConfigurationError, match="EntityPath"):
        await AzureMessageBroker(f"{peer.connection_string}EntityPath=orders", entities=["payments"]).__aenter__()


@pytest.mark.parametrize(
    "connection_string",
    [
        "",
        "sb://shop",
        "Endpoint=sb://shop/",
        "Endpoint=sb://shop/;SharedAccessKey=secret",
        "SharedAccessKey=secret;secret",
    ],
)
def test_what_is_no_connection_string_is_refused_without_being_repeated(connection_string: str) -> None:
    with pytest.raises(ConfigurationError, match="no Service Bus connection string") as caught:
        AzureMessageBroker(connection_string)
    assert "secret" not in whole_text(caught.value)


def test_a_blocking_client_is_refused() -> None:
    client: Any = azure.servicebus.ServiceBusClient.from_connection_string(_nowhere())
    with pytest.raises(ConfigurationError, match=r"azure\.servicebus\.aio\.ServiceBusClient, not azure\.servicebus\._"):
        AzureMessageBroker(client)


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"idle_timeout": 0.0}, {"max_senders": 0}])
def test_limits_that_let_nothing_through_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        AzureMessageBroker(_nowhere(), **settings)


# In the middle


async def test_a_dropped_connection_is_replaced(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.next("drop")
    assert await broker.publish(batch(2)) == [None, None]
    assert orders.bodies == bodies(0, 1)


async def test_a_link_that_was_detached_meanwhile_is_replaced(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    assert await broker.publish([outgoing(0)]) == [None]
    peer.detach(orders)
    assert await broker.publish([outgoing(1)]) == [None]
    orders.next("detach")
    assert await broker.publish([outgoing(2)]) == [None]
    assert orders.bodies == bodies(0, 1, 2)


async def test_a_transfer_whose_answer_is_lost_is_sent_again_with_the_same_ids(
    broker: AzureMessageBroker, orders: Entity
) -> None:
    orders.next("lose answer")
    assert await broker.publish(batch(2)) == [None, None]
    assert [message.id for message in orders.messages] == ["id-0", "id-1", "id-0", "id-1"]


async def test_a_service_that_is_busy_is_asked_again_once(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.next("reject", "com.microsoft:server-busy")
    assert await broker.publish([outgoing(0)]) == [None]
    for _ in range(2):
        orders.next("reject", "com.microsoft:server-busy")
    (answer,) = await broker.publish([outgoing(1)])
    assert isinstance(answer, BrokerUnavailableError)
    assert "is busy" in str(answer)
    assert await broker.publish([outgoing(2)]) == [None]
    assert orders.bodies == bodies(0, 2)


async def test_an_entity_that_is_full_is_no_reason_to_give_up(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.next("reject", "amqp:resource-limit-exceeded")
    answers = await broker.publish(batch(2))
    assert kinds(answers) == [BrokerUnavailableError] * 2
    assert "takes no more" in str(answers[0])
    assert answers[0] is not answers[1]
    assert await broker.publish(batch(1)) == [None]


async def test_an_entity_that_is_disabled_is_no_reason_to_give_up(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    orders.closed_with = "com.microsoft:entity-disabled"
    peer.cut()
    (answer,) = await broker.publish([outgoing(0)])
    assert isinstance(answer, BrokerUnavailableError)
    assert "'orders' at" in str(answer)
    assert "Enable it" in str(answer)


async def test_those_who_wait_for_a_link_share_the_error(peer: AmqpPeer, orders: Entity) -> None:
    orders.closed_with = "com.microsoft:entity-disabled"
    broker = AzureMessageBroker(peer.connection_string)
    answers = await asyncio.gather(*[broker.publish([outgoing(number)]) for number in range(10)])
    assert kinds([answer for (answer,) in answers]) == [BrokerUnavailableError] * 10
    assert peer.opened == 2  # the client tries twice
    orders.closed_with = None
    async with broker:
        assert await broker.publish([outgoing(0)]) == [None]


async def test_rights_that_were_taken_away_are_refused(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    orders.closed_with = "amqp:unauthorized-access"
    peer.cut()
    (answer,) = await broker.publish([outgoing(0)])
    assert isinstance(answer, BrokerRefusedError)
    assert "right to send" in str(answer)


async def test_a_dead_service_refuses_each_message_and_a_restarted_one_takes_them_again(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    peer.refuse()
    answers = await broker.publish(batch(2))
    assert kinds(answers) == [BrokerUnavailableError] * 2
    assert answers[0] is not answers[1]
    assert "cannot be reached" in str(answers[0])
    peer.accept()
    assert await broker.publish(batch(2)) == [None, None]


async def test_a_service_that_hangs_refuses_after_the_timeout_and_takes_messages_when_it_wakes(
    peer: AmqpPeer, orders: Entity
) -> None:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), timeout=1.5) as broker:
        peer.pause()
        answers = await broker.publish(batch(2))
        assert kinds(answers) == [BrokerUnavailableError] * 2
        assert "did not answer within 1.5 s" in str(answers[0])
        peer.resume()
        assert await broker.publish([outgoing(2)]) == [None]
    assert orders.messages[-1].id == "id-2"


@pytest.mark.parametrize("action", ["ignore", "reject barely"])
async def test_no_transfer_is_waited_for_beyond_the_timeout(peer: AmqpPeer, orders: Entity, action: Any) -> None:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), timeout=1.5) as broker:
        orders.next(action)
        (answer,) = await broker.publish([outgoing(0)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "did not answer within 1.5 s" in str(answer)
        assert await broker.publish([outgoing(1)]) == [None]
        # The link that was given up is closed, and in order.
        await until(lambda: len(peer.connections) == 1)
        assert peer.abandoned == 0
    assert orders.bodies == bodies(1)


async def test_waiting_for_its_turn_counts_against_the_timeout(peer: AmqpPeer, orders: Entity) -> None:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), timeout=1.5) as broker:
        ignored = orders.next("ignore")
        first = asyncio.ensure_future(broker.publish([outgoing(0)]))
        await ignored.struck()
        assert kinds(await broker.publish([outgoing(1)])) == [BrokerUnavailableError]
        assert kinds(await first) == [BrokerUnavailableError]
        assert await broker.publish([outgoing(2)]) == [None]
    # The second was not sent when nobody waited for it any longer.
    assert orders.bodies == bodies(2)


async def test_a_cancelled_publish_breaks_neither_the_link_nor_what_others_publish(
    broker: AzureMessageBroker, orders: Entity, peer: AmqpPeer
) -> None:
    held = orders.next("hold")
    on_its_way = asyncio.ensure_future(broker.publish([outgoing(0)]))
    await held.struck()
    waiting = asyncio.ensure_future(broker.publish([outgoing(1)]))
    another = asyncio.ensure_future(broker.publish([outgoing(2)]))
    await asyncio.sleep(0)
    on_its_way.cancel()
    waiting.cancel()
    assert [type(result) for result in await asyncio.gather(on_its_way, waiting, return_exceptions=True)] == [
        asyncio.CancelledError
    ] * 2
    held.release()
    assert await another == [None]
    # What was on its way arrived; what still waited was not sent.
    assert orders.bodies == bodies(0, 2)
    assert peer.opened == 1


# In part


def refuse_poison(messages: Any) -> str | None:
    return "amqp:not-allowed" if any(b"poison" in bytes(message.body) for message in messages) else None


def poison(number: int, key: str | None = None) -> Outgoing:
    return Outgoing("orders", b"poison", "text/plain", f"id-{number}", "n", key)


async def test_a_message_that_is_refused_takes_no_other_with_it(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.rule = refuse_poison
    answers = await broker.publish([outgoing(0), outgoing(1), poison(2), outgoing(3)])
    assert kinds(answers) == [type(None), type(None), BrokerRefusedError, type(None)]
    assert "amqp:not-allowed" in str(answers[2])
    assert "poison" not in whole_text(answers[2] or Exception())
    assert orders.bodies == bodies(0, 1, 3)


async def test_nothing_of_a_key_follows_a_refused_message_of_it(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.rule = refuse_poison
    sent = [outgoing(0, "a"), poison(1, "a"), outgoing(2, "b"), outgoing(3, "a"), outgoing(4), outgoing(5, "a")]
    answers = await broker.publish(sent)
    unavailable, fine = BrokerUnavailableError, type(None)
    assert kinds(answers) == [fine, BrokerRefusedError, fine, unavailable, fine, unavailable]
    assert "message id-3 was not sent" in str(answers[3])
    assert "message id-1" in str(answers[3])
    assert sorted(orders.bodies) == bodies(0, 2, 4)
    # It holds for one call; what comes later is a new attempt.
    assert await broker.publish([outgoing(6, "a")]) == [None]


async def test_a_message_that_is_too_large_is_refused_by_itself(peer: AmqpPeer, orders: Entity) -> None:
    orders.max_batch_size = 5_000
    async with AzureMessageBroker(peer.connection_string) as broker:
        sent = [outgoing(0, "a"), outgoing(1, "a", size=6_000), outgoing(2, "a"), outgoing(3, "b")]
        answers = await broker.publish(sent)
    assert kinds(answers) == [type(None), MessageTooLargeError, BrokerUnavailableError, type(None)]
    assert isinstance(answers[1], MessageTooLargeError)
    assert 6_000 < answers[1].size < 6_200
    assert answers[1].limit == 5_000
    assert orders.bodies == bodies(0, 3)


async def test_a_large_message_goes_alone_where_that_is_allowed(peer: AmqpPeer, orders: Entity) -> None:
    orders.max_batch_size = 5_000
    async with AzureMessageBroker(peer.connection_string, max_message_size=10_000, timeout=SECONDS) as broker:
        sent = [outgoing(0, "a"), outgoing(1, "a", size=6_000), outgoing(2, "a")]
        assert await broker.publish(sent) == [None] * 3
        assert [len(transfer) for transfer in orders.batches] == [1, 1, 1]
        assert kinds(await broker.publish([outgoing(3, size=10_000)])) == [MessageTooLargeError]
    assert broker.features.max_message_size == 10_000


async def test_texts_that_are_too_long_for_service_bus_are_refused(broker: AzureMessageBroker, orders: Entity) -> None:
    long = Outgoing("orders", b"", "text/plain", "i" * 129, "n", "a")
    answers = await broker.publish([outgoing(0, "k" * 129), outgoing(1), long, outgoing(2, "a")])
    assert kinds(answers) == [BrokerRefusedError, type(None), BrokerRefusedError, BrokerUnavailableError]
    assert "session_id cannot be longer than 128" in str(answers[0])
    assert orders.bodies == bodies(1)


async def test_a_message_that_amqp_cannot_carry_is_refused_by_itself(
    broker: AzureMessageBroker, orders: Entity
) -> None:
    headers: Any = {"type": object()}
    odd = Outgoing("orders", b"", "text/plain", "odd", "n", headers=headers)
    answers = await broker.publish([odd, outgoing(1), odd, outgoing(2)])
    assert kinds(answers) == [BrokerRefusedError, type(None)] * 2
    assert "message odd cannot be written in AMQP" in str(answers[0])
    assert orders.bodies == bodies(1, 2)


async def test_what_is_no_message_sends_nothing_of_its_batch(broker: AzureMessageBroker, orders: Entity) -> None:
    wrong: Any = outgoing(1)
    with pytest.raises(TypeError):
        await broker.publish([outgoing(0), Outgoing("orders", wrong, "text/plain", "1", "n")])
    assert await broker.publish([outgoing(2)]) == [None]
    assert orders.bodies == bodies(2)


@pytest.mark.parametrize(("action", "condition"), [("ignore", ""), ("reject", "amqp:resource-limit-exceeded")])
async def test_what_was_stored_before_the_service_failed_is_known(
    peer: AmqpPeer, orders: Entity, action: Any, condition: str
) -> None:
    orders.max_batch_size = 5_000
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), timeout=1.5) as broker:
        first = orders.next("hold")
        orders.next(action, condition)
        publishing = asyncio.ensure_future(broker.publish([outgoing(number, size=1_000) for number in range(10)]))
        await first.struck()
        first.release()
        assert kinds(await publishing) == [type(None)] * 4 + [BrokerUnavailableError] * 6
    assert [len(transfer) for transfer in orders.batches] == [4]
    # The third transfer was not tried.
    assert orders.refused == 1


async def test_a_destination_that_is_unknown_takes_no_other_with_it(broker: AzureMessageBroker, orders: Entity) -> None:
    answers = await broker.publish([outgoing(0), outgoing(1, to="ordres"), outgoing(2)])
    assert kinds(answers) == [type(None), BrokerRefusedError, type(None)]
    assert "no queue or topic 'ordres'" in str(answers[1])


async def test_a_partitioned_entity_gets_transfers_of_one_key(broker: AzureMessageBroker, orders: Entity) -> None:
    orders.rule = lambda messages: "amqp:not-allowed" if len({message.group_id for message in messages}) > 1 else None
    sent = [outgoing(number, key) for number, key in enumerate("abcabc")]
    assert await broker.publish(sent) == [None] * 6
    assert orders.refused == 1
    assert await broker.publish(sent) == [None] * 6
    assert orders.refused == 1  # it has learnt
    assert [[message.group_id for message in transfer] for transfer in orders.batches] == [
        ["a"] * 2,
        ["b"] * 2,
        ["c"] * 2,
    ] * 2


async def test_an_entity_that_takes_no_batches_gets_messages_one_by_one(
    broker: AzureMessageBroker, orders: Entity
) -> None:
    # As a partitioned one that detects duplicates.
    orders.rule = lambda messages: "amqp:not-allowed" if len(messages) > 1 else None
    sent = [outgoing(number, "a") for number in range(3)]
    assert await broker.publish(sent) == [None] * 3
    assert await broker.publish(sent) == [None] * 3
    assert orders.refused == 1
    assert orders.bodies == bodies(0, 1, 2) * 2


# Whose client it is, and how long a link is kept


async def test_a_client_that_was_handed_over_is_not_closed(peer: AmqpPeer, orders: Entity) -> None:
    client = ServiceBusClient.from_connection_string(peer.connection_string)
    async with client, client.get_queue_sender("orders") as own:
        async with AzureMessageBroker(client) as broker:
            assert await broker.publish([outgoing(0)]) == [None]
        await own.send_messages(azure.servicebus.ServiceBusMessage(b"mine"))
        assert len(peer.connections) == 1
    assert orders.bodies == [*bodies(0), b"mine"]


async def test_its_links_are_closed_by_the_last_user(peer: AmqpPeer, orders: Entity) -> None:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",)) as broker:
        async with broker:
            assert await broker.publish([outgoing(0)]) == [None]
        assert await broker.publish([outgoing(1)]) == [None]
        assert peer.opened == 1
    await until(lambda: not peer.connections)
    (answer,) = await broker.publish([outgoing(2)])
    assert isinstance(answer, BrokerUnavailableError)
    assert "was closed" in str(answer)
    async with broker:
        assert await broker.publish([outgoing(3)]) == [None]
    assert orders.bodies == bodies(0, 1, 3)


async def test_leaving_waits_for_what_is_on_its_way(peer: AmqpPeer, orders: Entity) -> None:
    broker = await AzureMessageBroker(peer.connection_string, entities=("orders",)).__aenter__()
    held = orders.next("hold")
    publishing = asyncio.ensure_future(broker.publish([outgoing(0)]))
    await held.struck()
    waiting = asyncio.ensure_future(broker.publish([outgoing(1)]))
    await asyncio.sleep(0)
    leaving = asyncio.ensure_future(broker.__aexit__(None, None, None))
    await asyncio.sleep(0)
    held.release()
    await leaving
    assert await publishing == [None]
    assert await waiting == [None]
    assert orders.bodies == bodies(0, 1)


async def test_leaving_in_a_hurry_leaves_nobody_waiting(peer: AmqpPeer, orders: Entity) -> None:
    broker = await AzureMessageBroker(peer.connection_string, entities=("orders",)).__aenter__()
    ignored = orders.next("ignore")
    publishing = [asyncio.ensure_future(broker.publish([outgoing(0)]))]
    await ignored.struck()
    publishing.append(asyncio.ensure_future(broker.publish([outgoing(1)])))
    leaving = asyncio.ensure_future(broker.__aexit__(None, None, None))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    for (answer,) in await asyncio.gather(*publishing):
        assert isinstance(answer, BrokerUnavailableError)
        assert "was closed" in str(answer)
    async with broker:
        assert await broker.publish([outgoing(2)]) == [None]
    assert orders.bodies == bodies(2)


async def test_an_idle_link_is_closed_and_opened_again_for_the_next_message(peer: AmqpPeer, orders: Entity) -> None:
    async with AzureMessageBroker(peer.connection_string, entities=("orders",), idle_timeout=0.1) as broker:
        await until(lambda: not peer.connections)
        assert await broker.publish([outgoing(0)]) == [None]
        await until(lambda: not peer.connections)
    assert orders.bodies == bodies(0)
    assert peer.opened == 2


async def test_no_more_than_so_many_idle_links_are_kept(peer: AmqpPeer, orders: Entity) -> None:
    payments = peer.entity("payments")
    peer.entity("refunds")
    async with AzureMessageBroker(peer.connection_string, entities=("orders", "payments"), max_senders=2) as broker:
        assert await broker.publish([outgoing(0, to="payments")]) == [None]
        assert await broker.publish([outgoing(0, to="refunds")]) == [None]
        # The one that was not used for the longest time.
        await until(lambda: not orders.links)
        assert payments.links
        assert await broker.publish([outgoing(1)]) == [None]
        await until(lambda: not payments.links)
    assert orders.bodies == bodies(1)


async def test_a_link_that_is_in_use_is_kept_whatever_their_number(peer: AmqpPeer, orders: Entity) -> None:
    payments = peer.entity("payments")
    async with AzureMessageBroker(peer.connection_string, max_senders=1) as broker:
        held = orders.next("hold")
        publishing = asyncio.ensure_future(broker.publish([outgoing(0)]))
        await held.struck()
        assert await broker.publish([outgoing(1, to="payments")]) == [None]
        held.release()
        assert await publishing == [None]
        assert await broker.publish([outgoing(2)]) == [None]
        assert peer.opened == 2 + 1  # one to look whether the namespace is there
    assert (orders.bodies, payments.bodies) == (bodies(0, 2), bodies(1))


async def test_a_broker_that_was_not_entered_connects_when_it_is_used(peer: AmqpPeer, orders: Entity) -> None:
    broker = AzureMessageBroker(peer.connection_string)
    assert await broker.publish([outgoing(0)]) == [None]
    assert orders.bodies == bodies(0)
    async with broker:
        pass


async def test_a_user_who_cannot_enter_takes_nothing_from_the_one_who_is_in(peer: AmqpPeer, orders: Entity) -> None:
    payments = peer.entity("payments")
    async with AzureMessageBroker(peer.connection_string, entities=("orders", "payments")) as broker:
        payments.closed_with = "com.microsoft:entity-disabled"
        peer.detach(payments)
        assert kinds(await broker.publish([outgoing(0, to="payments")])) == [BrokerUnavailableError]
        with pytest.raises(BrokerUnavailableError, match="'payments'"):
            await broker.__aenter__()
        assert orders.links
        assert await broker.publish([outgoing(1)]) == [None]


def test_its_features_say_what_service_bus_is() -> None:
    features = AzureMessageBroker(_nowhere()).features
    assert (features.system, features.durable, features.headers, features.ordered_by_key) == (
        "servicebus",
        True,
        True,
        True,
    )
    assert features.max_message_size == 256 * 1024


def test_without_the_sdk_the_error_names_the_extra() -> None:
    _run(
        "import sys; sys.modules['azure.servicebus'] = None",
        "from pipeline_mediator.errors import MissingExtraError",
        "try: from pipeline_mediator.message_brokers import AzureMessageBroker",
        "except MissingExtraError as error: assert 'pipeline-mediator[azure]' in str(error)",
        "else: raise SystemExit('no error')",
    )


def test_what_the_sdk_itself_misses_is_not_blamed_on_the_extra() -> None:
    _run(
        "import sys; sys.modules['isodate'] = None",
        "try: from pipeline_mediator.message_brokers import AzureMessageBroker",
        "except ModuleNotFoundError as error: assert error.name == 'isodate', error.name",
        "else: raise SystemExit('no error')",
    )


@pytest.mark.skipif(
    not {"AZURE_SERVICEBUS_CONNECTION_STRING", "AZURE_SERVICEBUS_QUEUE"} <= os.environ.keys(),
    reason="needs a queue, without sessions and of nobody else's: set AZURE_SERVICEBUS_CONNECTION_STRING (Send and "
    "Listen) and AZURE_SERVICEBUS_QUEUE",
)
async def test_a_real_namespace_stores_what_is_published_and_refuses_what_it_has_to() -> None:
    connection_string, queue = os.environ["AZURE_SERVICEBUS_CONNECTION_STRING"], os.environ["AZURE_SERVICEBUS_QUEUE"]
    codec = Codec(OrderPlaced, source="shop")
    run = str(uuid4())
    sent: list[Outgoing] = []
    for number in range(200):
        encoded = codec.encode(OrderPlaced(number), Facts(f"{run}-{number}", correlation_id=run), binary=True)
        sent.append(
            Outgoing(queue, encoded.body, encoded.content_type, f"{run}-{number}", encoded.name, None, encoded.headers)
        )
    async with AzureMessageBroker(connection_string, entities=(queue,)) as broker:
        assert await broker.publish(sent) == [None] * 200
        (unknown,) = await broker.publish([outgoing(1, to=f"{queue}-{run}")])
        assert isinstance(unknown, BrokerRefusedError)
        (large,) = await broker.publish([outgoing(1, to=queue, size=2 * 1024 * 1024)])
        assert isinstance(large, MessageTooLargeError)
    received: list[int] = []
    async with (
        ServiceBusClient.from_connection_string(connection_string) as client,
        client.get_queue_receiver(queue, max_wait_time=10) as receiver,
    ):
        async for delivery in receiver:
            await receiver.complete_message(delivery)
            if delivery.correlation_id == run:
                raw = delivery.application_properties or {}
                headers = {_text(name): _text(value) for name, value in raw.items()}
                received.append(codec.decode(b"".join(delivery.body), delivery.content_type, headers).message.order_id)
            if len(received) == len(sent):
                break
    assert sorted(received) == list(range(200))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _nowhere(port: int = 1) -> str:
    access = "SharedAccessKeyName=shop;SharedAccessKey=key;UseDevelopmentEmulator=true"
    return f"Endpoint=sb://127.0.0.1:{port}/;{access}"


def _run(*lines: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], check=True)
