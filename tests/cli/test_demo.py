"""The demo adds up on real servers, says so when it does not, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.sql import Executable

from pipeline_mediator import message_brokers
from pipeline_mediator.cli.demo import database as demo_database
from pipeline_mediator.cli.demo import process as demo_process
from pipeline_mediator.cli.demo.count_outage import outage_table
from pipeline_mediator.cli.demo.database import Contents
from pipeline_mediator.cli.demo.ledger import Ledger
from pipeline_mediator.cli.demo.listener import Received
from pipeline_mediator.cli.demo.outage import Outage, open_outage, plan_kills
from pipeline_mediator.cli.demo.receipts import Receipts, listen_to_receipts
from pipeline_mediator.cli.demo.run import Demo, open_demo
from pipeline_mediator.cli.demo.visits import plan_visits
from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.cli.main import main
from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.examples.orders.messages import OrderCancelled, OrderPlaced
from pipeline_mediator.examples.orders.tables import Order, OrderLine, Product, Reorder
from tests.redis_view import command

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from tests.servers import PostgresServer, RedisServer, Running

ROOT = Path(__file__).parents[2]
ADDS_UP = "It adds up"
SOME = ["--orders", "60"]
KILLED = "The same with the service in a process of its own"

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")


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


def tables_in(url: str) -> list[Any]:
    """Without SQLite's own, which it keeps for good once a table numbered its rows by AUTOINCREMENT."""
    return execute(url, "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")


# -- it adds up --------------------------------------------------------------------------------------------------------


def test_it_adds_up_without_any_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SOME]) == 0

    shown, complaints = capsys.readouterr()
    assert ADDS_UP in shown
    assert "WRONG" not in shown
    assert complaints == ""
    # The stack as it was compiled, what the clients were told, and all tables.
    assert "RetryMiddleware        3 attempts" in shown
    assert "MemoryBroker → orders" in shown
    for status in (201, 204, 404, 409, 422, 500, 503):
        assert f"  {status}  " in shown
    for row in ("orders placed", "orders cancelled", "committed", "rolled back", "published", "received"):
        assert row in shown
    assert KILLED in shown
    assert shown.count("Killed after ") == 2
    for column in ("again", "lost", "unexpected"):
        assert column in shown


