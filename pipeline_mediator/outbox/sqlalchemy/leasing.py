"""Taking the outbox on SQLite: no transaction may be open while publishing, so a row says whose it is and how long."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
from sqlalchemy import Float, bindparam, func, literal_column, null, select, update
from sqlalchemy.exc import OperationalError

from pipeline_mediator.concurrency import finish
from pipeline_mediator.databases import seconds_ago
from pipeline_mediator.outbox.protocol import LANES
from pipeline_mediator.outbox.sqlalchemy.batch import TakenBatch
from pipeline_mediator.outbox.sqlalchemy.claiming import Claiming
from pipeline_mediator.outbox.sqlalchemy.clock import NOW
from pipeline_mediator.outbox.sqlalchemy.errors import lease_lost
from pipeline_mediator.outbox.sqlalchemy.one_hop import Begin, OneHop
from pipeline_mediator.outbox.sqlalchemy.process import ProcessName
from pipeline_mediator.outbox.sqlalchemy.reading import Reading
from pipeline_mediator.outbox.sqlalchemy.sql import among
from pipeline_mediator.outbox.sqlalchemy.tables import PENDING, WHOLE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.outbox.protocol import Policy
    from pipeline_mediator.outbox.sqlalchemy.settling import Settling
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Leasing"]

_BUSY = 5
"""SQLite's primary result code for a lock that another connection has."""
_SECONDS = 30.0
"""For what a database should answer at once."""
_WAKE_EVERY = 0.1
"""Seconds between looks for what is delayed, while there is other work."""


class _Owner(msgspec.Struct, frozen=True):
    token: str
    process: ProcessName


@dataclass(slots=True)
class _Taking:
    limit: int
    policy: Policy
    without: Collection[str]
    owner: str
    batch: TakenBatch | None = None


