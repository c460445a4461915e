"""What a look for work costs while many rows of one key wait behind the first of them, which failed.

Beside it the statement that one would write by hand: the earliest rows that nothing of their key stands before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from time import perf_counter
from typing import Any, Final

from sqlalchemy import text

from benchmarks.outbox.databases import address_of, vacuum
from benchmarks.outbox.measuring import percentiles
from benchmarks.outbox.ours import ours
from benchmarks.rounds import BenchmarkError
from pipeline_mediator.outbox.protocol import Failure, Policy

_BATCH: Final = 1000
_AN_HOUR: Final = 3600.0
_MOST_BATCHES: Final = 10_000

_CREATE: Final = text("CREATE TABLE heads (id bigint PRIMARY KEY, key text NOT NULL, available_at bigint NOT NULL)")
_INDEX: Final = text("CREATE INDEX heads_key ON heads (key, id)")
_INSERT: Final = {
    "postgresql": text("INSERT INTO heads SELECT n, 'k', (n = 1)::int FROM generate_series(1, :count) AS n"),
    "sqlite": text(
        "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :count)"
        " INSERT INTO heads SELECT n, 'k', n = 1 FROM s"
    ),
}
_NOT_EXISTS: Final = text(
    "SELECT id FROM heads AS o WHERE available_at <= 0 AND NOT EXISTS"
    " (SELECT 1 FROM heads AS h WHERE h.key = o.key AND h.id < o.id) ORDER BY id LIMIT 1000"
)


async def measure(database: str, redis_url: str, count: int, polls: int) -> dict[str, Any]:
    async with ours(address_of(database).sqlalchemy, redis_url) as own:
        await own.empty()
        await own.fill(count, keys=1)
        await asyncio.to_thread(vacuum, database)
        policy = Policy()
        async with own.store.take(1, policy) as batch:
            if batch is None:
                raise BenchmarkError("nothing was taken of a full table")
            batch.failed([Failure(batch.rows[0].id, "refused", _AN_HOUR)])
        began = perf_counter()
        for _ in range(_MOST_BATCHES):  # what stands behind it is set aside
            async with own.store.take(_BATCH, policy) as batch:
                if batch is None:
                    break
                if batch.rows:
                    raise BenchmarkError("a row behind the head was taken")
        aside = perf_counter() - began
        took: list[float] = []
        for _ in range(polls):
            began = perf_counter()
            async with own.store.take(_BATCH, policy) as batch:
                if batch is not None:
                    raise BenchmarkError("there was something to take")
            took.append((perf_counter() - began) * 1000)
        by_hand = await _by_hand(own.engine, count)
        health = await own.store.health()
    p50, p99 = percentiles(took)
    return {"p50": p50, "p99": p99, "aside_s": aside, "by_hand": by_hand, "waiting": health.waiting}


async def _by_hand(engine: Any, count: int) -> float:
    """Milliseconds, once: it may take long."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS heads"))
        await connection.execute(_CREATE)
        await connection.execute(_INDEX)
        await connection.execute(_INSERT[engine.dialect.name], {"count": count})
    async with engine.begin() as connection:
        await connection.execute(text("ANALYZE heads"))
        if engine.dialect.name == "postgresql":
            # Of a single key its planner makes a join of all with all, which ends some day.
            await connection.execute(text("SET LOCAL enable_hashjoin = off"))
            await connection.execute(text("SET LOCAL enable_mergejoin = off"))
        began = perf_counter()
        rows = (await connection.execute(_NOT_EXISTS)).all()
        took = (perf_counter() - began) * 1000
    if rows:
        raise BenchmarkError("the statement found rows behind the head")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database")
    parser.add_argument("redis")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--polls", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.database, options.redis, options.count, options.polls))))


if __name__ == "__main__":
    main()
