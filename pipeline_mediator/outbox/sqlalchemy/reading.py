"""Finding the rows of a batch: the earliest of their keys, without a gap, by indexes alone."""

from __future__ import annotations

import time
from collections import Counter
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import ARRAY, SmallInteger, bindparam, func, null, select, true, union_all

from pipeline_mediator.outbox.protocol import Failure, StoredMessage, StoredRow
from pipeline_mediator.outbox.sqlalchemy.batch import Found
from pipeline_mediator.outbox.sqlalchemy.clock import NOW, moment, seconds_since
from pipeline_mediator.outbox.sqlalchemy.rows import read_headers
from pipeline_mediator.outbox.sqlalchemy.sql import MYSQL, by_index, same, update_among
from pipeline_mediator.outbox.sqlalchemy.tables import DELAYED, PENDING, WAITING, WHOLE, unsent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import ColumnElement, CompoundSelect, Connection, ScalarSelect, Select

    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Reading"]

_SECONDS = 5.0
"""For how long rows are looked for behind others that are in the way; what is left is found next time."""
_WOKEN_AT_ONCE = 1000
"""Rows of a destination, at least."""
_ID, _LANE = 0, 12
"""Positions in a row that was read."""


class Reading:
    """What is due, read within whatever transaction makes its lanes one's own."""

    def __init__(self, tables: OutboxTables, dialect: str) -> None:
        self._rows = tables.rows
        self._lanes = tables.lanes
        self._dialect = dialect
        self._shares = self._shares_by_lateral()
        self._shares_of = cache(self._shares_by_union)
        self._delayed = self._destinations_with_delayed()
        self._due = self._delayed_and_due()
        self._wake = self._set_state(PENDING, null()).where(tables.rows.c.state == DELAYED)
        self._delay = self._set_state(DELAYED, self._rows.c.key)
        self._wait = self._set_state(WAITING, self._rows.c.key)

    # -- lanes ---------------------------------------------------------------------------------------------------------

    def lanes_with_work(self) -> Select[Any]:
        """Lanes with something pending; one probe of an index for each."""
        lanes = self._lanes
        return select(lanes.c.lane).where(lanes.c.lane < WHOLE, self.first_of(lanes.c.lane).is_not(None))

    def first_of(self, lane: ColumnElement[int]) -> ScalarSelect[int]:
        """The id of the first pending row of a lane."""
        rows = self._rows
        query = (
            select(rows.c.id)
            .where(unsent(rows, PENDING), same(rows.c.lane, lane))
            .order_by(rows.c.lane, rows.c.id)
            .limit(1)
        )
        return by_index(query, rows, self._index("lane")).correlate_except(rows).scalar_subquery()

    # -- delayed rows whose time has come ------------------------------------------------------------------------------

    def wake(self, connection: Connection, limit: int, without: Collection[str]) -> bool:
        """Make pending what backed off long enough and what waited for its destination; whether there was any."""
        woken = False
        for destination in self._destinations_due(connection, without):
            # No fewer, or a small batch could be all of rows that stand behind others, and what is due not be found.
            at_once = max(limit, _WOKEN_AT_ONCE)
            ids = connection.scalars(self._due, {"destination": destination, "limit": at_once}).all()
            if ids:
                # Another relay may be doing the same.
                woken = connection.execute(self._wake, {"ids": ids}).rowcount > 0 or woken
        return woken

    def has_due(self, connection: Connection, without: Collection[str]) -> bool:
        """Whether `wake` would find something."""
        return bool(self._destinations_due(connection, without))

    def _destinations_due(self, connection: Connection, without: Collection[str]) -> list[str]:
        return [name for name in connection.scalars(self._delayed) if name not in without]

    def _destinations_with_delayed(self) -> Select[Any]:
        """One probe of an index for each, however many rows are delayed."""
        destinations = self._delayed_destinations()
        first = self._first_delayed(destinations.c.destination)
        return select(destinations.c.destination).where(first.scalar_subquery() <= NOW)

    def _delayed_destinations(self) -> Any:
        """Their names, from one to the next as they stand in the index."""
        rows = self._rows
        first = select(func.min(rows.c.destination).label("destination")).where(rows.c.state == DELAYED)
        found = first.cte("delayed", recursive=True)
        following = rows.alias("following")
        after = select(func.min(following.c.destination)).where(
            following.c.state == DELAYED, following.c.destination > found.c.destination
        )
        return found.union_all(select(after.scalar_subquery()).where(found.c.destination.is_not(None)))

    def seconds_since_next_due(self) -> Select[Any]:
        """Of what is not due yet; negative."""
        destinations = self._delayed_destinations()
        next_due = self._first_delayed(destinations.c.destination, not_before=moment())
        return select(seconds_since(func.min(next_due.scalar_subquery()))).select_from(destinations)

    def _first_delayed(self, destination: Any, not_before: Any = None) -> Select[Any]:
        """When the first delayed row of a destination is due."""
        rows = self._rows.alias("delayed_row")
        query = (
            select(rows.c.available_at)
            .where(rows.c.state == DELAYED, same(rows.c.destination, destination))
            .order_by(rows.c.destination, rows.c.available_at)
            .limit(1)
        )
        if not_before is not None:
            query = query.where(rows.c.available_at > not_before)
        return by_index(query, rows, self._index("delayed"))

    def _delayed_and_due(self) -> Select[Any]:
        rows = self._rows
        query = (
            select(rows.c.id)
            .where(rows.c.state == DELAYED, same(rows.c.destination, bindparam("destination")))
            .where(rows.c.available_at <= moment())
            .order_by(rows.c.destination, rows.c.available_at)
            .limit(bindparam("limit"))
        )
        return by_index(query, rows, self._index("delayed"))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def find(
        self, connection: Connection, lanes: Sequence[int], limit: int, without: Collection[str], *, park: bool
    ) -> Found:
        """Rows to publish, and nothing that would overtake an earlier message of its key.

        What is in the way is taken out of the index, once: rows of destinations that are left out, and rows behind an
        earlier one of their key.
        """
        give_up = time.monotonic() + _SECONDS
        while True:
            raw = self.read(connection, lanes, limit)
            found, aside = _sort_out(raw, without, park=park)
            if aside.delayed:
                connection.execute(self._delay, {"ids": aside.delayed})
            if aside.waiting:
                connection.execute(self._wait, {"ids": aside.waiting})
            if found.rows or found.unreadable or not raw or time.monotonic() > give_up:
                return found

    def read(self, connection: Connection, lanes: Sequence[int], limit: int) -> list[Any]:
        """The first rows of the lanes, an equal share of each; if some lack much of theirs, more from the others.

        Each lane's rows are of one statement: what was committed between two of them may belong before what the second
        one reads.
        """
        if not lanes:
            return []
        share = -(-limit // len(lanes))
        raw = self._share_of(connection, lanes, share)
        while len(raw) < limit / 2:
            got = Counter(row[_LANE] for row in raw)
            more = [lane for lane in lanes if got[lane] == share]
            if not more:
                break
            share += -(-(limit - len(raw)) // len(more))
            raw = [row for row in raw if row[_LANE] not in more] + self._share_of(connection, more, share)
            lanes = more
        raw.sort(key=itemgetter(_ID))
        return raw[:limit]

    def _share_of(self, connection: Connection, lanes: Sequence[int], share: int) -> list[Any]:
        if self._dialect == "postgresql":
            return list(connection.execute(self._shares, {"lanes": lanes, "share": share}).all())
        parameters = {f"lane_{position}": lane for position, lane in enumerate(lanes)}
        return list(connection.execute(self._shares_of(len(lanes)), {**parameters, "share": share}).all())

    def message_columns(self) -> tuple[Any, ...]:
        """What `message_of` reads."""
        c = self._rows.c
        return c.id, c.message_id, c.name, c.version, c.destination, c.content_type, c.headers, c.body, c.key

    def _shares_by_lateral(self) -> Select[Any]:
        lanes = func.unnest(bindparam("lanes", type_=ARRAY(SmallInteger)))
        wanted = lanes.table_valued("lane", name="wanted").render_derived()
        share = self._share(wanted.c.lane).lateral("share")
        return self.with_fronts(select(share).select_from(wanted.join(share, true())))

    def _shares_by_union(self, lanes: int) -> Select[Any]:
        """For MariaDB, which knows no LATERAL."""
        shares = [self._share(bindparam(f"lane_{position}")) for position in range(lanes)]
        each = (select(share.subquery(f"share_{position}")) for position, share in enumerate(shares))
        return self.with_fronts(union_all(*each))

    def _share(self, lane: ColumnElement[int]) -> Select[Any]:
        rows = self._rows
        query = (
            self.row()
            .where(unsent(rows, PENDING), same(rows.c.lane, lane))
            .order_by(rows.c.lane, rows.c.id)
            .limit(bindparam("share"))
        )
        return by_index(query, rows, self._index("lane"))

    def row(self) -> Select[Any]:
        """Everything about a row but the front of its key."""
        c = self._rows.c
        age = seconds_since(c.created_at).label("age")
        columns: list[Any] = [*self.message_columns(), c.failures, age, c.last_error, c.lane]
        if self._dialect in MYSQL:
            columns.append(func.length(c.key).label("key_length"))
        return cast("Select[Any]", select(*columns))

    def with_fronts(self, query: Select[Any] | CompoundSelect[Any]) -> Select[Any]:
        """Rows, each with the first row of its key that is delayed, waiting or dead.

        Looked up once for each key: until a vacuum, the index leads past all the rows of a key that have been there. In
        the same statement as the rows, or a row might leave the front in between unseen.
        """
        if self._dialect in MYSQL:
            # Would run a common table expression once for each reference; it remembers what a subquery gave by itself.
            each = query.subquery("taken")
            front = self._front(each.c.key, each.c.key_length)
            return select(*(column for column in each.c if column.name != "key_length"), front.label("front"))
        taken = query.cte("taken")
        keys = select(taken.c.key).where(taken.c.key.is_not(None)).distinct().subquery("keys")
        fronts = select(keys.c.key, self._front(keys.c.key).label("front")).subquery("fronts")
        return select(taken, fronts.c.front).select_from(taken.outerjoin(fronts, fronts.c.key == taken.c.key))

    def _front(self, key: ColumnElement[Any], length: ColumnElement[Any] | None = None) -> ScalarSelect[Any]:
        rows = self._rows.alias("blocking")
        query = select(rows.c.id).where(same(rows.c.hold, key)).order_by(rows.c.hold, rows.c.id).limit(1)
        if length is not None:
            # They hold texts equal that differ in spaces at the end, here and where they remember subqueries.
            query = query.where(func.length(rows.c.hold) == length)
        return by_index(query, rows, self._index("hold")).scalar_subquery()

    def _set_state(self, state: Any, hold: Any) -> Any:
        return update_among(self._rows.c.id, "ids", self._dialect).values(state=state, hold=hold)

    def _index(self, purpose: str) -> str:
        return f"ix_{self._rows.name}_{purpose}"


class _Aside:
    def __init__(self) -> None:
        self.delayed: list[int] = []
        self.waiting: list[int] = []


def _sort_out(raw: Sequence[Any], without: Collection[str], *, park: bool) -> tuple[Found, _Aside]:
    found, aside = Found(), _Aside()
    held: set[str] = set()
    # In one piece, and by position: this is what the store does for each message that is published.
    number: int
    key: str | None
    for (
        number, message_id, name, version, destination, content_type, headers, body, key,
        failures, age, last_error, _, front,
    ) in raw:  # fmt: skip
        if without and destination in without:
            aside.delayed.append(number)
        elif key is not None and (key in held or (front is not None and front < number)):
            aside.waiting.append(number)
        else:
            if front is not None and key is not None:
                found.followed[number] = key
            try:
                attributes = read_headers(headers)
            except ValueError as error:
                failure = Failure(number, f"unreadable headers: {type(error).__name__}", None)
                found.unreadable[number] = (failure, key, failures + 1)
                if park:
                    continue
            else:
                message = StoredMessage(message_id, name, version, destination, content_type, body, attributes, key)
                found.rows.append(StoredRow(number, message, failures, age))
                found.last_error = last_error
                continue
        if key is not None:
            held.add(key)
    return found, aside
