"""An OutboxStore in memory, for tests of what works with stores: every promise of the protocol, and no database."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Literal

import anyio
from anyio.lowlevel import checkpoint

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import (
    LANES,
    DeadLetter,
    Failure,
    Health,
    Policy,
    StoredMessage,
    StoredRow,
)


@dataclass(eq=False)
class Row:
    id: int
    message: StoredMessage
    created_at: float
    available_at: float
    failures: int = 0
    last_error: str | None = None
    state: Literal["pending", "dead", "sent"] = "pending"
    parked: bool = False
    sent_at: float = 0.0
    readable: bool = True


class MemoryBatch:
    def __init__(self, rows: Sequence[StoredRow], unreadable: Sequence[Failure], lease: float) -> None:
        self.rows = rows
        self.unreadable = unreadable
        self.deadline = monotonic() + lease / 2
        self.told_sent: list[int] = []
        self.told_failed: list[Failure] = []

    def sent(self, ids: Sequence[int], /) -> None:
        self.told_sent += ids

    def failed(self, failures: Sequence[Failure], /) -> None:
        self.told_failed += failures


class MemoryStore:
    """Its clock is the event loop's. What a test may set: errors to raise, a lease that is lost, a time to keep."""

    def __init__(self, *, keep: float = 0.0, lanes_at_a_time: int = LANES // 4) -> None:
        self.rows: dict[int, Row] = {}
        self.takes = 0
        """How often somebody looked for work."""
        self.cleans: list[int] = []
        """How much each cleaning deleted."""
        self.listeners = 0
        self.broken: Exception | None = None
        """What every call raises: the database is away."""
        self.deaf: Exception | None = None
        """What `listen` raises."""
        self.hangs_on_leaving: anyio.Event | None = None
        self.loses_lease = False
        """Whether the next batch is somebody else's when it is left."""
        self.is_late = False
        """Whether the deadline of a batch is over when it is handed out."""
        self.left_out: list[Sequence[str]] = []
        """The destinations that each take was without."""
        self._keep = keep
        self._lanes_at_a_time = lanes_at_a_time
        self._ids = itertools.count(1)
        self._held: set[int] = set()
        self._crashes = dict.fromkeys(range(LANES), 0)
        self._served = dict.fromkeys(range(LANES), 0)
        self._turn = itertools.count(1)
        self._wakers: dict[object, Callable[[], None]] = {}

    # -- for the test --------------------------------------------------------------------------------------------------

    def state_of(self, number: int) -> str:
        """pending, dead or sent; "gone" for what was sent and is not kept."""
        return self.rows[number].state if number in self.rows else "gone"

    def relay_died_over(self, number: int, times: int = 2) -> None:
        """Relays were killed while they published this row."""
        self._crashes[self.rows[number].message.lane] += times

    @property
    def wakers(self) -> int:
        return len(self._wakers)

    # -- for the application -------------------------------------------------------------------------------------------

    async def add(self, resource: object, messages: Sequence[StoredMessage], /) -> None:
        await checkpoint()
        now = anyio.current_time()
        for message in messages:
            number = next(self._ids)
            self.rows[number] = Row(number, message, now, now)

    def committed(self) -> None:
        for waker in tuple(self._wakers.values()):
            waker()

    # -- for the relay -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def take(
        self, limit: int, policy: Policy, /, *, without: Sequence[str] = ()
    ) -> AsyncGenerator[MemoryBatch | None]:
        self.takes += 1
        self.left_out.append(without)
        await self._reach()
        lanes, rows = self._choose(limit, without)
        if not rows:
            yield None
            return
        read = [self._as_stored(row) for row in rows if row.readable]
        batch = MemoryBatch(
            read,
            [Failure(row.id, "unreadable", None) for row in rows if not row.readable],
            -1.0 if self.is_late else policy.lease,
        )
        self._held |= lanes
        self._crashes.update((lane, self._crashes[lane] + 1) for lane in lanes)
        try:
            yield batch
        finally:
            self._held -= lanes
            self._crashes.update(dict.fromkeys(lanes, 0))
            self._served.update(dict.fromkeys(lanes, next(self._turn)))
            if self.hangs_on_leaving is not None:
                await self.hangs_on_leaving.wait()
            await self._reach()
            if self.loses_lease:
                self.loses_lease = False
                raise LeaseLostError("The lease had expired.")
            self._settle(batch, park=policy.park)

    def _choose(self, limit: int, without: Sequence[str]) -> tuple[set[int], list[Row]]:
        now = anyio.current_time()
        due = [
            row
            for row in self._first_of_keys()
            if row.available_at <= now and row.message.destination not in without and row.message.lane not in self._held
        ]
        lanes = sorted({row.message.lane for row in due}, key=lambda lane: (self._served[lane], lane))
        if lanes and self._crashes[lanes[0]] >= 2:
            return {lanes[0]}, [row for row in due if row.message.lane == lanes[0]][:1]
        chosen = {lane for lane in lanes[: self._lanes_at_a_time] if self._crashes[lane] < 2}
        rows = [row for row in due if row.message.lane in chosen]
        firsts = {row.message.key for row in rows if row.message.key is not None}
        rows += [row for row in self._unsent() if row.message.key in firsts and row not in rows and row.failures == 0]
        taken: list[Row] = []
        ended: set[str] = set()
        for row in sorted(rows, key=lambda row: row.id):
            key = row.message.key
            if key in ended or row.message.destination in without:
                if key is not None:
                    ended.add(key)
                continue
            taken.append(row)
        return chosen, taken[:limit]

    def _unsent(self) -> Iterator[Row]:
        return (row for row in self.rows.values() if row.state == "pending")

    def _first_of_keys(self) -> Iterator[Row]:
        """What no earlier message of its key is in the way of."""
        seen: set[str] = set()
        for row in self.rows.values():
            key = row.message.key
            if row.state == "pending" and key not in seen:
                yield row
            if key is not None and (row.state == "pending" or (row.state == "dead" and not row.parked)):
                seen.add(key)

    def _as_stored(self, row: Row) -> StoredRow:
        crashed = self._crashes[row.message.lane] >= 2
        age = anyio.current_time() - row.created_at
        return StoredRow(row.id, row.message, row.failures + crashed, age, crashed)

    def _settle(self, batch: MemoryBatch, *, park: bool) -> None:
        now = anyio.current_time()
        for number in batch.told_sent:
            row = self.rows[number]
            row.state, row.sent_at = "sent", now
            if not self._keep:
                del self.rows[number]
        for failure in (*batch.told_failed, *batch.unreadable):
            row = self.rows[failure.id]
            row.failures += 1
            row.last_error = failure.error
            if failure.delay is None:
                row.state, row.parked = "dead", park
            else:
                row.available_at = now + failure.delay

    async def clean(self, limit: int, /) -> int:
        await self._reach()
        old = anyio.current_time() - self._keep
        finished = [row.id for row in self.rows.values() if row.state == "sent" and row.sent_at <= old][:limit]
        for number in finished:
            del self.rows[number]
        self.cleans.append(len(finished))
        return len(finished)

    async def health(self) -> Health:
        await self._reach()
        unsent = list(self._unsent())
        free = len(list(self._first_of_keys()))
        dead = sum(row.state == "dead" for row in self.rows.values())
        oldest = max((anyio.current_time() - row.created_at for row in unsent), default=0.0)
        return Health(pending=free, waiting=len(unsent) - free, dead=dead, oldest=oldest)

    async def next_due(self) -> float | None:
        await self._reach()
        now = anyio.current_time()
        return min((row.available_at - now for row in self._unsent() if row.failures), default=None)

    def on_commit(self, wake: Callable[[], None], /) -> Callable[[], None]:
        key = object()
        self._wakers[key] = wake
        return lambda: self._wakers.pop(key, None) and None

    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[None]:
        await checkpoint()
        if self.deaf is not None:
            raise self.deaf
        self.listeners += 1
        try:
            yield
        finally:
            self.listeners -= 1

    async def _reach(self) -> None:
        await checkpoint()
        if self.broken is not None:
            raise self.broken

    # -- for people ----------------------------------------------------------------------------------------------------

    async def validate_schema(self) -> None:
        await self._reach()

    async def dead_letters(self, limit: int, /, *, after: int = 0) -> Sequence[DeadLetter]:
        await self._reach()
        dead = [row for row in self.rows.values() if row.state == "dead" and row.id > after]
        return [
            DeadLetter(row.id, row.message, row.failures, row.last_error or "", datetime.fromtimestamp(0, UTC))
            for row in dead[:limit]
        ]

    async def retry(self, ids: Sequence[int], /) -> int:
        await self._reach()
        dead = [self.rows[number] for number in ids if self.state_of(number) == "dead"]
        for row in dead:
            row.state, row.failures, row.available_at = "pending", 1, anyio.current_time()
        return len(dead)

    async def purge(self, ids: Sequence[int], /) -> int:
        await self._reach()
        dead = [number for number in ids if self.state_of(number) == "dead"]
        for number in dead:
            del self.rows[number]
        return len(dead)
