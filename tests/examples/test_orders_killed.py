"""The order service as three processes, each of which is killed while orders are sent, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from pipeline_mediator import Codec
from pipeline_mediator.examples.orders.database import create_engine, create_tables
from pipeline_mediator.examples.orders.mediator import create_mediator, create_pipeline
from pipeline_mediator.examples.orders.messages import Line, OrderCancelled, OrderPlaced, PlaceOrder
from pipeline_mediator.examples.orders.payments import SandboxPayments
from pipeline_mediator.examples.orders.tables import OUTBOX, Order
from pipeline_mediator.examples.orders.tracing import as_mermaid, read_spans
from pipeline_mediator.examples.orders.warehouse import Parcel, create_warehouse_tables
from pipeline_mediator.message_brokers import MemoryBroker
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.redis_view import Client
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import RedisServer

ROOT = Path(__file__).parents[2]
APP = "pipeline_mediator.examples.orders.app"
SECONDS = 60.0
CLIENTS = 6
ORDERS = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/orders.db"
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.fixture
async def engine(database: str) -> AsyncGenerator[AsyncEngine]:
    """The test's own view of the database."""
    engine = create_engine(database)
    await create_tables(engine)
    await create_warehouse_tables(engine)
    yield engine
    await engine.dispose()


class Program:
    """One of the service's processes."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    def end(self, number: signal.Signals) -> int | None:
        if self._process is None:
            return None
        self._process.send_signal(number)
        try:
            return self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def wait_for(self, text: str) -> None:
        """Until its log says so."""
        give_up = time.monotonic() + SECONDS
        while text not in self._log.read_text():
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up, self._log.read_text()
            await asyncio.sleep(0.02)

    @property
    def log(self) -> str:
        return self._log.read_text()


class Service:
    """Its three processes: the web service by uvicorn, the others by the library's own program."""

    def __init__(self, database: str, redis: str, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.traces = folder / "traces"
        self.traces.mkdir()
        settings = {"ORDERS_DATABASE_URL": database, "ORDERS_REDIS_URL": redis, "ORDERS_TRACES": str(self.traces)}
        commands = {
            "web": ["uvicorn", f"{APP}:create_app", "--factory", "--port", str(self.port)],
            "relay": ["pipeline_mediator", "relay", f"{APP}:create_for_relay"],
            "warehouse": ["pipeline_mediator", "consume", f"{APP}:create_consumer"],
        }
        self.programs = {name: Program(command, settings, folder / f"{name}.log") for name, command in commands.items()}
        self.web, self.relay, self.warehouse = self.programs.values()

    async def start(self) -> None:
        for program in self.programs.values():
            program.start()
        await self.wait()

    def end(self, number: signal.Signals) -> None:
        for program in self.programs.values():
            program.end(number)

    async def wait(self) -> None:
        """Until the web service listens."""
        give_up = time.monotonic() + SECONDS
        while time.monotonic() < give_up:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(self.web.log)


@pytest.fixture
def service(database: str, engine: AsyncEngine, own_redis: RedisServer, tmp_path: Path) -> Iterator[Service]:
    service = Service(database, own_redis.url, tmp_path)
    try:
        yield service
    finally:
        service.end(signal.SIGKILL)


async def received(url: str) -> dict[str, object]:
    """What is in the stream, by message id."""
    codec = Codec(OrderPlaced, OrderCancelled)
    messages: dict[str, object] = {}
    async with Client.from_url(url) as redis:
        for _, fields in await redis.xrange("orders"):
            headers = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
            decoded = codec.decode(fields[b"data"], headers.pop("datacontenttype"), headers)
            messages[decoded.facts.message_id] = decoded.message
    return messages


async def until_published(engine: AsyncEngine) -> None:
    give_up = time.monotonic() + SECONDS
    while (await SQLAlchemyOutbox(engine, OUTBOX).health()).pending:
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


async def orders_in(engine: AsyncEngine) -> dict[str, tuple[int, int]]:
    """Number and cents, by reference."""
    async with AsyncSession(engine) as session:
        return {order.reference: (order.id, order.total_cents) for order in await session.scalars(select(Order))}


def an_order(reference: str, sku: str = "pen") -> dict[str, Any]:
    return {"customer_id": 1, "reference": reference, "lines": [{"sku": sku, "quantity": 1}]}


async def test_what_was_committed_while_the_broker_was_away_is_delivered_after_a_kill(
    engine: AsyncEngine, service: Service, own_redis: RedisServer
) -> None:
    await service.start()
    own_redis.pause()
    references = [f"A-{number}" for number in range(5)]
    async with httpx.AsyncClient(base_url=service.address, timeout=SECONDS, trust_env=False) as client:
        for reference in references:
            assert (await client.post("/orders", json=an_order(reference))).status_code == 201
        assert (await client.post("/orders", json=an_order("B-1", "piano"))).status_code == 409
        assert (await client.post("/orders/1/cancel")).status_code == 204
    service.end(signal.SIGKILL)
    own_redis.resume()
    await service.start()
    await until_published(engine)

    orders = await orders_in(engine)
    assert orders.keys() == set(references)
    told = list((await received(own_redis.url)).values())
    assert sorted(event.order_id for event in told if isinstance(event, OrderPlaced)) == sorted(
        number for number, _ in orders.values()
    )
    assert [event for event in told if isinstance(event, OrderCancelled)] == [OrderCancelled(1, orders["A-0"][1])]


async def test_each_process_killed_in_the_middle_what_was_ordered_is_packed_once_and_nothing_else(
    engine: AsyncEngine, service: Service, own_redis: RedisServer
) -> None:
    await service.start()
    waiting = iter(range(ORDERS))
    answered: dict[str, int | None] = {}
    reached = {ORDERS * part // 4: asyncio.Event() for part in (1, 2, 3)}

    async def send(client: httpx.AsyncClient, reference: str) -> None:
        """Again and again, until it is known what became of it."""
        give_up = time.monotonic() + SECONDS
        while time.monotonic() < give_up:
            with suppress(httpx.TransportError):
                answer = await client.post("/orders", json=an_order(reference))
                assert answer.status_code == 201 or answer.json()["error"] == "RepeatedReferenceError"
                answered[reference] = answer.json().get("order_id")
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"no answer to {reference}")

    async def send_all(client: httpx.AsyncClient) -> None:
        for number in waiting:
            await send(client, f"A-{number}")
            if len(answered) in reached:
                reached[len(answered)].set()

    async def kill() -> None:
        for event, program in zip(reached.values(), service.programs.values(), strict=True):
            await event.wait()
            program.end(signal.SIGKILL)
            program.start()

    async with httpx.AsyncClient(base_url=service.address, timeout=SECONDS, trust_env=False) as client:
        await asyncio.gather(kill(), *(send_all(client) for _ in range(CLIENTS)))
        assert (await client.post("/orders", json=an_order("B-1", "piano"))).status_code == 409
    await until_published(engine)

    orders = await orders_in(engine)
    assert orders.keys() == answered.keys()
    assert {answered[reference] for reference in orders} <= {None, *(number for number, _ in orders.values())}
    told = await received(own_redis.url)  # by message id: a relay that was killed tells some of them twice
    assert sorted(told.values(), key=repr) == sorted(
        (OrderPlaced(number, 1, cents, (Line("pen", 1),)) for number, cents in orders.values()), key=repr
    )
    assert await packed(engine, len(orders)) == {number: ("packed", 1) for number, _ in orders.values()}
    # uvicorn shuts down, then ends by the signal it was given.
    ends = [program.end(signal.SIGTERM) for program in service.programs.values()]
    assert ends == [-signal.SIGTERM, 0, 0]
    assert "dead letter" not in service.warehouse.log


async def test_a_cancelled_order_is_packed_and_unpacked_and_its_trace_is_one(
    engine: AsyncEngine, service: Service
) -> None:
    await service.start()
    async with httpx.AsyncClient(base_url=service.address, timeout=SECONDS, trust_env=False) as client:
        assert (await client.post("/orders", json=an_order("A-1"))).status_code == 201
        assert (await client.post("/orders/1/cancel")).status_code == 204
    give_up = time.monotonic() + SECONDS
    while (await packed(engine, 1)) != {1: ("unpacked", 1)}:
        assert time.monotonic() < give_up, service.warehouse.log
        await asyncio.sleep(0.05)
    service.end(signal.SIGTERM)

    spans = read_spans(service.traces)
    placed = reached_from(spans, "process PlaceOrder")
    assert {(span["service"], span["name"]) for span in placed} >= {
        ("web", "process PlaceOrder"),
        ("web", "create orders"),
        ("relay", "send orders"),
        ("warehouse", "process orders"),
    }
    picture = as_mermaid(spans)
    assert 'subgraph warehouse["warehouse"]' in picture
    assert "-.->" in picture


def reached_from(spans: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Every span that the first of this name leads to, by parents and links."""
    (first, *_) = (span for span in spans if span["name"] == name)
    found = {first["id"]: first}
    for _ in spans:
        for span in spans:
            if found.keys() & {span["parent"], *span["links"]}:
                found[span["id"]] = span
    return list(found.values())


async def packed(engine: AsyncEngine, count: int) -> dict[int, tuple[str, int]]:
    """The parcels by order, when there are so many, with their pieces."""
    give_up = time.monotonic() + SECONDS
    while True:
        async with AsyncSession(engine) as session:
            parcels = (await session.scalars(select(Parcel))).all()
        if len(parcels) >= count or time.monotonic() > give_up:
            return {parcel.order_id: (parcel.status, parcel.pieces) for parcel in parcels}
        await asyncio.sleep(0.05)


async def test_a_relay_may_be_a_process_of_its_own(database: str, engine: AsyncEngine, own_redis: RedisServer) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments())
    receipt = await mediator.send(PlaceOrder(1, "A-1", (Line("pen", 1),)))

    relay = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline_mediator", "relay", "--drain", f"{APP}:create_for_relay"),
        cwd=ROOT,
        env={**os.environ, "ORDERS_DATABASE_URL": database, "ORDERS_REDIS_URL": own_redis.url},
        stderr=subprocess.PIPE,
    )
    _, log = await relay.communicate()

    assert relay.returncode == 0, log
    told = (await received(own_redis.url)).values()
    assert list(told) == [OrderPlaced(receipt.order_id, 1, receipt.total_cents, (Line("pen", 1),))]
