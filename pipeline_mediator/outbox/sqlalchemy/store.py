"""`SQLAlchemyOutbox`: the outbox that an application writes to and a relay publishes from."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.outbox.sqlalchemy.leasing import Leasing
from pipeline_mediator.outbox.sqlalchemy.listening import Listening, channel_of
from pipeline_mediator.outbox.sqlalchemy.locking import Locking
from pipeline_mediator.outbox.sqlalchemy.reading import Reading
from pipeline_mediator.outbox.sqlalchemy.schema import validate
from pipeline_mediator.outbox.sqlalchemy.settling import Settling
from pipeline_mediator.outbox.sqlalchemy.upkeep import Upkeep
from pipeline_mediator.outbox.sqlalchemy.writing import Writing
from pipeline_mediator.unit_of_work.sqlalchemy import check_engine_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.outbox.protocol import Batch, DeadLetter, Health, Policy, StoredMessage
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["SQLAlchemyOutbox"]

_SECONDS = 60.0
"""For whatever else is asked of the database. To its end also if the caller is cancelled: a statement that is cut off
leaves a connection behind, and with aiosqlite a thread."""

_TAKERS: dict[str, type[Locking | Leasing]] = {
    "postgresql": Locking,
    "mysql": Locking,
    "mariadb": Locking,
    "sqlite": Leasing,
}


class SQLAlchemyOutbox:
    """An `OutboxStore` in the application's own database: PostgreSQL, MariaDB ≥ 10.6, MySQL 8 or SQLite.

        OUTBOX = outbox_tables(Base.metadata)
        store = SQLAlchemyOutbox(engine, OUTBOX)
        Pipeline(TransactionMiddleware(sessions.begin), OutboxMiddleware(store), PublishMiddleware(broker))

    Without an engine it can be written to and nothing else: for tenants, each with a database and a relay of its own.

    `max_pending`: more messages than these may not wait; then `add` raises `OutboxFullError`, and the transaction is
    rolled back. Counted once a second, so it may be exceeded by what other processes write within one.
    `notify`: tell other processes of commits, by PostgreSQL's NOTIFY; elsewhere it does nothing. It costs a writer a
    round trip, and spares a relay in another process the wait until it polls.
    `keep`: for how long what was sent stays in the table, until `clean`; zero deletes it when it was sent.

    On PostgreSQL, MariaDB and MySQL a relay holds one connection of the engine's pool, with an open transaction, for as
    long as it publishes a batch, and one more to listen. The lease is a timeout of the server's session: not below one
    second, and in whole ones, on MariaDB and MySQL. On SQLite one relay publishes at a time.

    Raises `ConfigurationError` for another database, `DatabaseNotPreparedError` for an SQLite engine that
    `prepare_sqlite` has not seen.
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        tables: OutboxTables,
        *,
        max_pending: int | None = None,
        notify: bool = False,
        keep: timedelta = timedelta(0),
    ) -> None:
        self._channel = channel_of(tables.rows.fullname) if notify else None
        self._writing = Writing(tables, max_pending, self._channel)
        self._reading = None if engine is None else _Reading(engine, tables, keep)
        self._wakes: list[Callable[[], None]] = []

    # -- the application's side ----------------------------------------------------------------------------------------

    async def add(self, resource: object, messages: Sequence[StoredMessage], /) -> None:
        """Write them in the open transaction of a session or a connection; see `OutboxStore.add`."""
        await self._writing.add(resource, messages)

    def committed(self) -> None:
        """Wake the relays of this process."""
        for wake in tuple(self._wakes):
            wake()

    # -- a relay's side ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def take(self, limit: int, policy: Policy, /, *, without: Sequence[str] = ()) -> AsyncGenerator[Batch | None]:
        """Take what is due; see `OutboxStore.take`."""
        reading = self._own()
        await reading.start(park=policy.park)
        async with reading.taker.take(limit, policy, frozenset(without)) as batch:
            yield batch

    def on_commit(self, wake: Callable[[], None], /) -> Callable[[], None]:
        """Call `wake` after commits that stored messages through this object; returns how to stop that."""
        self._wakes.append(wake)

        def stop() -> None:
            with suppress(ValueError):
                self._wakes.remove(wake)

        return stop

    def listen(self) -> AbstractAsyncContextManager[None]:
        """While open, hear of other processes' commits too: on PostgreSQL with `notify`."""
        reading = self._own()
        if self._channel is None or reading.engine.dialect.name != "postgresql":
            return nullcontext()
        return Listening(reading.engine, self._channel, self.committed).listen()

    async def clean(self, limit: int, /) -> int:
        """Delete what was sent longer than `keep` ago; see `OutboxStore.clean`."""
        return await finish(self._own().upkeep.clean(limit), seconds=_SECONDS)

    async def health(self) -> Health:
        """Count what is not sent. By index, but every row: a second for some million."""
        return await finish(self._own().upkeep.health(), seconds=_SECONDS)

    async def next_due(self) -> float | None:
        """Seconds until something that backs off is due."""
        return await finish(self._own().upkeep.next_due(), seconds=_SECONDS)

    # -- an operator's side --------------------------------------------------------------------------------------------

    async def validate_schema(self) -> None:
        """Raise `SchemaError` with every difference between the tables in the database and what this version needs."""
        reading = self._own()
        await finish(validate(reading.engine, reading.tables), seconds=_SECONDS)

    async def dead_letters(self, limit: int, /, *, after: int = 0) -> Sequence[DeadLetter]:
        """What was given up, by id, beginning behind `after`."""
        return await finish(self._own().upkeep.dead_letters(limit, after), seconds=_SECONDS)

    async def retry(self, ids: Sequence[int], /) -> int:
        """Make dead letters due again, with one failure to their name."""
        return await finish(self._own().upkeep.retry(ids), seconds=_SECONDS)

    async def purge(self, ids: Sequence[int], /) -> int:
        """Delete dead letters for good. Waits for a relay that has their lanes to finish its batch."""
        return await finish(self._own().upkeep.purge(ids), seconds=_SECONDS)

    def _own(self) -> _Reading:
        if self._reading is None:
            raise ConfigurationError(
                "this SQLAlchemyOutbox was made without an engine, so it can only be written to. Give it the engine of "
                "the database that a relay reads: SQLAlchemyOutbox(engine, tables)."
            )
        return self._reading


class _Reading:
    """What needs an engine."""

    def __init__(self, engine: AsyncEngine, tables: OutboxTables, keep: timedelta) -> None:
        check_engine_of(engine)
        dialect = engine.dialect.name
        if dialect not in _TAKERS:
            raise ConfigurationError(f"SQLAlchemyOutbox knows {', '.join(sorted(_TAKERS))}, and not {dialect}")
        self.engine = engine
        self.tables = tables
        reading = Reading(tables, dialect)
        settling = Settling(tables, dialect, keep=keep > timedelta(0))
        self.taker = _TAKERS[dialect](engine, tables, reading, settling)
        self.upkeep = Upkeep(engine, tables, reading, settling, keep)
        self._started: set[bool] = set()

    async def start(self, *, park: bool) -> None:
        """Once for each policy."""
        if park not in self._started:
            await finish(self.upkeep.start(park=park), seconds=_SECONDS)
            self._started.add(park)
