"""The consumer as a process: it handles what is delivered, and ends as it is told to."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pipeline_mediator.cli.main import main
from tests.cli.called import Called
from tests.cli.processes import SECONDS, read_until, running

SHOP = """
    import asyncio
    import logging
    from dataclasses import dataclass

    import anyio

    from pipeline_mediator import EventMap, IntegrationEvent, Mediator, message
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.errors import BrokerUnavailableError, DestinationError
    from pipeline_mediator.message_brokers import MemoryBroker
    from pipeline_mediator.message_brokers.protocol import Outgoing
    from pipeline_mediator.middlewares import PublishMiddleware

    @message("orders.placed")
    @dataclass(frozen=True)
    class OrderPlaced(IntegrationEvent):
        number: int

    class OrderPaid(IntegrationEvent):
        pass

    broker = MemoryBroker(timeout=60)
    events = EventMap()
    tasks = []
    hangs = False

    @events.handler
    async def ship(event: OrderPlaced) -> None:
        print("shipping", event.number, flush=True)
        try:
            if event.number == 0:
                await anyio.sleep(60 if hangs else 0.3)
        except BaseException:
            print("cancelled", event.number, flush=True)
            raise
        print("shipped", event.number, flush=True)

    async def publish(number):
        attributes = {"specversion": "1.0", "source": "shop", "type": "orders.placed"}
        answers = await broker.publish([
            Outgoing(
                "orders", b'{"number": %d}' % one, "application/json", str(one), "orders.placed", None,
                {**attributes, "id": str(one)},
            )
            for one in range(number)
        ])
        print("answers", [None if one is None else type(one).__name__ for one in answers], flush=True)

    def create_quiet():
        return Consumer(Mediator(event_map=events), broker.subscribe("orders", name="warehouse"), grace=20)

    async def create_consumer(number=2):
        consumer = create_quiet()
        tasks.append(asyncio.ensure_future(publish(number)))
        return consumer

    async def create_hanging():
        global hangs
        hangs = True
        return await create_consumer(1)

    async def create_with_logging():
        return await create_consumer()

    async def create_slowly():
        print("creating", flush=True)
        await anyio.sleep(60)

    async def create_early():
        consumer = await create_consumer()

        class Late(MemoryBroker):
            tries = 0

            async def __aenter__(self):
                self.tries += 1
                if self.tries == 1:
                    raise BrokerUnavailableError("nobody is at home")
                return await super().__aenter__()

        mediator = Mediator(event_map=events, middlewares=[PublishMiddleware(Late(), {OrderPaid: "payments"})])
        return Consumer(mediator, *consumer.subscriptions)

    def create_wrong():
        consumer = create_quiet()

        async def enter():
            raise DestinationError("'orders' is no stream: redis://ada:secret@host")

        class Wrong:
            name = "warehouse"
            dead_letters = None

            async def __aenter__(self):
                await enter()

            async def __aexit__(self, *_):
                pass

        return Consumer(consumer.mediator, Wrong())

    mediator = Mediator(event_map=events)
