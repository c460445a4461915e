"""A real database for the tests that ask for one: an SQLite file, and PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.middlewares.databases import Database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the test's own."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/test.db"
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    """The database with its table; in the end nothing may be checked out or in a transaction."""
    database = Database(database_url)
    await database.create()
    yield database
    await database.wait_until_left()
    await database.close()
