"""What SQLAlchemyInbox promises beyond InboxStore: what it may be given, and what it says when that is wrong."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from pipeline_mediator.errors import ConfigurationError, SchemaError
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox, inbox_table
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

TABLE = inbox_table(MetaData())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncGenerator[list[AsyncEngine]]:
    """Those of two tenants."""
    made = [
        prepare_sqlite(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / name}")) for name in ("acme", "umbrella")
    ]
    for engine in made:
        async with engine.begin() as connection:
            await connection.run_sync(TABLE.metadata.create_all)
    yield made
    for engine in made:
        await engine.dispose()


async def remembered(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        found: int = (await connection.execute(select(func.count()).select_from(TABLE))).scalar_one()
    return found


async def test_without_an_engine_it_cleans_what_it_has_recorded_in(engines: list[AsyncEngine]) -> None:
    """Each tenant has a database, and one inbox serves them all."""
    inbox = SQLAlchemyInbox(TABLE, retention=timedelta(seconds=60))
    acme, umbrella = engines
    async with async_sessionmaker(acme).begin() as session:
        assert await inbox.record(session, "warehouse", "shop", "1")
    async with umbrella.begin() as connection:
        assert await inbox.record(connection, "warehouse", "shop", "1")
    for engine in engines:
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE inbox SET handled_at = '2000-01-01 00:00:00.000000'"))

    assert await inbox.clean(100) == 2
    assert [await remembered(engine) for engine in engines] == [0, 0]


async def test_it_forgets_no_more_than_told(engines: list[AsyncEngine]) -> None:
    inbox = SQLAlchemyInbox(TABLE, engines[0])
    async with engines[0].begin() as connection:
        for number in range(5):
            await inbox.record(connection, "warehouse", "shop", str(number))
        await connection.execute(text("UPDATE inbox SET handled_at = '2000-01-01 00:00:00.000000'"))
    assert await inbox.clean(3) == 3
    assert await remembered(engines[0]) == 2


async def test_without_an_engine_nothing_can_be_validated() -> None:
    with pytest.raises(ConfigurationError, match="without an engine"):
        await SQLAlchemyInbox(TABLE).validate_schema()


async def test_without_the_table_it_says_so(tmp_path: Path) -> None:
    engine = prepare_sqlite(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'empty'}"))
    try:
        async with engine.begin() as connection:
            with pytest.raises(SchemaError, match="inbox"):
                await SQLAlchemyInbox(TABLE).record(connection, "warehouse", "shop", "1")
        with pytest.raises(SchemaError, match="inbox"):
            await SQLAlchemyInbox(TABLE, engine).validate_schema()
    finally:
        await engine.dispose()


@pytest.mark.parametrize("resource", [None, object(), "session"])
async def test_what_is_no_session_and_no_connection_is_refused(resource: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"sessions\.begin or engine\.begin"):
        await SQLAlchemyInbox(TABLE).record(resource, "warehouse", "shop", "1")


def test_it_has_to_remember_for_a_while() -> None:
    with pytest.raises(ConfigurationError, match="nothing would be remembered"):
        SQLAlchemyInbox(TABLE, retention=timedelta(0))
