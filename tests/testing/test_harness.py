"""The harness runs an application's own pipeline, and says what happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from tenacity import wait_fixed

from pipeline_mediator import (
    Codec,
    Command,
    Context,
    DomainEvent,
    EventMap,
    IntegrationEvent,
    Mediator,
    PermanentError,
    Pipeline,
    RequestMap,
    message,
    only,
)
from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox, inbox_table
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Outgoing
from pipeline_mediator.middlewares import (
    DeadLetterMiddleware,
    InboxMiddleware,
    OutboxMiddleware,
    PublishMiddleware,
    RedeliveryMiddleware,
    TransactionMiddleware,
)
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.testing import FakeBroker, Harness
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite
from tests.fakes import Broker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

TABLES = MetaData()
OUTBOX, INBOX = outbox_tables(TABLES), inbox_table(TABLES)


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    sku: str


@dataclass(frozen=True)
class StockRanLow(DomainEvent):
    sku: str


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: int


@message("warehouse.ship", key="order_id")
@dataclass(frozen=True)
class ShipOrder(Command):
    order_id: int


class Warehouse:
    """Handles what others tell; raises its errors first."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    async def handle(self, event: OrderPlaced, context: Context) -> None:
        if self.errors:
            raise self.errors.pop(0)
        await context.mediator.send(ShipOrder(event.order_id))


async def place_order(command: PlaceOrder, context: Context) -> int:
    context.emit(StockRanLow(command.sku))
    context.emit(OrderPlaced(7))
    return 7


async def reorder(event: StockRanLow) -> None:
    """Nothing to do."""


async def ship(command: ShipOrder) -> None:
    """Nothing to do."""


def application(*middlewares: Any, broker: Any = None, warehouse: Warehouse | None = None) -> Mediator:
    return Mediator(
        RequestMap().bind(PlaceOrder, place_order).bind(ShipOrder, ship),
        event_map=EventMap().bind(StockRanLow, reorder).bind(OrderPlaced, warehouse or Warehouse()),
        middlewares=Pipeline(
            DeadLetterMiddleware(),
            RedeliveryMiddleware(3, wait=wait_fixed(60)),
            *middlewares,
            only(
                (IntegrationEvent, ShipOrder),
                PublishMiddleware(broker or Broker(), {OrderPlaced: "orders", ShipOrder: "warehouse"}),
            ),
        ),
        codec=Codec(source="shop"),
    )


async def test_it_tells_what_was_sent_emitted_published_and_handled() -> None:
    real = Broker()
    async with Harness(application(broker=real)) as app:
        assert await app.send(PlaceOrder("book")) == 7
        await app.idle()

        assert app.sent() == [PlaceOrder("book"), ShipOrder(7)]
        assert app.emitted() == [StockRanLow("book"), OrderPlaced(7)]
        assert app.published() == [OrderPlaced(7), ShipOrder(7)]
        assert app.published(OrderPlaced) == [OrderPlaced(7)]
        assert app.handled() == [PlaceOrder("book"), StockRanLow("book"), OrderPlaced(7), ShipOrder(7)]
        assert {one.correlation_id for one in app.log if one.step != "dead"} == {app.log[0].message_id}
    assert real.published == []
    assert real.log == []


async def test_nothing_is_handed_over_before_it_is_asked_for() -> None:
    async with Harness(application()) as app:
        await app.send(PlaceOrder("book"))
        assert app.published() == [OrderPlaced(7)]
        assert app.handled(OrderPlaced) == []
        await app.idle()
        assert app.handled(OrderPlaced) == [OrderPlaced(7)]


async def test_what_failed_comes_again_after_a_while_that_nobody_waits_for() -> None:
    warehouse = Warehouse()
    warehouse.errors = [BrokenPipeError("away"), BrokenPipeError("away")]
    async with Harness(application(warehouse=warehouse)) as app:
        await app.emit(OrderPlaced(7))
        await app.idle()
        assert [due for due, _ in app.postponed] == [60]
        await app.pass_time(59)
        assert app.handled(OrderPlaced) == []
        await app.pass_time(1)
        assert [due for due, _ in app.postponed] == [120]
        await app.pass_time(60)
        assert app.handled(OrderPlaced) == [OrderPlaced(7)]
        assert app.postponed == []
        assert app.dead_letters == []
        steps = [one.step for one in app.log if one.step in {"failed", "postponed", "handled"}]
        assert steps[:5] == ["failed", "postponed", "failed", "postponed", "handled"]


