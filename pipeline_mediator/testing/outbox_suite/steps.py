"""The steps that the tests of an outbox are made of."""

# ruff: noqa: ASYNC110, PT012, S101  # these are tests: what another process does can only be polled

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, Final

import anyio
import pytest

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import LANES, Failure, Policy, StoredMessage, lane_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from pipeline_mediator.outbox.protocol import Batch, OutboxStore, StoredRow
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = [
    "BLOCK",
    "DAY",
    "PARK",
    "SECONDS",
    "OutOfStockError",
    "TakenOver",
    "add",
    "assert_in_order",
    "crash",
    "drain",
    "everything_due",
    "fail",
    "ids_of",
    "key_in",
    "keyless_in",
    "lanes_of",
    "message",
    "names_of",
    "rows_of",
    "take",
    "tell",
    "until",
]

SECONDS: Final = 30.0
"""What takes longer hangs."""
DAY: Final = 86400.0
_PATIENCE: Final = 0.5
"""Seconds. While there is other work, a store need not look all the time for what has become due."""
BLOCK: Final = Policy()
PARK: Final = Policy(park=True)


class OutOfStockError(Exception):
    """What a handler raises."""


def message(message_id: str, key: str | None = None, destination: str = "orders") -> StoredMessage:
    """An encoded message."""
    headers = {"id": message_id, "source": "/shop", "type": "OrderPlaced"}
    return StoredMessage(message_id, "OrderPlaced", 1, destination, "application/json", b"{}", headers, key)


def key_in(lane: int) -> str:
    """A key of that lane, not `k`."""
    return next(key for number in count() if lane_of(key := f"key {number}") == lane)


def keyless_in(lane: int, number: int) -> list[StoredMessage]:
    """Messages without a key that are in one lane."""
    ids = (name for it in count() if lane_of(name := f"keyless {it}") == lane)
    return [message(next(ids)) for _ in range(number)]


async def add(database: OutboxDatabase, store: OutboxStore, *messages: StoredMessage) -> None:
    """Store messages in a transaction that is committed."""
    async with database.transaction() as resource:
        await store.add(resource, messages)


def ids_of(batch: Batch | None) -> list[str]:
    """The message ids of a batch, in its order."""
    return [] if batch is None else [row.message.message_id for row in batch.rows]


def lanes_of(batch: Batch | None) -> list[int]:
    """The lane of each row of a batch."""
    return [] if batch is None else [row.message.lane for row in batch.rows]


def tell(batch: Batch | None, *, sent: int | None = None, failed: int | None = None) -> None:
    """What became of the rows with these positions."""
    assert batch is not None
    if sent is not None:
        batch.sent([batch.rows[sent].id])
    if failed is not None:
        batch.failed([Failure(batch.rows[failed].id, "Refused: no", 60.0)])


async def rows_of(store: OutboxStore, limit: int = 1000, policy: Policy = BLOCK) -> list[StoredRow]:
    """What one batch has; it is given back."""
    async with store.take(limit, policy) as batch:
        return [] if batch is None else list(batch.rows)


async def take(store: OutboxStore, limit: int = 1000, policy: Policy = BLOCK, without: Sequence[str] = ()) -> list[str]:
    """Send what one batch has."""
    async with store.take(limit, policy, without=without) as batch:
        if batch is not None:
            batch.sent([row.id for row in batch.rows])
        return ids_of(batch)


async def drain(
    store: OutboxStore, limit: int = 1000, policy: Policy = BLOCK, without: Sequence[str] = ()
) -> list[StoredRow]:
    """Send everything that is due, batch by batch."""
    taken: list[StoredRow] = []
    for _ in range(10_000):
        async with store.take(limit, policy, without=without) as batch:
            if batch is None:
                return taken
            taken += batch.rows
            batch.sent([row.id for row in batch.rows])
    raise AssertionError("there is no end to what is due")


async def names_of(store: OutboxStore, policy: Policy = BLOCK, without: Sequence[str] = ()) -> list[str]:
    """The message ids of what `drain` sends."""
    return [row.message.message_id for row in await drain(store, policy=policy, without=without)]


async def everything_due(store: OutboxStore) -> dict[str, StoredRow]:
    """All that is due, by message id; given back. Each batch has other lanes than the ones before it."""
    found: dict[str, StoredRow] = {}
    for _ in range(LANES):
        found |= {row.message.message_id: row for row in await rows_of(store)}
        await anyio.sleep(_PATIENCE / LANES)
    return found


async def fail(
    store: OutboxStore,
    message_id: str,
    *,
    delay: float | None,
    error: str = "Refused: no",
    policy: Policy = BLOCK,
) -> None:
    """Take batches until one has this message, and say that the broker refused it; the rest is given back."""
    for _ in range(LANES):
        async with store.take(1000, policy) as batch:
            assert batch is not None
            for row in batch.rows:
                if row.message.message_id == message_id:
                    batch.failed([Failure(row.id, error, delay)])
                    return
        await anyio.sleep(_PATIENCE / LANES)
    raise AssertionError(f"{message_id} is not due")


async def crash(database: OutboxDatabase, limit: int = 1000) -> list[StoredRow]:
    """A relay that dies over a batch; what it had."""
    victim = database.store()
    rows: list[StoredRow] = []
    with pytest.raises(LeaseLostError):
        async with victim.take(limit, BLOCK) as batch:
            assert batch is not None
            rows = list(batch.rows)
            await database.kill(victim)
    return rows


class TakenOver:
    """A batch of another relay, as soon as it gets one."""

    def __init__(self, store: OutboxStore, policy: Policy) -> None:
        self._store = store
        self._policy = policy
        self._taking = store.take(1000, policy)

    async def __aenter__(self) -> Batch:
        with anyio.fail_after(SECONDS):
            while (batch := await self._taking.__aenter__()) is None:
                await self._taking.__aexit__(None, None, None)
                await anyio.sleep(0.02)
                self._taking = self._store.take(1000, self._policy)
        return batch

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._taking.__aexit__(kind, error, trace)


async def until(happened: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    with anyio.fail_after(SECONDS):
        while not happened():
            await anyio.sleep(0.005)


def assert_in_order(taken: Sequence[StoredRow]) -> None:
    """Of each key, in order of id."""
    by_key: defaultdict[str, list[int]] = defaultdict(list)
    for row in taken:
        if row.message.key is not None:
            by_key[row.message.key].append(row.id)
    assert [key for key, ids in by_key.items() if ids != sorted(ids)] == []
