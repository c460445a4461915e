"""Sessions and connections as units of work, and what makes SQLite a safe one."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidRequestError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pipeline_mediator.context import Context
from pipeline_mediator.errors import ConfigurationError, DatabaseNotPreparedError
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.unit_of_work import check_engine_of, control_of, yielded_by
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite
from tests.middlewares.databases import Database, put
from tests.middlewares.shop import Memory, MemorySession, Place, Reserve, mediator_of

if TYPE_CHECKING:
    from fractions import Fraction as OnlyForCheckers


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def unprepared(tmp_path: Path) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/unprepared.db")
    yield engine
    await engine.dispose()


class Tenant(AsyncSession):
    """A session class of the application's own."""


# -- prepare_sqlite ----------------------------------------------------------------------------------------------------


async def pragma(engine: AsyncEngine, name: str) -> object:
    async with engine.connect() as connection:
        return (await connection.execute(text(f"PRAGMA {name}"))).scalar()


async def test_it_sets_every_connection_up(unprepared: AsyncEngine) -> None:
    assert prepare_sqlite(unprepared, busy_timeout=1.5) is unprepared
    assert await pragma(unprepared, "journal_mode") == "wal"
    assert await pragma(unprepared, "busy_timeout") == 1500


async def test_a_transaction_holds_the_lock_from_its_begin(unprepared: AsyncEngine) -> None:
    """So nobody can write between what it reads and what it writes."""
    engine = prepare_sqlite(unprepared, busy_timeout=0)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE placed (n int)"))
    async with engine.begin() as first:
        await first.execute(text("SELECT n FROM placed"))
        with pytest.raises(OperationalError, match="database is locked"):
            async with engine.begin():
                pass


