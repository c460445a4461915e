"""A message in a transaction of the caller's: this library neither commits it nor repeats anything in it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from pipeline_mediator.context import Context
from pipeline_mediator.errors import ConfigurationError, EmitError, TransactionDoomedError, TransactionError
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.middlewares.databases import Database, put
from tests.middlewares.shop import (
    Memory,
    MemorySession,
    Place,
    Placed,
    RecordingBroker,
    Reserve,
    Reserved,
    mediator_of,
)


async def place(command: Place, context: Context, session: MemorySession) -> int:
    session.rows.append(command.n)
    context.emit(Reserved())
    return command.n


async def reserved(event: Reserved, session: MemorySession) -> None:
    session.rows.append(event.n)


async def test_events_run_inside_and_nothing_is_committed() -> None:
    memory = Memory()
    session = MemorySession()
    mediator = mediator_of({Place: place, Reserved: reserved}, TransactionMiddleware(memory.begin))
    assert await mediator.send(Place(), transaction=session) == 1
    assert session.rows == [1, 3]
    assert memory.log == []


async def test_nothing_is_repeated_in_it() -> None:
    """What failed may have left the caller's transaction unusable; only the caller can begin another."""
    attempts: list[int] = []

    async def fail(command: Place) -> int:
        attempts.append(1)
        raise ConnectionError("reset")

    mediator = mediator_of({Place: fail}, RetryMiddleware(3), TransactionMiddleware(Memory().begin))
    with pytest.raises(ConnectionError):
        await mediator.send(Place(), transaction=MemorySession())
    assert attempts == [1]


async def test_what_its_handler_sends_joins_it() -> None:
    memory = Memory()
    session = MemorySession()

    async def reserve(command: Reserve, session: MemorySession) -> int:
        session.rows.append(command.n)
        return command.n

    async def place_and_reserve(command: Place, session: MemorySession) -> int:
        session.rows.append(command.n)
        return await mediator.send(Reserve())

    mediator = mediator_of({Place: place_and_reserve, Reserve: reserve}, TransactionMiddleware(memory.begin))
    await mediator.send(Place(), transaction=session)
    assert session.rows == [1, 2]
    assert memory.log == []


async def test_a_nested_failure_that_was_caught_reaches_the_caller() -> None:
    """Or the caller would commit half of it."""

    async def fail(command: Reserve) -> int:
        raise ValueError("out of stock")

    async def catch(command: Place) -> int:
        with pytest.raises(ValueError, match="out of stock"):
            await mediator.send(Reserve())
        return 1

    mediator = mediator_of({Place: catch, Reserve: fail}, TransactionMiddleware(Memory().begin))
    with pytest.raises(TransactionDoomedError, match="Place may not commit: Reserve"):
        await mediator.send(Place(), transaction=MemorySession())


@pytest.mark.parametrize("how", ["queued", "at once"])
async def test_an_event_for_a_broker_is_refused(how: str) -> None:
    broker = RecordingBroker()

    async def place_and_emit(command: Place, context: Context) -> int:
        if how == "queued":
            context.emit(Placed())
        else:
            await mediator.emit(Placed())
        return 1

    mediator = mediator_of(
        {Place: place_and_emit}, TransactionMiddleware(Memory().begin), PublishMiddleware(broker, {Placed: "orders"})
    )
    with pytest.raises(EmitError, match=r"Placed goes to 'orders' and was emitted inside send\(\.\.\., transaction="):
        await mediator.send(Place(), transaction=MemorySession())
    assert broker.attempts == 0


async def test_a_hook_after_its_commit_is_refused() -> None:
    async def place_with_hook(command: Place, context: Context) -> int:
        context.after_commit(lambda: None)
        return 1

    mediator = mediator_of({Place: place_with_hook}, TransactionMiddleware(Memory().begin))
    with pytest.raises(TransactionError, match="this library does not learn of it"):
        await mediator.send(Place(), transaction=MemorySession())


async def test_without_a_transaction_middleware_it_is_refused() -> None:
    async def handle(command: Place) -> int:
        return 1

    mediator = mediator_of({Place: handle}, RetryMiddleware(3))
    with pytest.raises(ConfigurationError, match="needs a TransactionMiddleware in the chain"):
        await mediator.send(Place(), transaction=MemorySession())


class TestDatabase:
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize("commits", [True, False])
    async def test_a_session_of_the_callers(self, database: Database, *, commits: bool) -> None:
        class PlaceHandler:
            def __init__(self, session: AsyncSession) -> None:
                self._session = session

            async def handle(self, command: Place) -> int:
                await put(self._session, command.n)
                return command.n

        mediator = mediator_of({Place: PlaceHandler}, TransactionMiddleware(database.sessions.begin))
        async with database.sessions() as session:
            await mediator.send(Place(1), transaction=session)
            await mediator.send(Place(2), transaction=session)
            assert await database.rows() == []
            if commits:
                await session.commit()
        assert await database.rows() == ([1, 2] if commits else [])

    @pytest.mark.parametrize("commits", [True, False])
    async def test_a_connection_of_the_callers(self, database: Database, *, commits: bool) -> None:
        async def handle(command: Place, connection: AsyncConnection) -> int:
            await put(connection, command.n)
            return command.n

        mediator = mediator_of({Place: handle}, TransactionMiddleware(database.engine.begin))
        async with database.engine.connect() as connection:
            await mediator.send(Place(1), transaction=connection)
            assert await database.rows() == []
            if commits:
                await connection.commit()
        assert await database.rows() == ([1] if commits else [])

    @pytest.mark.parametrize("unit_of_work", ["session", "connection"])
    async def test_joined_messages_have_savepoints_in_it_too(self, database: Database, unit_of_work: str) -> None:
        async def place(context: Context, session: AsyncSession | AsyncConnection) -> int:
            await put(session, 1)
            with pytest.raises(ValueError, match="out of stock"):
                await context.send(Reserve(2))
            return 1

        async def reserve(session: AsyncSession | AsyncConnection) -> int:
            await put(session, 2)
            raise ValueError("out of stock")

        async def place_by_session(command: Place, context: Context, session: AsyncSession) -> int:
            return await place(context, session)

        async def place_by_connection(command: Place, context: Context, connection: AsyncConnection) -> int:
            return await place(context, connection)

        async def reserve_by_session(command: Reserve, session: AsyncSession) -> int:
            return await reserve(session)

        async def reserve_by_connection(command: Reserve, connection: AsyncConnection) -> int:
            return await reserve(connection)

        on_connection = unit_of_work == "connection"
        begin: Any = database.engine.begin if on_connection else database.sessions.begin
        mediator = mediator_of(
            {
                Place: place_by_connection if on_connection else place_by_session,
                Reserve: reserve_by_connection if on_connection else reserve_by_session,
            },
            TransactionMiddleware(begin, nested="savepoint"),
        )
        async with begin() as transaction:
            assert await mediator.send(Place(), transaction=transaction) == 1
        assert await database.rows() == [1]
