"""Messages sent from a handler: what joins its transaction, what must not, and what a failure of one does."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from pipeline_mediator.context import Context
from pipeline_mediator.errors import TransactionDoomedError, TransactionFinishedError
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.middlewares.databases import Database, put
from tests.middlewares.shop import (
    AT_ONCE,
    Memory,
    MemorySession,
    Place,
    Placed,
    RecordingBroker,
    Reserve,
    Reserved,
    Shipped,
    mediator_of,
)

DESTINATIONS = {Placed: "orders", Shipped: "shipping"}


async def reserve(command: Reserve, session: MemorySession) -> int:
    session.rows.append(command.n)
    return command.n


async def refuse(command: Reserve, context: Context, session: MemorySession) -> int:
    """Leaves something for later, and fails."""
    session.rows.append(command.n)
    context.emit(Reserved())
    context.emit(Shipped())
    context.after_commit(lambda: HOOKS.append("of the one that failed"))
    await context.mediator.emit(Shipped(2))
    raise ValueError("out of stock")


HOOKS: list[str] = []


@pytest.fixture(autouse=True)
def _no_hooks() -> None:
    HOOKS.clear()


def retry(attempts: int = 3, **options: Any) -> RetryMiddleware:
    return RetryMiddleware(attempts, wait=AT_ONCE, **options)


# -- joining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mediator", "context"])
async def test_a_message_sent_from_a_handler_joins_its_transaction(how: str) -> None:
    memory = Memory()
    contexts: list[Context] = []

    async def place(command: Place, context: Context, session: MemorySession) -> int:
        session.rows.append(command.n)
        contexts.append(context)
        sender: Any = context if how == "context" else mediator
        reserved: int = await sender.send(Reserve(5))
        return reserved + command.n

    async def look(command: Reserve, context: Context, session: MemorySession) -> int:
        contexts.append(context)
        return await reserve(command, session)

    mediator = mediator_of({Place: place, Reserve: look}, retry(), TransactionMiddleware(memory.begin))
    assert await mediator.send(Place()) == 6
    assert memory.log == ["begin", "commit"]
    assert memory.rows == [1, 5]
    outer, inner = contexts
    assert inner.parent is outer
    assert inner.correlation_id == outer.correlation_id
    assert inner.causation_id == outer.message_id


async def test_a_message_sent_in_a_second_attempt_joins_that_attempt() -> None:
    memory = Memory()
    attempts: list[int] = []

    async def place(command: Place, session: MemorySession) -> int:
        attempts.append(1)
        session.rows.append(command.n)
        await mediator.send(Reserve())
        if len(attempts) == 1:
            raise ConnectionError("reset")
        return 1

    mediator = mediator_of({Place: place, Reserve: reserve}, retry(), TransactionMiddleware(memory.begin))
    await mediator.send(Place())
    assert memory.log == ["begin", "rollback", "begin", "commit"]
    assert memory.rows == [1, 2]


async def test_a_joined_message_is_attempted_once() -> None:
    """Only the root is repeated: a transaction that failed cannot be used again."""
    memory = Memory()
    attempts: list[str] = []

    async def place(command: Place) -> int:
        attempts.append("place")
        return await mediator.send(Reserve())

    async def fail(command: Reserve) -> int:
        attempts.append("reserve")
        raise ConnectionError("reset")

    mediator = mediator_of({Place: place, Reserve: fail}, retry(2), TransactionMiddleware(memory.begin))
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert attempts == ["place", "reserve"] * 2


async def test_after_its_end_a_message_sent_from_the_same_task_is_one_of_its_own() -> None:
    memory = Memory()
    kept: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        kept.append(context)
        return 1

    mediator = mediator_of({Place: place, Reserve: reserve}, TransactionMiddleware(memory.begin))
    await mediator.send(Place())
    await mediator.send(Reserve())
    assert memory.log == ["begin", "commit"] * 2


async def test_another_mediator_does_not_join() -> None:
    memory, other_memory = Memory(), Memory()
    other = mediator_of({Reserve: reserve}, TransactionMiddleware(other_memory.begin))

    async def place(command: Place, session: MemorySession) -> int:
        session.rows.append(command.n)
        return await other.send(Reserve())

    mediator = mediator_of({Place: place}, TransactionMiddleware(memory.begin))
    await mediator.send(Place())
    assert (memory.rows, other_memory.rows) == ([1], [2])
    assert other_memory.log == ["begin", "commit"]


async def test_a_message_with_another_unit_of_work_does_not_join() -> None:
    from pipeline_mediator.pipeline import only

    memory, audit = Memory(), Memory()

    async def place(command: Place, session: MemorySession) -> int:
        session.rows.append(command.n)
        await mediator.send(Reserve())
        raise ValueError("no")

    mediator = mediator_of(
        {Place: place, Reserve: reserve},
        *only(Place, TransactionMiddleware(memory.begin)),
        *only(Reserve, TransactionMiddleware(audit.begin)),
    )
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert memory.rows == []
    assert audit.rows == [2]


# -- a failure inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mediator", "context"])
async def test_a_nested_failure_dooms_the_transaction_even_if_it_is_caught(how: str) -> None:
    memory = Memory()
    broker = RecordingBroker()

    async def place(command: Place, context: Context, session: MemorySession) -> int:
        session.rows.append(command.n)
        sender: Any = context if how == "context" else mediator
        with pytest.raises(ValueError, match="out of stock"):
            await sender.send(Reserve())
        return 1

    mediator = mediator_of(
        {Place: place, Reserve: refuse}, TransactionMiddleware(memory.begin), PublishMiddleware(broker, DESTINATIONS)
    )
    with pytest.raises(TransactionDoomedError) as caught:
        await mediator.send(Place())
    assert (caught.value.message_type, caught.value.root_type, caught.value.error) == (Reserve, Place, "ValueError")
    assert str(caught.value).startswith("Place may not commit: Reserve, sent from its handler, failed inside its")
    assert memory.log == ["begin", "rollback"]
    assert broker.names == []


async def test_a_failing_event_that_was_emitted_at_once_dooms_it_too() -> None:
    memory = Memory()

    async def place(command: Place) -> int:
        with pytest.raises(ValueError, match="no"):
            await mediator.emit(Reserved())
        return 1

    async def fail(event: Reserved) -> None:
        raise ValueError("no")

    mediator = mediator_of({Place: place, Reserved: fail}, TransactionMiddleware(memory.begin))
    with pytest.raises(TransactionDoomedError, match="Reserved"):
        await mediator.send(Place())


async def test_a_nested_failure_that_an_event_handler_caught_dooms_it_before_the_next_event() -> None:
    memory = Memory()
    walked: list[int] = []

    async def place(command: Place, context: Context) -> int:
        context.emit(Reserved(1))
        context.emit(Reserved(2))
        return 1

    async def fail(command: Reserve) -> int:
        raise ValueError("out of stock")

    async def catch(event: Reserved, context: Context) -> None:
        walked.append(event.n)
        with pytest.raises(ValueError, match="out of stock"):
            await context.send(Reserve())

    mediator = mediator_of({Place: place, Reserve: fail, Reserved: catch}, TransactionMiddleware(memory.begin))
    with pytest.raises(TransactionDoomedError):
        await mediator.send(Place())
    assert walked == [1]
    assert memory.log == ["begin", "rollback"]


async def test_without_a_transaction_a_nested_failure_drops_only_what_it_left_for_later() -> None:
    broker = RecordingBroker()
    walked: list[str] = []

    async def place(command: Place, context: Context) -> int:
        context.emit(Reserved())
        context.after_commit(lambda: HOOKS.append("of the one that sent it"))
        with pytest.raises(ValueError, match="out of stock"):
            await context.send(Reserve())
        return 1

    async def fail(command: Reserve, context: Context) -> int:
        context.emit(Shipped())
        context.emit(Reserved())
        context.after_commit(lambda: HOOKS.append("of the one that failed"))
        raise ValueError("out of stock")

    async def reserved(event: Reserved) -> None:
        walked.append("reserved")

    mediator = mediator_of(
        {Place: place, Reserve: fail, Reserved: reserved}, retry(), PublishMiddleware(broker, DESTINATIONS)
    )
    assert await mediator.send(Place()) == 1
    assert walked == ["reserved"]
    assert broker.names == []
    assert HOOKS == ["of the one that sent it"]


class Savepoints:
    """A handler that sends two messages, of which the first fails, over a real database."""

    def __init__(self, database: Database, nested: Any = "savepoint") -> None:
        self.broker = RecordingBroker()
        self.walked: list[int] = []
        self.mediator = mediator_of(
            {Place: self.place, Reserve: self.reserve, Reserved: self.reserved},
            TransactionMiddleware(database.sessions.begin, nested=nested),
            PublishMiddleware(self.broker, DESTINATIONS),
        )

    async def place(self, command: Place, context: Context, session: AsyncSession) -> int:
        await put(session, 1)
        context.emit(Reserved(1))
        context.emit(Placed())
        context.after_commit(lambda: HOOKS.append("of the one that sent it"))
        with pytest.raises(ValueError, match="out of stock"):
            await context.send(Reserve(-2))
        await self.mediator.send(Reserve(3))
        return 1

    async def reserve(self, command: Reserve, context: Context, session: AsyncSession) -> int:
        await put(session, command.n)
        context.emit(Reserved(command.n))
        context.emit(Shipped(command.n))
        await self.mediator.emit(Shipped(command.n))
        context.after_commit(lambda: HOOKS.append(f"of {command.n}"))
        if command.n < 0:
            raise ValueError("out of stock")
        return command.n

    async def reserved(self, event: Reserved) -> None:
        self.walked.append(event.n)


class TestDatabase:
    """The same, and what only a database can show."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    async def test_a_savepoint_keeps_the_rest(self, database: Database) -> None:
        """The nested message's rows, events and hooks are gone; everything else is committed."""
        shop = Savepoints(database)
        assert await shop.mediator.send(Place()) == 1
        assert await database.rows() == [1, 3]
        assert shop.walked == [1, 3]
        assert shop.broker.names == ["Shipped", "Placed", "Shipped"]
        assert sorted(HOOKS) == ["of 3", "of the one that sent it"]

    async def test_without_savepoints_all_of_it_is_gone(self, database: Database) -> None:
        shop = Savepoints(database, "join")
        with pytest.raises(TransactionDoomedError):
            await shop.mediator.send(Place())
        assert await database.rows() == []
        assert (shop.walked, shop.broker.names, HOOKS) == ([], [], [])

    async def test_a_savepoint_survives_a_time_limit_on_what_is_inside(self, database: Database) -> None:
        """anyio delivers a cancellation again and again: the rollback to the savepoint must not be cut off by it."""
        waiting = anyio.Event()

        async def place(command: Place, session: AsyncSession) -> int:
            await put(session, 1)
            scope = anyio.CancelScope()

            async def give_up() -> None:
                await waiting.wait()
                scope.cancel()

            giving_up = asyncio.ensure_future(give_up())
            with scope:
                await mediator.send(Reserve())
            await giving_up
            await put(session, 3)
            return 1

        async def hang(command: Reserve, session: AsyncSession) -> int:
            await put(session, 2)
            waiting.set()
            await anyio.sleep_forever()
            return 2

        mediator = mediator_of(
            {Place: place, Reserve: hang}, TransactionMiddleware(database.sessions.begin, nested="savepoint")
        )
        assert await mediator.send(Place()) == 1
        assert await database.rows() == [1, 3]

    @pytest.mark.parametrize("group", ["gather", "task group"])
    async def test_concurrent_sends_from_one_handler_have_a_transaction_each(
        self, postgres_database: str, group: str
    ) -> None:
        """The handler's own is not shared between tasks; on SQLite they would wait for its lock in vain."""
        database = Database(postgres_database)
        await database.create()
        sessions: set[int] = set()

        async def place(command: Place, session: AsyncSession) -> int:
            await put(session, command.n)
            sends = [mediator.send(Reserve(n)) for n in (2, 3, -4)]
            if group == "gather":
                await asyncio.gather(*sends, return_exceptions=True)
            else:
                async with anyio.create_task_group() as tasks:
                    for send in sends:
                        tasks.start_soon(quietly, send)
            raise ValueError("after all that")

        async def quietly(send: Any) -> None:
            with anyio.CancelScope():
                try:
                    await send
                except ValueError:
                    return

        async def reserve(command: Reserve, session: AsyncSession) -> int:
            sessions.add(id(session))
            await put(session, command.n)
            await asyncio.sleep(0)
            if command.n < 0:
                raise ValueError("out of stock")
            return command.n

        mediator = mediator_of({Place: place, Reserve: reserve}, TransactionMiddleware(database.sessions.begin))
        with pytest.raises(ValueError, match="after all that"):
            await mediator.send(Place())
        assert await database.rows() == [2, 3]
        await database.wait_until_left()
        await database.close()


