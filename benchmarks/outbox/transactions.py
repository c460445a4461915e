"""What stored events add to a transaction that writes one row of business, beside an executemany written by hand.

Prints the microseconds of a transaction, round by round, and how many statements wrote to the outbox in one with ten
events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any, Final

import msgspec
from sqlalchemy import Column, Integer, LargeBinary, Table, Text, event
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.outbox.databases import address_of
from benchmarks.outbox.events import STREAM, order
from benchmarks.outbox.ours import METADATA, engine_of, ours
from pipeline_mediator import Command, Context, Mediator, Pipeline, RequestMap
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.middlewares import TransactionMiddleware

_BUSINESS: Final = Table("business", METADATA, Column("id", Integer, primary_key=True), Column("note", Text))
_BY_HAND: Final = Table(
    "stored_by_hand",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("destination", Text),
    Column("headers", Text),
    Column("body", LargeBinary),
)
_HEADERS: Final = {
    "specversion": "1.0",
    "source": "shop",
    "type": "orders.placed",
    "dataversion": "1",
    "time": "2026-11-22T12:00:00+00:00",
    "correlationid": "0192f7a0-0000-7000-8000-000000000001",
    "datacontenttype": "application/json",
}

Run = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class PlaceOrders(Command[None]):
    events: int


class PlaceOrdersHandler:
    """Writes a row, and emits."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def handle(self, command: PlaceOrders, context: Context) -> None:
        await self._connection.execute(_BUSINESS.insert(), {"note": "placed"})
        for number in range(command.events):
            context.emit(order(number))


async def measure(database: str, redis_url: str, rounds: int, loops: int) -> dict[str, Any]:
    address = address_of(database)
    requests = RequestMap().bind(PlaceOrders, PlaceOrdersHandler)
    engine = engine_of(address.sqlalchemy)
    plain = Mediator(
        RequestMap().bind(PlaceOrders, PlaceOrdersHandler),
        PlainContainer(),
        middlewares=Pipeline(TransactionMiddleware(engine.begin)),
    )
    async with ours(address.sqlalchemy, redis_url, requests=requests) as own:
        await own.empty()

        def by_hand(events: int) -> Run:
            async def run() -> None:
                async with engine.begin() as connection:
                    await connection.execute(_BUSINESS.insert(), {"note": "placed"})
                    if events:
                        await connection.execute(_BY_HAND.insert(), [_row(number) for number in range(events)])

            return run

        def sent(mediator: Mediator, events: int) -> Run:
            return lambda: mediator.send(PlaceOrders(events))

        variants = {f"by hand, {events}": by_hand(events) for events in (0, 1, 10)}
        variants |= {"ours, without outbox": sent(plain, 0)}
        variants |= {f"ours, {events}": sent(own.mediator, events) for events in (0, 1, 10)}
        took: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, run in list(variants.items())[:: 1 if number % 2 else -1]:
                each = await _times(run, loops)
                if number:  # the first is to get warm
                    took[name].append(each)
        statements = await _statements(own.engine, variants["ours, 10"])
    await engine.dispose()
    return {"took": took, "statements": statements}


async def _times(run: Run, loops: int) -> float:
    """The median, in microseconds: whatever else the machine does meanwhile."""
    times: list[float] = []
    for _ in range(loops):
        began = perf_counter()
        await run()
        times.append((perf_counter() - began) * 1e6)
    return median(times)


async def _statements(engine: Any, run: Run) -> int:
    """How many statements write to the outbox in one transaction."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        found.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    await run()
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    return sum(1 for statement in found if statement.lower().startswith("insert into ours"))


def _row(number: int) -> dict[str, Any]:
    placed = order(number)
    headers = {**_HEADERS, "id": f"0192f7a0-0000-7000-8000-{number:012}", "partitionkey": str(placed.order_id)}
    return {"destination": STREAM, "headers": json.dumps(headers), "body": msgspec.json.encode(asdict(placed))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database")
    parser.add_argument("redis")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.database, options.redis, options.rounds, options.loops))))


if __name__ == "__main__":
    main()
