"""Relays as one writes them in an afternoon, honestly: for one database and one stream, and nothing that can fail.

They read a batch under a lock, add it to the stream by one pipeline, delete it, and commit. There are no keys, no
back-off, no dead letters, no traces; two of them on PostgreSQL do not keep any order.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import islice
from time import monotonic
from typing import Any, Final, Self

import redis.asyncio

from benchmarks.outbox.events import HandRow, hand_rows

__all__ = ["PostgresByHand", "SQLiteByHand"]

# Any: it has no annotations.
_asyncpg: Any = import_module("asyncpg")

_POLL_SECONDS: Final = 1.0
_FILL: Final = 10_000


class _ByHand:
    """The loop, and waking it."""

    def __init__(self, redis_url: str, limit: int) -> None:
        # Any: redis-py's annotations are partial. The fastest settings: no timer for every answer.
        client_class: Any = redis.asyncio.Redis
        self._redis: Any = client_class.from_url(redis_url, protocol=2, socket_timeout=None)
        self._limit = limit
        self._woken = asyncio.Event()

    async def relay(self) -> None:
        """Until cancelled."""
        while True:
            self._woken.clear()
            while await self.relay_batch():
                pass
            try:
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def relay_batch(self) -> int:
        raise NotImplementedError

    def wake(self) -> None:
        self._woken.set()

    async def _add(self, rows: Sequence[Any]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for identifier, destination, headers, body in rows:
            pipeline.xadd(destination, {**json.loads(headers), "sequence": f"{identifier:020}", "data": body})
        await pipeline.execute()


class PostgresByHand(_ByHand):
    """asyncpg; rows are locked while they are published, and skipped by others. Deleted, or marked if `keep`."""

    TABLE: Final = """
        CREATE TABLE by_hand (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            destination text NOT NULL,
            headers text NOT NULL,
            body bytea NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            sent_at timestamptz
        );
        CREATE INDEX ON by_hand (id) WHERE sent_at IS NULL;
    """
    _TAKE: Final = """
        SELECT id, destination, headers, body FROM by_hand WHERE sent_at IS NULL
        ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
    """
    _DELETE: Final = "DELETE FROM by_hand WHERE id = ANY($1)"
    _MARK: Final = "UPDATE by_hand SET sent_at = clock_timestamp() WHERE id = ANY($1)"
    _INSERT: Final = "INSERT INTO by_hand (destination, headers, body) VALUES ($1, $2, $3)"

    def __init__(self, url: str, redis_url: str, limit: int = 100, *, keep: bool = False) -> None:
        super().__init__(redis_url, limit)
        self._url = url
        self._settle = self._MARK if keep else self._DELETE
        self._relaying: Any = None
        self._writing: Any = None

    async def __aenter__(self) -> Self:
        self._relaying = await _asyncpg.connect(self._url)
        self._writing = await _asyncpg.connect(self._url)
        await self._redis.ping()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._relaying.close()
        await self._writing.close()
        await self._redis.aclose()

    async def relay_batch(self) -> int:
        connection = self._relaying
        async with connection.transaction():
            rows = await connection.fetch(self._TAKE, self._limit)
            if rows:
                await self._add(rows)
                await connection.execute(self._settle, [row[0] for row in rows])
        return len(rows)

    async def listen(self) -> None:
        def rung(*_: object) -> None:
            self.wake()

        await self._writing.add_listener("by_hand", rung)

    async def write(self, row: HandRow, *, notify: bool) -> float:
        """When the commit was asked for."""
        async with self._writing.transaction():
            await self._writing.execute(self._INSERT, row.destination, row.headers, row.body)
            if notify:
                await self._writing.execute("SELECT pg_notify('by_hand', '')")
            return monotonic()

    async def empty(self) -> None:
        await self._writing.execute(f"DROP TABLE IF EXISTS by_hand; {self.TABLE}")

    async def fill(self, count: int) -> None:
        for some in _batches(hand_rows(count)):
            records = [(row.destination, row.headers, row.body) for row in some]
            await self._writing.copy_records_to_table(
                "by_hand", records=records, columns=["destination", "headers", "body"]
            )

    async def mark(self) -> None:
        await self._writing.execute("UPDATE by_hand SET sent_at = clock_timestamp()")


class SQLiteByHand(_ByHand):
    """sqlite3 in a thread, a whole transaction for each hop; there is one relay, so nothing is locked meanwhile."""

    TABLE: Final = """
        CREATE TABLE by_hand (
            id integer PRIMARY KEY AUTOINCREMENT,
            destination text NOT NULL,
            headers text NOT NULL,
            body blob NOT NULL,
            created_at text NOT NULL DEFAULT CURRENT_TIMESTAMP,
            sent_at text
        );
        CREATE INDEX by_hand_pending ON by_hand (id) WHERE sent_at IS NULL;
    """
    _TAKE: Final = "SELECT id, destination, headers, body FROM by_hand WHERE sent_at IS NULL ORDER BY id LIMIT ?"
    _DELETE: Final = "DELETE FROM by_hand WHERE id BETWEEN ? AND ?"
    _MARK: Final = "UPDATE by_hand SET sent_at = CURRENT_TIMESTAMP WHERE id BETWEEN ? AND ?"
    _INSERT: Final = "INSERT INTO by_hand (destination, headers, body) VALUES (?, ?, ?)"

    def __init__(self, path: str, redis_url: str, limit: int = 100, *, keep: bool = False) -> None:
        super().__init__(redis_url, limit)
        self._settle = self._MARK if keep else self._DELETE
        self._relaying = _open(path)
        self._writing = _open(path)
        self._threads = ThreadPoolExecutor(2)

    async def __aenter__(self) -> Self:
        await self._redis.ping()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._relaying.close()
        self._writing.close()
        await self._redis.aclose()

    async def relay_batch(self) -> int:
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._threads, self._take)
        if rows:
            await self._add(rows)
            await loop.run_in_executor(self._threads, self._settle_between, rows[0][0], rows[-1][0])
        return len(rows)

    def _take(self) -> list[tuple[Any, ...]]:
        return self._relaying.execute(self._TAKE, (self._limit,)).fetchall()

    def _settle_between(self, first: int, last: int) -> None:
        self._relaying.execute(self._settle, (first, last))

    async def listen(self) -> None:
        """Nobody tells it; the process that writes wakes it."""

    async def write(self, row: HandRow, *, notify: bool) -> float:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._insert, row)

    def _insert(self, row: HandRow) -> float:
        self._writing.execute("BEGIN IMMEDIATE")
        self._writing.execute(self._INSERT, (row.destination, row.headers, row.body))
        asked = monotonic()
        self._writing.execute("COMMIT")
        return asked

    async def empty(self) -> None:
        self._writing.executescript(f"DROP TABLE IF EXISTS by_hand; {self.TABLE}")

    async def fill(self, count: int) -> None:
        for some in _batches(hand_rows(count)):
            self._writing.execute("BEGIN IMMEDIATE")
            self._writing.executemany(self._INSERT, [(row.destination, row.headers, row.body) for row in some])
            self._writing.execute("COMMIT")

    async def mark(self) -> None:
        self._writing.execute("UPDATE by_hand SET sent_at = CURRENT_TIMESTAMP")


def _open(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA busy_timeout = 5000")
    connection.execute("PRAGMA journal_mode = WAL")
    return connection


def _batches(rows: Iterable[HandRow]) -> Iterator[list[HandRow]]:
    iterator = iter(rows)
    while some := list(islice(iterator, _FILL)):
        yield some
