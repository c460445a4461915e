"""Gathers, when a run is over, what the ledger, the database and the streams have to say."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.faults.application import EFFECTS, FACTS, OPERATIONS, OUTBOX, STREAMS, codec, engine_of
from tests.faults.consuming import GROUP
from tests.faults.ledger import entries, files
from tests.faults.verdict import Batch, Copy, Effect, Fact, Outcome, Record, Send
from tests.redis_view import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from pipeline_mediator.codec import Codec, Decoded
    from pipeline_mediator.outbox.protocol import Health

__all__ = ["copies_in", "decoded", "gather", "is_drained", "left_in_streams"]

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
            effects = await connection.execute(select(EFFECTS).order_by(EFFECTS.c.id))
        health = await store.health()
        dead = await store.dead_letters(_PAGE)
        return Record(
            sends=_sends(ledger),
            operations=frozenset(operations),
            facts=[Fact(row.token, row.operation, row.account, row.place) for row in facts],
            copies=[copy async for copy in copies_in(client)],
            effects=[Effect(row.message_id, row.token, row.account, row.place) for row in effects],
            handlings=_handlings(ledger),
            batches=_batches(ledger),
            dead=[f"{one.message.message_id}: {one.error}" for one in dead],
            undone=await dead_in_streams(client),
            left=[*_left_in_outbox(health), *await left_in_streams(client)],
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


def _handlings(ledger: Path) -> Counter[str]:
    lines = (entry for file in files(ledger, "consumer") for entry in entries(file))
    return Counter("begun" if "handling" in entry else "failed on purpose" for entry in lines)


async def copies_in(client: Any) -> AsyncGenerator[Copy]:
    """Every entry of both streams, in each in its order."""
    known = codec()
    for stream in STREAMS:
        last = "-"
        while page := await client.xrange(stream, min=last, count=_PAGE):
            for _, fields in page:
                yield _copy(decoded(fields, known))
            last = f"({page[-1][0].decode()}"


def decoded(fields: Mapping[bytes, bytes], known: Codec | None = None) -> Decoded:
    """The message in an entry of a stream that `RedisStreamBroker` wrote."""
    attributes = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
    return (known or codec()).decode(fields[b"data"], attributes["datacontenttype"], attributes)


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
        return not _left_in_outbox(health) and not await left_in_streams(client)
    finally:
        await client.aclose()
        await engine.dispose()


def _left_in_outbox(health: Health) -> list[str]:
    if not health.pending and not health.waiting:
        return []
    return [f"outbox: {health.pending} pending, {health.waiting} waiting"]


async def left_in_streams(client: Any, name: str = GROUP) -> list[str]:
    """What the group has not read, or not settled; what it has postponed is of those."""
    left: list[str] = []
    for stream in STREAMS:
        if not await client.xlen(stream):
            continue
        last = (await client.xinfo_stream(stream))["last-generated-id"]
        groups = {group["name"]: group for group in await client.xinfo_groups(stream)}
        group = groups.get(name.encode())
        if group is None or group["last-delivered-id"] != last:
            left.append(f"{stream}: not read to its end")
        elif group["pending"]:
            left.append(f"{stream}: {group['pending']} not settled")
    return left


async def dead_in_streams(client: Any) -> list[str]:
    """Ids of what was given up, and why."""
    shelves = [await client.xrange(f"{{{stream}}}:{GROUP}:dead") for stream in STREAMS]
    return [
        f"{fields.get(b'id', b'?').decode()}: {fields[b'dead-reason'].decode()}"
        for shelf in shelves
        for _, fields in shelf
    ]