class Leasing:
    """One lease for the whole outbox, taken with a batch and given up with it; a dead owner's is taken over at once."""

    def __init__(self, engine: AsyncEngine, tables: OutboxTables, reading: Reading, settling: Settling) -> None:
        self._hop = OneHop(engine)
        self._wake_at = 0.0
        self._reading = _SequentialReading(tables, engine.dialect.name)
        self._settling = settling
        self._work = self._reading.lanes_with_work().limit(1)
        # With one lease there is nobody to leave lanes to.
        self._claiming = Claiming(tables, engine.dialect.name, self._reading, LANES)
        lanes = tables.lanes
        whole = lanes.c.lane == WHOLE
        self._lease = select(lanes.c.owner, lanes.c.expires_at > NOW).where(whole)
        self._own = (
            update(lanes)
            .where(whole)
            .values(owner=bindparam("me"), expires_at=seconds_ago(-bindparam("lease", type_=Float())))
        )
        self._disown = update(lanes).where(whole).values(owner=null(), expires_at=null())

    @asynccontextmanager
    async def take(self, limit: int, policy: Policy, without: Collection[str]) -> AsyncGenerator[TakenBatch | None]:
        """See `OutboxStore.take`."""
        taking = _Taking(limit, policy, without, _encode(_Owner(uuid4().hex, ProcessName.own())))
        try:
            # Whole or not at all: lanes that are counted and then forgotten would look like a crash.
            await finish(self._begin(taking), seconds=_SECONDS)
            yield taking.batch
        except BaseException:
            # What went wrong in the end is less than what went wrong before.
            with suppress(Exception):
                await finish(self._end(taking), seconds=policy.lease)
            raise
        try:
            await finish(self._end(taking), seconds=policy.lease)
        except TimeoutError as error:
            raise lease_lost("the database stayed locked for longer than the lease") from error

    # -- taking --------------------------------------------------------------------------------------------------------

    async def _begin(self, taking: _Taking) -> None:
        look, take = partial(self._look, taking=taking), partial(self._take, taking=taking)
        await self._hop.run((Begin.READING, look), (Begin.WRITING, take))

    def _look(self, connection: Connection, taking: _Taking) -> bool:
        """Whether it is worth the write lock, for which writers would have to wait."""
        if not self._is_free(connection):
            return False
        return connection.execute(self._work).first() is not None or self._reading.has_due(connection, taking.without)

    def _take(self, connection: Connection, taking: _Taking) -> bool:
        if not self._is_free(connection):
            return False
        limit, park = taking.limit, taking.policy.park
        if time.monotonic() >= self._wake_at:
            self._wake(connection, taking)
        for _ in range(LANES):
            lanes, alone = self._claiming.claim(connection, limit)
            if not lanes and self._wake(connection, taking):
                lanes, alone = self._claiming.claim(connection, limit)
            if not lanes:
                return True
            found = self._reading.find(connection, lanes, 1 if alone else limit, taking.without, park=park)
            if found.rows or found.unreadable:
                batch = TakenBatch(found, lanes, time.monotonic() + taking.policy.lease / 2)
                if alone and found.rows:
                    batch.alone = self._claiming.count(connection, found, alone)
                connection.execute(self._own, {"me": taking.owner, "lease": taking.policy.lease})
                taking.batch = batch
                return True
            self._settling.leave(connection, lanes, alone=alone)
        return True

    def _wake(self, connection: Connection, taking: _Taking) -> bool:
        self._wake_at = time.monotonic() + _WAKE_EVERY
        return self._reading.wake(connection, taking.limit, taking.without)

    def _is_free(self, connection: Connection) -> bool:
        owner, lasts = connection.execute(self._lease).one()
        return owner is None or not lasts or _decode(owner).process.is_dead()

    # -- leaving -------------------------------------------------------------------------------------------------------

    async def _end(self, taking: _Taking) -> None:
        """Whoever has the write lock for longer than `busy_timeout` must not make messages go out twice."""
        if taking.batch is None:
            return
        give_up = time.monotonic() + taking.policy.lease
        while True:
            try:
                await self._hop.run((Begin.WRITING, partial(self._settle, taking=taking, batch=taking.batch)))
            except OperationalError as error:
                if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != _BUSY or time.monotonic() > give_up:
                    raise
            else:
                return

    def _settle(self, connection: Connection, taking: _Taking, batch: TakenBatch) -> bool:
        owner, _ = connection.execute(self._lease).one()
        if owner != taking.owner:
            raise lease_lost("another relay has taken the outbox over")
        self._settling.settle(connection, batch, park=taking.policy.park)
        connection.execute(self._disown)
        return True


_WINDOW = 20
"""How many times a batch's ids are looked through for its rows, which may lie between others."""


class _SequentialReading(Reading):
    """Rows in the order in which they lie in the table: whoever has all lanes need not gather them from each."""

    def __init__(self, tables: OutboxTables, dialect: str) -> None:
        super().__init__(tables, dialect)
        rows, lanes = tables.rows, tables.lanes
        chosen = among(rows.c.lane, "lanes", dialect)
        first = select(func.min(self.first_of(lanes.c.lane)))
        self._first_pending = first.where(among(lanes.c.lane, "lanes", dialect))
        window = (
            self.row()
            .where(rows.c.id.between(bindparam("first"), bindparam("last")))
            # Not by the index of the state, which is in the order of the lanes.
            .where(rows.c.state + literal_column("0") == PENDING, chosen)
            .order_by(rows.c.id)
            .limit(bindparam("limit"))
        )
        self._window = self.with_fronts(window)

    def read(self, connection: Connection, lanes: Sequence[int], limit: int) -> list[Any]:
        first = connection.scalar(self._first_pending, {"lanes": lanes})
        if first is None:
            return []
        window = {"first": first, "last": first + _WINDOW * limit, "lanes": lanes, "limit": limit}
        return sorted(connection.execute(self._window, window), key=itemgetter(0))


def _encode(owner: _Owner) -> str:
    return msgspec.json.encode(owner).decode()


def _decode(owner: str) -> _Owner:
    return msgspec.json.decode(owner, type=_Owner)
