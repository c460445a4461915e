"""A scene on each kind of database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.scene import Scene, scene_on
from tests.servers import RedisServer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'database.sqlite'}"
    url: str = request.getfixturevalue({"postgresql": "postgres_database"}.get(request.param, "mariadb_database"))
    return url


@pytest.fixture
async def scene(database: str, own_redis: RedisServer) -> AsyncIterator[Scene]:
    async with scene_on(database, own_redis.url) as scene:
        await scene.create("a", "b", "c")
        yield scene
