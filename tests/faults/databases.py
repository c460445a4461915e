"""The databases that a run may be against: how to start one, and how to break it."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.servers import MariaDBServer, PostgresServer, RedisServer, Server

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KINDS", "Kind", "durable_redis", "execute"]


class Kind(NamedTuple):
    """One kind of database. Whatever it has acknowledged survives the SIGKILL of its processes."""

    server: type[Server] | None
    driver: str
    sessions: str = ""
    """Selects the ids of all sessions that are not ours."""
    end: str = ""
    """Ends the session {id}."""
    commit: bytes = b"COMMIT"

    def create(self) -> Server | None:
        """The server, not started yet."""
        if self.server is PostgresServer:
            # What is synced survives the machine as well. It is not tested here, and costs little.
            return PostgresServer(fsync="on", full_page_writes="on")
        return None if self.server is None else self.server()

    def url(self, server: Server | None, folder: Path, port: int | None = None) -> str:
        """As SQLAlchemy takes it; by another port if it is given."""
        if server is None:
            return f"{self.driver}:///{folder / 'database.sqlite'}"
        parts = urlsplit(server.url)
        netloc = parts.netloc if port is None else parts.netloc.replace(f":{parts.port}", f":{port}")
        return parts._replace(scheme=self.driver, netloc=netloc).geturl()

    def terminate(self, url: str) -> None:
        """Let the server end every session."""
        with contextlib.suppress(DBAPIError, OSError):
            for session in execute(url, self.sessions):
                # It may have ended meanwhile.
                with contextlib.suppress(DBAPIError, OSError):
                    execute(url, self.end.format(id=session))


KINDS = {
    "postgresql": Kind(
        PostgresServer,
        "postgresql+asyncpg",
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
        "SELECT pg_terminate_backend({id})",
    ),
    "mariadb": Kind(
        MariaDBServer,
        "mariadb+asyncmy",
        "SELECT id FROM information_schema.processlist WHERE user = 'root' AND id <> connection_id()",
        "KILL {id}",
    ),
    "sqlite": Kind(None, "sqlite+aiosqlite"),
}


def durable_redis() -> RedisServer:
    """A Redis that has on disk what it has answered. With `everysec` it may write behind its answer."""
    return RedisServer("--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")


def execute(url: str, statement: str) -> list[Any]:
    """Run one statement, and return the first column of what it selects."""

    async def run() -> list[Any]:
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            result = await connection.execute(text(statement))
            return list(result.scalars()) if result.returns_rows else []

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()
