"""What is emitted is stored in the transaction that it belongs to: whoever commits it, and only what is committed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from pipeline_mediator.codec import Codec
from pipeline_mediator.context import Context
from pipeline_mediator.errors import (
    EncodeError,
    OrderError,
    OutboxFullError,
    TransactionDoomedError,
    TransactionFinishedError,
)
from pipeline_mediator.events import IntegrationEvent
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.messages import message
from pipeline_mediator.middlewares.outbox import OutboxMiddleware
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.outbox.protocol import StoredMessage
from pipeline_mediator.requests import Command
from tests.middlewares.databases import Database, put
from tests.middlewares.shop import AT_ONCE, Memory, Place, Placed, RecordingBroker, Reserve, Shipped, mediator_of

STORED = 1000
"""What the store writes is told from what the handlers write by this much."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # SQLAlchemy's


class Store:
    """Writes `STORED + key` beside the handlers' rows, and remembers each statement."""

    def __init__(self) -> None:
        self.statements: list[list[str | None]] = []
        self.messages: list[StoredMessage] = []
        self.commits = 0
        self.error: Exception | None = None

    async def add(self, resource: Any, messages: Sequence[StoredMessage], /) -> None:
        if self.error is not None:
            raise self.error
        self.statements.append([one.key for one in messages])
        self.messages.extend(messages)
        await resource.execute(
            text("INSERT INTO placed VALUES (:n)"), [{"n": STORED + int(one.key or 0)} for one in messages]
        )

    def committed(self) -> None:
        self.commits += 1


@message("shop.counted", key="n")
@dataclass(frozen=True)
class Counted(IntegrationEvent):
    n: int


def stack(database: Database, store: Store, *, connections: object = False, **options: Any) -> list[Any]:
    begin = database.engine.begin if connections else database.sessions.begin
    broker = RecordingBroker()
    return [
        TransactionMiddleware(begin, **options),
        OutboxMiddleware(store),  # type: ignore[arg-type]
        PublishMiddleware(broker),
    ]


@pytest.fixture(params=["session", "connection"])
def connections(request: pytest.FixtureRequest) -> object:
    return request.param == "connection"


async def write(resource: AsyncSession | AsyncConnection, n: int) -> None:
    await resource.execute(text("INSERT INTO placed VALUES (:n)"), {"n": n})


def handler_of(steps: Any, *, connections: object) -> Any:
    """A handler of Place that does `steps(resource, context)`."""
    if connections:

        async def by_connection(command: Place, connection: AsyncConnection, context: Context) -> int:
            await steps(connection, context)
            return command.n

        return by_connection

    async def by_session(command: Place, session: AsyncSession, context: Context) -> int:
        await steps(session, context)
        return command.n

    return by_session


class UndoError(Exception): ...


@asynccontextmanager
async def undone_savepoint(resource: Any) -> AsyncGenerator[None]:
    """What is done in the block is rolled back, and nothing else."""
    with suppress(UndoError):
        async with resource.begin_nested():
            yield
            raise UndoError


def emit(context: Context, *numbers: int) -> None:
    for n in numbers:
        context.emit(Placed(n), key=str(n))


