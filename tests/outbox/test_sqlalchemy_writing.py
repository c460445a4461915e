"""What storing messages costs the application's transaction, and what it is told when that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker

from pipeline_mediator.errors import ConfigurationError, OutboxError, OutboxFullError, SchemaError
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, writing
from tests.outbox.sqlalchemy_outboxes import Outbox, message, opened, recorded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["aiosqlite", "asyncpg", "psycopg", "asyncmy"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "aiosqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/outbox.db"
    if request.param == "asyncmy":
        mariadb: str = request.getfixturevalue("mariadb_database")
        return mariadb
    postgres: str = request.getfixturevalue("postgres_database")
    return postgres.replace("+asyncpg", f"+{request.param}")


@pytest.fixture
async def outbox(url: str) -> AsyncGenerator[Outbox]:
    async with opened(url) as outbox:
        yield outbox


# -- one executemany ---------------------------------------------------------------------------------------------------


async def test_messages_of_a_transaction_are_one_executemany(outbox: Outbox) -> None:
    messages = [message(str(number)) for number in range(500)]
    async with outbox.engine.begin() as connection:
        with recorded(outbox.engine) as sent:
            await outbox.store.add(connection, messages)
    assert sent.executemany == [500]
    assert len(sent.statements) == 1


async def test_one_message_is_one_statement(outbox: Outbox) -> None:
    async with async_sessionmaker(outbox.engine).begin() as session:
        with recorded(outbox.engine) as sent:
            await outbox.store.add(session, [message("1")])
    assert len(sent.statements) == 1


async def test_no_message_is_no_statement(outbox: Outbox) -> None:
    async with outbox.engine.begin() as connection:
        with recorded(outbox.engine) as sent:
            await outbox.store.add(connection, [])
    assert sent.statements == []


async def test_ids_rise_in_the_order_given_by_writers_at_the_same_time(outbox: Outbox) -> None:
    for start in range(0, 1000, 250):
        await outbox.add(*[message(f"{number:04}") for number in range(start, start + 250)])
    async with outbox.engine.connect() as connection:
        found = (await connection.execute(outbox.tables.rows.select().order_by(outbox.tables.rows.c.id))).all()
    assert [row.message_id for row in found] == [f"{number:04}" for number in range(1000)]


async def test_notification_is_one_statement_more_on_postgresql_alone(outbox: Outbox) -> None:
    store = SQLAlchemyOutbox(outbox.engine, outbox.tables, notify=True)
    async with outbox.engine.begin() as connection:
        with recorded(outbox.engine) as sent:
            await store.add(connection, [message(str(number)) for number in range(10)])
    notifications = [statement for statement in sent.statements if "pg_notify" in statement]
    assert len(notifications) == (outbox.engine.dialect.name == "postgresql")
    assert len(sent.statements) == 1 + len(notifications)


# -- a limit -----------------------------------------------------------------------------------------------------------


async def test_what_waits_is_counted_now_and_then_and_before_anything_is_refused(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_COUNT_SECONDS", 3600.0)
    store = SQLAlchemyOutbox(outbox.engine, outbox.tables, max_pending=50)
    with recorded(outbox.engine) as sent:
        for number in range(5):
            async with outbox.engine.begin() as connection:
                await store.add(connection, [message(f"{number} {it}") for it in range(10)])
    assert [statement.startswith("SELECT count") for statement in sent.statements] == [True] + [False] * 5
    async with outbox.engine.begin() as connection:
        with pytest.raises(OutboxFullError, match="50 messages wait in the outbox, 1 more would exceed max_pending=50"):
            await store.add(connection, [message("too many")])
    # What the relay has sent meanwhile is seen at once.
    while await outbox.send():
        pass
    async with outbox.engine.begin() as connection:
        await store.add(connection, [message("there is room again")])


async def test_what_waits_behind_another_counts_and_what_is_dead_does_not(outbox: Outbox) -> None:
    await outbox.add(*[message(str(number), key="k") for number in range(4)])
    await outbox.execute("UPDATE outbox SET state = 2 WHERE message_id IN ('1', '2')")
    await outbox.execute("UPDATE outbox SET state = 3 WHERE message_id = '3'")
    store = SQLAlchemyOutbox(outbox.engine, outbox.tables, max_pending=3)
    async with outbox.engine.begin() as connection:
        with pytest.raises(OutboxFullError) as failure:
            await store.add(connection, [message("4")])
    assert failure.value.pending == 3


# -- what cannot be stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["missing", "too old"])
async def test_table_that_will_not_do_is_a_schema_error(outbox: Outbox, table: str) -> None:
    if table == "missing":
        await outbox.execute("DROP TABLE outbox")
    else:
        await outbox.execute("ALTER TABLE outbox DROP COLUMN content_type")
    async with outbox.engine.connect() as connection:
        with pytest.raises(SchemaError) as failure:
            await outbox.store.add(connection, [message("1", body=b"secret")])
        await connection.rollback()
    assert failure.value.table == "outbox"
    assert "create_all" in str(failure.value)
    assert "secret" not in f"{failure.value} {failure.value.__cause__}"


async def test_errors_of_the_database_do_not_show_the_message(outbox: Outbox) -> None:
    await outbox.execute("CREATE UNIQUE INDEX only_once ON outbox (version)")
    with pytest.raises(DBAPIError) as failure:
        await outbox.add(message("1", body=b"secret"), message("2", body=b"secret"))
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize("column", ["message_id", "name", "destination", "content_type", "key"])
async def test_name_that_is_too_long_is_refused_by_its_name(outbox: Outbox, column: str) -> None:
    too_long = replace(message("1"), **{column: "x" * 256})  # type: ignore[arg-type]
    with pytest.raises(OutboxError, match=f"{column} of .* has 256 characters; the outbox keeps at most 255"):
        await outbox.add(too_long)
    assert await outbox.execute("SELECT count(*) FROM outbox") == 0


async def test_resource_of_another_library_is_refused(outbox: Outbox) -> None:
    with pytest.raises(ConfigurationError, match="AsyncSession or AsyncConnection, and the transaction's resource is"):
        await outbox.store.add(object(), [message("1")])
