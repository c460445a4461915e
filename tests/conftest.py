"""Fixtures for the whole suite: both event loops, and real servers."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import pytest
from hypothesis import settings
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.servers import MariaDBServer, MissingServerError, NatsServer, PostgresServer, RedisServer, Server

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tests.servers import Running

# How long an example takes says more about the machine than about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# In a background job of a shell it is ignored from the start, and so it would be by every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

S = TypeVar("S", bound=Server)

_database_numbers = count(1)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The core runs on both; a module whose client knows only asyncio has a fixture of this name that says so."""
    backend: str = request.param
    return backend


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Running]:
    """A Redis for all tests that do not break it: the one at TEST_REDIS_URL, else one of our own."""
    with _running(RedisServer, "TEST_REDIS_URL") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Running]:
    """A PostgreSQL for all tests that do not break it: the one at TEST_POSTGRES_URL, else one of our own."""
    with _running(PostgresServer, "TEST_POSTGRES_URL") as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Running]:
    """A MariaDB for all tests that do not break it: the one at TEST_MARIADB_URL, else one of our own."""
    with _running(MariaDBServer, "TEST_MARIADB_URL") as server:
        yield server


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Running]:
    """A NATS with JetStream for all tests that do not break it: the one at TEST_NATS_URL, else one of our own."""
    with _running(NatsServer, "TEST_NATS_URL") as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may stop, kill and freeze."""
    with _owned(RedisServer) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop, kill and freeze."""
    with _owned(PostgresServer) as server:
        yield server


@pytest.fixture
def own_mariadb() -> Iterator[MariaDBServer]:
    """A MariaDB that the test may stop, kill and freeze."""
    with _owned(MariaDBServer) as server:
        yield server


@pytest.fixture
def own_nats() -> Iterator[NatsServer]:
    """A NATS that the test may stop, kill and freeze."""
    with _owned(NatsServer) as server:
        yield server


@pytest.fixture
def postgres_database(postgres_server: Running) -> Iterator[str]:
    """The URL of an empty database of the test's own, for SQLAlchemy with asyncpg."""
    name = f"test_{os.getpid()}_{next(_database_numbers)}"
    admin = urlsplit(postgres_server.url)._replace(scheme="postgresql+asyncpg")
    _execute(admin.geturl(), f"CREATE DATABASE {name} TEMPLATE template0")
    yield admin._replace(path=f"/{name}").geturl()
    _execute(admin.geturl(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def mariadb_database(mariadb_server: Running) -> Iterator[str]:
    """The URL of an empty database of the test's own, for SQLAlchemy with asyncmy."""
    name = f"test_{os.getpid()}_{next(_database_numbers)}"
    admin = urlsplit(mariadb_server.url)._replace(scheme="mariadb+asyncmy")
    _execute(admin.geturl(), f"CREATE DATABASE {name}")
    yield admin._replace(path=f"/{name}").geturl()
    # It would wait for transactions that a test left open, for ever.
    left = _execute(admin.geturl(), f"SELECT id FROM information_schema.processlist WHERE db = '{name}'")
    for connection in left:
        with suppress(OperationalError):  # gone meanwhile
            _execute(admin.geturl(), f"KILL {connection}")
    _execute(admin.geturl(), f"DROP DATABASE {name}")


@dataclass(frozen=True)
class _Elsewhere:
    """A server that was running before the tests."""

    url: str


@contextmanager
def _running(kind: type[Server], variable: str) -> Generator[Running]:
    if url := os.environ.get(variable):
        yield _Elsewhere(url)
        return
    with _owned(kind, f"or set {variable}") as server:
        yield server


@contextmanager
def _owned(kind: type[S], otherwise: str = "") -> Generator[S]:
    try:
        server = kind()
    except MissingServerError as error:
        reason = f"{error} {otherwise}".strip()
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with server:
        yield server


def _execute(url: str, statement: str) -> list[object]:
    async def execute() -> list[object]:
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            result = await connection.execute(text(statement))
            return list(result.scalars()) if result.returns_rows else []

    # In a thread of its own: in this one, the test's event loop may be about to run.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, execute()).result()
