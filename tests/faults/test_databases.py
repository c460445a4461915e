"""Trouble with the database: it goes away, it refuses, it is full of old rows."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from pipeline_mediator.outbox.protocol import Failure, Policy
from tests.faults.brokers import HookedBroker
from tests.faults.scene import Scene, scene_on
from tests.faults.test_order import stored
from tests.servers import PostgresServer, RedisServer

POSTGRESQL = pytest.mark.parametrize("database", ["postgresql"], indirect=True)
POLICY = Policy(lease=10.0)


async def test_26_a_database_that_goes_away_is_one_line_for_each_pause_and_no_storm(
    own_postgres: PostgresServer, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline_mediator")
    url = own_postgres.url.replace("postgresql:", "postgresql+asyncpg:")
    async with scene_on(url, own_redis.url) as relaying, scene_on(url, own_redis.url) as scene:
        await scene.create("a")
        await scene.send(scene.command("a"))
        async with relaying.relay(clean_every=None):
            await scene.until(lambda: scene.has_copies(1))
            await asyncio.to_thread(own_postgres.kill)
            await scene.until(lambda: has(len(pauses_in(caplog)) >= 3))
            await asyncio.to_thread(own_postgres.start)
            await scene.engine.dispose()
            await scene.send(scene.command("a"))
            await scene.until(lambda: scene.has_copies(2))
    pauses = pauses_in(caplog)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    # One line for each pause, and one when it is back.
    assert len(warnings) == len(pauses) + 1
    assert "works again" in warnings[-1].getMessage()


def pauses_in(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [float(found[1]) for message in caplog.messages if (found := re.search(r"next try in ([\d.]+) s", message))]


async def has(value: bool) -> bool:  # noqa: FBT001 - what is asked
    return value


@POSTGRESQL
async def test_27_a_handler_that_cannot_be_serialised_is_repeated_with_its_events(scene: Scene) -> None:
    async with scene_on(scene.database, scene.redis, isolation_level="SERIALIZABLE") as strict:
        mediator = strict.mediator(attempts=50)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(mediator.send(strict.command("a", notes=1)))
    await scene.drain()
    assert await scene.places("a") == list(range(1, 9))
    assert sorted(await scene.tokens()) == await scene.facts()


@POSTGRESQL
async def test_27_a_relay_that_is_the_victim_of_a_deadlock_tries_again(scene: Scene) -> None:
    """It holds the rows of lanes and waits for one of the outbox; the other way round for whoever is in its way."""
    await scene.send(scene.command("a"))
    in_the_way = await scene.engine.connect()
    rows, lanes = scene.names()
    blocked = False

    async def block() -> None:
        nonlocal blocked
        if blocked:
            return
        blocked = True
        await in_the_way.execute(text("SET LOCAL deadlock_timeout = '60s'"))
        await in_the_way.execute(text(f"SELECT id FROM {rows} FOR UPDATE"))

    try:
        async with (
            scene_on(scene.database, scene.redis) as relaying,
            relaying.relay(HookedBroker(scene.redis, after=block)),
        ):
            await scene.until(lambda: waits_for_a_lock(scene))
            await in_the_way.execute(text(f"SELECT lane FROM {lanes} FOR UPDATE"))
            await in_the_way.rollback()
            await scene.until(scene.is_empty)
    finally:
        await in_the_way.close()
    assert set(await scene.places("a")) == {1}
    assert len(await scene.copies()) == 2


async def waits_for_a_lock(scene: Scene) -> bool:
    async with scene.engine.connect() as connection:
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        number: int = (await connection.execute(waiting)).scalar_one()
        return number > 0


@POSTGRESQL
async def test_28_an_old_snapshot_delays_nobody(scene: Scene) -> None:
    """Nothing that is deleted meanwhile can be vacuumed; each poll steps over it, and finds what is due."""
    async with scene.engine.execution_options(isolation_level="REPEATABLE READ").connect() as old:
        await old.execute(text("SELECT 1 FROM accounts"))
        for _ in range(5):
            await fill(scene, 400, key=None)
            await scene.drain()
            assert await scene.waiting() == 0
    assert len(set(await scene.tokens())) == 2000


@pytest.mark.parametrize("database", ["postgresql", "sqlite"], indirect=True)
@pytest.mark.parametrize("analysed", [True, False], ids=["analysed", "never analysed"])
async def test_29_no_statement_of_a_relay_reads_what_was_sent(scene: Scene, *, analysed: bool) -> None:
    keeping = scene.store(keep=timedelta(days=1))
    await fill(scene, 3000, key=None)
    await scene.drain(store=keeping)
    if analysed:
        async with scene.engine.begin() as connection:
            await connection.execute(text("ANALYZE"))
    await scene.send(scene.command("a", "b", notes=2))
    async with Statements(scene.engine) as statements, keeping.take(1000, POLICY) as batch:
        assert batch is not None
        assert len(batch.rows) == 4
        batch.sent([row.id for row in batch.rows])
    assert len(statements) >= 3
    assert await statements.scans() == []


@pytest.mark.parametrize("database", ["postgresql", "sqlite"], indirect=True)
async def test_29_a_poll_does_not_read_what_waits_behind_a_failed_head(scene: Scene) -> None:
    """[tried] A NOT EXISTS over 200 000 of them took 1.3 s a poll."""
    await fill(scene, 1, key="a")
    async with scene.store().take(1, POLICY) as batch:
        assert batch is not None
        batch.failed([Failure(batch.rows[0].id, "refused", 3600.0)])
    await fill(scene, 5000, key="a")
    await scene.drain()
    assert (await scene.store().health()).waiting == 5000
    # The first poll of a relay looks at more, and marks what was pending until now for those to come.
    store = scene.store()
    async with store.take(1000, POLICY) as batch:
        assert batch is None
    async with Statements(scene.engine) as statements, store.take(1000, POLICY) as batch:
        assert batch is None
    assert await statements.scans() == []
    assert await statements.pages() < 500


async def fill(scene: Scene, number: int, key: str | None) -> None:
    async with scene.engine.begin() as connection:
        await scene.store().add(connection, [stored(f"{key}/{scene.number()}", key) for _ in range(number)])


class Statements:
    """Those that an engine has sent, and how the database carries them out."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._sent: list[tuple[str, Any]] = []

    async def __aenter__(self) -> Self:
        if self._engine.dialect.name == "sqlite":
            await self._trace(lambda statement: self._note(None, None, statement, ()))
        else:
            event.listen(self._engine.sync_engine, "before_cursor_execute", self._note)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._engine.dialect.name == "sqlite":
            await self._trace(None)
        else:
            event.remove(self._engine.sync_engine, "before_cursor_execute", self._note)

    async def _trace(self, note: Callable[[str], None] | None) -> None:
        """By the driver, parameters filled in: a store may speak to it without SQLAlchemy. The pool has one of them."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.set_trace_callback(note)

    def __len__(self) -> int:
        return len(self._sent)

    def _note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            self._sent.append((statement, parameters))

    async def plans(self, explain: str) -> list[str]:
        lines: list[str] = []
        async with self._engine.connect() as connection:
            for statement, parameters in self._sent:
                result = await connection.exec_driver_sql(f"{explain} {statement}", parameters)
                lines += [str(row[-1]) for row in result]
            await connection.rollback()
        return lines

    async def scans(self) -> list[str]:
        """Steps that read a whole table of messages."""
        if self._engine.dialect.name == "sqlite":
            return [line for line in await self.plans("EXPLAIN QUERY PLAN") if re.search(r"SCAN outbox$", line)]
        return [line for line in await self.plans("EXPLAIN") if "Seq Scan on outbox " in line]

    async def pages(self) -> int:
        """Pages that PostgreSQL looks at; SQLite does not count them."""
        if self._engine.dialect.name == "sqlite":
            return 0
        tops = [line for line in await self.plans("EXPLAIN (ANALYZE, BUFFERS)") if line.startswith("  Buffers")]
        return sum(int(number) for line in tops for number in re.findall(r"(?:hit|read)=(\d+)", line))