# -- tasks that a handler starts ---------------------------------------------------------------------------------------


async def test_a_task_started_by_a_handler_is_a_message_of_its_own() -> None:
    """Even while the handler still runs: with its own transaction, caused by the handler's message."""
    memory = Memory()
    contexts: list[Context] = []

    async def place(command: Place, context: Context, session: MemorySession) -> int:
        contexts.append(context)
        session.rows.append(command.n)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mediator.send, Reserve())
        assert memory.rows == [2], "it has committed by itself"
        return 1

    async def look(command: Reserve, context: Context, session: MemorySession) -> int:
        contexts.append(context)
        return await reserve(command, session)

    mediator = mediator_of({Place: place, Reserve: look}, TransactionMiddleware(memory.begin))
    await mediator.send(Place(), correlation_id="conversation")
    assert memory.log == ["begin", "begin", "commit", "commit"]
    parent, child = contexts
    assert child.parent is None
    assert child.correlation_id == "conversation"
    assert child.causation_id == parent.message_id


async def test_a_task_that_outlives_its_message_is_a_message_of_its_own() -> None:
    memory = Memory()
    ended = anyio.Event()
    contexts: list[Context] = []
    async with anyio.create_task_group() as tasks:

        async def later() -> None:
            await ended.wait()
            await mediator.send(Reserve())

        async def place(command: Place, context: Context) -> int:
            contexts.append(context)
            tasks.start_soon(later)
            return 1

        async def look(command: Reserve, context: Context, session: MemorySession) -> int:
            contexts.append(context)
            return await reserve(command, session)

        mediator = mediator_of({Place: place, Reserve: look}, TransactionMiddleware(memory.begin))
        await mediator.send(Place())
        ended.set()
    assert memory.rows == [2]
    parent, child = contexts
    assert (child.correlation_id, child.causation_id) == (parent.correlation_id, parent.message_id)


