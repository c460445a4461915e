"""The servers that are measured with: of the benchmark's own, or those that the environment names."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from tests.servers import MissingServerError, PostgresServer, RedisServer

__all__ = ["Address", "Servers", "address_of", "servers", "vacuum"]


@dataclass(frozen=True, slots=True)
class Address:
    """One database, as clients of either kind want to be told."""

    name: str
    sqlalchemy: str
    driver: str

    @property
    def postgresql(self) -> bool:
        return self.name == "PostgreSQL"


def address_of(url: str) -> Address:
    """From postgresql://... or sqlite:///path."""
    if url.startswith("postgresql://"):
        return Address("PostgreSQL", url.replace("postgresql://", "postgresql+asyncpg://", 1), url)
    return Address("SQLite", url.replace("sqlite://", "sqlite+aiosqlite://", 1), url.removeprefix("sqlite:///"))


@dataclass(frozen=True, slots=True)
class Servers:
    """Where everything is."""

    redis: str
    databases: tuple[str, ...]
    folder: Path
    client: Any
    """Of that Redis; blocking. Any: redis-py's annotations are partial."""
    left_out: tuple[str, ...]

    @property
    def versions(self) -> dict[str, str]:
        """Of the servers."""
        found = {"Redis": str(self.client.info("server")["redis_version"]), "SQLite": sqlite3.sqlite_version}
        for url in self.databases:
            if address_of(url).postgresql:
                found["PostgreSQL"] = str(asyncio.run(_ask(url, "SHOW server_version"))).partition(" ")[0]
        return found

    def further(self, url: str, name: str) -> str:
        """An empty database of its own, beside `url`."""
        if url.startswith("sqlite"):
            return f"sqlite:///{self.folder / name}.db"
        asyncio.run(_create(url, name))
        return urlsplit(url)._replace(path=f"/{name}").geturl()


@contextmanager
def servers() -> Generator[Servers]:
    """BENCHMARK_REDIS_URL and BENCHMARK_POSTGRES_URL, whose stream `orders` and tables are deleted; else our own.

    PostgreSQL of our own waits for the disk at each commit, and has no other settings than the usual ones. Raises
    `MissingServerError` without Redis; without PostgreSQL its rows are left out.
    """
    with ExitStack() as stack:
        at = os.environ.get("BENCHMARK_REDIS_URL") or stack.enter_context(RedisServer()).url
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-"))
        databases = [f"sqlite:///{Path(folder) / 'outbox.db'}"]
        left_out: list[str] = []
        try:
            found = os.environ.get("BENCHMARK_POSTGRES_URL") or stack.enter_context(_postgres()).url
            databases.insert(0, found)
        except MissingServerError as error:
            left_out.append(f"PostgreSQL is left out: {error}")
        blocking: Any = redis.Redis
        client = blocking.from_url(at, protocol=2)
        stack.callback(client.close)
        yield Servers(at, tuple(databases), Path(folder), client, tuple(left_out))


def _postgres() -> PostgresServer:
    return PostgresServer(fsync="on", full_page_writes="on")


def vacuum(url: str) -> None:
    """What the database would do by itself some time."""
    address = address_of(url)
    if address.postgresql:
        asyncio.run(_ask(url, "VACUUM ANALYZE"))
        return
    with closing(sqlite3.connect(address.driver)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _create(url: str, name: str) -> None:
    await _ask(url, f"DROP DATABASE IF EXISTS {name}")
    await _ask(url, f"CREATE DATABASE {name} TEMPLATE template0")


async def _ask(url: str, statement: str) -> Any:
    asyncpg: Any = import_module("asyncpg")
    connection = await asyncpg.connect(url)
    try:
        found: Any = await connection.fetchval(statement)
        return found
    finally:
        await connection.close()
