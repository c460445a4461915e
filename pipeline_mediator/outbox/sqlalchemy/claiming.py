"""Choosing lanes, counting the attempt on them, and what a lane that killed relays is treated like."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, and_, bindparam, case, literal_column, not_, or_, select, update

from pipeline_mediator.outbox.sqlalchemy.batch import DIED, Alone, Found
from pipeline_mediator.outbox.sqlalchemy.clock import NOW
from pipeline_mediator.outbox.sqlalchemy.sql import lock_among, update_among
from pipeline_mediator.outbox.sqlalchemy.tables import PENDING, WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Connection, Table

    from pipeline_mediator.outbox.sqlalchemy.reading import Reading
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["LANES_AT_A_TIME", "Claiming"]

LANES_AT_A_TIME = 16
"""A quarter of them, so that several relays find work."""

_TOO_MANY = 2
"""Crashes in a row: from then on a lane is taken alone, one row at a time, until the rows of one batch are past."""


class Claiming:
    """Counts an attempt on lanes before it is made: only who comes back takes the count back."""

    def __init__(
        self, tables: OutboxTables, dialect: str, reading: Reading, lanes_at_a_time: int = LANES_AT_A_TIME
    ) -> None:
        self._dialect = dialect
        self._at_a_time = lanes_at_a_time
        lanes, rows = tables.lanes, tables.rows
        begins_now = and_(lanes.c.alone == literal_column("0"), lanes.c.crashes >= literal_column(str(_TOO_MANY)))
        # In this order: MariaDB and MySQL see in the second expression what the first has written.
        attempt = (
            (lanes.c.alone, case((begins_now, bindparam("batch", type_=Integer())), else_=lanes.c.alone)),
            (lanes.c.crashes, lanes.c.crashes + literal_column("1")),
            (lanes.c.served_at, NOW),
        )
        work = reading.lanes_with_work().add_columns(lanes.c.crashes, lanes.c.alone)
        self._looking = work.order_by(lanes.c.served_at, lanes.c.lane)
        self._at_once = self._claim_at_once(reading, lanes, attempt)
        self._lock = lock_among(lanes.c.lane, "lanes", dialect, also=(lanes.c.crashes, lanes.c.alone))
        self._attempt = update_among(lanes.c.lane, "lanes", dialect).ordered_values(*attempt)
        self._count = (
            update(rows)
            .where(rows.c.id == bindparam("row"), rows.c.state == PENDING)
            .values(failures=bindparam("count"), last_error=bindparam("error"))
        )

    def claim(self, connection: Connection, limit: int) -> tuple[list[int], int]:
        """Lanes with work that nobody has, and how many rows are to be taken alone if it is only one: else 0.

        Committed by the caller before anything is published.
        """
        if self._dialect == "postgresql":
            claimed: Sequence[Any] = connection.execute(self._at_once, {"batch": limit}).all()
        else:
            claimed = self._claim_step_by_step(connection, limit)
        return [lane for lane, _ in claimed], max((alone for _, alone in claimed), default=0)

    def count(self, connection: Connection, found: Found, left: int) -> Alone:
        """Count in advance that the relay died over the one row that was found."""
        (row,) = found.rows
        counted = replace(row, failures=row.failures + 1, crashed=True)
        connection.execute(self._count, {"row": row.id, "count": counted.failures, "error": DIED})
        found.rows[0] = counted
        return Alone(row.failures, found.last_error, left)

    def _claim_at_once(self, reading: Reading, lanes: Table, attempt: tuple[Any, ...]) -> Any:
        """One statement, which is committed by itself. The locks of a CTE are taken once, and only as far as LIMIT."""
        # A subquery for the order, so that lanes whose turn it is not are not looked into.
        turns = select(lanes.c.lane).where(lanes.c.lane < WHOLE).order_by(lanes.c.served_at, lanes.c.lane)
        turn = turns.offset(0).subquery("turn")
        free = (
            select(lanes.c.lane, lanes.c.served_at, _suspicious(lanes).label("suspicious"))
            .join(turn, turn.c.lane == lanes.c.lane)
            .where(reading.first_of(turn.c.lane).is_not(None))
            .limit(self._at_a_time)
            .with_for_update(of=lanes, skip_locked=True)
            .cte("free")
        )
        first = select(free).order_by(free.c.served_at, free.c.lane).limit(1).subquery("first")
        chosen = or_(
            free.c.lane == select(first.c.lane).scalar_subquery(),
            and_(not_(free.c.suspicious), not_(select(first.c.suspicious).scalar_subquery())),
        )
        claim = update(lanes).where(lanes.c.lane.in_(select(free.c.lane).where(chosen))).ordered_values(*attempt)
        return claim.returning(lanes.c.lane, lanes.c.alone)

    def _claim_step_by_step(self, connection: Connection, limit: int) -> Sequence[Any]:
        found = connection.execute(self._looking).all()
        for turn in _turns([(lane, _alone(crashes, alone, limit)) for lane, crashes, alone in found], self._at_a_time):
            claimed = turn if self._dialect == "sqlite" else self._locked(connection, turn, limit)
            if claimed:
                connection.execute(self._attempt, {"lanes": [lane for lane, _ in claimed], "batch": limit})
                return claimed
        return ()

    def _locked(self, connection: Connection, turn: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
        """Those that nobody else has; SQLite's lock is for everything, and it is held already."""
        free = connection.execute(self._lock, {"lanes": [lane for lane, _ in turn]}).all()
        locked = [(lane, _alone(crashes, alone, limit)) for lane, crashes, alone in free]
        # A lane may have become suspicious since it was looked at.
        return [(lane, alone) for lane, alone in locked if not alone] or locked[:1]


def _alone(crashes: int, alone: int, limit: int) -> int:
    """How many rows of the lane are to be taken one at a time."""
    return alone or (limit if crashes >= _TOO_MANY else 0)


def _suspicious(lanes: Any) -> ColumnElement[bool]:
    return or_(lanes.c.crashes >= literal_column(str(_TOO_MANY)), lanes.c.alone > literal_column("0"))


def _turns(found: Sequence[tuple[int, int]], at_a_time: int) -> list[list[tuple[int, int]]]:
    """The lanes in the order of their turns: suspicious ones each alone, the others together."""
    turns: list[list[tuple[int, int]]] = []
    together: list[tuple[int, int]] | None = None
    for lane, alone in found:
        if alone:
            turns.append([(lane, alone)])
        elif together is None or len(together) == at_a_time:
            together = [(lane, alone)]
            turns.append(together)
        else:
            together.append((lane, alone))
    return turns
