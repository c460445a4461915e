"""The demo adds up on real servers, says so when it does not, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.sql import Executable

from pipeline_mediator import message_brokers
from pipeline_mediator.cli.demo.run import Demo, open_demo
from pipeline_mediator.cli.demo.visits import plan_visits
from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.cli.main import main
from pipeline_mediator.examples.orders.tables import Order, OrderLine, Product, Reorder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.servers import PostgresServer, RedisServer, Running

ROOT = Path(__file__).parents[2]
ADDS_UP = "It adds up"
SOME = ["--orders", "60"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def execute(url: str, *statements: str) -> list[Any]:
    """The first column of the last statement."""
    *first, last = statements

    async def run() -> list[Any]:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            for statement in first:
                await connection.execute(text(statement))
            result = await connection.execute(text(last))
        await engine.dispose()
        return list(result.scalars()) if result.returns_rows else []

    return asyncio.run(run())


# -- it adds up --------------------------------------------------------------------------------------------------------


def test_it_adds_up_without_any_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SOME]) == 0

    shown, complaints = capsys.readouterr()
    assert ADDS_UP in shown
    assert "WRONG" not in shown
    assert complaints == ""
    # The stack as it was compiled, what the clients were told, and both tables.
    assert "RetryMiddleware        3 attempts" in shown
    assert "MemoryBroker → orders" in shown
    for status in (201, 204, 404, 409, 422, 500, 503):
        assert f"  {status}  " in shown
    for row in ("orders placed", "orders cancelled", "committed", "rolled back", "published", "received"):
        assert row in shown


def test_it_adds_up_on_postgresql_and_redis(
    postgres_database: str, redis_server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *SOME, "--database", postgres_database, "--redis", redis_server.url]) == 0

    shown = capsys.readouterr().out
    assert ADDS_UP in shown
    assert "RedisMessageBroker → orders" in shown
    assert execute(postgres_database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


async def test_every_kind_of_trouble_is_in_it() -> None:
    async with open_demo(orders=100) as demo:
        await demo.send()

        assert {(500, ""), (503, "ConnectionError"), (422, "InvalidMessageError")} <= demo.ledger.commands.keys()
        assert demo.payments.raised.keys() == {"ConnectionError", "ZeroDivisionError"}
        assert demo.tally.committed_later > 0
        assert demo.tally.rolled_back > 0
        assert demo.tally.handled["StockRanLow"] > 0
        assert demo.received.messages.keys() == {"OrderPlaced", "OrderCancelled"}
        assert [table.failures for table in await demo.count()] == [[], []]


def test_a_seed_decides_the_orders() -> None:
    assert plan_visits(100, seed=1) == plan_visits(100, seed=1)
    assert plan_visits(100, seed=1) != plan_visits(100, seed=2)


@pytest.mark.parametrize("number", [1, 5, 12])
def test_few_orders_will_do(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--orders", str(number)]) == 0
    assert ADDS_UP in capsys.readouterr().out


# -- it does not add up ------------------------------------------------------------------------------------------------


def database(*statements: Executable) -> Callable[[Demo], Coroutine[Any, Any, None]]:
    async def tamper(demo: Demo) -> None:
        async with demo.engine.begin() as connection:
            for statement in statements:
                await connection.execute(statement)

    return tamper


async def lose_a_message(demo: Demo) -> None:
    demo.received.messages["OrderPlaced"] -= 1


async def receive_a_message_twice(demo: Demo) -> None:
    demo.received.messages["OrderCancelled"] += 1


async def publish_nothing(demo: Demo) -> None:
    demo.tally.published["OrderPlaced"] = 0


async def forget_a_rollback(demo: Demo) -> None:
    demo.tally.rolled_back -= 1


async def commit_once_more(demo: Demo) -> None:
    demo.tally.committed += 1


a_left_over = insert(Order).values(customer_id=1, reference="left-over", status="placed", total_cents=0)


@pytest.mark.parametrize(
    ("tamper", "noticed"),
    [
        (database(delete(Order).where(Order.id == 1)), "orders placed"),
        (database(delete(Order).where(Order.id == 1), a_left_over), "orders placed"),
        (database(a_left_over), "orders placed"),
        (database(update(Order).where(Order.id == 1).values(total_cents=1)), "orders placed"),
        (database(update(Order).where(Order.status == "cancelled").values(status="placed")), "orders cancelled"),
        (database(delete(OrderLine).where(OrderLine.order_id == 1)), "cents in orders"),
        (
            database(update(Product).where(Product.sku == "pen").values(available=Product.available - 1)),
            "products taken",
        ),
        (database(insert(Reorder).values(sku="pen", order_id=1)), "reorders, written with the order"),
        (lose_a_message, "orders placed"),
        (receive_a_message_twice, "orders cancelled"),
        (publish_nothing, "orders placed"),
        (forget_a_rollback, "rolled back"),
        (commit_once_more, "committed"),
    ],
)
async def test_it_notices(tamper: Callable[[Demo], Coroutine[Any, Any, None]], noticed: str) -> None:
    async with open_demo(orders=20) as demo:
        await demo.send()
        await tamper(demo)

        first, second = await demo.count()

    assert noticed in [*first.failures, *second.failures]


def test_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    send = Demo.send

    async def send_and_lose_an_order(demo: Demo, advance: Callable[[], None]) -> None:
        await send(demo, advance)
        await database(delete(Order).where(Order.id == 1))(demo)

    monkeypatch.setattr(Demo, "send", send_and_lose_an_order)

    assert main(["demo", "--orders", "20"]) == 1

    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "It does not add up: orders placed" in shown
    assert ADDS_UP not in shown


# -- it cannot run -----------------------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it says, with exit code 2."""
    assert main(["demo", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("python -m pipeline_mediator: ")
    assert len(complaint.splitlines()) == 1
    assert "secret" not in complaint
    return complaint


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--database", "postgresql+asyncpg://ada:secret@127.0.0.1:1/shop"], "127.0.0.1:1/shop cannot be used"),
        (["--database", "sqlite+aiosqlite:////no/such/folder/x.db"], "unable to open database file"),
        (["--database", "sqlite:////tmp/x.db"], "needs an async driver"),
        (["--database", "oracle+nonsense://ada:secret@127.0.0.1/x"], "no database that SQLAlchemy knows"),
        (["--database", "ada:secret@127.0.0.1"], "no database URL"),
        (["--redis", "redis://ada:secret@127.0.0.1:1/0"], "Redis at 127.0.0.1:1/0 cannot be reached"),
        (["--redis", "ada:secret@127.0.0.1"], "no Redis URL"),
        (["--log", "/no/such/folder/x.log"], "log cannot be written"),
    ],
)
def test_what_it_cannot_reach_is_one_line(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in fails(arguments, capsys)


def test_wrong_credentials(postgres_database: str, redis_server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = postgres_database.replace("postgres@", "nobody:secret@")
    assert 'role "nobody" does not exist' in fails(["--database", nobody], capsys)

    stranger = redis_server.url.replace("://", "://stranger:secret@")
    assert "refused the credentials" in fails(["--redis", stranger], capsys)


async def test_a_redis_that_dies_meanwhile_is_one_line(own_redis: RedisServer) -> None:
    with pytest.raises(CommandError, match="the subscriber lost Redis"):
        await count_after(own_redis.kill, redis_url=own_redis.url)


async def test_a_database_that_dies_meanwhile_is_one_line(own_postgres: PostgresServer) -> None:
    url = own_postgres.url.replace("://", "+asyncpg://")
    with pytest.raises(CommandError, match="cannot be used"):
        await count_after(own_postgres.kill, database_url=url)


async def count_after(
    action: Callable[[], None], database_url: str | None = None, redis_url: str | None = None
) -> None:
    """Do it after the fifth order, and go on."""
    numbers = count(1)
    async with open_demo(database_url, redis_url, orders=20) as demo:
        await demo.send(lambda: action() if next(numbers) == 5 else None)
        await demo.count()


def test_tables_of_others_are_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/shop.db"
    execute(url, "CREATE TABLE orders (id INTEGER)", "INSERT INTO orders VALUES (42)")

    assert "already has tables of these names: orders" in fails(["--database", url], capsys)

    assert execute(url, "SELECT id FROM orders") == [42]
    assert execute(url, "SELECT name FROM sqlite_master") == ["orders"]


def test_its_own_tables_are_dropped(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/demo.db"
    execute(url, "CREATE TABLE something_else (id INTEGER)")

    assert main(["demo", "--orders", "5", "--database", url]) == 0

    assert execute(url, "SELECT name FROM sqlite_master") == ["something_else"]


@pytest.mark.parametrize("library", ["aiosqlite", "greenlet", "httpx", "sqlalchemy", "starlette"])
def test_a_missing_library_names_the_extra(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert 'pip install "pipeline-mediator[demo]"' in fails([], capsys)


def test_what_it_does_not_use_may_be_missing() -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(["asyncpg", "di", "dishka", "pydantic", "redis", "rich", "rodi", "trio", "uvicorn"]))
from pipeline_mediator.cli.main import main
from pipeline_mediator.examples.orders.app import create_app
sys.exit(main(["demo", "--orders", "5"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ADDS_UP in done.stdout


def test_a_missing_redis_client_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("redis", "redis_client"):
        monkeypatch.delitem(sys.modules, f"pipeline_mediator.message_brokers.{module}", raising=False)
    monkeypatch.delitem(vars(message_brokers), "RedisMessageBroker", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    complaint = fails(["--redis", "redis://ada:secret@127.0.0.1/0"], capsys)
    assert 'pip install "pipeline-mediator[redis]"' in complaint


def test_a_missing_postgresql_driver_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    complaint = fails(["--database", "postgresql+asyncpg://ada:secret@127.0.0.1/shop"], capsys)
    assert 'pip install "pipeline-mediator[postgresql]"' in complaint


@pytest.mark.parametrize(
    "arguments", [["--orders", "0"], ["--orders", "many"], ["--seed", "x"], ["--describe", "dot"], []]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments] if arguments else [])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


# -- how it shows ------------------------------------------------------------------------------------------------------


def test_without_rich_it_is_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "pipeline_mediator.cli.demo.rich_screen", raising=False)

    assert main(["demo", "--orders", "20"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("orders: ")] == [f"orders: {at} of 20" for at in range(2, 21, 2)]
    assert any(line.startswith("orders placed ") and line.endswith("ok") for line in lines)
    assert lines[-1].startswith(ADDS_UP)


def test_describe_shows_every_chain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--describe", "json"]) == 0
    chains = json.loads(capsys.readouterr().out)
    assert {chain["message"] for chain in chains} == {
        "PlaceOrder",
        "CancelOrder",
        "GetOrder",
        "ExportOrders",
        "StockRanLow",
        "OrderPlaced",
        "OrderCancelled",
    }

    assert main(["demo", "--describe", "mermaid"]) == 0
    assert capsys.readouterr().out.startswith("flowchart")


def test_ctrl_c_stops_it_without_a_trace(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/demo.db"
    command = [sys.executable, "-m", "pipeline_mediator", "demo", "--orders", "100000", "--database", url]

    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to Ctrl-C, and the deafness is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread of ours runs yet
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Sending"):
                    break
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == 130
    assert complaint == "python -m pipeline_mediator: stopped\n"
    assert execute(url, "SELECT name FROM sqlite_master") == []
