"""The order service, as its clients and the systems behind it see it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
import uvicorn
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import ClientDisconnect

from pipeline_mediator import Codec, Context
from pipeline_mediator.examples.orders.app import create_app, create_for_relay
from pipeline_mediator.examples.orders.database import create_engine, create_tables
from pipeline_mediator.examples.orders.errors import OutOfStockError
from pipeline_mediator.examples.orders.handlers import PlaceOrderHandler
from pipeline_mediator.examples.orders.mediator import create_mediator, create_pipeline
from pipeline_mediator.examples.orders.messages import (
    Line,
    OrderCancelled,
    OrderPlaced,
    PlaceOrder,
    Receipt,
    StockRanLow,
)
from pipeline_mediator.examples.orders.payments import Payments, SandboxPayments
from pipeline_mediator.examples.orders.tables import Customer, Order, Product, Reorder
from pipeline_mediator.examples.orders.web import create_web
from pipeline_mediator.message_brokers import Ack, MemoryBroker
from pipeline_mediator.outbox import OutboxRelay
from tests.redis_view import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.applications import Starlette

    from pipeline_mediator import Mediator
    from tests.servers import RedisServer

ROOT = Path(__file__).parents[2]
DESK = 34_900
PEN = 120


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncGenerator[AsyncEngine]:
    engine = create_engine(f"sqlite+aiosqlite:///{tmp_path}/orders.db")
    await create_tables(engine)
    yield engine
    await engine.dispose()


@asynccontextmanager
async def serving(app: Starlette) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the application behind a real server on a loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            await running


def an_order(reference: str = "A-1", **lines: int) -> dict[str, Any]:
    ordered = [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]
    return {"customer_id": 1, "reference": reference, "lines": ordered}


# -- over HTTP ---------------------------------------------------------------------------------------------------------


async def walk_through(client: httpx.AsyncClient) -> None:
    """The life of two orders."""
    placed = await client.post("/orders", json=an_order("A-1", desk=20, pen=3))
    assert (placed.status_code, placed.json()) == (201, {"order_id": 1, "total_cents": 20 * DESK + 3 * PEN})

    shown = await client.get(placed.headers["Location"])
    assert shown.status_code == 200
    assert shown.json() == {
        "order_id": 1,
        "customer_id": 1,
        "reference": "A-1",
        "status": "placed",
        "total_cents": 20 * DESK + 3 * PEN,
        "lines": [{"sku": "desk", "quantity": 20}, {"sku": "pen", "quantity": 3}],
    }

    refused = await client.post("/orders", json=an_order("A-2", desk=6))
    assert (refused.status_code, refused.json()["detail"]) == (409, "6 of desk are wanted, 5 are left")

    cancelled = await client.post("/orders/1/cancel")
    assert (cancelled.status_code, cancelled.content) == (204, b"")
    assert (await client.post("/orders/1/cancel")).json()["error"] == "AlreadyCancelledError"

    # The desks are back.
    placed = await client.post("/orders", json=an_order("A-2", desk=6))
    assert placed.status_code == 201
    second = placed.json()["order_id"]

    export = await client.get("/orders.csv")
    assert export.headers["Content-Type"].startswith("text/csv")
    assert export.text.splitlines() == [
        "order_id,customer_id,reference,status,total_cents",
        f"1,1,A-1,cancelled,{20 * DESK + 3 * PEN}",
        f"{second},1,A-2,placed,{6 * DESK}",
    ]


async def test_it_answers_a_client_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORDERS_DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/orders.db")
    monkeypatch.delenv("ORDERS_REDIS_URL", raising=False)

    async with serving(create_app()) as client:
        await walk_through(client)


async def test_it_keeps_its_orders_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORDERS_DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/orders.db")
    monkeypatch.delenv("ORDERS_REDIS_URL", raising=False)
    async with serving(create_app()) as client:
        await client.post("/orders", json=an_order(desk=20))

    async with serving(create_app()) as client:
        assert (await client.get("/orders/1")).json()["status"] == "placed"
        assert (await client.post("/orders", json=an_order("A-2", desk=6))).json()["error"] == "OutOfStockError"


async def test_it_answers_a_client_on_postgresql_and_publishes_to_redis(
    postgres_database: str, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORDERS_DATABASE_URL", postgres_database)
    monkeypatch.setenv("ORDERS_REDIS_URL", own_redis.url)
    codec = Codec(OrderPlaced, OrderCancelled)

    arrived: list[object] = []
    async with (
        Client.from_url(own_redis.url) as redis,
        serving(create_app()) as client,
        create_for_relay() as relay,
        cast("Mediator", relay.mediator),
        relay,
    ):
        await walk_through(client)
        last = b"0"
        while len(arrived) < 3:
            ((_, entries),) = await redis.xread({"orders": last}, block=10_000)
            last = entries[-1][0]
            for _, fields in entries:
                headers = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
                arrived.append(codec.decode(fields[b"data"], headers.pop("datacontenttype"), headers).message)

    # Nothing was published for the order that was refused.
    lines = (Line("desk", 20), Line("pen", 3))
    first, cancelled, second = arrived
    assert first == OrderPlaced(1, 1, 20 * DESK + 3 * PEN, lines)
    assert cancelled == OrderCancelled(1, 20 * DESK + 3 * PEN)
    assert isinstance(second, OrderPlaced)
    assert second.lines == (Line("desk", 6),)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        pytest.param(b"{", 400, "DecodeError", id="no JSON"),
        pytest.param(b"\xff", 400, "DecodeError", id="no text"),
        pytest.param({"reference": "A-1"}, 422, "ValidationError", id="fields missing"),
        pytest.param(an_order() | {"customer_id": 2**31}, 422, "ValidationError", id="number out of range"),
        pytest.param(an_order(), 422, "InvalidMessageError", id="no lines"),
        pytest.param(an_order(pen=-1), 422, "InvalidMessageError", id="negative quantity"),
        pytest.param(an_order(pen=1_001), 422, "InvalidMessageError", id="too many"),
        pytest.param(an_order("=1+1", pen=1), 422, "InvalidMessageError", id="reference with signs"),
        pytest.param(an_order() | {"lines": an_order(pen=1)["lines"] * 2}, 422, "InvalidMessageError", id="twice"),
        pytest.param(an_order(pen=1) | {"customer_id": 99}, 409, "UnknownCustomerError", id="unknown customer"),
        pytest.param(an_order(piano=1, pen=1), 409, "UnknownProductError", id="unknown product"),
        pytest.param(an_order(pen=1, desk=26), 409, "OutOfStockError", id="out of stock"),
        pytest.param(an_order(pen=1, desk=5) | {"customer_id": 4}, 409, "CreditExceededError", id="too dear"),
        pytest.param(b" " * 70_000, 413, None, id="too large"),
    ],
)
async def test_a_refused_order_leaves_nothing_behind(
    engine: AsyncEngine, body: bytes | dict[str, Any], status: int, error: str | None
) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments())
    before = await stock_of(engine)

    async with serving(create_web(mediator)) as client:
        answer = await client.post("/orders", content=body if isinstance(body, bytes) else json.dumps(body))
        export = await client.get("/orders.csv")

    assert answer.status_code == status
    assert error is None or answer.json()["error"] == error
    assert len(export.text.splitlines()) == 1
    assert await stock_of(engine) == before


@pytest.mark.parametrize(("path", "status"), [("/orders/1", 404), ("/orders/one", 422), ("/orders/9999999999", 422)])
async def test_an_order_that_is_not_there(engine: AsyncEngine, path: str, status: int) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments())

    async with serving(create_web(mediator)) as client:
        assert (await client.get(path)).status_code == status
        assert (await client.post(f"{path}/cancel")).status_code == status


@pytest.mark.parametrize("package", ["examples.orders", "pipeline_mediator.examples.orders"])
def test_it_starts_from_a_checkout_and_as_installed(package: str, tmp_path: Path) -> None:
    if package.startswith("examples") and not (ROOT / "examples").is_dir():
        pytest.skip("looks at a checkout; here are only the tests, and the package is installed")
    command = [sys.executable, "-m", "uvicorn", f"{package}.app:create_app", "--factory", "--port", "0"]
    settings = {"ORDERS_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/orders.db", "ORDERS_REDIS_URL": ""}

    with subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
            assert httpx.get(f"{address}/orders.csv").status_code == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert "Application shutdown complete" in process.stderr.read()


# -- what the stack is for ---------------------------------------------------------------------------------------------


class TroubledPayments(Payments):
    """Cannot be reached a number of times."""

    def __init__(self, failures: int) -> None:
        self.keys: list[str] = []
        self._failures = failures

    async def authorise(self, key: str, customer_id: int, cents: int) -> str:
        self.keys.append(key)
        if len(self.keys) <= self._failures:
            raise ConnectionError("gateway.internal:443 refused the connection")
        return "authorised"


async def test_a_gateway_that_comes_back_is_asked_again_with_the_same_key(engine: AsyncEngine) -> None:
    payments = TroubledPayments(failures=2)
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), payments)

    async with serving(create_web(mediator)) as client:
        answer = await client.post("/orders", json=an_order("A-1", desk=2))
        again = await client.post("/orders", json=an_order("A-1", desk=2))

    assert answer.status_code == 201
    assert payments.keys == ["1/A-1"] * 3
    assert (await stock_of(engine))["desk"] == 23
    assert (again.status_code, again.json()["error"]) == (409, "RepeatedReferenceError")


async def test_a_gateway_that_stays_away_leaves_nothing_behind(engine: AsyncEngine) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), TroubledPayments(failures=9))

    async with serving(create_web(mediator)) as client:
        answer = await client.post("/orders", json=an_order("A-1", desk=2))

    assert answer.status_code == 503
    assert "gateway.internal" not in answer.text
    assert (await stock_of(engine))["desk"] == 25
    async with AsyncSession(engine) as session:
        assert (await session.get_one(Customer, 1)).owed_cents == 0
        assert await session.scalar(select(Order)) is None


async def test_orders_at_the_same_time_do_not_sell_a_desk_twice(engine: AsyncEngine) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments())

    async with serving(create_web(mediator)) as client:
        sending = (client.post("/orders", json=an_order(f"A-{at}", desk=2)) for at in range(15))
        answers = [answer.status_code for answer in await asyncio.gather(*sending)]

    assert sorted(answers) == [201] * 12 + [409] * 3
    assert (await stock_of(engine))["desk"] == 1


async def test_what_is_running_low_is_reordered_in_the_same_transaction(engine: AsyncEngine) -> None:
    mediator = create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments())

    first = await mediator.send(PlaceOrder(1, "A-1", (Line("desk", 19),)))
    second = await mediator.send(PlaceOrder(1, "A-2", (Line("desk", 1), Line("pen", 1))))
    await mediator.send(PlaceOrder(1, "A-3", (Line("desk", 1),)))

    assert first == Receipt(1, 19 * DESK)
    async with AsyncSession(engine) as session:
        assert [(row.sku, row.order_id) for row in await session.scalars(select(Reorder))] == [
            ("desk", second.order_id)
        ]


async def test_others_are_told_in_order_what_became_of_an_order(engine: AsyncEngine) -> None:
    broker = MemoryBroker()
    mediator = create_mediator(create_pipeline(engine, broker), SandboxPayments())
    codec = Codec(OrderPlaced, OrderCancelled)

    async with (
        mediator,
        OutboxRelay(mediator),
        broker.subscribe("orders", name="warehouse") as subscription,
        serving(create_web(mediator)) as client,
    ):
        for path, body, expected in (
            ("/orders", an_order(pen=2), OrderPlaced(1, 1, 2 * PEN, (Line("pen", 2),))),
            ("/orders/1/cancel", None, OrderCancelled(1, 2 * PEN)),
        ):
            # Answered without waiting for the warehouse.
            assert (await client.post(path, json=body)).is_success
            (delivery,) = await subscription.receive(1)
            assert codec.decode(delivery.body, delivery.content_type, delivery.headers).message == expected
            assert delivery.key == "1"
            delivery.outcome = Ack()
            await subscription.settle([delivery])


async def test_a_client_who_leaves_the_export_ends_its_transaction(engine: AsyncEngine) -> None:
    """Starlette does not close the generator of a response that is cut off in `send`; the response must do it."""
    async with engine.begin() as connection:
        order = {"customer_id": 1, "status": "placed", "total_cents": 1}
        await connection.execute(insert(Order), [order | {"reference": f"A-{at}"} for at in range(1_000)])
    web = create_web(create_mediator(create_pipeline(engine, MemoryBroker()), SandboxPayments()))
    sent = 0

    async def send(_message: object) -> None:
        nonlocal sent
        sent += 1
        if sent == 10:
            raise OSError("the client has gone")

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "method": "GET",
        "path": "/orders.csv",
        "headers": [],
        "query_string": b"",
    }
    with pytest.raises(ClientDisconnect):
        await web(scope, receive, send)

    pool: Any = engine.pool
    assert pool.checkedout() == 0


async def test_a_handler_is_tested_with_a_session_and_a_context(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        handler = PlaceOrderHandler(session, SandboxPayments())
        command = PlaceOrder(2, "A-1", (Line("desk", 21),))
        context = Context(command)

        receipt = await handler.handle(command, context)

        assert context.events == [
            StockRanLow("desk", receipt.order_id),
            OrderPlaced(receipt.order_id, 2, 21 * DESK, command.lines),
        ]
        with pytest.raises(OutOfStockError, match="5 of desk are wanted, 4 are left"):
            await handler.handle(PlaceOrder(2, "A-2", (Line("desk", 5),)), context)


async def stock_of(engine: AsyncEngine) -> dict[str, int]:
    async with AsyncSession(engine) as session:
        return {product.sku: product.available for product in await session.scalars(select(Product))}
