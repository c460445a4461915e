"""What is read to take a batch: a few entries of an index, whatever else is in the table and the planner believes."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event

from pipeline_mediator.outbox.protocol import Failure, Policy
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, one_hop
from tests.outbox.sqlalchemy_outboxes import Outbox, message, opened

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator
    from pathlib import Path

    from sqlalchemy import Connection, Engine

WAITING = 200_000
KEPT = 1_000_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def postgresql(postgres_database: str) -> AsyncGenerator[Outbox]:
    async with opened(postgres_database, keep=timedelta(days=1)) as outbox:
        await outbox.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
        yield outbox


@pytest.fixture
async def mariadb(mariadb_database: str) -> AsyncGenerator[Outbox]:
    async with opened(mariadb_database, keep=timedelta(days=1)) as outbox:
        yield outbox


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncGenerator[Outbox]:
    async with opened(f"sqlite+aiosqlite:///{tmp_path}/outbox.db", keep=timedelta(days=1)) as outbox:
        yield outbox


@dataclass
class Plans:
    """How the statements of a batch were run, by statement."""

    of: dict[str, Any] = field(default_factory=dict[str, Any])


@contextmanager
def explained(engine: Engine, how: str) -> Generator[Plans]:
    """Explain each statement where it is run: in its transaction, with its parameters."""
    plans = Plans()
    explaining = False

    def before(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        nonlocal explaining
        if explaining or not statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE")):
            return
        explaining = True
        plans.of[statement] = connection.exec_driver_sql(f"{how} {statement}", parameters).all()
        explaining = False

    event.listen(engine, "before_cursor_execute", before)
    try:
        yield plans
    finally:
        event.remove(engine, "before_cursor_execute", before)


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def ways_into_rows(plans: Plans, of: str = "") -> set[tuple[str, str]]:
    """How the rows were reached by statements that have this word, and by which index."""
    found = set[tuple[str, str]]()
    for statement, ((plan,),) in plans.of.items():
        if of in statement:
            for node in nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]):
                if node.get("Relation Name") == "outbox":
                    found.add((node["Node Type"], node.get("Index Name", "")))
    return found


def searched_by(plans: Plans, index: str) -> set[str]:
    """The columns of times by which the index is searched; the others would be read one by one."""
    found = set[str]()
    for ((plan,),) in plans.of.values():
        for node in nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]):
            if node.get("Index Name") == index:
                found |= {column for column in ("available_at", "sent_at") if column in node.get("Index Cond", "")}
    return found


async def test_postgresql_counts_what_waits_by_index(postgresql: Outbox) -> None:
    await fill(postgresql, 20_000)
    await analyze(postgresql)
    await postgresql.execute("UPDATE outbox SET state = 4, sent_at = now()")
    store = SQLAlchemyOutbox(postgresql.engine, postgresql.tables, max_pending=100)
    with explained(postgresql.engine.sync_engine, "EXPLAIN (FORMAT JSON)") as plans:
        async with postgresql.engine.begin() as connection:
            await store.add(connection, [message("1")])
    assert {index for _, index in ways_into_rows(plans, of="count")} == {"ix_outbox_lane", "ix_outbox_delayed"}


@pytest.mark.parametrize("statistics", ["none", "of a backlog that was sent", "of today"])
async def test_postgresql_takes_by_indexes_whatever_its_statistics_say(postgresql: Outbox, statistics: str) -> None:
    await fill(postgresql, 20_000)
    if statistics == "of a backlog that was sent":
        await analyze(postgresql)
    await postgresql.execute("UPDATE outbox SET state = 4, sent_at = now() WHERE id <= 19500")
    if statistics == "of today":
        await analyze(postgresql)
    await postgresql.send(limit=10)
    with explained(postgresql.engine.sync_engine, "EXPLAIN (FORMAT JSON)") as plans:
        assert await postgresql.send(limit=300)
        async with postgresql.store.take(10, Policy()) as batch:
            assert batch is not None
            batch.failed([Failure(batch.rows[0].id, "Refused: no", 0.0)])
        assert await postgresql.send()
    assert {kind for kind, _ in ways_into_rows(plans)} == {"Index Scan", "Index Only Scan", "ModifyTable"}
    # The primary key is for rows whose ids are known, never a way through the table.
    by_key = [statement for statement in plans.of if "outbox_pkey" in str(plans.of[statement])]
    assert all("outbox.id = ANY" in statement for statement in by_key)


async def test_postgresql_polls_behind_a_failed_head(postgresql: Outbox, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(postgresql, WAITING, key="hot")
    async with postgresql.store.take(1, Policy()) as batch:
        assert batch is not None
        batch.failed([Failure(batch.rows[0].id, "Refused: no", 3600.0)])
    await postgresql.execute("UPDATE outbox SET state = 2, hold = key WHERE state = 0")
    # Now the planner believes that any key is held, and that each row is of that key.
    await analyze(postgresql)
    await report(postgresql, capsys, f"behind {WAITING} rows that wait")
    # Others go on, and one more of that key waits with the rest.
    await postgresql.add(message("other", key="cold"), message("one more", key="hot"))
    with explained(postgresql.engine.sync_engine, "EXPLAIN (FORMAT JSON)") as plans:
        assert await postgresql.send() == ["other"]
    reading = ways_into_rows(plans, of="taken")
    assert reading == {("Index Scan", "ix_outbox_lane"), ("Index Only Scan", "ix_outbox_hold")}
    assert (await postgresql.store.health()).waiting == WAITING


async def test_postgresql_polls_with_many_rows_kept(postgresql: Outbox, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(postgresql, KEPT, state=4)
    await report(postgresql, capsys, f"with {KEPT} rows kept")
    await postgresql.add(message("1"), message("2"))
    assert sorted(await postgresql.send()) == ["1", "2"]
    with explained(postgresql.engine.sync_engine, "EXPLAIN (FORMAT JSON)") as plans:
        assert await postgresql.store.clean(10) == 0
    assert searched_by(plans, "ix_outbox_sent") == {"sent_at"}


async def test_postgresql_looks_for_what_is_due_behind_what_is_not(postgresql: Outbox) -> None:
    await fill(postgresql, 20_000, state=1)
    await postgresql.execute("UPDATE outbox SET available_at = now() + interval '1 hour' WHERE id > 3")
    await analyze(postgresql)
    with explained(postgresql.engine.sync_engine, "EXPLAIN (FORMAT JSON)") as plans:
        assert len(await postgresql.send()) == 3
        assert 3500 < (await postgresql.store.next_due() or 0) <= 3600
    assert {kind for kind, _ in ways_into_rows(plans)} <= {"Index Scan", "Index Only Scan", "ModifyTable"}
    assert "available_at" in searched_by(plans, "ix_outbox_delayed")


async def fill(outbox: Outbox, number: int, *, state: int = 0, key: str | None = None) -> None:
    """By SQL alone, or this would take a minute."""
    sent = "now()" if state == 4 else "NULL"
    await outbox.execute(
        "INSERT INTO outbox (message_id, name, version, destination, content_type, headers, body, key, lane, state, "
        "failures, created_at, available_at, sent_at) "
        f"SELECT n, 'OrderPlaced', 1, 'orders', 'text/plain', '{{}}', '', {repr(key) if key else 'NULL'}, "
        f"{message('', key=key).lane if key else 'n % 64'}, {state}, 0, now(), now(), {sent} "
        f"FROM generate_series(1, {number}) AS n"
    )


async def analyze(outbox: Outbox) -> None:
    await outbox.execute("ANALYZE outbox")


async def report(outbox: Outbox, capsys: pytest.CaptureFixture[str], situation: str) -> None:
    took: list[float] = []
    for _ in range(10):
        began = time.perf_counter()
        assert await outbox.send() == []
        took.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"\n    {outbox.engine.dialect.name}, {situation}: a poll takes {min(took) * 1000:.1f} ms")  # noqa: T201 - the figure is what this is for


# -- SQLite ------------------------------------------------------------------------------------------------------------


async def test_sqlite_takes_by_indexes(sqlite: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    await sqlite.add(*[message(str(number), key=f"k{number % 50}") for number in range(1000)])
    assert len(await sqlite.send(limit=600)) == 600
    engines: list[Engine] = []

    def remember(*arguments: Any, **options: Any) -> Engine:
        engines.append(create_engine(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr(one_hop, "create_engine", remember)
    again = SQLAlchemyOutbox(sqlite.engine, sqlite.tables, keep=timedelta(days=1))
    with explained(engines[0], "EXPLAIN QUERY PLAN") as plans:
        async with again.take(100, Policy()) as batch:
            assert batch is not None
            batch.sent([row.id for row in batch.rows[1:]])
            batch.failed([Failure(batch.rows[0].id, "Refused: no", 0.0)])
    steps = [str(row[3]) for plan in plans.of.values() for row in plan]
    into = [step for step in steps if " outbox " in f"{step} " or " blocking " in step or " following " in step]
    assert into
    assert all(step.startswith("SEARCH") for step in into), into


async def test_sqlite_polls_behind_a_failed_head(sqlite: Outbox, capsys: pytest.CaptureFixture[str]) -> None:
    await sqlite.add(message("head", key="hot"))
    async with sqlite.store.take(1, Policy()) as batch:
        assert batch is not None
        batch.failed([Failure(batch.rows[0].id, "Refused: no", 3600.0)])
    await copy_first(sqlite, WAITING, "state = 2, hold = 'hot'")
    await report(sqlite, capsys, f"behind {WAITING} rows that wait")
    await sqlite.add(message("other", key="cold"), message("one more", key="hot"))
    assert await sqlite.send() == ["other"]


async def test_sqlite_polls_with_many_rows_kept(sqlite: Outbox, capsys: pytest.CaptureFixture[str]) -> None:
    await sqlite.add(message("first"))
    assert await sqlite.send() == ["first"]
    await copy_first(sqlite, KEPT // 5, "state = 4")
    await report(sqlite, capsys, f"with {KEPT // 5} rows kept")
    await sqlite.add(message("1"), message("2"))
    assert await sqlite.send() == ["1", "2"]


async def copy_first(outbox: Outbox, number: int, change: str) -> None:
    names = ", ".join(f'"{column.name}"' for column in outbox.tables.rows.columns if column.name != "id")
    counting = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number})"
    await outbox.execute(f"INSERT INTO outbox ({names}) {counting} SELECT {names} FROM outbox, n WHERE outbox.id = 1")
    await outbox.execute(f"UPDATE outbox SET {change} WHERE id > 1")


# -- MariaDB -----------------------------------------------------------------------------------------------------------


async def test_mariadb_locks_and_changes_rows_by_their_keys_alone(mariadb: Outbox) -> None:
    """Read as a whole, which its planner prefers for a small table, it would wait for what another relay has locked."""
    await mariadb.add(*[message(str(number), key=f"k{number}") for number in range(20)])
    async with mariadb.store.take(5, Policy()) as batch:
        assert batch is not None
    with explained(mariadb.engine.sync_engine, "EXPLAIN") as plans:
        async with mariadb.store.take(5, Policy()) as batch:
            assert batch is not None
            batch.sent([row.id for row in batch.rows[1:]])
            batch.failed([Failure(batch.rows[0].id, "Refused: no", 0.0)])
    locking = [s for s in plans.of if s.startswith(("UPDATE", "DELETE")) or "FOR UPDATE" in s]
    assert len(locking) >= 5
    for statement in locking:
        for row in plans.of[statement]:
            kind, table = row[3], row[2]
            assert table == "wanted" or kind in {"range", "const", "eq_ref"}, (statement, row)
