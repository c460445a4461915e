"""FastStream's brokers as ours, over a real NATS server: whose they are, what is on the wire, and how it can fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from anyio import to_thread
from faststream.nats import NatsBroker

from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
    MessageTooLargeError,
)
from pipeline_mediator.message_brokers.faststream import FastStreamBroker, FastStreamSubscription
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Delivery, MessageBroker, Outgoing, Subscription
from tests.nats_view import emptied, jetstream, new_broker
from tests.servers import NatsServer, Running, free_port

SECONDS = 15.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def nats(nats_server: Running) -> NatsBroker:
    await emptied(nats_server.url)
    return new_broker(nats_server.url)


@pytest.fixture
async def broker(nats: NatsBroker) -> AsyncIterator[FastStreamBroker]:
    async with FastStreamBroker(nats) as broker:
        yield broker


def outgoing(number: int, key: str | None = None, *, to: str = "orders", size: int = 0) -> Outgoing:
    headers = {"specversion": "1.0", "type": "orders.placed", "source": "/shop", "correlationid": "für 7%"}
    body = b'{"number": %d}' % number
    return Outgoing(to, body.ljust(size), "application/json", f"id-{number}", "orders.placed", key, headers)


def kinds(answers: Sequence[Exception | None]) -> list[type]:
    return [type(answer) for answer in answers]


async def receive(subscription: FastStreamSubscription, number: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(SECONDS):
        while len(found) < number:
            try:
                found += await subscription.receive(number - len(found))
            except BrokerUnavailableError:
                await asyncio.sleep(0.02)
    return found


async def settle(subscription: FastStreamSubscription, delivery: Delivery, outcome: Any) -> Exception | None:
    delivery.outcome = outcome
    (answer,) = await subscription.settle([delivery])
    return answer


# Whose the FastStream broker is


def test_it_is_a_broker_and_its_subscriptions_are_subscriptions() -> None:
    faststream = FastStreamBroker(NatsBroker())
    broker: MessageBroker = faststream
    subscription: Subscription = faststream.subscribe("orders", name="warehouse")
    assert (broker.features.system, broker.features.durable, broker.features.headers) == ("nats", True, True)
    assert subscription.name == "warehouse"


async def test_a_running_broker_is_left_running(nats: NatsBroker) -> None:
    await nats.start()
    broker = FastStreamBroker(nats)
    async with broker, broker.subscribe("orders", name="warehouse"):
        pass
    assert nats.running
    assert await nats.ping(1.0)
    await nats.stop()


async def test_a_connected_broker_is_left_connected(nats: NatsBroker) -> None:
    async with nats:
        async with FastStreamBroker(nats) as broker:
            assert await broker.publish([outgoing(1)]) == [None]
        assert await nats.ping(1.0)


async def test_one_that_is_not_connected_is_connected_and_stopped_by_the_last_to_leave(nats: NatsBroker) -> None:
    broker = FastStreamBroker(nats)
    async with broker:
        async with broker.subscribe("orders", name="warehouse"):
            pass
        assert await nats.ping(1.0)
    assert not await nats.ping(0.1)


async def test_one_that_its_application_started_meanwhile_is_left_running(nats: NatsBroker) -> None:
    async with FastStreamBroker(nats):
        await nats.start()
    assert await nats.ping(1.0)
    await nats.stop()


# What is on the wire


async def test_a_message_has_the_attributes_of_the_event_as_headers(
    broker: FastStreamBroker, nats_server: Running
) -> None:
    assert await broker.publish([outgoing(1, "a b")]) == [None]
    async with jetstream(nats_server.url) as streams:
        stored = await streams.get_last_msg("orders", "orders")
    assert stored.data == b'{"number": 1}'
    assert stored.headers == {
        "id": "id-1",
        "partitionkey": "a b",
        "specversion": "1.0",
        "type": "orders.placed",
        "source": "/shop",
        "correlationid": "f%C3%BCr 7%25",
        "datacontenttype": "application/json",
        "content-type": "application/json",
        "correlation_id": "f%C3%BCr 7%25",
        "Nats-Expected-Stream": "orders",
    }


async def test_a_subscriber_of_faststreams_own_reads_what_is_published(nats: NatsBroker) -> None:
    read: asyncio.Queue[Any] = asyncio.Queue()

    @nats.subscriber("orders", stream="orders")
    async def handle(message: dict[str, int]) -> None:
        await read.put(message)

    await nats.start()
    async with FastStreamBroker(nats) as broker:
        assert await broker.publish([outgoing(1)]) == [None]
        assert await asyncio.wait_for(read.get(), SECONDS) == {"number": 1}
    await nats.stop()


async def test_what_faststream_or_anyone_publishes_is_delivered(broker: FastStreamBroker, nats: NatsBroker) -> None:
    async with broker.subscribe("orders", name="warehouse") as warehouse:
        await nats.publish({"number": 1}, "orders", stream="orders")
        await nats.connection.publish("orders", b"\xff bare")
        found = {delivery.content_type: delivery for delivery in await receive(warehouse, 2)}
        assert json.loads(found["application/json"].body) == {"number": 1}
        assert (found[None].body, found[None].key, found[None].message_id) == (b"\xff bare", None, None)
        assert [await settle(warehouse, delivery, Ack()) for delivery in found.values()] == [None, None]


async def test_a_stream_that_has_the_subject_already_is_used(broker: FastStreamBroker, nats_server: Running) -> None:
    async with jetstream(nats_server.url) as streams:
        await streams.add_stream(name="EVERYTHING", subjects=["shop.>"])
        async with broker.subscribe("shop.orders", name="the warehouse") as warehouse:
            assert await broker.publish([outgoing(1, to="shop.orders")]) == [None]
            (delivery,) = await receive(warehouse, 1)
            assert delivery.destination == "shop.orders"
            assert await settle(warehouse, delivery, Dead("no")) is None
        assert (await streams.stream_info("EVERYTHING")).state.messages == 1


async def test_no_more_is_read_ahead_than_prefetch_and_one_fetch(
    broker: FastStreamBroker, nats_server: Running
) -> None:
    async with broker.subscribe("orders", name="warehouse", prefetch=10) as warehouse:
        assert set(await broker.publish([outgoing(number) for number in range(300)])) == {None}
        first = await receive(warehouse, 1)
        async with jetstream(nats_server.url) as streams:
            for _ in range(20):
                await asyncio.sleep(0.01)
                (info,) = [one for one in await streams.consumers_info("orders") if one.name == "warehouse-orders"]
                assert info.num_ack_pending <= 10 + 64
        found = [first[0].body]
        assert await settle(warehouse, first[0], Ack()) is None
        while len(found) < 300:
            (delivery,) = await receive(warehouse, 1)
            found.append(delivery.body)
            assert await settle(warehouse, delivery, Ack()) is None
        assert len(set(found)) == 300


# How it can fail


async def test_without_a_server_entering_says_so_and_each_message_has_an_answer() -> None:
    broker = FastStreamBroker(new_broker(f"nats://127.0.0.1:{free_port()}"), timeout=0.3)
    with pytest.raises(BrokerUnavailableError, match="NATS does not answer"):
        await broker.__aenter__()
    assert kinds(await broker.publish([outgoing(1), outgoing(2)])) == [BrokerUnavailableError] * 2
    with pytest.raises(BrokerUnavailableError):
        await broker.subscribe("orders", name="warehouse").__aenter__()


async def test_a_frozen_server_is_unavailable_in_time(own_nats: NatsServer) -> None:
    async with FastStreamBroker(new_broker(own_nats.url), timeout=0.3) as broker:
        assert await broker.publish([outgoing(1)]) == [None]
        own_nats.pause()
        try:
            assert kinds(await broker.publish([outgoing(2), outgoing(3)])) == [BrokerUnavailableError] * 2
        finally:
            own_nats.resume()


async def test_a_killed_server_makes_receive_say_so_and_goes_on_when_it_is_back(own_nats: NatsServer) -> None:
    broker = FastStreamBroker(new_broker(own_nats.url), timeout=5.0)
    async with broker, broker.subscribe("orders", name="warehouse", hold=1.0) as warehouse:
        assert await broker.publish([outgoing(1)]) == [None]
        (first,) = await receive(warehouse, 1)
        own_nats.kill()
        lost = asyncio.Event()
        first.on_lost = lost.set
        with pytest.raises(BrokerUnavailableError):
            async with asyncio.timeout(SECONDS):
                await warehouse.receive(1)
        await asyncio.wait_for(lost.wait(), SECONDS)
        assert first.lost
        assert isinstance(await settle(warehouse, first, Ack()), BrokerRefusedError)
        await to_thread.run_sync(own_nats.start)
        (again,) = await receive(warehouse, 1)
        assert (again.body, again.attempt) == (first.body, 2)
        assert await settle(warehouse, again, Ack()) is None


async def test_a_client_that_gave_up_its_connection_does_not_hang_the_process(
    broker: FastStreamBroker, nats: NatsBroker
) -> None:
    async with broker.subscribe("orders", name="warehouse") as warehouse:
        await nats.connection.close()
        with pytest.raises(BrokerUnavailableError):
            async with asyncio.timeout(SECONDS):
                await warehouse.receive(1)
        (answer,) = await broker.publish([outgoing(1)])
        assert isinstance(answer, BrokerUnavailableError)
        assert "max_reconnect_attempts=-1" in str(answer)


async def test_nothing_of_a_key_follows_what_was_refused(broker: FastStreamBroker) -> None:
    batch = [outgoing(1, "a", size=2_000_000), outgoing(2, "a"), outgoing(3, "b"), outgoing(4)]
    answers = await broker.publish(batch)
    assert kinds(answers) == [MessageTooLargeError, BrokerUnavailableError, type(None), type(None)]
    assert "an earlier message of its key was refused" in str(answers[1])


@pytest.mark.parametrize("subject", ["orders.*", "orders.>", "two words", ".orders", "a..b"])
async def test_what_is_no_subject_is_refused_by_name(broker: FastStreamBroker, subject: str) -> None:
    (answer,) = await broker.publish([outgoing(1, to=subject)])
    assert isinstance(answer, DestinationError)
    assert subject in str(answer)
    with pytest.raises(DestinationError):
        await broker.subscribe(subject, name="warehouse").__aenter__()


async def test_a_consumer_of_something_else_under_that_name_is_refused(
    broker: FastStreamBroker, nats_server: Running
) -> None:
    async with jetstream(nats_server.url) as streams:
        await streams.add_stream(name="SHOP", subjects=["orders", "returns"])
        await streams.add_consumer("SHOP", durable_name="warehouse-orders", filter_subject="returns")
    with pytest.raises(DestinationError, match="another name than 'warehouse'"):
        await broker.subscribe("orders", name="warehouse").__aenter__()


async def test_a_dead_letter_that_cannot_be_written_leaves_the_message_where_it_was(
    broker: FastStreamBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broker.subscribe("orders", name="warehouse") as warehouse:
        assert await broker.publish([outgoing(1)]) == [None]
        (delivery,) = await receive(warehouse, 1)

        async def full(*args: object) -> None:
            raise OSError

        with monkeypatch.context() as broken:
            broken.setattr("pipeline_mediator.message_brokers.faststream.nats.Nats.send", full)
            assert isinstance(await settle(warehouse, delivery, Dead("no")), BrokerUnavailableError)
        assert warehouse.dead_letters is not None
        assert await warehouse.dead_letters.count() == 0
        assert await settle(warehouse, delivery, Dead("no")) is None
        assert await warehouse.dead_letters.count() == 1


async def test_what_cannot_be_settled_any_more_is_answered_and_forgotten(
    broker: FastStreamBroker, nats_server: Running
) -> None:
    async with broker.subscribe("orders", name="warehouse") as warehouse:
        assert await broker.publish([outgoing(1)]) == [None]
        (delivery,) = await receive(warehouse, 1)
        async with jetstream(nats_server.url) as streams:
            await streams.delete_stream("orders")
        assert isinstance(await settle(warehouse, delivery, Ack()), BrokerUnavailableError)


async def test_at_least_one_delivery_is_asked_for(broker: FastStreamBroker) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        await broker.subscribe("orders", name="warehouse").receive(0)


@pytest.mark.parametrize("thing", ["nats://localhost", None, object()])
def test_what_is_no_broker_of_faststreams_is_refused(thing: object) -> None:
    with pytest.raises(ConfigurationError, match="NatsBroker, RabbitBroker or KafkaBroker"):
        FastStreamBroker(thing)


def test_limits_that_let_nothing_through_are_refused() -> None:
    broker = FastStreamBroker(NatsBroker())
    with pytest.raises(ConfigurationError, match="no destination"):
        broker.subscribe(name="warehouse")
    wrongs: list[dict[str, Any]] = [{"name": ""}, {"name": "w", "hold": 0.0}, {"name": "w", "prefetch": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match="hold must be above"):
            broker.subscribe("orders", **wrong)
    with pytest.raises(ConfigurationError, match="timeout=0"):
        FastStreamBroker(NatsBroker(), timeout=0)


def test_without_faststream_the_error_names_the_extra() -> None:
    _run(
        "import sys; sys.modules['faststream'] = None",
        "from pipeline_mediator.errors import MissingExtraError",
        "try: from pipeline_mediator.message_brokers.faststream import FastStreamBroker",
        "except MissingExtraError as error: assert 'pipeline-mediator[faststream]' in str(error)",
        "else: raise SystemExit('no error')",
    )


def test_a_client_that_is_not_installed_is_not_needed_for_the_others() -> None:
    _run(
        "import sys; sys.modules['aio_pika'] = sys.modules['aiokafka'] = None",
        "from faststream.nats import NatsBroker",
        "from pipeline_mediator.message_brokers.faststream import FastStreamBroker",
        "FastStreamBroker(NatsBroker())",
    )


def _run(*lines: str) -> None:
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