async def test_what_only_reads_may_do_without_the_lock(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(unprepared, busy_timeout=0)
    reading = engine.execution_options(sqlite_begin="DEFERRED")
    assert check_engine_of(reading)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE placed (n int)"))
    async with reading.begin() as reader:
        assert (await reader.execute(text("SELECT count(*) FROM placed"))).scalar() == 0
        async with engine.begin() as writer:
            await writer.execute(text("INSERT INTO placed VALUES (1)"))
        assert (await reader.execute(text("SELECT count(*) FROM placed"))).scalar() == 0
    async with reading.begin() as reader:
        assert (await reader.execute(text("SELECT count(*) FROM placed"))).scalar() == 1


async def test_an_unknown_way_to_begin_is_refused(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(unprepared).execution_options(sqlite_begin="EXCLUSIVELY")
    with pytest.raises(ConfigurationError, match="IMMEDIATE"):
        async with engine.begin():
            pass


async def test_a_rollback_takes_even_a_new_table_back(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(unprepared)
    async with engine.connect() as connection:
        await connection.execute(text("CREATE TABLE placed (n int)"))
        await connection.rollback()
        assert (await connection.execute(text("SELECT count(*) FROM sqlite_master"))).scalar() == 0


async def test_twice_is_once(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(prepare_sqlite(unprepared))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE placed (n int)"))


def test_another_database_needs_none() -> None:
    with pytest.raises(DatabaseNotPreparedError, match="an engine for postgresql; it needs none"):
        prepare_sqlite(create_async_engine("postgresql+asyncpg://localhost/none"))


# -- an engine that would lose updates ---------------------------------------------------------------------------------


def begins_of(engine: AsyncEngine) -> list[Any]:
    return [engine.begin, engine.connect, async_sessionmaker(engine).begin, async_sessionmaker(engine)]


async def test_an_unprepared_engine_is_refused_at_construction(unprepared: AsyncEngine) -> None:
    for unit_of_work in begins_of(unprepared):
        with pytest.raises(DatabaseNotPreparedError, match="concurrent messages would lose updates"):
            TransactionMiddleware(unit_of_work)


async def test_a_prepared_one_is_taken_and_so_is_what_derives_from_it(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(unprepared)
    derived = engine.execution_options(schema_translate_map={"tenant": None})
    for unit_of_work in begins_of(engine) + begins_of(derived):
        TransactionMiddleware(unit_of_work)


async def test_what_is_bound_to_a_connection_is_judged_by_its_engine(unprepared: AsyncEngine) -> None:
    async with unprepared.connect() as connection:
        for unit_of_work in (connection.begin, async_sessionmaker(connection).begin, AsyncSession(connection).begin):
            with pytest.raises(DatabaseNotPreparedError):
                TransactionMiddleware(unit_of_work)


async def test_other_databases_are_taken_as_they_are() -> None:
    for unit_of_work in begins_of(create_async_engine("postgresql+asyncpg://localhost/none")):
        TransactionMiddleware(unit_of_work)


async def test_behind_a_function_it_is_refused_when_it_is_first_used(tmp_path: Path) -> None:
    """For each engine: one prepared tenant does not vouch for the next."""
    engines = {name: create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/{name}.db") for name in ("good", "bad")}
    prepare_sqlite(engines["good"])
    handled: list[str] = []

    @asynccontextmanager
    async def of_tenant(context: Context) -> AsyncGenerator[AsyncSession]:
        async with async_sessionmaker(engines[context.headers["tenant"]]).begin() as session:
            yield session

    async def handle(command: Place, context: Context, session: AsyncSession) -> int:
        handled.append(context.headers["tenant"])
        return 1

    mediator = mediator_of({Place: handle}, TransactionMiddleware(of_tenant))
    await mediator.send(Place(), headers={"tenant": "good"})
    for _ in range(2):
        with pytest.raises(DatabaseNotPreparedError):
            await mediator.send(Place(), headers={"tenant": "bad"})
    assert handled == ["good"]
    for engine in engines.values():
        await engine.dispose()


def test_what_is_not_known_is_not_judged() -> None:
    assert check_engine_of(Memory().begin) is False
    assert check_engine_of(async_sessionmaker()) is False
    assert check_engine_of(create_engine("sqlite://")) is False


# -- what it yields ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def annotated(context: Context) -> AsyncGenerator[Tenant]:
    raise NotImplementedError
    yield


@asynccontextmanager
async def with_unknown_parameter(context: OnlyForCheckers) -> AsyncGenerator[Tenant]:
    raise NotImplementedError
    yield


@asynccontextmanager
async def with_unknown_result(context: Context) -> AsyncGenerator[OnlyForCheckers]:
    raise NotImplementedError
    yield


@asynccontextmanager
async def unannotated(context: Context) -> AsyncGenerator[Any]:
    raise NotImplementedError
    yield


unannotated.__wrapped__.__annotations__.clear()  # type: ignore[attr-defined]


def plain(context: Context) -> AbstractAsyncContextManager[Tenant]:
    raise NotImplementedError


def test_what_it_yields_is_told_from_the_callable() -> None:
    engine = create_async_engine("postgresql+asyncpg://localhost/none")
    assert yielded_by(engine.begin) is AsyncConnection
    assert yielded_by(async_sessionmaker(engine).begin) is AsyncSession
    assert yielded_by(async_sessionmaker(engine, class_=Tenant).begin) is Tenant
    assert yielded_by(annotated) is Tenant
    assert yielded_by(with_unknown_parameter) is Tenant
    assert yielded_by(plain) is Tenant
    assert yielded_by(Memory().begin) is MemorySession


def test_where_it_cannot_be_told_it_is_none() -> None:
    assert yielded_by(with_unknown_result) is None
    assert yielded_by(unannotated) is None
    assert yielded_by(lambda: None) is None
    assert yielded_by(Memory()) is None


async def test_a_session_reaches_handlers_under_its_class_and_its_base(unprepared: AsyncEngine) -> None:
    engine = prepare_sqlite(unprepared)
    seen: list[object] = []

    async def by_class(command: Place, session: Tenant) -> int:
        seen.append(session)
        return await mediator.send(Reserve())

    async def by_base(command: Reserve, session: AsyncSession) -> int:
        seen.append(session)
        return 2

    mediator = mediator_of(
        {Place: by_class, Reserve: by_base}, TransactionMiddleware(async_sessionmaker(engine, class_=Tenant).begin)
    )
    await mediator.send(Place())
    assert seen[0] is seen[1]
    assert type(seen[0]) is Tenant


# -- control -----------------------------------------------------------------------------------------------------------


def test_what_is_not_of_sqlalchemy_has_no_control() -> None:
    assert control_of(MemorySession()) is None
    assert control_of(create_engine("sqlite://")) is None


async def test_what_a_handler_adds_after_its_own_commit_is_an_error_not_a_loss(database: Database) -> None:
    """Another statement in a transaction that is over; SQLAlchemy says so."""

    async def place(command: Place, session: AsyncSession) -> int:
        await put(session, 1)
        await session.commit()
        await put(session, 2)
        return 1

    mediator = mediator_of({Place: place}, TransactionMiddleware(database.sessions.begin))
    with pytest.raises(InvalidRequestError, match="closed transaction"):
        await mediator.send(Place())
    assert await database.rows() == [1]


class _DriverError(Exception):
    def __init__(self, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate


def dbapi_error(sqlstate: str | None = None, *, invalidated: bool = False) -> DBAPIError:
    return InterfaceError("COMMIT", None, _DriverError(sqlstate), connection_invalidated=invalidated)


@pytest.mark.parametrize(
    ("error", "unknown"),
    [
        (dbapi_error("08006"), True),  # connection failure
        (dbapi_error("57P01"), True),  # terminated by an administrator
        (dbapi_error(invalidated=True), True),
        (ConnectionResetError(), True),
        (EOFError(), True),
        (TimeoutError(), True),
        (dbapi_error("40001"), False),  # serialization failure
        (dbapi_error("23505"), False),  # unique violation
        (dbapi_error("57014"), False),  # query cancelled
        (dbapi_error(), False),
        (ValueError("of a listener"), False),
    ],
    ids=repr,
)
async def test_which_errors_of_commit_mean_that_no_answer_came(
    database: Database, error: Exception, *, unknown: bool
) -> None:
    async with database.sessions() as session, database.engine.connect() as connection:
        for resource in (session, connection):
            control = control_of(resource)
            assert control is not None
            assert control.outcome_unknown(error) is unknown


async def test_an_error_of_the_driver_itself_means_that_no_answer_came(database: Database) -> None:
    """asyncpg raises some that SQLAlchemy does not know, such as InternalClientError."""
    InternalClientError = importlib.import_module("asyncpg").InternalClientError  # noqa: N806 - it has no types

    async with database.sessions() as session:
        control = control_of(session)
        assert control is not None
        assert control.outcome_unknown(InternalClientError())


async def test_twenty_at_once_each_add_one(tmp_path: Path) -> None:
    """On a connection, without a session: 20, because BEGIN IMMEDIATE makes each wait for the one before."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    await database.create()
    async with database.other_connection() as connection:
        await put(connection, 0)

    async def count(command: Place, connection: AsyncConnection) -> int:
        n: int = (await connection.execute(text("SELECT n FROM placed"))).scalar_one()
        await asyncio.sleep(0)
        await connection.execute(text("UPDATE placed SET n = :n"), {"n": n + 1})
        return n + 1

    mediator = mediator_of({Place: count}, TransactionMiddleware(database.engine.begin))
    await asyncio.gather(*(mediator.send(Place()) for _ in range(20)))
    assert await database.rows() == [20]
    await database.close()
