"""Runs the order service in this process, sends it orders, and counts what became of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import httpx

from pipeline_mediator.cli.demo.count import answers_as_text, orders_table, transactions_table
from pipeline_mediator.cli.demo.database import open_engine, own_tables, read_contents, until_published
from pipeline_mediator.cli.demo.ledger import Ledger
from pipeline_mediator.cli.demo.listener import Received, listen_to_stream, listen_to_subscription
from pipeline_mediator.cli.demo.outage import CLIENTS, open_outage
from pipeline_mediator.cli.demo.payments import UnreliablePayments
from pipeline_mediator.cli.demo.tally import Tally
from pipeline_mediator.cli.demo.visits import plan_visits
from pipeline_mediator.examples.orders.mediator import create_mediator, create_pipeline
from pipeline_mediator.examples.orders.messages import OrderPlaced, PlaceOrder
from pipeline_mediator.examples.orders.payments import SandboxPayments
from pipeline_mediator.examples.orders.web import create_web
from pipeline_mediator.message_brokers import MemoryBroker
from pipeline_mediator.outbox import OutboxRelay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.cli.demo.database import Contents
    from pipeline_mediator.cli.demo.screen import Screen
    from pipeline_mediator.cli.demo.table import Table
    from pipeline_mediator.cli.demo.visits import Visit
    from pipeline_mediator.message_brokers import MessageBroker

__all__ = ["Demo", "describe", "open_demo", "run"]

ADDS_UP = (
    "It adds up: what was answered was committed, published and received, and nothing else was; also of the service "
    "that was killed."
)


async def run(
    screen: Screen, database_url: str | None, redis_url: str | None, orders: int, seed: int, *, log: str | None = None
) -> bool:
    """The whole demo on a screen; whether it added up."""
    failures = [
        *await _run_in_process(screen, database_url, redis_url, orders, seed),
        *await _run_outage(screen, database_url, redis_url, orders, seed, log=log),
    ]
    screen.verdict(ADDS_UP if not failures else f"It does not add up: {', '.join(failures)}.", good=not failures)
    return not failures


async def _run_in_process(
    screen: Screen, database_url: str | None, redis_url: str | None, orders: int, seed: int
) -> list[str]:
    async with open_demo(database_url, redis_url, orders, seed) as demo:
        screen.heading("The stack, compiled for an order, for the event it causes, and for the relay")
        screen.text("\n\n".join(demo.mediator.describe(message_type) for message_type in (PlaceOrder, OrderPlaced)))
        screen.heading(f"Sending {orders} orders from {CLIENTS} clients at a time")
        started = perf_counter()
        with screen.progress("orders", orders) as advance:
            await demo.send(advance)
        seconds = perf_counter() - started
        screen.heading("What the clients were told")
        screen.text(answers_as_text(demo.ledger))
        failures = _show(screen, await demo.count())
        screen.text(demo.pace(seconds))
    return failures


async def _run_outage(
    screen: Screen, database_url: str | None, redis_url: str | None, orders: int, seed: int, *, log: str | None
) -> list[str]:
    async with open_outage(database_url, redis_url, orders, seed, log=log) as outage:
        screen.heading("The same with the service in a process of its own, killed twice (kill -9)")
        with screen.progress("orders", orders) as advance:
            await outage.send(advance)
        screen.text("\n".join(outage.told))
        return _show(screen, await outage.count())


def _show(screen: Screen, tables: Sequence[Table]) -> list[str]:
    """What does not add up in them."""
    for table in tables:
        screen.table(table)
    return [name for table in tables for name in table.failures]


class Demo:
    """The application with counters around it, and a subscriber to what it publishes."""

    def __init__(
        self,
        engine: AsyncEngine,
        broker: MessageBroker,
        listen: Callable[[Received], AbstractAsyncContextManager[None]],
        visits: Sequence[Visit],
        before: Contents,
    ) -> None:
        self.engine = engine
        self.ledger = Ledger()
        self.tally = Tally()
        self.received = Received()
        faults = {visit.payment_key: visit.fault for visit in visits if visit.fault is not None}
        self.payments = UnreliablePayments(faults)
        self.mediator = create_mediator(self.tally.put_into(create_pipeline(engine, broker)), self.payments)
        self._listen = listen
        self._visits = visits
        self._before = before

    async def send(self, advance: Callable[[], None] = lambda: None) -> None:
        """Send every order, and wait until the relay has published what they caused."""
        # A crash is to be a status here, as it is for a client elsewhere.
        service = httpx.ASGITransport(create_web(self.mediator), raise_app_exceptions=False)
        async with (
            self._listen(self.received),
            httpx.AsyncClient(transport=service, base_url="http://orders") as client,
        ):
            waiting = iter(self._visits)
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(self._send(client, waiting, advance))
            await self.ledger.export(client)
            await until_published(self.engine)

    async def _send(self, client: httpx.AsyncClient, waiting: Iterator[Visit], advance: Callable[[], None]) -> None:
        for visit in waiting:
            await self.ledger.record(client, visit)
            advance()

    async def count(self) -> list[Table]:
        """Hold everything against everything else."""
        after = await read_contents(self.engine)
        return [
            orders_table(self.ledger, self._before, after, self.tally, self.received),
            transactions_table(self.ledger, after, self.tally, self.payments),
        ]

    def pace(self, seconds: float) -> str:
        """What was seen on this machine; no promise."""
        events = sum(map(len, self.tally.published.values())) + self.tally.handled.total()
        messages = self.ledger.requests + events
        return (
            f"{self.ledger.requests} requests and {events} events in {seconds:.2f} s: {messages / seconds:,.0f} "
            "messages/s, with clients, service, relay and subscriber in one process.\n"
            f"{self.tally.committed_later} orders were committed in a second or third attempt."
        )


@asynccontextmanager
async def open_demo(
    database_url: str | None = None, redis_url: str | None = None, orders: int = 300, seed: int = 1
) -> AsyncGenerator[Demo]:
    """The demo on these servers, or without any; its tables are there as long as the block lasts.

    Raises `CommandError` for a database that cannot be used, `BrokerError` for such a Redis.
    """
    with TemporaryDirectory(prefix="pipeline-mediator-demo-") as folder:
        engine = open_engine(database_url or f"sqlite+aiosqlite:///{folder}/orders.db")
        try:
            broker, listen = _broker(redis_url)
            # The mediator would do without a broker for a while; a demo need not begin then.
            async with broker, own_tables(engine, orders):
                demo = Demo(engine, broker, listen, plan_visits(orders, seed), await read_contents(engine))
                async with demo.mediator, OutboxRelay(demo.mediator):
                    yield demo
        finally:
            await engine.dispose()


def _broker(redis_url: str | None) -> tuple[MessageBroker, Callable[[Received], AbstractAsyncContextManager[None]]]:
    if redis_url is None:
        memory = MemoryBroker()
        return memory, partial(listen_to_subscription, memory.subscribe("orders", name="demo"))
    from pipeline_mediator.message_brokers import RedisStreamBroker

    # A prefix of this run's own: others may have a stream "orders" on that server.
    prefix = f"pipeline-mediator-demo.{uuid4().hex}."
    return RedisStreamBroker(redis_url, stream_prefix=prefix), partial(listen_to_stream, redis_url, f"{prefix}orders")


def describe(form: Literal["text", "json", "mermaid"]) -> str:
    """Every chain of the application."""
    pipeline = create_pipeline(open_engine("sqlite+aiosqlite://"), MemoryBroker())
    return create_mediator(pipeline, SandboxPayments()).describe(format=form)
