"""Writing what became of a batch: a few statements, whatever its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, bindparam, literal_column, null, select, update

from pipeline_mediator.databases import seconds_ago
from pipeline_mediator.outbox.sqlalchemy.batch import DIED
from pipeline_mediator.outbox.sqlalchemy.clock import NOW
from pipeline_mediator.outbox.sqlalchemy.sql import among, by_index, delete_among, update_among
from pipeline_mediator.outbox.sqlalchemy.tables import DEAD, DELAYED, PENDING, SENT, WAITING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Connection

    from pipeline_mediator.outbox.sqlalchemy.batch import TakenBatch
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Settling"]

_RELEASED_AT_ONCE = 10_000
"""Rows. What waits behind them is released when they are settled in turn."""


class Settling:
    """Writes outcomes, in the transaction of whoever owns the lanes."""

    def __init__(self, tables: OutboxTables, dialect: str, *, keep: bool) -> None:
        rows, lanes = tables.rows, tables.lanes
        chosen = update_among(rows.c.id, "ids", dialect)
        one = rows.c.id == bindparam("row")
        self._sent: Any = chosen.values(state=SENT, sent_at=NOW) if keep else delete_among(rows.c.id, "ids", dialect)
        told: dict[str, Any] = {"failures": bindparam("count"), "last_error": bindparam("error")}
        self._delayed = (
            update(rows)
            .where(one)
            .values(
                state=DELAYED, hold=rows.c.key, available_at=seconds_ago(-bindparam("delay", type_=Float())), **told
            )
        )
        self._dead = update(rows).where(one).values(state=DEAD, hold=rows.c.key, **told)
        self._parked = update(rows).where(one).values(state=DEAD, hold=null(), **told)
        self._given_back = update(rows).where(one).values(**told)
        self._waiting = by_index(
            select(rows.c.id)
            .where(among(rows.c.hold, "keys", dialect), rows.c.state == WAITING)
            .order_by(rows.c.id)
            .limit(_RELEASED_AT_ONCE),
            rows,
            f"ix_{rows.name}_hold",
        )
        self._released = chosen.values(state=PENDING, hold=null())
        self._left = update_among(lanes.c.lane, "lanes", dialect).values(
            crashes=literal_column("0"), alone=bindparam("rows_alone"), served_at=NOW
        )

    def settle(self, connection: Connection, batch: TakenBatch, *, park: bool) -> None:
        """Write what the batch was told, give the rest back."""
        sent = batch.told_sent
        failed = batch.told_failed
        if sent:
            connection.execute(self._sent, {"ids": sent})
        if failed:
            self._write_failures(connection, failed, park=park)
        if batch.found.followed:
            keeps_back = {key for failure, key, _ in failed if failure.delay is not None or not park}
            settled = {*sent, *(failure.id for failure, _, _ in failed)}
            keys = {key for number, key in batch.found.followed.items() if number in settled} - keeps_back
            self.release(connection, keys)
        if batch.alone and not sent and not failed:
            back = {"row": batch.rows[0].id, "count": batch.alone.failures, "error": batch.alone.last_error}
            connection.execute(self._given_back, back)
        self.leave(connection, batch.lanes, alone=_still_alone(batch))

    def leave(self, connection: Connection, lanes: Sequence[int], *, alone: int = 0) -> None:
        """The batch of these lanes was left: that was no crash."""
        connection.execute(self._left, {"lanes": lanes, "rows_alone": alone})

    def release(self, connection: Connection, keys: Collection[str]) -> None:
        """Let go on what waits behind rows of these keys; whatever still has an earlier one is met again and waits."""
        if not keys:
            return
        ids = connection.scalars(self._waiting, {"keys": list(keys)}).all()
        if ids:
            connection.execute(self._released, {"ids": ids})

    def _write_failures(self, connection: Connection, failed: Sequence[tuple[Any, Any, int]], *, park: bool) -> None:
        delayed: list[dict[str, Any]] = []
        dead: list[dict[str, Any]] = []
        for failure, _, failures in failed:
            row = {"row": failure.id, "count": failures, "error": failure.error}
            if failure.delay is None:
                dead.append(row)
            else:
                delayed.append({**row, "delay": failure.delay})
        if delayed:
            connection.execute(self._delayed, delayed)
        if dead:
            connection.execute(self._parked if park else self._dead, dead)


def _still_alone(batch: TakenBatch) -> int:
    """How many rows of its lane are still to be taken one at a time."""
    if batch.alone is None:
        return 0
    found_it = batch.alone.last_error == DIED and any(failure.delay is None for failure, _, _ in batch.told_failed)
    return 0 if found_it else batch.alone.left - 1