"""


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


# -- beginning and ending ----------------------------------------------------------------------------------------------


def test_it_handles_what_is_delivered_until_it_is_told_to_end(shop: str) -> None:
    with running("consume", f"{shop}:create_consumer") as consumer:
        read_until(consumer, "subscription 'warehouse' receives")
        read_until(consumer, "answers [None, None]")
        consumer.send_signal(signal.SIGTERM)
        read_until(consumer, "SIGTERM: nothing more is fetched; what is being handled has 20 s to finish")
        read_until(consumer, "consumer stopped")
        assert consumer.wait(SECONDS) == 0


def test_what_is_being_handled_may_finish(shop: str) -> None:
    with running("consume", f"{shop}:create_consumer", "--concurrency", "1") as consumer:
        read_until(consumer, "shipping 0")
        consumer.send_signal(signal.SIGINT)
        read_until(consumer, "shipped 0")
        read_until(consumer, "answers [None, 'BrokerUnavailableError']")
        assert consumer.wait(SECONDS) == 0


def test_what_is_not_done_within_the_grace_period_is_given_back(shop: str) -> None:
    with running("consume", f"{shop}:create_hanging", "--grace", "0.1") as consumer:
        read_until(consumer, "shipping 0")
        consumer.send_signal(signal.SIGTERM)
        read_until(consumer, "what is being handled has 0.1 s to finish")
        read_until(consumer, "cancelled 0")
        assert consumer.wait(SECONDS) == 0


def test_told_twice_it_ends_at_once(shop: str) -> None:
    with running("consume", f"{shop}:create_hanging") as consumer:
        read_until(consumer, "shipping 0")
        consumer.send_signal(signal.SIGTERM)
        read_until(consumer, "waits for 1 messages")
        consumer.send_signal(signal.SIGTERM)
        read_until(consumer, "SIGTERM: it ends at once; what is under way is given back")
        read_until(consumer, "cancelled 0")
        assert consumer.wait(SECONDS) == 128 + signal.SIGTERM


def test_it_waits_for_the_broker_that_it_publishes_to(shop: str) -> None:
    with running("consume", f"{shop}:create_early") as consumer:
        read_until(consumer, "the mediator cannot reach its broker (BrokerUnavailableError: nobody is at home)")
        read_until(consumer, "the mediator reaches its broker")
        read_until(consumer, "answers [None, None]")
        consumer.send_signal(signal.SIGTERM)
        assert consumer.wait(SECONDS) == 0


def test_told_to_end_before_it_began_it_ends(shop: str) -> None:
    with running("consume", f"{shop}:create_slowly") as consumer:
        read_until(consumer, "creating")
        consumer.send_signal(signal.SIGINT)
        assert consumer.wait(SECONDS) == 130


def test_at_most_so_many_at_a_time(shop: str) -> None:
    with running("consume", f"{shop}:create_consumer", "--concurrency", "1", "--json", apart=True) as consumer:
        assert consumer.stderr is not None
        told: list[str] = []
        for line in consumer.stderr:  # where the application's own lines go, so that the document stands alone
            told.append(line.strip())
            if line.startswith("answers"):
                break
        assert [line for line in told if line.startswith("ship")] == [
            "shipping 0",
            "shipped 0",
            "shipping 1",
            "shipped 1",
        ]
        consumer.send_signal(signal.SIGTERM)
        out, _ = consumer.communicate(timeout=SECONDS)
    assert json.loads(out) == {"signal": "SIGTERM", "forced": False}


def test_forced_it_says_so_in_its_document(shop: str) -> None:
    with running("consume", f"{shop}:create_hanging", "--json", apart=True) as consumer:
        assert consumer.stderr is not None
        signalled = 0
        for line in consumer.stderr:
            if line.startswith("shipping 0") or "waits for 1 messages" in line:
                consumer.send_signal(signal.SIGINT)
                signalled += 1
            if signalled == 2:
                break
        out, _ = consumer.communicate(timeout=SECONDS)
    assert consumer.returncode == 130
    assert json.loads(out) == {"signal": "SIGINT", "forced": True}


# -- its log -----------------------------------------------------------------------------------------------------------


def test_its_log_can_be_read_by_machines(shop: str) -> None:
    with running(
        "consume", f"{shop}:create_consumer", "--log-format", "json", "--log-level", "info", apart=True
    ) as one:
        read_until(one, "answers [None, None]")
        one.send_signal(signal.SIGTERM)
        _, log = one.communicate(timeout=SECONDS)
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    assert lines[-1]["message"] == "consumer: consumer stopped"


def test_its_log_says_as_much_as_it_is_asked_for(shop: str) -> None:
    with running("consume", f"{shop}:create_consumer", "--log-level", "error", apart=True) as one:
        read_until(one, "answers [None, None]")
        one.send_signal(signal.SIGTERM)
        _, log = one.communicate(timeout=SECONDS)
        assert one.returncode == 0
    assert log == ""


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("mediator", "gives no Consumer, and only that knows what to receive from"),
        (
            "broker",
            "{shop}:broker is a MemoryBroker; needed is a Mediator, or what returns one, async or not. An Outbox",
        ),
        ("create_wrong", "'orders' is no stream: redis://***@host"),
    ],
)
def test_what_cannot_be_consumed_is_told(
    target: str, complaint: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["consume", f"{shop}:{target}"]) == 2
    told = capsys.readouterr().err
    assert complaint.format(shop=shop) in told
    assert "Traceback" not in told


def test_concurrency_and_grace_are_the_consumers_unless_they_are_given(
    shop: str, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline_mediator.consumer import Consumer

    seen: list[tuple[int, float]] = []

    async def run(consumer: Consumer) -> None:
        seen.append((consumer.concurrency, consumer.grace))

    monkeypatch.setattr(Consumer, "run", run)
    assert call("consume", f"{shop}:create_quiet", "--json").document == {"signal": None, "forced": False}
    sys.modules.pop(shop)
    assert call("consume", f"{shop}:create_quiet", "--concurrency", "3", "--grace", "0").code == 0
    assert seen == [(16, 20.0), (3, 0.0)]
