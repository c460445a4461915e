"""SQLAlchemy's async sessions and connections as units of work, and what SQLite needs to be a safe one."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import ConfigurationError, DatabaseNotPreparedError, MissingExtraError

try:
    from sqlalchemy import Engine, event
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.util import await_only
except ModuleNotFoundError as error:  # pragma: no cover - shown in a subprocess
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise MissingExtraError("pipeline_mediator.unit_of_work.sqlalchemy", "SQLAlchemy", "sqlalchemy") from error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["check_engine_of", "control_of", "prepare_sqlite", "yielded_by_method_of"]

_SAVEPOINT_SECONDS = 30.0
"""How long releasing or rolling back a savepoint may take."""

_DRIVERS = frozenset({"asyncpg", "psycopg", "aiosqlite"})
_NO_ANSWER = ("08", "57P")
"""SQLSTATE classes after which it is not known what became of COMMIT: connection exception, operator intervention."""


def prepare_sqlite(engine: AsyncEngine, *, busy_timeout: float = 5.0) -> AsyncEngine:
    """Make an SQLite engine keep every update: BEGIN IMMEDIATE, write-ahead log, and waiting for a lock. Returns it.

    SQLite's default is to begin without a lock and to take it at the first write. Two transactions that read the same
    row first then overwrite each other or fail. With BEGIN IMMEDIATE the second one waits for the first, at most
    `busy_timeout` seconds.

        engine = prepare_sqlite(create_async_engine("sqlite+aiosqlite:///shop.db"))
        sessions = async_sessionmaker(engine, expire_on_commit=False)

    What only reads needs no lock, and should take none: a stream may last. An execution option says so for what is
    begun through it, which may then read beside a writer, and must not write.

        reading = async_sessionmaker(engine.execution_options(sqlite_begin="DEFERRED"))
        Pipeline(
            only((Query, StreamQuery), TransactionMiddleware(reading.begin)),
            unless((Query, StreamQuery), TransactionMiddleware(sessions.begin)),
        )

    Source: SQLAlchemy's documentation, "Serializable isolation / Savepoints / Transactional DDL" of the SQLite dialect.
    """
    sync_engine = engine.sync_engine
    if sync_engine.dialect.name != "sqlite":
        raise DatabaseNotPreparedError(
            f"prepare_sqlite was given an engine for {sync_engine.dialect.name}; it needs none"
        )
    if _is_prepared(sync_engine):
        return engine

    def set_up(connection: Any, _record: Any) -> None:
        # The driver must not begin by itself: BEGIN IMMEDIATE does.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(busy_timeout * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.close()

    event.listen(sync_engine, "connect", set_up)
    event.listen(sync_engine, "begin", _begin)
    return engine


def _begin(connection: Any) -> None:
    kind = connection.get_execution_options().get("sqlite_begin", "IMMEDIATE")
    if kind not in {"IMMEDIATE", "DEFERRED"}:
        raise ConfigurationError(f'execution_options(sqlite_begin={kind!r}): it is "IMMEDIATE" or "DEFERRED"')
    connection.exec_driver_sql(f"BEGIN {kind}")


def check_engine_of(source: object) -> bool:
    """Raise `DatabaseNotPreparedError` for an SQLite engine that `prepare_sqlite` has not seen; False if none is."""
    engine = _engine_of(source)
    if engine is None:
        return False
    if engine.dialect.name == "sqlite" and not _is_prepared(engine):
        raise DatabaseNotPreparedError(
            "TransactionMiddleware was given an SQLite engine as SQLAlchemy sets it up by default: concurrent messages "
            "would lose updates. Wrap it: prepare_sqlite(create_async_engine(...)), from "
            "pipeline_mediator.unit_of_work.sqlalchemy."
        )
    return True


def _is_prepared(engine: Engine) -> bool:
    # Asked of the listeners, not with event.contains: an engine.execution_options(...) has those of its origin.
    return _begin in engine.dispatch.begin


def _engine_of(source: object) -> Engine | None:
    bound: Any = source
    if isinstance(source, async_sessionmaker):
        bound = source.kw.get("bind")
    elif isinstance(source, AsyncSession):
        bound = source.bind
    if isinstance(bound, AsyncConnection):
        bound = bound.engine
    return bound.sync_engine if isinstance(bound, AsyncEngine) else None


def yielded_by_method_of(owner: object) -> type | None:
    """What `sessions.begin` and `engine.begin` yield."""
    maker: Any = owner
    if isinstance(owner, async_sessionmaker):
        session_type: type = maker.class_
        return session_type
    return AsyncConnection if isinstance(owner, AsyncEngine) else None


def control_of(resource: object) -> _SessionControl | _ConnectionControl | None:
    """The control of a session or a connection."""
    if isinstance(resource, AsyncSession):
        return _SessionControl(resource)
    if isinstance(resource, AsyncConnection):
        return _ConnectionControl(resource)
    return None


class _SessionControl:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._undone: list[SessionTransaction] | None = None
        self.committed = False

    def watch(
        self, before_commit: Callable[[], Awaitable[None] | None], after_commit: Callable[[], None] | None = None
    ) -> None:
        # SQLAlchemy reports the release of a savepoint as a commit too.
        def before(session: Session) -> None:
            if not session.in_nested_transaction() and (step := before_commit()) is not None:
                await_only(step)

        def after(session: Session) -> None:
            if not session.in_nested_transaction():
                self.committed = True
                if after_commit is not None:
                    after_commit()

        event.listen(self._session.sync_session, "before_commit", before)
        event.listen(self._session.sync_session, "after_commit", after)

    async def begin(self) -> None:
        if not self._session.in_transaction():
            _ = await self._session.begin()

    async def flush(self) -> None:
        await self._session.flush()

    async def commit(self) -> None:
        # After a commit of the handler's own there is none open, and commit() would complain about that.
        if self._session.in_transaction():
            await self._session.commit()

    def outcome_unknown(self, error: BaseException) -> bool:
        return _no_answer(error)

    def place(self) -> Callable[[], bool]:
        session = self._session.sync_session
        undone = self._undone
        if undone is None:
            undone = self._undone = []
            event.listen(session, "after_soft_rollback", self._rolled_back)
        innermost = session.get_nested_transaction() or session.get_transaction()

        def remains() -> bool:
            around = innermost
            while around is not None:
                if around in undone:
                    return False
                around = around.parent
            return True

        return remains

    def _rolled_back(self, _session: Session, undone: SessionTransaction) -> None:
        if self._undone is not None:
            self._undone.append(undone)

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return _finished(self._session.begin_nested())


class _ConnectionControl:
    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._asked = False
        self._places: _Places | None = None

    @property
    def committed(self) -> bool:
        # A transaction whose COMMIT failed stays, because it has to be rolled back.
        return self._asked and self._connection.get_transaction() is None

    def watch(
        self, before_commit: Callable[[], Awaitable[None] | None], after_commit: Callable[[], None] | None = None
    ) -> None:
        def before(_connection: Connection) -> None:
            self._asked = True
            if (step := before_commit()) is not None:
                await_only(step)

        event.listen(self._connection.sync_connection, "commit", before)

    async def begin(self) -> None:
        if not self._connection.in_transaction():
            _ = await self._connection.begin()

    async def flush(self) -> None:
        """Nothing is kept in memory."""

    async def commit(self) -> None:
        await self._connection.commit()

    def outcome_unknown(self, error: BaseException) -> bool:
        return _no_answer(error)

    def place(self) -> Callable[[], bool]:
        if self._places is None:
            self._places = _Places(self._connection.sync_connection)
        return self._places.here()

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return _finished(self._connection.begin_nested())


class _Places:
    """Where in a connection's transaction something was done: inside which savepoint.

    SQLAlchemy numbers a connection's savepoints. One that is rolled back has been open since it was set, so whatever
    was done inside it, or inside one with a higher number, is undone.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._done: list[_Done] = []
        event.listen(connection, "rollback_savepoint", self._rolled_back)
        event.listen(connection, "rollback", self._all_rolled_back)

    def here(self) -> Callable[[], bool]:
        # No public attribute tells the name of a savepoint.
        innermost: Any = self._connection.get_nested_transaction()
        done = _Done(0 if innermost is None else _number_of(innermost._savepoint))
        self._done.append(done)
        return done.remains

    def _rolled_back(self, _connection: Connection, name: str, _context: object) -> None:
        self._undo_from(_number_of(name))

    def _all_rolled_back(self, _connection: Connection) -> None:
        self._undo_from(0)

    def _undo_from(self, number: int) -> None:
        for done in self._done:
            done.undone |= done.savepoint >= number


def _number_of(savepoint: str) -> int:
    return int(savepoint.rpartition("_")[2])


class _Done:
    __slots__ = ("savepoint", "undone")

    def __init__(self, savepoint: int) -> None:
        self.savepoint = savepoint
        self.undone = False

    def remains(self) -> bool:
        return not self.undone


@asynccontextmanager
async def _finished(savepoint: AbstractAsyncContextManager[Any]) -> AsyncGenerator[None]:
    """A savepoint that a cancellation does not cut off while it is rolled back, so that the rest can go on."""
    await savepoint.__aenter__()
    try:
        yield
    except BaseException as error:
        await finish(savepoint.__aexit__(type(error), error, error.__traceback__), seconds=_SAVEPOINT_SECONDS)
        raise
    await finish(savepoint.__aexit__(None, None, None), seconds=_SAVEPOINT_SECONDS)


def _no_answer(error: BaseException) -> bool:
    if isinstance(error, DBAPIError):
        state = getattr(error.orig, "sqlstate", None) or ""
        return error.connection_invalidated or state.startswith(_NO_ANSWER)
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in _DRIVERS