def test_it_adds_up_on_postgresql_and_redis(
    postgres_database: str, redis_server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *SOME, "--database", postgres_database, "--redis", redis_server.url]) == 0

    shown = capsys.readouterr().out
    assert ADDS_UP in shown
    assert "RedisStreamBroker → orders" in shown
    assert shown.count("Killed after ") == 2
    assert execute(postgres_database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
    assert not [key for key in asyncio.run(command(redis_server.url, "KEYS", "*")) if b"demo" in key]


async def test_every_kind_of_trouble_is_in_it() -> None:
    async with open_demo(orders=100) as demo:
        await demo.send()

        assert {(500, ""), (503, "ConnectionError"), (422, "InvalidMessageError")} <= demo.ledger.commands.keys()
        assert demo.payments.raised.keys() == {"ConnectionError", "ZeroDivisionError"}
        assert demo.tally.committed_later > 0
        assert demo.tally.rolled_back > 0
        assert demo.tally.handled["StockRanLow"] > 0
        assert demo.received.of(OrderPlaced)
        assert demo.received.of(OrderCancelled)
        assert [table.failures for table in await demo.count()] == [[], []]


def test_a_seed_decides_the_orders() -> None:
    assert plan_visits(100, seed=1) == plan_visits(100, seed=1)
    assert plan_visits(100, seed=1) != plan_visits(100, seed=2)
    assert plan_kills(100, seed=1) == plan_kills(100, seed=1)
    assert plan_kills(100, seed=1) != plan_kills(100, seed=2)


@pytest.mark.parametrize("number", [1, 12])
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
    lost, *_ = demo.received.of(OrderPlaced)
    del demo.received.messages[lost]


async def invent_a_message(demo: Demo) -> None:
    copied, *_ = demo.received.of(OrderCancelled).values()
    demo.received.messages["another id"] = copied


async def publish_nothing(demo: Demo) -> None:
    demo.tally.published["orders.placed"].clear()


async def publish_something_else(demo: Demo) -> None:
    demo.tally.published["orders.placed"].pop()
    demo.tally.published["orders.placed"].add("another id")


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
        (invent_a_message, "orders cancelled"),
        (publish_nothing, "orders placed"),
        (publish_something_else, "orders placed"),
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


async def test_a_copy_that_comes_again_is_no_mistake() -> None:
    async with open_demo(orders=20) as demo:
        await demo.send()
        demo.received.again[OrderPlaced] += 1

        first, _ = await demo.count()

    assert first.failures == []
    assert [row.beside for row in first.rows][:2] == [(1,), (0,)]


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


# -- the service that is killed ----------------------------------------------------------------------------------------


def scene() -> tuple[Ledger, Contents, Received]:
    """Orders 1 to 3, of which 3 is cancelled; the answer to 2 was lost, and it was sent again."""
    ledger, received = Ledger(), Received()
    ledger.placed = {1: 100, 3: 300}
    ledger.known = {"1/a": 1, "1/c": 3}
    ledger.repeated = {"1/b"}
    ledger.cancelled = {3}
    placed = {1: 100, 2: 200, 3: 300}
    known = {"1/a": 1, "1/b": 2, "1/c": 3}
    contents = Contents(placed, known, cancelled={3: 300}, in_lines=600, owed=300, available=0, reorders=0)
    received.messages = {f"p{number}": OrderPlaced(number, 1, cents, ()) for number, cents in placed.items()}
    received.messages["c3"] = OrderCancelled(3, 300)
    return ledger, contents, received


Scene = tuple[Ledger, Contents, Received]


def lose_a_receipt(scene: Scene) -> None:
    del scene[2].messages["p2"]


def lose_a_cancellation(scene: Scene) -> None:
    del scene[2].messages["c3"]


def invent_a_receipt(scene: Scene) -> None:
    scene[2].messages["p4"] = OrderPlaced(4, 1, 400, ())


def invent_a_second_message(scene: Scene) -> None:
    scene[2].messages["p1 again"] = OrderPlaced(1, 1, 100, ())


def receive_another_order(scene: Scene) -> None:
    scene[2].messages["p2"] = OrderPlaced(4, 1, 200, ())


def receive_other_cents(scene: Scene) -> None:
    scene[2].messages["p2"] = OrderPlaced(2, 1, 201, ())


def receive_in_another_order(scene: Scene) -> None:
    scene[2].messages["p3"] = scene[2].messages.pop("p3")


def lose_a_committed_order(scene: Scene) -> None:
    del scene[1].placed[2], scene[1].known["1/b"]


def lose_an_order_and_its_receipt(scene: Scene) -> None:
    lose_a_committed_order(scene)
    lose_a_receipt(scene)


def swap_a_committed_order(scene: Scene) -> None:
    lose_a_committed_order(scene)
    scene[1].placed[4], scene[1].known["1/d"] = 200, 4
    receive_another_order(scene)


def answer_what_was_not_committed(scene: Scene) -> None:
    scene[0].repeated.add("1/d")


def answer_other_cents(scene: Scene) -> None:
    scene[0].placed[1] = 101


def answer_nothing(scene: Scene) -> None:
    scene[0].repeated.clear()


def cancel_nothing(scene: Scene) -> None:
    scene[1].cancelled.clear()


@pytest.mark.parametrize(
    ("tamper", "noticed"),
    [
        (lose_a_receipt, "orders placed"),
        (lose_a_cancellation, "orders cancelled"),
        (invent_a_receipt, "orders placed"),
        (invent_a_second_message, "orders placed"),
        (receive_another_order, "orders placed"),
        (receive_other_cents, "orders placed"),
        (receive_in_another_order, "told in order"),
        (lose_a_committed_order, "orders placed"),
        (lose_an_order_and_its_receipt, "orders placed"),
        (swap_a_committed_order, "orders placed"),
        (answer_what_was_not_committed, "orders placed"),
        (answer_other_cents, "orders placed"),
        (answer_nothing, "orders placed"),
        (cancel_nothing, "orders cancelled"),
    ],
)
def test_it_notices_of_a_killed_service(tamper: Callable[[Scene], None], noticed: str) -> None:
    whole = scene()
    assert outage_table(*whole).failures == []

    tamper(whole)

    assert noticed in outage_table(*whole).failures


def test_it_counts_what_was_lost_invented_and_received_again() -> None:
    whole = scene()
    lose_a_receipt(whole)
    invent_a_receipt(whole)
    whole[2].again[OrderPlaced] += 5

    placed, *_ = outage_table(*whole).rows

    assert (placed.values, placed.beside) == ((3, 3, 3), (5, 1, 1))


async def test_a_killed_service_keeps_its_word() -> None:
    async with open_outage(orders=40) as outage:
        await outage.send()

        assert [table.failures for table in await outage.count()] == [[]]
        assert len(outage.told) == 3
        assert outage.ledger.cut_off > 0
        assert outage.received.of(OrderPlaced)

        async with outage.engine.begin() as connection:
            await connection.execute(delete(Order).where(Order.id == 1))
        assert "orders placed" in [name for table in await outage.count() for name in table.failures]


def test_it_says_so_if_the_killed_service_lost_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send = Outage.send

    async def send_and_lose_a_receipt(outage: Outage, advance: Callable[[], None]) -> None:
        await send(outage, advance)
        lost, *_ = outage.received.of(OrderPlaced)
        del outage.received.messages[lost]

    monkeypatch.setattr(Outage, "send", send_and_lose_a_receipt)

    assert main(["demo", "--orders", "20"]) == 1
    assert "It does not add up: orders placed" in capsys.readouterr().out


async def test_a_note_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    """It was not acknowledged either, so its message comes again."""
    codec = Codec(OrderPlaced)
    sent = {f"id-{number}": OrderPlaced(number, 1, 100, ()) for number in range(3)}
    for process in ("001", "002"):
        with Receipts(tmp_path / process) as receipts:
            for message_id, message in sent.items():
                encoded = codec.encode(message, Facts(message_id), binary=True)
                receipts.take(encoded.body, encoded.content_type, encoded.headers)
    cut = tmp_path / "001"
    cut.write_bytes(cut.read_bytes()[:-10])
    received = Received()

    async with listen_to_receipts(tmp_path, received):
        pass

    assert received.messages == sent
    assert received.again[OrderPlaced] == 2


async def test_a_service_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_process, "PROGRAM", "pipeline_mediator.no_such_program")
    async with open_outage(orders=1) as outage:
        with pytest.raises(CommandError, match=r"did not start: .*no_such_program"):
            await outage.send()


