"""Storing messages in the application's own transaction."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, insert, literal_column, select, union_all
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from pipeline_mediator.databases import missing_from
from pipeline_mediator.errors import ConfigurationError, OutboxFullError, name_of
from pipeline_mediator.outbox.sqlalchemy.clock import NOW
from pipeline_mediator.outbox.sqlalchemy.rows import COLUMNS, columns_of
from pipeline_mediator.outbox.sqlalchemy.schema import schema_error
from pipeline_mediator.outbox.sqlalchemy.sql import by_index
from pipeline_mediator.outbox.sqlalchemy.tables import DELAYED, PENDING, WAITING, unsent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select

    from pipeline_mediator.outbox.protocol import StoredMessage
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["Writing"]

_COUNT_SECONDS = 1.0
"""For how long a count of what waits will do."""


class Writing:
    """One executemany for all messages of a transaction, and one notification where somebody may listen."""

    def __init__(self, tables: OutboxTables, max_pending: int | None, channel: str | None) -> None:
        self._tables = tables
        self._insert = insert(tables.rows).values(
            **{name: bindparam(name) for name in COLUMNS},
            state=PENDING,
            failures=literal_column("0"),
            created_at=NOW,
            available_at=NOW,
        )
        self._notify = None if channel is None else select(func.pg_notify(channel, ""))
        self._room = None if max_pending is None else _Room(tables, max_pending)

    async def add(self, resource: object, messages: Sequence[StoredMessage]) -> None:
        """See `OutboxStore.add`."""
        connection = await self._connection_of(resource)
        if not messages:
            return
        rows = [columns_of(message) for message in messages]
        try:
            if self._room is not None:
                await self._room.take(connection, len(rows))
            await connection.execute(self._insert, rows)
            if self._notify is not None and connection.dialect.name == "postgresql":
                await connection.execute(self._notify)
        except DBAPIError as error:
            # Its text would show the parameters, which are the messages.
            error.hide_parameters = True
            problem = missing_from(error)
            if problem is not None:
                raise schema_error(self._tables, [problem]) from error
            raise

    async def _connection_of(self, resource: object) -> AsyncConnection:
        if isinstance(resource, AsyncSession):
            return await resource.connection(bind_arguments={"clause": self._tables.rows})
        if isinstance(resource, AsyncConnection):
            return resource
        raise ConfigurationError(
            f"SQLAlchemyOutbox writes through an AsyncSession or AsyncConnection, and the transaction's resource is a "
            f"{name_of(type(resource))}. Let TransactionMiddleware begin with sessions.begin or engine.begin."
        )


class _Room:
    """How many messages may still be stored. Counted once a second and before anything is refused.

    In between, what this process adds is counted along; what others add, and what relays send, is not. So `max_pending`
    may be exceeded by what the other processes write within a second.
    """

    def __init__(self, tables: OutboxTables, max_pending: int) -> None:
        self._max_pending = max_pending
        self._count = _bounded_count(tables, max_pending + 1)
        self._waiting = 0
        self._good_until = 0.0

    async def take(self, connection: AsyncConnection, added: int) -> None:
        if self._waiting + added > self._max_pending or time.monotonic() >= self._good_until:
            self._waiting = await connection.scalar(self._count) or 0
            self._good_until = time.monotonic() + _COUNT_SECONDS
        if self._waiting + added > self._max_pending:
            raise OutboxFullError(self._waiting, added, self._max_pending)
        self._waiting += added


def _bounded_count(tables: OutboxTables, limit: int) -> Any:
    """What is neither sent nor dead, by index alone, of each state no further than `limit`."""
    rows = tables.rows

    def some(name: str, state: ColumnElement[int]) -> Select[Any]:
        # In the order of the index, or a planner with old statistics may begin with the rows that are kept.
        query = select(rows.c.id).where(unsent(rows, state)).order_by(rows.c.lane, rows.c.id).limit(limit)
        return select(by_index(query, rows, f"ix_{rows.name}_lane").subquery(name))

    each = some("pending", PENDING), some("delayed", DELAYED), some("waiting", WAITING)
    return select(func.count()).select_from(union_all(*each).subquery("counted"))