async def test_dead_letters_are_kept() -> None:
    warehouse = Warehouse()
    warehouse.errors = [PermanentError("never")]
    async with Harness(application(warehouse=warehouse)) as app:
        delivery = await app.deliver(OrderPlaced(7), message_id="1", headers={"tenant": "acme"}, attempt=2)
        assert delivery.outcome == Dead("PermanentError: never")
        assert app.dead_letters == [delivery]
        assert (delivery.message_id, delivery.attempt) == ("1", 2)
        unreadable = await app.deliver_raw(b"?")
        assert isinstance(unreadable.outcome, Dead)
        assert "dead" in app.story()
        assert "PermanentError: never" in app.story()


async def test_an_error_that_nobody_decides_about_reaches_the_test() -> None:
    async def fail(event: OrderPlaced) -> None:
        raise BrokenPipeError

    mediator = Mediator(event_map=EventMap().bind(OrderPlaced, fail), middlewares=[PublishMiddleware(Broker())])
    async with Harness(mediator) as app:
        with pytest.raises(BrokenPipeError):
            await app.deliver(OrderPlaced(7))
        await app.emit(OrderPlaced(7))
        with pytest.raises(BrokenPipeError):
            await app.idle()


async def test_messages_that_cause_each_other_for_ever_are_told() -> None:
    async def again(event: OrderPlaced, context: Context) -> None:
        # A chain that is not counted in hops: nothing of it is inherited.
        context.headers.clear()
        await context.mediator.emit(OrderPlaced(event.order_id), headers={"hops": "0"})

    mediator = Mediator(event_map=EventMap().bind(OrderPlaced, again), middlewares=[PublishMiddleware(Broker())])
    async with Harness(mediator) as app:
        await app.emit(OrderPlaced(1))
        with pytest.raises(RuntimeError, match="for ever"):
            await app.idle()


async def test_a_broker_that_is_away() -> None:
    async with Harness(application()) as app:
        app.broker.go_away()
        with pytest.raises(BrokerUnavailableError):
            await app.emit(OrderPlaced(7))
        app.broker.come_back()
        await app.emit(OrderPlaced(7))
        assert app.published() == [OrderPlaced(7)]


async def test_the_fake_broker_keeps_the_order_of_a_key() -> None:
    def outgoing(number: int, key: str) -> Outgoing:
        return Outgoing("orders", b"{}", "application/json", str(number), "OrderPlaced", key)

    broker = FakeBroker()
    first, second, other = outgoing(1, key="a"), outgoing(2, key="a"), outgoing(3, key="b")
    broker.refuse = lambda message: BrokerUnavailableError("no") if message is first else None
    answers = await broker.publish([first, second, other])
    assert [answer is None for answer in answers] == [False, False, True]
    assert broker.published == [other]


def test_it_takes_a_mediator() -> None:
    wrong: Any = object()
    with pytest.raises(ConfigurationError, match="takes a Mediator, not a object"):
        Harness(wrong)


class TestWithADatabase:
    """Transactions, outbox and inbox are real."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def mediator(self, tmp_path: Path) -> AsyncGenerator[Mediator]:
        engine = prepare_sqlite(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"))
        async with engine.begin() as connection:
            await connection.run_sync(TABLES.create_all)
        sessions = async_sessionmaker(engine)
        yield application(
            TransactionMiddleware(sessions.begin, yields=AsyncSession),
            InboxMiddleware(SQLAlchemyInbox(INBOX)),
            OutboxMiddleware(SQLAlchemyOutbox(engine, OUTBOX)),
        )
        await engine.dispose()

    async def test_what_the_outbox_holds_is_relayed_when_it_is_asked_for(self, mediator: Mediator) -> None:
        async with Harness(mediator) as app:
            await app.send(PlaceOrder("book"))
            assert app.published() == []
            await app.idle()
            assert app.published() == [OrderPlaced(7), ShipOrder(7)]
            assert app.handled(ShipOrder) == [ShipOrder(7)]

    async def test_the_inbox_skips_what_it_knows(self, mediator: Mediator) -> None:
        async with Harness(mediator) as app:
            for _ in range(3):
                delivery = await app.deliver(OrderPlaced(7), message_id="1")
                assert delivery.outcome == Ack()
            assert app.handled(OrderPlaced) == [OrderPlaced(7)]

    async def test_a_broker_that_is_away_loses_nothing(self, mediator: Mediator) -> None:
        async with Harness(mediator) as app:
            app.broker.go_away()
            await app.send(PlaceOrder("book"))
            await app.idle()
            assert app.published() == []
