"""Gathers, when a run is over, what the ledger, the database and the streams have to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.faults.application import EFFECTS, FACTS, OPERATIONS, OUTBOX, STREAMS, codec, engine_of
from tests.faults.consumer import decoded
from tests.faults.ledger import entries, files
from tests.faults.verdict import Batch, Copy, Fact, Outcome, Record, Send
from tests.redis_view import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from pipeline_mediator.codec import Decoded

__all__ = ["copies_in", "gather", "is_drained"]

_PAGE = 1000


async def gather(database: str, redis: str, ledger: Path, troubles: Sequence[str]) -> Record:
    """Everything that there is to judge by."""
    engine = engine_of(database)
    client: Any = Client.from_url(redis)
    store = SQLAlchemyOutbox(engine, OUTBOX)
    try:
        async with engine.begin() as connection:
            operations = (await connection.execute(select(OPERATIONS.c.operation))).scalars()
            facts = await connection.execute(select(FACTS))
            effects = (await connection.execute(select(EFFECTS.c.message_id))).scalars()
        health = await store.health()
        dead = await store.dead_letters(_PAGE)
        return Record(
            sends=_sends(ledger),
            operations=frozenset(operations),
            facts=[Fact(row.token, row.operation, row.account, row.place) for row in facts],
            copies=[copy async for copy in copies_in(client)],
            effects=list(effects),
            batches=_batches(ledger),
            dead=[f"{one.message.message_id}: {one.error}" for one in dead],
            left=[f"{health.pending} pending, {health.waiting} waiting"] if health.pending or health.waiting else [],
            troubles=troubles,
        )
    finally:
        await client.aclose()
        await engine.dispose()


def _sends(ledger: Path) -> list[Send]:
    tokens: dict[str, tuple[str, ...]] = {}
    outcomes: dict[str, Outcome] = {}
    for entry in (entry for file in files(ledger, "writer") for entry in entries(file)):
        if "tokens" in entry:
            tokens[entry["send"]] = tuple(entry["tokens"])
        else:
            outcomes[entry["send"]] = entry["outcome"]
    return [Send(operation, known, outcomes.get(operation, "unknown")) for operation, known in tokens.items()]


def _batches(ledger: Path) -> list[Batch]:
    """A relay's numbers are its own, so what two of them wrote must not be mixed."""
    batches: list[Batch] = []
    for file in files(ledger, "relay"):
        rows: dict[int, frozenset[int]] = {}
        settled: dict[int, frozenset[int]] = {}
        for entry in entries(file):
            known = rows if "rows" in entry else settled
            known[entry["batch"]] = frozenset(entry["rows"] if "rows" in entry else entry["settled"])
        batches += [Batch(one, settled.get(number, frozenset())) for number, one in rows.items()]
    return batches


async def copies_in(client: Any) -> AsyncGenerator[Copy]:
    """Every entry of both streams, in each in its order."""
    known = codec()
    for stream in STREAMS:
        last = "-"
        while page := await client.xrange(stream, min=last, count=_PAGE):
            for _, fields in page:
                yield _copy(decoded(known, fields))
            last = f"({page[-1][0].decode()}"


def _copy(event: Decoded) -> Copy:
    told: Any = event.message
    account: str | None = getattr(told, "account", None)
    return Copy(told.token, event.facts.message_id, account, told.place, event.facts.sequence or "0")


async def is_drained(database: str, redis: str) -> bool:
    """Whether nothing waits any more, neither in the outbox nor in the streams."""
    engine = engine_of(database)
    client: Any = Client.from_url(redis)
    try:
        health = await SQLAlchemyOutbox(engine, OUTBOX).health()
        if health.pending or health.waiting:
            return False
        for stream in STREAMS:
            if not await client.exists(stream):
                continue
            about = await client.xinfo_stream(stream)
            for group in await client.xinfo_groups(stream):
                if group["pending"] or group["last-delivered-id"] != about["last-generated-id"]:
                    return False
        return True
    finally:
        await client.aclose()
        await engine.dispose()