@pytest.mark.parametrize("transaction", [True, False])
async def test_after_the_end_nothing_joins_explicitly(*, transaction: bool) -> None:
    memory = Memory()
    kept: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        kept.append(context)
        return 1

    async def nothing(command: Reserve) -> int:
        return 1

    mediator = mediator_of(
        {Place: place, Reserve: nothing}, retry(), *([TransactionMiddleware(memory.begin)] if transaction else [])
    )
    await mediator.send(Place())
    (context,) = kept
    with pytest.raises(TransactionFinishedError, match="Reserve was sent from Place, whose attempt has ended"):
        await context.send(Reserve())
    with pytest.raises(TransactionFinishedError, match="Reserved was emitted after the events of this attempt"):
        context.emit(Reserved())
    with pytest.raises(TransactionFinishedError, match="the hook would never run"):
        context.after_commit(lambda: None)


async def test_a_failed_attempt_has_ended_though_another_follows() -> None:
    memory = Memory()
    kept: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        kept.append(context)
        if len(kept) == 1:
            raise ConnectionError("reset")
        with pytest.raises(TransactionFinishedError):
            await kept[0].send(Reserve())
        return await context.send(Reserve())

    mediator = mediator_of({Place: place, Reserve: reserve}, retry(), TransactionMiddleware(memory.begin))
    assert await mediator.send(Place()) == 2
    assert memory.rows == [2]


async def test_the_event_handlers_are_the_last_who_may_emit() -> None:
    """In a hook the transaction is over; what it sends is a message of its own."""
    memory = Memory()
    raised: list[str] = []

    async def place(command: Place, context: Context) -> int:
        async def hook() -> None:
            with pytest.raises(TransactionFinishedError) as caught:
                context.emit(Reserved())
            raised.append(type(caught.value).__name__)
            await mediator.send(Reserve())

        context.after_commit(hook)
        return 1

    mediator = mediator_of({Place: place, Reserve: reserve}, TransactionMiddleware(memory.begin))
    await mediator.send(Place())
    assert raised == ["TransactionFinishedError"]
    assert memory.log == ["begin", "commit", "begin", "commit"]
