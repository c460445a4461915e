"""Whose a batch is, and for how long: a session timeout of the server, or SQLite's one lease."""

# ruff: noqa: ASYNC110, ASYNC222, PT012  # what another process does can only be polled; errors come where batches end

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite
import anyio
import msgspec
import pytest
from sqlalchemy import event, text

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import Failure, Policy
from pipeline_mediator.outbox.sqlalchemy import one_hop, process
from pipeline_mediator.outbox.sqlalchemy.errors import is_gone
from pipeline_mediator.outbox.sqlalchemy.process import ProcessName
from pipeline_mediator.outbox.sqlalchemy.settling import Settling
from tests.outbox.sqlalchemy_outboxes import Outbox, message, opened
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

SHORT = Policy(lease=1.0)
LONG = Policy(lease=600.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["asyncpg", "psycopg", "asyncmy"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "asyncmy":
        mariadb: str = request.getfixturevalue("mariadb_database")
        return mariadb
    postgres: str = request.getfixturevalue("postgres_database")
    return postgres.replace("+asyncpg", f"+{request.param}")


@pytest.fixture
async def outbox(url: str) -> AsyncGenerator[Outbox]:
    async with opened(url) as outbox:
        await outbox.add(*[message(str(number), key="k") for number in range(3)])
        yield outbox


@asynccontextmanager
async def another(outbox: Outbox) -> AsyncGenerator[Outbox]:
    """Another process's, on connections of its own."""
    async with opened(outbox.engine.url.render_as_string(hide_password=False)) as other:
        yield other


async def end_sessions(outbox: Outbox) -> None:
    """The server ends all sessions of the engine, as an operator or a failover does."""
    if outbox.engine.dialect.name == "postgresql":
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        await outbox.execute(f"SELECT count(pg_terminate_backend(pid)) {others}")
        return
    async with another(outbox) as operator, operator.engine.connect() as connection:
        own = (await connection.execute(text("SELECT connection_id()"))).scalar()
        sessions = await connection.execute(
            text("SELECT id FROM information_schema.processlist WHERE db = database() AND id <> :own"), {"own": own}
        )
        for (session,) in sessions.all():
            await connection.execute(text(f"KILL {session}"))


# -- the server's session timeout --------------------------------------------------------------------------------------


async def test_batch_that_is_held_too_long_is_anothers(outbox: Outbox) -> None:
    async with another(outbox) as other:
        with pytest.raises(LeaseLostError, match="will be published again"):
            async with outbox.store.take(10, SHORT) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                with anyio.fail_after(30):
                    while not (taken := await other.send(limit=2)):
                        await anyio.sleep(0.05)
        assert taken == ["0", "1"]
        assert await other.send() == ["2"]


async def test_working_on_a_batch_within_the_lease_is_no_crash(outbox: Outbox) -> None:
    for _ in range(4):
        async with outbox.store.take(10, SHORT) as batch:
            assert batch is not None
            assert len(batch.rows) == 3
            await anyio.sleep(0.3)
    assert await outbox.send() == ["0", "1", "2"]


async def test_timeout_is_not_left_behind_on_the_pools_connection(outbox: Outbox) -> None:
    if outbox.engine.dialect.name == "postgresql":
        showing = "SELECT current_setting('idle_in_transaction_session_timeout')"
    else:
        showing = "SELECT @@SESSION.idle_transaction_timeout"
    before = await outbox.execute(showing)
    async with outbox.store.take(10, SHORT) as batch:
        assert batch is not None
    assert await outbox.send()
    assert await outbox.send() == []
    assert outbox.engine.pool.checkedin() == 1  # type: ignore[attr-defined]  # a queue's
    assert await outbox.execute(showing) == before


async def test_session_that_the_server_ended_is_a_lost_lease_and_not_the_end(outbox: Outbox) -> None:
    with pytest.raises(LeaseLostError):
        async with outbox.store.take(10, LONG) as batch:
            assert batch is not None
            batch.sent([row.id for row in batch.rows])
            async with another(outbox) as operator:
                await end_sessions(operator)
    assert outbox.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await outbox.engine.dispose()
    assert await outbox.send() == ["0", "1", "2"]


async def test_server_that_was_killed_and_came_back(own_postgres: PostgresServer) -> None:
    async with opened(own_postgres.url.replace("postgresql:", "postgresql+asyncpg:")) as outbox:
        await outbox.add(message("1"))
        with pytest.raises(LeaseLostError):
            async with outbox.store.take(10, LONG) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                own_postgres.restart()
        await outbox.engine.dispose()
        assert await outbox.send() == ["1"]


async def test_error_of_the_relay_is_not_hidden_by_a_lost_lease(outbox: Outbox) -> None:
    with pytest.raises(ZeroDivisionError):
        async with outbox.store.take(10, LONG) as batch:
            assert batch is not None
            async with another(outbox) as operator:
                await end_sessions(operator)
            raise ZeroDivisionError
    assert outbox.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_asyncpgs_internal_error_is_a_lost_lease(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises, now and then, when the server ended the session while nothing was asked of it."""

    def settle(*_: object, **__: object) -> None:
        raise importlib.import_module("asyncpg").InternalClientError("got result for unknown protocol state 3")

    with monkeypatch.context() as patched:
        patched.setattr(Settling, "settle", settle)
        with pytest.raises(LeaseLostError):
            async with outbox.store.take(10, LONG):
                pass
    assert await outbox.send() == ["0", "1", "2"]


async def test_statement_that_is_wrong_is_no_lost_lease(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(_settling: object, connection: Any, *_: object, **__: object) -> None:
        connection.execute(text("SELECT nonsense"))

    with monkeypatch.context() as patched:
        patched.setattr(Settling, "settle", settle)
        with pytest.raises(Exception, match="nonsense") as failure:
            async with outbox.store.take(10, LONG):
                pass
    assert not is_gone(failure.value)
    assert await outbox.send() == ["0", "1", "2"]


async def test_while_a_batch_is_published_nothing_is_asked_of_the_pool_but_one_connection(outbox: Outbox) -> None:
    async with outbox.store.take(10, LONG) as batch:
        assert batch is not None
        assert outbox.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    async with outbox.store.take(10, LONG) as batch:
        assert batch is not None
    assert outbox.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# -- SQLite's lease ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncGenerator[Outbox]:
    async with opened(f"sqlite+aiosqlite:///{tmp_path}/outbox.db") as outbox:
        await outbox.add(*[message(str(number), key="k") for number in range(3)])
        yield outbox


@pytest.fixture
def relay(sqlite: Outbox) -> Generator[subprocess.Popen[bytes]]:
    """Another process, with a batch in its hands."""
    code = f"""
        import asyncio
        from pipeline_mediator.outbox.protocol import Policy
        from tests.outbox.sqlalchemy_outboxes import opened

        async def main():
            async with opened({sqlite.engine.url.render_as_string()!r}) as outbox:
                async with outbox.store.take(10, Policy(lease=600)) as batch:
                    print(len(batch.rows), flush=True)
                    await asyncio.sleep(600)

        asyncio.run(main())
    """
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=paths)
    assert child.stdout is not None
    assert child.stdout.readline() == b"3\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


async def test_lease_of_a_killed_process_is_taken_over_at_once(sqlite: Outbox, relay: subprocess.Popen[bytes]) -> None:
    assert await sqlite.send() == []
    relay.kill()
    relay.wait()
    assert await sqlite.send() == ["0", "1", "2"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
async def test_lease_of_a_killed_process_that_nobody_waited_for_is_taken_over(
    sqlite: Outbox, relay: subprocess.Popen[bytes]
) -> None:
    relay.kill()
    os.waitid(os.P_PID, relay.pid, os.WEXITED | os.WNOWAIT)
    assert await sqlite.send() == ["0", "1", "2"]


async def test_lease_of_a_stopped_process_is_left_to_it(sqlite: Outbox, relay: subprocess.Popen[bytes]) -> None:
    relay.send_signal(signal.SIGSTOP)
    assert await sqlite.send() == []


async def test_lease_of_another_machine_is_left_to_it_until_it_ends(sqlite: Outbox) -> None:
    with pytest.raises(LeaseLostError, match="another relay has taken the outbox over"):
        async with sqlite.store.take(10, LONG) as batch:
            assert batch is not None
            batch.sent([row.id for row in batch.rows])
            # There, no process has this number.
            await sqlite.execute(
                "UPDATE outbox_lanes SET owner = json_set(owner, '$.process.machine', 'elsewhere', '$.process.pid', 0)"
            )
            assert await sqlite.send() == []
            await sqlite.execute("UPDATE outbox_lanes SET expires_at = '2000-01-01 00:00:00.000000'")
            assert await sqlite.send(limit=2) == ["0", "1"]
    assert await sqlite.send() == ["2"]


async def test_batch_is_settled_when_a_writer_lets_go_of_the_lock(sqlite: Outbox) -> None:
    """A message that went out must not go out again because somebody wrote for a while."""

    def wait_no_time(connection: Any, _record: object, _proxy: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 0")
        cursor.close()

    event.listen(sqlite.engine.sync_engine, "checkout", wait_no_time)
    async with opened(sqlite.engine.url.render_as_string()) as writer, anyio.create_task_group() as tasks:
        written = anyio.Event()

        async def write() -> None:
            async with writer.engine.begin():
                written.set()
                await anyio.sleep(0.3)

        async with sqlite.store.take(10, LONG) as batch:
            assert batch is not None
            batch.sent([row.id for row in batch.rows])
            tasks.start_soon(write)
            await written.wait()
    assert await sqlite.send() == []
    assert (await sqlite.store.health()).pending == 0


async def test_nothing_is_open_while_a_batch_is_published(sqlite: Outbox) -> None:
    async with sqlite.store.take(10, LONG) as batch:
        assert batch is not None
        assert sqlite.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with anyio.fail_after(5):
            await sqlite.add(message("4"))


async def test_batch_costs_few_hops_to_the_thread(sqlite: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    await sqlite.send(limit=1)
    hops: list[Any] = []
    execute: Any = getattr(aiosqlite.Connection, one_hop._HAND_OVER)  # pyright: ignore[reportPrivateUsage]

    async def counted(self: aiosqlite.Connection, *arguments: Any, **options: Any) -> Any:
        hops.append(arguments[0])
        return await execute(self, *arguments, **options)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)
    assert await sqlite.send() == ["1", "2"]
    # Look, take, settle; and what the pool does when a connection comes back.
    assert len(hops) <= 6


async def test_without_aiosqlites_private_way_it_goes_on_hop_by_hop(
    sqlite: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_hop, "_HAND_OVER", "gone")
    async with sqlite.store.take(2, LONG) as batch:
        assert batch is not None
        batch.sent([batch.rows[0].id])
        batch.failed([Failure(batch.rows[1].id, "Refused: no", 0.0)])
    assert await sqlite.send() + await sqlite.send() == ["1", "2"]


# -- whether a process is dead -----------------------------------------------------------------------------------------


def look_into(monkeypatch: pytest.MonkeyPatch, proc: Path) -> None:
    """As on a system that has its processes there, or nowhere."""
    monkeypatch.setattr(process, "_PROC", proc)
    monkeypatch.setattr(process, "name_of", process.name_of.__wrapped__)


def ended() -> int:
    """The number of a process that ran."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        return child.pid


@pytest.mark.parametrize("proc", [Path("/proc"), Path("/nowhere")])
def test_process_is_dead_when_it_is_gone(monkeypatch: pytest.MonkeyPatch, proc: Path) -> None:
    look_into(monkeypatch, proc)
    own = ProcessName.own()
    assert not own.is_dead()
    assert replace_process(own, pid=ended()).is_dead()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it() -> None:
    assert replace_process(ProcessName.own(), started="1").is_dead()


def test_process_of_another_machine_may_be_alive() -> None:
    assert not replace_process(ProcessName.own(), pid=ended(), machine="elsewhere").is_dead()


def test_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    look_into(monkeypatch, Path("/nowhere"))

    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not ProcessName.own().is_dead()


def test_on_other_systems_nothing_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    look_into(monkeypatch, Path("/nowhere"))
    gone = replace_process(ProcessName.own(), pid=ended())
    monkeypatch.setattr(os, "name", "nt")
    assert not gone.is_dead()


def replace_process(name: ProcessName, **changes: Any) -> ProcessName:
    return msgspec.structs.replace(name, **changes)
