"""Taking lanes on PostgreSQL, MariaDB and MySQL: an open transaction locks them, a session timeout is the lease."""

from __future__ import annotations

import math
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, select, text, true

from pipeline_mediator.concurrency import finish
from pipeline_mediator.outbox.protocol import LANES
from pipeline_mediator.outbox.sqlalchemy.batch import TakenBatch
from pipeline_mediator.outbox.sqlalchemy.claiming import Claiming
from pipeline_mediator.outbox.sqlalchemy.errors import is_gone, lease_lost
from pipeline_mediator.outbox.sqlalchemy.sql import lock_among
from pipeline_mediator.outbox.sqlalchemy.tables import PENDING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from pipeline_mediator.outbox.protocol import Policy
    from pipeline_mediator.outbox.sqlalchemy.reading import Reading
    from pipeline_mediator.outbox.sqlalchemy.settling import Settling
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Locking"]


_SECONDS = 30.0
"""For what a database should answer at once."""
_WAKE_EVERY = 0.1
"""Seconds between looks for what is delayed, while there is other work."""


@dataclass(slots=True)
class _Taking:
    limit: int
    policy: Policy
    without: Collection[str]
    connection: AsyncConnection | None = None
    leased: bool = False
    batch: TakenBatch | None = None

    def new_deadline(self) -> float:
        return time.monotonic() + self.policy.lease / 2


class Locking:
    """The transaction that reads a batch stays open while it is published: its locks say whose the lanes are."""

    def __init__(self, engine: AsyncEngine, tables: OutboxTables, reading: Reading, settling: Settling) -> None:
        self._engine = engine
        self._reading = reading
        self._settling = settling
        dialect = engine.dialect.name
        self._claiming = Claiming(tables, dialect, reading)
        self._server = _PostgreSQL() if dialect == "postgresql" else _MySQL()
        lanes, rows = tables.lanes, tables.rows
        self._lock = lock_among(lanes.c.lane, "lanes", dialect, also=self._server.lease_columns())
        self._unchanged = select(rows.c.id).where(
            rows.c.id == bindparam("row"), rows.c.state == PENDING, rows.c.failures == bindparam("count")
        )
        self._wake_at = 0.0

    @asynccontextmanager
    async def take(self, limit: int, policy: Policy, without: Collection[str]) -> AsyncGenerator[TakenBatch | None]:
        """See `OutboxStore.take`."""
        taking = _Taking(limit, policy, without)
        try:
            # Whole or not at all: lanes that are counted and then forgotten would look like a crash.
            await finish(self._begin(taking), seconds=_SECONDS)
            yield taking.batch
        except BaseException:
            # What went wrong in the end is less than what went wrong before.
            with suppress(Exception):
                await finish(self._end(taking), seconds=_SECONDS)
            raise
        try:
            await finish(self._end(taking), seconds=_SECONDS)
        except Exception as error:
            if is_gone(error):
                raise lease_lost("the database has ended the session that had taken these messages") from error
            raise

    # -- taking --------------------------------------------------------------------------------------------------------

    async def _begin(self, taking: _Taking) -> None:
        taking.connection = await self._engine.connect()
        await taking.connection.run_sync(self._take, taking)

    def _take(self, connection: Connection, taking: _Taking) -> None:
        # As long as lanes have nothing but rows that have to wait; those that are taken alone come one by one.
        for _ in range(LANES):
            lanes, alone = self._claim(connection, taking)
            if not lanes:
                return
            taking.batch = self._lock_and_read(connection, taking, lanes, alone)
            if taking.batch is not None:
                return

    def _claim(self, connection: Connection, taking: _Taking) -> tuple[list[int], int]:
        self._server.commit_each(connection)
        claimed = self._claiming.claim(connection, taking.limit)
        if not claimed[0] and self._wake(connection, taking):
            claimed = self._claiming.claim(connection, taking.limit)
        connection.commit()
        return claimed

    def _wake(self, connection: Connection, taking: _Taking) -> bool:
        self._wake_at = time.monotonic() + _WAKE_EVERY
        return self._reading.wake(connection, taking.limit, taking.without)

    def _lock_and_read(
        self, connection: Connection, taking: _Taking, lanes: Sequence[int], alone: int
    ) -> TakenBatch | None:
        self._server.commit_together(connection)
        park = taking.policy.park
        deadline = taking.new_deadline()
        locked = self._lock_lanes(connection, taking, lanes)
        if not locked:
            # Another relay was faster; it takes back what was counted here.
            connection.rollback()
            return None
        found = self._reading.find(connection, locked, 1 if alone else taking.limit, taking.without, park=park)
        batch = TakenBatch(found, locked, deadline)
        if not batch.rows and not batch.unreadable:
            self._settling.leave(connection, locked, alone=alone)
            connection.commit()
            return None
        if alone and batch.rows and not self._count(connection, taking, batch, alone):
            connection.rollback()
            return None
        return batch

    def _lock_lanes(self, connection: Connection, taking: _Taking, lanes: Sequence[int]) -> Sequence[int]:
        lease = taking.policy.lease
        self._server.set_lease(connection, lease)
        taking.leased = True
        return connection.scalars(self._lock, {"lanes": lanes, **self._server.lease_parameters(lease)}).all()

    def _count(self, connection: Connection, taking: _Taking, batch: TakenBatch, alone: int) -> bool:
        """Commit that the row's relay died, in advance. That gives up the lock; False if another relay was faster."""
        batch.alone = self._claiming.count(connection, batch.found, alone)
        connection.commit()
        batch.deadline = taking.new_deadline()
        row = batch.rows[0]
        unchanged = {"row": row.id, "count": row.failures}
        return bool(self._lock_lanes(connection, taking, batch.lanes)) and (
            connection.scalar(self._unchanged, unchanged) is not None
        )

    # -- leaving -------------------------------------------------------------------------------------------------------

    async def _end(self, taking: _Taking) -> None:
        connection = taking.connection
        if connection is None:
            return
        try:
            await connection.run_sync(self._settle, taking)
        except BaseException:
            # Whatever it was, this session is not to be trusted with anything any more, and its locks have to go.
            with suppress(Exception):
                await connection.invalidate()
            raise
        finally:
            await connection.close()

    def _settle(self, connection: Connection, taking: _Taking) -> None:
        if taking.batch is not None:
            self._settling.settle(connection, taking.batch, park=taking.policy.park)
            connection.commit()
            if time.monotonic() >= self._wake_at:
                # Behind the batch, which need not wait for it; but what is due must not wait until there is no work.
                self._server.commit_each(connection)
                self._wake(connection, taking)
                connection.commit()
        if taking.leased:
            self._server.end_lease(connection)


