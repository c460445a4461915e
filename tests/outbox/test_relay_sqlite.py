"""From a handler's transaction to a consumer's hands, on SQLite and the broker within the process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from pipeline_mediator import Command, Context, IntegrationEvent, Mediator, Pipeline, RequestMap, message
from pipeline_mediator.message_brokers import Ack, MemoryBroker
from pipeline_mediator.middlewares import OutboxMiddleware, PublishMiddleware, TransactionMiddleware
from pipeline_mediator.outbox import OutboxRelay
from pipeline_mediator.outbox.protocol import Health
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from pipeline_mediator.message_brokers import MemorySubscription

OUTBOX = outbox_tables(MetaData())
LONG = 30.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class PlaceOrder(Command[None]):
    number: int
    fails: bool = False


@message("orders.placed", key="customer")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    number: int
    customer: str


async def place(command: PlaceOrder, context: Context) -> None:
    context.emit(OrderPlaced(command.number, f"customer {command.number % 3}"))
    if command.fails:
        raise ZeroDivisionError


class Shop:
    """One process's share in the shop: its mediator, its broker, and its own engine of the common database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.broker = MemoryBroker()
        self.mediator = Mediator(
            RequestMap().bind(PlaceOrder, place),
            middlewares=Pipeline(
                TransactionMiddleware(async_sessionmaker(engine).begin),
                OutboxMiddleware(SQLAlchemyOutbox(engine, OUTBOX)),
                PublishMiddleware(self.broker, {OrderPlaced: "orders"}),
            ),
        )


@asynccontextmanager
async def open_engine(path: Path) -> AsyncGenerator[AsyncEngine]:
    engine = prepare_sqlite(create_async_engine(f"sqlite+aiosqlite:///{path}/shop.db"))
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncGenerator[AsyncEngine]:
    async with open_engine(tmp_path) as engine:
        async with engine.begin() as connection:
            await connection.run_sync(OUTBOX.rows.metadata.create_all)
        yield engine


async def receive(orders: MemorySubscription, number: int) -> list[bytes]:
    """That many bodies, each acknowledged."""
    bodies: list[bytes] = []
    with anyio.fail_after(10):
        while len(bodies) < number:
            deliveries = await orders.receive(number)
            for delivery in deliveries:
                delivery.outcome = Ack()
            await orders.settle(deliveries)
            bodies += [delivery.body for delivery in deliveries]
    return bodies


async def test_what_was_committed_arrives_and_nothing_else(engine: AsyncEngine) -> None:
    shop = Shop(engine)
    orders = shop.broker.subscribe("orders", name="warehouse")
    async with shop.mediator, OutboxRelay(shop.mediator, poll=LONG) as relay, orders:
        await shop.mediator.send(PlaceOrder(1))
        assert await receive(orders, 1) == [b'{"number":1,"customer":"customer 1"}']
        with pytest.raises(ZeroDivisionError):
            await shop.mediator.send(PlaceOrder(2, fails=True))
        await shop.mediator.send(PlaceOrder(3))
        assert await receive(orders, 1) == [b'{"number":3,"customer":"customer 0"}']
    assert await relay.health() == Health(pending=0, waiting=0, dead=0, oldest=0.0)


async def test_what_waits_arrives_in_order_when_a_relay_comes(engine: AsyncEngine) -> None:
    shop = Shop(engine)
    for number in range(30):
        await shop.mediator.send(PlaceOrder(number))
    orders = shop.broker.subscribe("orders", name="warehouse")
    async with shop.mediator, orders, OutboxRelay(shop.mediator, batch=7):
        bodies = await receive(orders, 30)
    for customer in range(3):
        of_customer = [body for body in bodies if f'"customer {customer}"'.encode() in body]
        wanted = [b'{"number":%d,"customer":"customer %d"}' % (one, customer) for one in range(customer, 30, 3)]
        assert of_customer == wanted


async def test_nobody_listens_so_it_waits(engine: AsyncEngine) -> None:
    shop = Shop(engine)
    async with shop.mediator, shop.broker.subscribe("orders", name="warehouse") as orders:
        relay = OutboxRelay(shop.mediator, lease=0.4, stop_within=0.1)
        async with relay:
            await shop.mediator.send(PlaceOrder(1))
            with anyio.fail_after(10):
                await orders.receive(1)
        assert (await relay.health()).pending == 1


async def test_two_relays_of_two_processes_share_the_work(engine: AsyncEngine, tmp_path: Path) -> None:
    shop = Shop(engine)
    for number in range(20):
        await shop.mediator.send(PlaceOrder(number))
    async with open_engine(tmp_path) as other_engine:
        other = Shop(other_engine)
        async with anyio.create_task_group() as tasks:
            counts: list[int] = []

            async def drain(one: Shop) -> None:
                counts.append(await OutboxRelay(one.mediator, batch=1).drain())

            tasks.start_soon(drain, shop)
            tasks.start_soon(drain, other)
        # Who finds the other at work has nothing to do.
        assert sum(counts) + await OutboxRelay(shop.mediator).drain() == 20


async def test_drained_in_a_script(engine: AsyncEngine) -> None:
    shop = Shop(engine)
    async with shop.mediator:
        await shop.mediator.send(PlaceOrder(1))
        assert await OutboxRelay(shop.mediator).drain() == 1
        assert await OutboxRelay(shop.mediator).drain() == 0
