"""What an outbox needs beside taking: its lanes, cleaning, figures, dead letters."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, insert, literal_column, null, select
from sqlalchemy.exc import IntegrityError, OperationalError

from pipeline_mediator.outbox.protocol import LANES, DeadLetter, Health
from pipeline_mediator.outbox.sqlalchemy.clock import NOW, moment, seconds_since
from pipeline_mediator.outbox.sqlalchemy.rows import message_of
from pipeline_mediator.outbox.sqlalchemy.sql import among, by_index, delete_among, lock_among, update_among
from pipeline_mediator.outbox.sqlalchemy.tables import DEAD, PENDING, SENT, WAITING, WHOLE, unsent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from sqlalchemy import Connection, Select
    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.outbox.sqlalchemy.reading import Reading
    from pipeline_mediator.outbox.sqlalchemy.settling import Settling
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Upkeep"]

_TRIES = 5


class Upkeep:
    """Everything that is not on the way of a message from its commit to its broker."""

    def __init__(
        self, engine: AsyncEngine, tables: OutboxTables, reading: Reading, settling: Settling, keep: timedelta
    ) -> None:
        self._engine = engine
        self._settling = settling
        rows, lanes = tables.rows, tables.lanes
        self._rows, self._lanes = rows, lanes
        dialect = engine.dialect.name
        self._delete = delete_among(rows.c.id, "ids", dialect)
        self._old = by_index(
            select(rows.c.id)
            .where(rows.c.sent_at <= moment(keep.total_seconds()), rows.c.state == SENT)
            .order_by(rows.c.sent_at)
            .limit(bindparam("limit")),
            rows,
            f"ix_{rows.name}_sent",
        )
        self._whole = select(lanes.c.lane).where(lanes.c.lane == WHOLE).with_for_update(skip_locked=True)
        self._states = (
            select(rows.c.state, func.count(), seconds_since(func.min(rows.c.created_at)))
            .where(rows.c.state < SENT)
            .group_by(rows.c.state)
        )
        self._next_due = reading.seconds_since_next_due()
        self._dead = (
            select(*reading.message_columns(), rows.c.failures, rows.c.last_error, rows.c.created_at)
            .where(unsent(rows, DEAD), rows.c.id > bindparam("after"))
            .order_by(rows.c.id)
            .limit(bindparam("limit"))
        )
        self._retry = (
            update_among(rows.c.id, "ids", dialect)
            .where(rows.c.state == DEAD)
            .values(state=PENDING, hold=null(), failures=literal_column("1"), available_at=NOW)
        )
        self._park = update_among(rows.c.id, "ids", dialect).where(rows.c.state == DEAD).values(hold=null())
        self._chosen = lock_among(rows.c.id, "ids", dialect, also=(rows.c.state, rows.c.hold), skip_locked=False)
        self._dead_among = select(rows.c.id, rows.c.lane).where(among(rows.c.id, "ids", dialect), rows.c.state == DEAD)
        self._orphans = self._keys_behind_nothing()
        self._wait_for_lanes = lock_among(lanes.c.lane, "lanes", dialect, skip_locked=False)

    # -- before the first batch ----------------------------------------------------------------------------------------

    async def start(self, *, park: bool) -> None:
        """Create the lanes that are missing, and let go on what waits for nothing any more."""
        for tries_left in reversed(range(_TRIES)):
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(self._create_lanes)
                break
            except (IntegrityError, OperationalError):
                # Another relay starts at this moment; MariaDB may call that a deadlock.
                if not tries_left:
                    raise
        async with self._engine.begin() as connection:
            await connection.run_sync(self._release_orphans, park)

    def _create_lanes(self, connection: Connection) -> None:
        lanes = self._lanes
        there = set(connection.scalars(select(lanes.c.lane)))
        missing = [{"lane": lane} for lane in (*range(LANES), WHOLE) if lane not in there]
        if missing:
            untouched: dict[str, Any] = {"crashes": literal_column("0"), "alone": literal_column("0"), "served_at": NOW}
            connection.execute(insert(lanes).values(lane=bindparam("lane"), **untouched), missing)

    def _release_orphans(self, connection: Connection, park: bool) -> None:  # noqa: FBT001 - run_sync has no keywords
        """Rows behind dead letters that somebody deleted by hand, or that were kept before `park` was chosen.

        Only of lanes that nobody has: whoever has one may be making rows wait at this moment.
        """
        rows, lanes = self._rows, self._lanes
        free = select(lanes.c.lane).where(lanes.c.lane < WHOLE).with_for_update(skip_locked=True)
        concerned = connection.scalars(free).all()
        if park:
            # Found without a lock first: MariaDB would wait for every other row that a relay works on.
            holding = select(rows.c.id).where(unsent(rows, DEAD), rows.c.hold.is_not(None))
            ids = connection.scalars(holding.where(rows.c.lane.in_(concerned))).all()
            if ids:
                connection.execute(self._park, {"ids": ids})
        self._settling.release(connection, set(connection.scalars(self._orphans, {"lanes": concerned})))

    def _keys_behind_nothing(self) -> Select[Any]:
        """Keys whose first row that is held waits itself; by one walk along an index, however many rows wait.

        Asked row by row whether another is ahead, 200,000 rows of one key took minutes.
        """
        rows = self._rows
        first = select(func.min(rows.c.id).label("id")).where(rows.c.hold.is_not(None)).group_by(rows.c.hold)
        heads = by_index(first, rows, f"ix_{rows.name}_hold").subquery("heads")
        return (
            select(rows.c.hold)
            .join(heads, heads.c.id == rows.c.id)
            .where(rows.c.state == WAITING, rows.c.lane.in_(bindparam("lanes", expanding=True)))
        )

    # -- cleaning ------------------------------------------------------------------------------------------------------

    async def clean(self, limit: int) -> int:
        """See `OutboxStore.clean`. Whoever cleans has the lock of the row that stands for the whole outbox."""
        async with self._engine.begin() as connection:
            if await connection.scalar(self._whole) is None:
                return 0
            ids = (await connection.scalars(self._old, {"limit": limit})).all()
            if ids:
                await connection.execute(self._delete, {"ids": ids})
            return len(ids)

    # -- figures -------------------------------------------------------------------------------------------------------

    async def health(self) -> Health:
        """See `OutboxStore.health`. Counts what is unsent by index; a backlog of a million takes a while."""
        async with self._engine.connect() as connection:
            found = {state: (count, float(age)) for state, count, age in await connection.execute(self._states)}
        none = (0, 0.0)
        pending, delayed, waiting, dead = (found.get(state, none) for state in range(4))
        return Health(
            pending=pending[0] + delayed[0],
            waiting=waiting[0],
            dead=dead[0],
            oldest=max(0.0, pending[1], delayed[1], waiting[1]),
        )

    async def next_due(self) -> float | None:
        """See `OutboxStore.next_due`."""
        async with self._engine.connect() as connection:
            since = await connection.scalar(self._next_due)
        return None if since is None else max(0.0, -float(since))

    # -- dead letters --------------------------------------------------------------------------------------------------

    async def dead_letters(self, limit: int, after: int) -> Sequence[DeadLetter]:
        """See `OutboxStore.dead_letters`."""
        async with self._engine.connect() as connection:
            found = await connection.execute(self._dead, {"limit": limit, "after": after})
            return [
                DeadLetter(row.id, message_of(row), row.failures, row.last_error or "", _aware(row.created_at))
                for row in found
            ]

    async def retry(self, ids: Sequence[int]) -> int:
        """See `OutboxStore.retry`."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(self._make_due, list(ids))

    async def purge(self, ids: Sequence[int]) -> int:
        """See `OutboxStore.purge`."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(self._purge, list(ids))

    def _make_due(self, connection: Connection, ids: list[int]) -> int:
        # Found without a lock first: MariaDB would wait for every other row that a relay works on.
        dead = [number for number, _ in connection.execute(self._dead_among, {"ids": ids})]
        return connection.execute(self._retry, {"ids": dead}).rowcount if dead else 0

    def _purge(self, connection: Connection, ids: list[int]) -> int:
        dead_rows = connection.execute(self._dead_among, {"ids": ids}).all()
        # Not while a relay makes rows wait behind one that is about to go: they would wait for ever.
        connection.execute(self._wait_for_lanes, {"lanes": sorted({lane for _, lane in dead_rows})})
        found = connection.execute(self._chosen, {"ids": sorted(number for number, _ in dead_rows)}).all()
        dead = {number: hold for number, state, hold in found if state == int(DEAD.name)}
        if dead:
            connection.execute(self._delete, {"ids": list(dead)})
            self._settling.release(connection, {hold for hold in dead.values() if hold is not None})
        return len(dead)


def _aware(moment: datetime) -> datetime:
    """In UTC, which is what is stored where the database keeps no zone."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
