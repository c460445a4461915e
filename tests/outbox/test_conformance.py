"""SQLAlchemyOutbox keeps the promises of OutboxStore on every database."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.testing.outbox_suite import OutboxFeatures, OutboxStoreSuite
from tests.outbox.databases import Database, mariadb, postgresql, sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# A connect that is cancelled leaves aiosqlite's connection to the garbage collector, at the latest here.
@pytest.mark.filterwarnings("ignore:.*was deleted before being closed:ResourceWarning")
class TestOnSQLite(OutboxStoreSuite):
    features = OutboxFeatures(several_relays=False, several_writers=False)

    @pytest.fixture
    async def database(self, tmp_path: Path) -> AsyncGenerator[Database]:
        async with sqlite(tmp_path / "outbox.db") as database:
            yield database

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def leave_nothing_to_collect(cls) -> Generator[None]:
        yield
        gc.collect()


class TestOnPostgreSQLByAsyncpg(OutboxStoreSuite):
    features = OutboxFeatures(hears_others=True)

    @pytest.fixture
    async def database(self, postgres_database: str) -> AsyncGenerator[Database]:
        async with postgresql(postgres_database) as database:
            yield database


class TestOnPostgreSQLByPsycopg(OutboxStoreSuite):
    features = OutboxFeatures(hears_others=True)

    @pytest.fixture
    async def database(self, postgres_database: str) -> AsyncGenerator[Database]:
        async with postgresql(postgres_database.replace("+asyncpg", "+psycopg"), "connection") as database:
            yield database


class TestOnMariaDB(OutboxStoreSuite):
    @pytest.fixture
    async def database(self, mariadb_database: str) -> AsyncGenerator[Database]:
        async with mariadb(mariadb_database, "connection") as database:
            yield database