class _PostgreSQL:
    """One round trip for what is committed by itself, and the lease is a setting of the transaction."""

    _SETTINGS = ("enable_seqscan", "enable_bitmapscan", "enable_sort")

    def lease_columns(self) -> list[Any]:
        # Statistics of a table that fills and empties all the time are wrong: keep the planner to the indexes.
        indexes_only = [func.set_config(setting, "off", true()) for setting in self._SETTINGS]
        lease = func.set_config("idle_in_transaction_session_timeout", bindparam("lease"), true())
        return [lease, *indexes_only]

    def lease_parameters(self, seconds: float) -> dict[str, Any]:
        return {"lease": f"{max(1, round(seconds * 1000))}ms"}

    def commit_each(self, connection: Connection) -> None:
        connection.execution_options(isolation_level="AUTOCOMMIT")

    def commit_together(self, connection: Connection) -> None:
        connection.execution_options(isolation_level="READ COMMITTED")

    def set_lease(self, connection: Connection, seconds: float) -> None:
        """Set with the lock."""

    def end_lease(self, connection: Connection) -> None:
        """Ended with the transaction."""


class _MySQL:
    """The lease is a setting of the session, in whole seconds, to be taken back before the pool has it again."""

    def lease_columns(self) -> list[Any]:
        return []

    def lease_parameters(self, seconds: float) -> dict[str, Any]:
        return {}

    def commit_each(self, connection: Connection) -> None:
        """Setting the isolation would cost more than it saves."""

    def commit_together(self, connection: Connection) -> None:
        """As the engine has it."""

    def set_lease(self, connection: Connection, seconds: float) -> None:
        connection.execute(text(f"SET SESSION {self._variable(connection)} = {max(1, math.ceil(seconds))}"))

    def end_lease(self, connection: Connection) -> None:
        connection.execute(text(f"SET SESSION {self._variable(connection)} = DEFAULT"))
        connection.commit()

    def _variable(self, connection: Connection) -> str:
        is_mariadb: bool = getattr(connection.dialect, "is_mariadb", False)
        return "idle_transaction_timeout" if is_mariadb else "wait_timeout"
