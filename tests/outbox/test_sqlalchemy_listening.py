"""A relay hears of commits of other processes by PostgreSQL's LISTEN, and goes on without it."""

# ruff: noqa: ASYNC110  # what another process does can only be polled

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy import MetaData

from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, listening, outbox_tables
from pipeline_mediator.outbox.sqlalchemy.listening import channel_of
from tests.outbox.sqlalchemy_outboxes import Outbox, message, opened
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["asyncpg", "psycopg"])
async def outbox(request: pytest.FixtureRequest, postgres_database: str) -> AsyncGenerator[Outbox]:
    async with opened(postgres_database.replace("+asyncpg", f"+{request.param}"), notify=True) as outbox:
        yield outbox


class Bell:
    """How often it was rung."""

    def __init__(self) -> None:
        self.rung = 0

    def __call__(self) -> None:
        self.rung += 1

    async def wait_for(self, times: int) -> None:
        await until(lambda: self.rung >= times)


async def until(happened: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not happened():
            await anyio.sleep(0.005)


LISTENERS = "FROM pg_stat_activity WHERE query LIKE 'LISTEN %' AND datname = current_database()"


async def test_commits_are_heard_and_rolled_back_messages_are_not(outbox: Outbox) -> None:
    bell = Bell()
    outbox.store.on_commit(bell)
    async with opened(outbox.engine.url.render_as_string(), notify=True) as other, outbox.store.listen():
        async with other.engine.connect() as connection:
            await other.store.add(connection, [message("1")])
            await connection.rollback()
        await other.add(message("2"), message("3"))
        await bell.wait_for(1)
        await other.add(message("4"))
        await bell.wait_for(2)
    assert bell.rung == 2
    assert await outbox.execute(f"SELECT count(*) {LISTENERS}") == 0


async def test_outboxes_do_not_hear_each_other(outbox: Outbox) -> None:
    bell = Bell()
    outbox.store.on_commit(bell)
    url = outbox.engine.url.render_as_string()
    async with opened(url, name="mails", notify=True) as mails, outbox.store.listen():
        await mails.add(message("1"))
        await outbox.add(message("2"))
        await bell.wait_for(1)
    assert bell.rung == 1


async def test_listening_takes_nothing_from_the_pool(outbox: Outbox) -> None:
    async with outbox.store.listen():
        assert outbox.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a queue's
        assert await outbox.execute(f"SELECT count(*) {LISTENERS}") == 1


async def test_connection_that_was_cut_is_made_again_and_what_was_missed_is_looked_for(
    outbox: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "pipeline_mediator")
    monkeypatch.setattr(listening, "_PAUSES", (0.01,))
    bell = Bell()
    outbox.store.on_commit(bell)
    async with outbox.store.listen():
        await outbox.execute(f"SELECT count(pg_terminate_backend(pid)) {LISTENERS}")
        await bell.wait_for(1)
        await outbox.add(message("1"))
        await bell.wait_for(2)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline_mediator")]
    assert ["does not hear" in it for it in said] == [True, False]
    assert "hears of commits of other processes again" in said[1]


async def test_server_that_is_not_there_yet_keeps_nobody_waiting(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_PAUSES", (0.01,))
    bell = Bell()
    async with opened(own_postgres.url.replace("postgresql:", "postgresql+asyncpg:"), notify=True) as outbox:
        outbox.store.on_commit(bell)
        own_postgres.kill()
        await outbox.engine.dispose()
        with anyio.fail_after(30):
            async with outbox.store.listen():
                assert bell.rung == 0
                own_postgres.start()
                await bell.wait_for(1)
    # However often it was tried.
    assert [record.levelname for record in caplog.records if "does not hear" in record.getMessage()] == ["WARNING"]


async def test_where_nobody_can_tell_it_does_nothing(tmp_path: Path, mariadb_database: str) -> None:
    for url in (f"sqlite+aiosqlite:///{tmp_path}/outbox.db", mariadb_database):
        async with opened(url, notify=True) as outbox, outbox.store.listen():
            await outbox.add(message("1"))
            assert await outbox.send() == ["1"]


def test_channel_of_a_long_name_is_short_enough_and_its_own() -> None:
    one, two = channel_of("schema." + "x" * 60), channel_of("schema." + "x" * 61)
    assert max(len(one), len(two)) < 64
    assert one != two
    assert channel_of("outbox") == "outbox:outbox"


def test_who_no_longer_wants_to_be_woken_is_not() -> None:
    store = SQLAlchemyOutbox(None, outbox_tables(MetaData()))
    first, second = Bell(), Bell()
    stop = store.on_commit(first)
    store.on_commit(second)
    store.committed()
    stop()
    stop()
    store.committed()
    assert (first.rung, second.rung) == (1, 2)