async def test_events_are_rows_of_the_transaction_by_one_statement(database: Database, connections: object) -> None:
    store = Store()

    async def steps(resource: Any, context: Context) -> None:
        await write(resource, 1)
        emit(context, *range(1, 21))
        await write(resource, 2)

    mediator = mediator_of(
        {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
    )
    await mediator.send(Place())
    assert store.statements == [[str(n) for n in range(1, 21)]]
    assert await database.rows() == [1, 2, *range(STORED + 1, STORED + 21)]
    assert store.commits == 1


async def test_a_message_that_fails_stores_nothing(database: Database, connections: object) -> None:
    store = Store()

    async def steps(resource: Any, context: Context) -> None:
        await write(resource, 1)
        await context.mediator.emit(Placed(1), key="1")
        emit(context, 2)
        raise ValueError("no")

    mediator = mediator_of(
        {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
    )
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert (store.statements, store.commits, await database.rows()) == ([], 0, [])


async def test_a_commit_of_the_handlers_own_carries_them(database: Database, connections: object) -> None:
    """Or a crash behind that commit would lose them."""
    store = Store()
    before: list[list[int]] = []

    async def steps(resource: Any, context: Context) -> None:
        await write(resource, 1)
        emit(context, 1, 2)
        await resource.commit()
        before.append(await database.rows())

    mediator = mediator_of(
        {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
    )
    await mediator.send(Place())
    assert before == [[1, STORED + 1, STORED + 2]] == [await database.rows()]
    assert store.statements == [["1", "2"]]
    assert store.commits == 1


async def test_local_handlers_of_queued_events_run_before_a_commit_of_the_handlers_own(database: Database) -> None:
    store = Store()

    async def steps(resource: Any, context: Context) -> None:
        emit(context, 1)
        await resource.commit()

    async def shipped(event: Placed, session: AsyncSession, context: Context) -> None:
        await write(session, 7)
        context.emit(Shipped(3), key="3")

    mediator = mediator_of({Place: handler_of(steps, connections=False)}, *stack(database, store))
    mediator = Mediator(
        mediator.requests,
        event_map=_at_emission(Placed, shipped),
        middlewares=mediator.pipeline,
    )
    await mediator.send(Place())
    assert await database.rows() == [7, STORED + 1, STORED + 3]
    assert len(store.statements) == 1


def _at_emission(event_type: type, handler: Any) -> Any:
    from pipeline_mediator.events import EventMap

    return EventMap().bind(event_type, handler, at="emit")


async def test_a_doomed_transaction_cannot_be_committed_by_its_handler(database: Database) -> None:
    store = Store()

    async def fail(command: Reserve) -> int:
        raise ValueError("no")

    async def place(command: Place, session: AsyncSession, context: Context) -> int:
        await put(session, 1)
        emit(context, 1)
        try:
            await context.send(Reserve())
        except ValueError:
            await session.commit()
        return 1

    mediator = mediator_of({Place: place, Reserve: fail}, *stack(database, store))
    with pytest.raises(TransactionDoomedError):
        await mediator.send(Place())
    assert (store.statements, await database.rows()) == ([], [])


async def test_a_savepoint_that_is_rolled_back_takes_its_messages_along(
    database: Database, connections: object
) -> None:
    store = Store()

    async def steps(resource: Any, context: Context) -> None:
        await context.mediator.emit(Placed(1), key="1")
        async with undone_savepoint(resource):
            await context.mediator.emit(Placed(2), key="2")
            async with resource.begin_nested():
                await context.mediator.emit(Placed(3), key="3")
        async with resource.begin_nested():
            await context.mediator.emit(Placed(4), key="4")

    mediator = mediator_of(
        {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
    )
    await mediator.send(Place())
    assert store.statements == [["1", "4"]]


async def test_a_joined_message_that_fails_in_its_savepoint_stores_nothing(database: Database) -> None:
    store = Store()

    async def reserve(command: Reserve, context: Context) -> int:
        await context.mediator.emit(Placed(1), key="1")
        emit(context, 2)
        raise ValueError("no")

    async def place(command: Place, session: AsyncSession, context: Context) -> int:
        with pytest.raises(ValueError, match="no"):
            await context.send(Reserve())
        emit(context, 3)
        return 1

    mediator = mediator_of({Place: place, Reserve: reserve}, *stack(database, store, nested="savepoint"))
    await mediator.send(Place())
    assert store.statements == [["3"]]


async def test_only_the_attempt_that_succeeds_stores(database: Database) -> None:
    store = Store()
    attempts: list[int] = []

    async def place(command: Place, context: Context) -> int:
        attempts.append(1)
        await context.mediator.emit(Placed(len(attempts)), key=str(len(attempts)))
        if len(attempts) < 3:
            raise ConnectionError("reset")
        return 1

    mediator = mediator_of({Place: place}, RetryMiddleware(3, wait=AT_ONCE), *stack(database, store))
    await mediator.send(Place())
    assert store.statements == [["3"]]


async def test_an_event_emitted_outside_any_message_has_a_transaction_of_its_own(database: Database) -> None:
    store = Store()
    mediator = mediator_of({}, *stack(database, store))
    await mediator.emit(Counted(5))
    assert await database.rows() == [STORED + 5]
    assert store.commits == 1


async def test_an_error_of_the_store_rolls_everything_back(database: Database, connections: object) -> None:
    store = Store()
    store.error = OutboxFullError(10, 1, 10)

    async def steps(resource: Any, context: Context) -> None:
        await write(resource, 1)
        emit(context, 1)

    mediator = mediator_of(
        {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
    )
    with pytest.raises(OutboxFullError, match="Is a relay running"):
        await mediator.send(Place())
    assert (await database.rows(), store.commits) == ([], 0)


async def test_a_handler_that_catches_the_error_of_its_own_commit_loses_nothing(database: Database) -> None:
    store = Store()

    async def place(command: Place, session: AsyncSession, context: Context) -> int:
        await put(session, 1)
        emit(context, 1)
        store.error = OutboxFullError(10, 1, 10)
        with pytest.raises(OutboxFullError):
            await session.commit()
        store.error = None
        await session.commit()
        return 1

    mediator = mediator_of({Place: place}, *stack(database, store))
    await mediator.send(Place())
    assert await database.rows() == [1, STORED + 1]


class TestInATransactionOfTheCallers:
    async def test_its_commit_carries_the_messages_of_all_sends_by_one_statement(
        self, database: Database, connections: object
    ) -> None:
        store = Store()

        async def steps(resource: Any, context: Context) -> None:
            emit(context, 1, 2)

        mediator = mediator_of(
            {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
        )
        async with caller(database, connections=connections) as resource:
            await mediator.send(Place(), transaction=resource)
            await mediator.send(Place(), transaction=resource)
            assert store.statements == []
            await resource.commit()
            assert store.statements == [["1", "2", "1", "2"]]
            await mediator.send(Place(), transaction=resource)
            await resource.commit()
        assert len(store.statements) == 2
        assert len(await database.rows()) == 6

    async def test_its_rollback_drops_them(self, database: Database, connections: object) -> None:
        store = Store()

        async def steps(resource: Any, context: Context) -> None:
            emit(context, len(numbers))

        numbers = [1]
        mediator = mediator_of(
            {Place: handler_of(steps, connections=connections)}, *stack(database, store, connections=connections)
        )
        async with caller(database, connections=connections) as resource:
            await mediator.send(Place(), transaction=resource)
            await resource.rollback()
            numbers.append(2)
            await mediator.send(Place(), transaction=resource)
            await resource.commit()
        assert store.statements == [["2"]]

    async def test_a_savepoint_around_a_send_takes_its_messages_along(
        self, database: Database, connections: object
    ) -> None:
        store = Store()

        async def place(command: Place, context: Context) -> int:
            emit(context, command.n)
            return 1

        mediator = mediator_of({Place: place}, *stack(database, store, connections=connections))
        async with caller(database, connections=connections) as resource:
            async with undone_savepoint(resource):
                await mediator.send(Place(1), transaction=resource)
            async with resource.begin_nested():
                await mediator.send(Place(2), transaction=resource)
            await mediator.send(Place(3), transaction=resource)
            await resource.commit()
        assert store.statements == [["2", "3"]]

    async def test_a_send_that_fails_leaves_nothing_to_store(self, database: Database) -> None:
        store = Store()

        async def place(command: Place, context: Context) -> int:
            await context.mediator.emit(Placed(1), key="1")
            raise ValueError("no")

        mediator = mediator_of({Place: place}, *stack(database, store))
        async with caller(database, connections=False) as session:
            with pytest.raises(ValueError, match="no"):
                await mediator.send(Place(), transaction=session)
            await session.commit()
        assert store.statements == []

    async def test_a_commit_by_the_handler_carries_them(self, database: Database) -> None:
        store = Store()

        async def place(command: Place, session: AsyncSession, context: Context) -> int:
            emit(context, command.n)
            await session.commit()
            return 1

        mediator = mediator_of({Place: place}, *stack(database, store))
        async with caller(database, connections=False) as session:
            await mediator.send(Place(4), transaction=session)
            assert await database.rows() == [STORED + 4]

    async def test_a_library_that_is_not_known_is_written_to_at_once(self) -> None:
        written: list[Any] = []

        class Plain(Store):
            async def add(self, resource: Any, messages: Sequence[StoredMessage], /) -> None:
                written.append((resource, [one.key for one in messages]))

        async def place(command: Place, context: Context) -> int:
            emit(context, 1, 2)
            return 1

        store = Plain()
        mediator = mediator_of(
            {Place: place},
            TransactionMiddleware(Memory().begin),
            OutboxMiddleware(store),  # type: ignore[arg-type]
            PublishMiddleware(RecordingBroker()),
        )
        transaction = object()
        await mediator.send(Place(), transaction=transaction)
        assert written == [(transaction, ["1", "2"])]

    async def test_a_session_that_is_let_go_of_leaves_nothing_behind(self, database: Database) -> None:
        async def place(command: Place, context: Context) -> int:
            emit(context, 1)
            return 1

        mediator = mediator_of({Place: place}, *stack(database, Store()))
        async with caller(database, connections=False) as session:
            await mediator.send(Place(), transaction=session)
            await session.commit()
        reference = weakref.ref(session)
        del session
        gc.collect()
        assert reference() is None


@asynccontextmanager
async def caller(database: Database, *, connections: object) -> AsyncGenerator[Any]:
    async with database.engine.connect() if connections else database.sessions() as resource:
        yield resource


async def test_a_unit_of_work_of_another_library_is_written_to_before_its_commit() -> None:
    memory = Memory()

    class Plain(Store):
        async def add(self, resource: Any, messages: Sequence[StoredMessage], /) -> None:
            assert memory.log == ["begin"]
            self.statements.append([one.key for one in messages])

    async def place(command: Place, context: Context) -> int:
        emit(context, 1, 2)
        return 1

    store = Plain()
    mediator = mediator_of(
        {Place: place},
        TransactionMiddleware(memory.begin),
        OutboxMiddleware(store),  # type: ignore[arg-type]
        PublishMiddleware(RecordingBroker()),
    )
    await mediator.send(Place())
    assert store.statements == [["1", "2"]]
    assert store.commits == 1


@message("warehouse.ship", key="n")
@dataclass(frozen=True)
class Ship(Command):
    n: Any


async def test_a_command_with_a_destination_is_stored_too(database: Database) -> None:
    store = Store()
    mediator = mediator_of(
        {},
        TransactionMiddleware(database.sessions.begin),
        OutboxMiddleware(store),  # type: ignore[arg-type]
        PublishMiddleware(RecordingBroker(), {Ship: "warehouse"}),
        codec=Codec(),
    )
    await mediator.send(Ship(1))
    assert store.statements == [["1"]]
    with pytest.raises(EncodeError):
        await mediator.send(Ship(object()))
    assert await database.rows() == [STORED + 1]


async def test_what_is_stored_is_the_message_as_it_was_emitted() -> None:
    memory = Memory()
    stored: list[StoredMessage] = []

    class Plain(Store):
        async def add(self, resource: Any, messages: Sequence[StoredMessage], /) -> None:
            stored.extend(messages)

    async def place(command: Place, context: Context) -> int:
        context.headers["tenant"] = "acme"
        context.emit(Placed(9), key="nine")
        return 1

    mediator = mediator_of(
        {Place: place},
        TransactionMiddleware(memory.begin),
        OutboxMiddleware(Plain()),  # type: ignore[arg-type]
        PublishMiddleware(RecordingBroker(), {IntegrationEvent: "shop.events"}),
        codec=Codec(source="shop"),
    )
    await mediator.send(Place(), correlation_id="conversation")
    (one,) = stored
    assert (one.name, one.version, one.destination, one.key, one.body) == (
        "Placed",
        1,
        "shop.events",
        "nine",
        b'{"n":9}',
    )
    decoded = mediator.codec.decode(one.body, one.content_type, one.headers)
    assert decoded.message == Placed(9)
    assert decoded.source == "shop"
    assert decoded.facts.message_id == one.message_id
    assert decoded.facts.correlation_id == "conversation"
    assert decoded.facts.key == "nine"
    assert decoded.facts.headers == {"tenant": "acme"}


def test_it_needs_a_transaction_around_it() -> None:
    with pytest.raises(OrderError, match=r"OutboxMiddleware .* needs a transaction middleware around it"):
        mediator_of(
            {},
            OutboxMiddleware(Store()),  # type: ignore[arg-type]
            PublishMiddleware(RecordingBroker(), {Placed: "placed"}),
        )


def test_publishing_first_is_refused() -> None:
    with pytest.raises(OrderError, match=r"PublishMiddleware .* must stand inside OutboxMiddleware"):
        mediator_of(
            {},
            TransactionMiddleware(Memory().begin),
            PublishMiddleware(RecordingBroker(), {Placed: "placed"}),
            OutboxMiddleware(Store()),  # type: ignore[arg-type]
        )


async def test_emitting_after_the_end_is_refused(database: Database) -> None:
    kept: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        kept.append(context)
        return 1

    mediator = mediator_of({Place: place}, *stack(database, Store()))
    await mediator.send(Place())
    with pytest.raises(TransactionFinishedError):
        kept[0].emit(Placed(1))


async def test_describe_shows_the_relays_chain_once() -> None:
    mediator = mediator_of(
        {},
        TransactionMiddleware(Memory().begin),
        OutboxMiddleware(Store()),  # type: ignore[arg-type]
        PublishMiddleware(RecordingBroker(), {Placed: "shop", Shipped: "shop"}),
    )
    text_of = mediator.describe()
    assert text_of.count("from relay to shop") == 1
    assert "OutboxMiddleware" in text_of
    assert mediator.check() == []


async def test_a_transaction_that_postgresql_has_given_up_is_not_committed_half(database: Database) -> None:
    """A statement that failed and was caught: the commit is a rollback there, and the outbox's statement says so."""
    store = Store()

    async def place(command: Place, session: AsyncSession, context: Context) -> int:
        await put(session, 1)
        emit(context, 1)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT * FROM no_such_table"))
        return 1

    mediator = mediator_of({Place: place}, *stack(database, store))
    if database.is_sqlite:
        await mediator.send(Place())
        assert await database.rows() == [1, STORED + 1]
    else:
        with pytest.raises(DBAPIError):
            await mediator.send(Place())
        assert await database.rows() == []
