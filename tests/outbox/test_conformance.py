"""SQLAlchemyOutbox keeps the promises of OutboxStore on every database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.testing.outbox_suite import OutboxFeatures, OutboxStoreSuite
from tests.outbox.databases import Database, mariadb, postgresql, sqlite

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class TestOnSQLite(OutboxStoreSuite):
    features = OutboxFeatures(several_relays=False, several_writers=False)

    @pytest.fixture
    async def database(self, tmp_path: Path) -> AsyncGenerator[Database]:
        async with sqlite(tmp_path / "outbox.db") as database:
            yield database


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