@needs_proc
async def test_a_service_that_ends_by_itself_is_one_line() -> None:
    numbers = count(1)
    async with open_outage(orders=40) as outage:
        with pytest.raises(CommandError, match="the service ended by itself"):
            await outage.send(lambda: kill_my_children() if next(numbers) == 3 else None)
    assert children_of(os.getpid()) == []


# -- it cannot run -----------------------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it says, with exit code 2."""
    assert main(["demo", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("pipeline-mediator: ")
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


async def test_a_redis_that_dies_meanwhile_is_one_line(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_database, "SECONDS", 1.0)
    with pytest.raises(CommandError, match=r"the relay gets no further: \d+ messages are still in the outbox"):
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

    assert tables_in(url) == ["something_else"]


@pytest.mark.parametrize("library", ["aiosqlite", "greenlet", "httpx", "sqlalchemy", "starlette", "uvicorn"])
def test_a_missing_library_names_the_extra(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert 'pip install "pipeline-mediator[demo]"' in fails([], capsys)


def test_what_it_does_not_use_may_be_missing() -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(["asyncpg", "di", "dishka", "pydantic", "redis", "rich", "rodi", "trio"]))
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
    package = "pipeline_mediator.message_brokers.redis"
    for module in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(vars(message_brokers), "RedisStreamBroker", raising=False)
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
    assert main(["demo", *arguments] if arguments else []) == 2
    assert "usage:" in capsys.readouterr().err.lower()


# -- how it shows ------------------------------------------------------------------------------------------------------


def test_without_rich_it_is_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "pipeline_mediator.cli.demo.rich_screen", raising=False)

    assert main(["demo", "--orders", "20"]) == 0

    lines = capsys.readouterr().out.splitlines()
    tenths = [f"orders: {at} of 20" for at in range(2, 21, 2)]
    assert [line for line in lines if line.startswith("orders: ")] == tenths * 2
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
        "Relayed",
    }

    assert main(["demo", "--describe", "mermaid"]) == 0
    assert capsys.readouterr().out.startswith("flowchart")


# -- it ends -----------------------------------------------------------------------------------------------------------


@contextmanager
def running_until(line: str, *arguments: str, folder: Path) -> Generator[subprocess.Popen[str]]:
    """The demo in a process, up to this line; `folder` is its place for temporary files."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline_mediator", "demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to Ctrl-C, and the deafness is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread of ours runs yet
    ) as process:
        try:
            assert process.stdout is not None
            assert any(shown.startswith(line) for shown in process.stdout)
            yield process
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    """The processes that it has started and not ended, in which a service runs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "demo.service" in Path(f"/proc/{child}/cmdline").read_text()]


def kill_my_children() -> None:
    for child in children_of(os.getpid()):
        os.kill(child, signal.SIGKILL)


def child_of(pid: int) -> int:
    for _ in range(3_000):
        if found := children_of(pid):
            return found[0]
        time.sleep(0.01)
    raise AssertionError("the demo started no service")


def is_gone(pid: int) -> bool:
    for _ in range(3_000):
        try:
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_ctrl_c_stops_it_without_a_trace(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/demo.db"
    arguments = ["--orders", "100000", "--database", url]

    with running_until("Sending", *arguments, folder=tmp_path / "temporary") as process:
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)

    assert process.returncode == 130
    assert complaint == "pipeline-mediator: stopped\n"
    assert tables_in(url) == []
    assert list((tmp_path / "temporary").iterdir()) == []


@needs_proc
def test_ctrl_c_ends_the_service_too(tmp_path: Path) -> None:
    with running_until(KILLED, "--orders", "5", folder=tmp_path / "temporary") as process:
        child = child_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)

    assert process.returncode == 130
    assert complaint == "pipeline-mediator: stopped\n"
    assert is_gone(child)
    assert list((tmp_path / "temporary").iterdir()) == []


@needs_proc
def test_a_demo_that_is_killed_leaves_no_service_behind(tmp_path: Path) -> None:
    with running_until(KILLED, "--orders", "5", folder=tmp_path / "temporary") as process:
        child = child_of(process.pid)
        process.kill()

    assert is_gone(child)
