"""One transaction around a message: all of it or nothing, and nothing leaves before the commit."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline_mediator.context import Context
from pipeline_mediator.errors import (
    BrokerUnavailableError,
    CommitOutcomeUnknownError,
    CommittedButNotPublishedError,
    ConfigurationError,
    EmitError,
    OrderError,
)
from pipeline_mediator.message_brokers.memory import MemoryBroker
from pipeline_mediator.message_brokers.protocol import Ack
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.middlewares.shop import (
    AT_ONCE,
    Memory,
    MemorySession,
    Place,
    Placed,
    RecordingBroker,
    Reserved,
    Shipped,
    mediator_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

LIMIT = 0.2
"""Seconds after which something that hangs is given up."""

DESTINATIONS = {Placed: "orders", Shipped: "shipping"}


async def place(command: Place, context: Context, session: MemorySession) -> int:
    session.rows.append(command.n)
    context.emit(Reserved())
    context.emit(Placed())
    return command.n


async def place_only(command: Place, session: MemorySession) -> int:
    session.rows.append(command.n)
    return command.n


async def reserved(event: Reserved, session: MemorySession) -> None:
    session.rows.append(event.n)


async def fail(_message: object) -> int:
    await checkpoint()
    raise ValueError("no")


async def noted(context: Context, call_next: Any) -> Any:
    """Stands outside Transaction and keeps the notes it hears."""
    context.on_note(lambda name, facts: context.items.setdefault("notes", []).append((name, dict(facts))))
    try:
        return await call_next(context)
    finally:
        NOTES[:] = context.items.get("notes", [])


NOTES: list[tuple[str, dict[str, Any]]] = []


async def test_the_handler_and_its_events_share_one_transaction() -> None:
    memory = Memory()
    broker = RecordingBroker()
    mediator = mediator_of(
        {Place: place, Reserved: reserved}, TransactionMiddleware(memory.begin), PublishMiddleware(broker, DESTINATIONS)
    )
    assert await mediator.send(Place(7)) == 7
    assert memory.log == ["begin", "commit"]
    assert memory.rows == [7, 3]
    assert broker.names == ["Placed"]


@pytest.mark.parametrize("failing", ["handler", "event handler", "commit"])
async def test_an_error_rolls_everything_back_and_drops_what_was_emitted(failing: str) -> None:
    memory = Memory()
    broker = RecordingBroker()
    hooks: list[str] = []

    async def place_with_hook(command: Place, context: Context, session: MemorySession) -> int:
        context.after_commit(lambda: hooks.append("ran"))
        await place(command, context, session)
        if failing == "handler":
            raise ValueError("no")
        if failing == "commit":
            memory.refusal = ValueError("no")
        return 1

    mediator = mediator_of(
        {Place: place_with_hook, Reserved: fail if failing == "event handler" else reserved},
        TransactionMiddleware(memory.begin),
        PublishMiddleware(broker, DESTINATIONS),
    )
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert memory.rows == []
    assert "commit" not in memory.log
    assert broker.attempts == 0
    assert hooks == []


async def test_events_are_walked_first_in_first_out_until_there_are_none() -> None:
    memory = Memory()
    order: list[int] = []

    async def place_two(command: Place, context: Context) -> int:
        context.emit(Reserved(3))
        context.emit(Reserved(5))
        return 1

    async def again(event: Reserved, context: Context) -> None:
        order.append(event.n)
        if event.n < 5:
            context.emit(Reserved(event.n + 1))

    mediator = mediator_of({Place: place_two, Reserved: again}, TransactionMiddleware(memory.begin))
    await mediator.send(Place())
    assert order == [3, 5, 4, 5]


async def test_an_event_that_is_emitted_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_mediator import unit

    monkeypatch.setattr(unit, "MAX_EVENTS", 20)
    memory = Memory()

    async def again(event: Reserved, context: Context) -> None:
        context.emit(event)

    async def place_one(command: Place, context: Context, session: MemorySession) -> int:
        context.emit(Reserved())
        return await place_only(command, session)

    mediator = mediator_of({Place: place_one, Reserved: again}, TransactionMiddleware(memory.begin))
    with pytest.raises(EmitError, match="Does an event handler emit the event that it handles"):
        await mediator.send(Place())
    assert memory.rows == []


async def test_the_order_of_the_end() -> None:
    """Begin, handler, events, commit, close the scope, publish, hooks."""
    memory = Memory()
    log = memory.log
    broker = RecordingBroker()

    async def published() -> None:
        log.append("publish")

    broker.on_publish = published

    class PlaceHandler:
        async def aclose(self) -> None:
            log.append("close")

        async def handle(self, command: Place, context: Context) -> int:
            context.after_commit(lambda: log.append("hook"))
            context.emit(Placed())
            context.emit(Reserved())
            log.append("handle")
            return 1

    async def note(event: Reserved) -> None:
        log.append("event")

    mediator = mediator_of(
        {Place: PlaceHandler, Reserved: note},
        TransactionMiddleware(memory.begin),
        PublishMiddleware(broker, DESTINATIONS),
    )
    await mediator.send(Place())
    assert log == ["begin", "handle", "event", "commit", "close", "publish", "hook"]


# -- publishing after the commit ---------------------------------------------------------------------------------------


async def test_a_failing_publish_is_retried_without_the_handler() -> None:
    memory = Memory()
    broker = RecordingBroker(BrokerUnavailableError("away"), BrokerUnavailableError("away"))
    mediator = mediator_of(
        {Place: place, Reserved: reserved},
        RetryMiddleware(3, wait=AT_ONCE),
        TransactionMiddleware(memory.begin),
        PublishMiddleware(broker, DESTINATIONS),
    )
    await mediator.send(Place())
    assert memory.rows == [1, 3]
    assert broker.attempts == 3
    assert broker.names == ["Placed"]


async def test_each_walk_of_a_put_off_event_is_a_message_of_its_own() -> None:
    """Its own way through the middlewares, with the handler's message as its cause."""
    memory = Memory()
    broker = RecordingBroker()
    seen: list[Context] = []

    async def look(context: Context, call_next: Any) -> Any:
        seen.append(context)
        return await call_next(context)

    mediator = mediator_of(
        {Place: place, Reserved: reserved},
        look,
        TransactionMiddleware(memory.begin),
        PublishMiddleware(broker, DESTINATIONS),
    )
    await mediator.send(Place(), correlation_id="conversation")
    command, _, event = seen
    assert isinstance(event.message, Placed)
    assert event.parent is None
    assert event.correlation_id == "conversation"
    assert event.causation_id == command.message_id


async def test_an_event_that_cannot_be_published_is_logged_noted_and_handed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = Memory()
    refusal = BrokerUnavailableError("away")
    broker = RecordingBroker(refusal)
    lost: list[tuple[object, Exception]] = []

    async def place_two(command: Place, context: Context, session: MemorySession) -> int:
        session.rows.append(command.n)
        context.emit(Placed(8))
        context.emit(Shipped(9))
        return 5

    mediator = mediator_of(
        {Place: place_two},
        noted,
        TransactionMiddleware(memory.begin, on_lost_event=lambda event, error: lost.append((event, error))),
        PublishMiddleware(broker, DESTINATIONS),
    )
    assert await mediator.send(Place()) == 5
    assert memory.rows == [1]
    assert lost == [(Placed(8), refusal)]
    assert broker.names == ["Shipped"]
    assert "Placed was committed but not published, and is lost: BrokerUnavailableError" in caplog.text
    assert NOTES == [("lost", {"event": "Placed", "error": "BrokerUnavailableError"})]


async def test_a_failing_on_lost_event_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def lost(event: object, error: Exception) -> None:
        await checkpoint()
        raise RuntimeError("the file is full")

    mediator = mediator_of(
        {Place: place, Reserved: reserved},
        TransactionMiddleware(Memory().begin, on_lost_event=lost),
        PublishMiddleware(RecordingBroker(BrokerUnavailableError("away")), DESTINATIONS),
    )
    assert await mediator.send(Place()) == 1
    assert "on_lost_event failed for Placed" in caplog.text
    assert "the file is full" in caplog.text


async def test_a_lost_event_can_be_raised_and_is_not_retried() -> None:
    memory = Memory()
    broker = RecordingBroker(BrokerUnavailableError("away"), BrokerUnavailableError("away"))
    mediator = mediator_of(
        {Place: place, Reserved: reserved},
        RetryMiddleware(2, wait=AT_ONCE),
        TransactionMiddleware(memory.begin, on_publish_error="raise"),
        PublishMiddleware(broker, DESTINATIONS),
    )
    with pytest.raises(CommittedButNotPublishedError, match="events did not reach the broker: Placed") as caught:
        await mediator.send(Place(4))
    assert caught.value.result == 4
    assert caught.value.events == (Placed(),)
    assert memory.rows == [4, 3]
    assert broker.attempts == 2


async def test_a_broker_that_hangs_holds_the_caller_up_for_a_limited_time() -> None:
    memory = Memory()
    broker = RecordingBroker()
    broker.on_publish = anyio.sleep_forever
    lost: list[str] = []
    hooks: list[int] = []

    async def place_with_hook(command: Place, context: Context, session: MemorySession) -> int:
        context.after_commit(lambda: hooks.append(1))
        context.emit(Shipped())
        return await place(command, context, session)

    mediator = mediator_of(
        {Place: place_with_hook, Reserved: reserved},
        TransactionMiddleware(
            memory.begin, seconds=LIMIT, on_lost_event=lambda event, error: lost.append(f"{event}: {error}")
        ),
        PublishMiddleware(broker, DESTINATIONS),
    )
    assert await mediator.send(Place()) == 1
    assert memory.rows == [1, 3]
    assert lost == [
        "Shipped(n=1): not published within 0.2 s after the commit",
        "Placed(n=1): not published within 0.2 s after the commit",
    ]
    assert hooks == [1], "a broker that hangs is not the hooks' fault"


async def test_an_event_waits_for_the_commit_of_a_memory_broker_too() -> None:
    memory = Memory()
    broker = MemoryBroker()
    committed_when_received: list[list[int]] = []
    mediator = mediator_of(
        {Place: place, Reserved: reserved}, TransactionMiddleware(memory.begin), PublishMiddleware(broker, DESTINATIONS)
    )
    async with mediator, broker.subscribe("orders", name="warehouse") as orders, anyio.create_task_group() as tasks:

        async def consume() -> None:
            (delivery,) = await orders.receive(1)
            committed_when_received.append(list(memory.rows))
            delivery.outcome = Ack()
            await orders.settle([delivery])

        tasks.start_soon(consume)
        with anyio.fail_after(5):
            await mediator.send(Place())
    assert committed_when_received == [[1, 3]]


async def test_outside_a_transaction_emit_publishes_now_and_raises_what_the_broker_raises() -> None:
    broker = RecordingBroker(BrokerUnavailableError("away"))
    mediator = mediator_of({}, TransactionMiddleware(Memory().begin), PublishMiddleware(broker, DESTINATIONS))
    with pytest.raises(BrokerUnavailableError, match="away"):
        await mediator.emit(Placed())
    await mediator.emit(Placed())
    assert broker.names == ["Placed"]


async def test_mediator_emit_inside_a_handler_waits_for_the_commit_too() -> None:
    memory = Memory()
    broker = RecordingBroker()
    published: list[list[str]] = []

    async def place_and_emit(command: Place, session: MemorySession) -> int:
        await mediator.emit(Placed())
        published.append(broker.names)
        return 1

    mediator = mediator_of(
        {Place: place_and_emit}, TransactionMiddleware(memory.begin), PublishMiddleware(broker, DESTINATIONS)
    )
    await mediator.send(Place())
    assert published == [[]]
    assert broker.names == ["Placed"]


def test_check_says_that_publishing_after_the_commit_is_at_most_once() -> None:
    publish = PublishMiddleware(RecordingBroker(), DESTINATIONS)
    mediator = mediator_of({}, TransactionMiddleware(Memory().begin), publish)
    assert any("Placed" in warning and "at most once" in warning for warning in mediator.check())


# -- hooks and clean-up ------------------------------------------------------------------------------------------------


async def test_a_failing_hook_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    ran: list[str] = []

    async def broken() -> None:
        await checkpoint()
        raise RuntimeError("no mail server")

    async def place_with_hooks(command: Place, context: Context, session: MemorySession) -> int:
        session.rows.append(command.n)
        context.after_commit(broken)
        context.after_commit(lambda: ran.append("second"))
        return 1

    mediator = mediator_of({Place: place_with_hooks}, noted, RetryMiddleware(3), TransactionMiddleware(memory.begin))
    assert await mediator.send(Place()) == 1
    assert memory.rows == [1]
    assert ran == ["second"]
    assert "after-commit hook failed for Place; its outcome stands" in caplog.text
    assert [name for name, _ in NOTES] == ["after-commit hook failed"]


async def test_hooks_that_hang_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def place_with_hooks(command: Place, context: Context) -> int:
        context.after_commit(anyio.sleep_forever)
        context.after_commit(lambda: None)
        return 1

    mediator = mediator_of({Place: place_with_hooks}, TransactionMiddleware(Memory().begin, seconds=LIMIT))
    assert await mediator.send(Place()) == 1
    assert "2 after-commit hooks of Place had not ended after 0.2 s" in caplog.text


async def test_a_failing_scope_clean_up_does_not_change_the_outcome(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    attempts: list[int] = []

    class PlaceHandler:
        def __init__(self, session: MemorySession) -> None:
            self.session = session

        async def handle(self, command: Place) -> int:
            attempts.append(1)
            self.session.rows.append(command.n)
            return 1

        async def aclose(self) -> None:
            raise RuntimeError("cannot close")

    mediator = mediator_of({Place: PlaceHandler}, RetryMiddleware(3), TransactionMiddleware(memory.begin))
    assert await mediator.send(Place()) == 1
    assert (memory.rows, attempts) == ([1], [1])
    assert "scope clean-up failed for Place; its outcome stands" in caplog.text


# -- units of work -----------------------------------------------------------------------------------------------------


async def test_a_unit_of_work_may_be_a_function_of_the_context() -> None:
    tenants = {"acme": Memory(), "umbrella": Memory()}

    @asynccontextmanager
    async def of_tenant(context: Context) -> AsyncGenerator[MemorySession]:
        async with tenants[context.headers["tenant"]].begin() as session:
            yield session

    mediator = mediator_of({Place: place_only}, TransactionMiddleware(of_tenant))
    await mediator.send(Place(5), headers={"tenant": "umbrella"})
    assert tenants["acme"].rows == []
    assert tenants["umbrella"].rows == [5]


async def test_a_unit_of_work_whose_signature_cannot_be_read_is_called_with_nothing() -> None:
    class Callable:
        __signature__ = "none"

        def __call__(self) -> Any:
            return memory.begin()

    memory = Memory()
    mediator = mediator_of({Place: place_only}, TransactionMiddleware(Callable(), yields=MemorySession))
    await mediator.send(Place())
    assert memory.rows == [1]


async def test_a_unit_of_work_may_be_a_class_of_ones_own() -> None:
    log: list[str] = []

    class OwnUnitOfWork:
        async def __aenter__(self) -> Self:
            log.append("begin")
            return self

        async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
            await checkpoint()
            log.append("commit" if kind is None else f"rollback after {kind.__name__}")

    async def use(command: Place, unit_of_work: Any) -> int:
        if command.n == 0:
            raise ValueError
        return command.n

    use.__annotations__["unit_of_work"] = OwnUnitOfWork
    mediator = mediator_of({Place: use}, TransactionMiddleware(OwnUnitOfWork, yields=OwnUnitOfWork))
    await mediator.send(Place())
    with pytest.raises(ValueError):  # noqa: PT011 - the handler's own
        await mediator.send(Place(0))
    assert log == ["begin", "commit", "begin", "rollback after ValueError"]
    assert "OwnUnitOfWork" in mediator.describe(Place)


async def test_a_commit_that_does_not_answer_in_time_has_an_unknown_outcome() -> None:
    attempts: list[int] = []

    @asynccontextmanager
    async def hanging() -> AsyncGenerator[MemorySession]:
        yield MemorySession()
        await anyio.sleep_forever()

    async def handle(command: Place) -> int:
        attempts.append(1)
        return 1

    mediator = mediator_of({Place: handle}, RetryMiddleware(3), TransactionMiddleware(hanging, seconds=LIMIT))
    with pytest.raises(CommitOutcomeUnknownError, match="no answer to COMMIT came back") as caught:
        await mediator.send(Place())
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert attempts == [1]


async def test_a_failing_rollback_is_logged_and_the_first_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[MemorySession]:
        try:
            yield MemorySession()
        except ValueError:
            raise RuntimeError("the connection is gone") from None

    mediator = mediator_of({Place: fail}, noted, TransactionMiddleware(broken))
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert "closing the transaction of Place failed" in caplog.text
    assert NOTES == [("closing the transaction failed", {"error": "RuntimeError"})]


async def test_a_unit_of_work_may_raise_the_error_again_itself(caplog: pytest.LogCaptureFixture) -> None:
    class Strict:
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
            if error is not None:
                raise error

    mediator = mediator_of({Place: fail}, TransactionMiddleware(Strict))
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert caplog.text == ""


async def test_a_rollback_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def hanging() -> AsyncGenerator[MemorySession]:
        try:
            yield MemorySession()
        finally:
            await anyio.sleep_forever()

    mediator = mediator_of({Place: fail}, TransactionMiddleware(hanging, seconds=LIMIT))
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Place())
    assert "closing the transaction of Place failed" in caplog.text


async def test_a_unit_of_work_that_does_not_begin_raises_its_own_error() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[MemorySession]:
        raise ConnectionError("no database")
        yield  # makes it a generator

    mediator = mediator_of({Place: place, Reserved: reserved}, TransactionMiddleware(broken))
    with pytest.raises(ConnectionError, match="no database"):
        await mediator.send(Place())


async def no_context_manager() -> None:
    """An async function, but no context manager."""


async def yields_without_decorator() -> AsyncGenerator[int]:
    yield 1


def of_two(context: Context, tenant: str) -> AbstractAsyncContextManager[None]:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("unit_of_work", "problem"),
    [
        (Memory(), "a callable that gives an async context manager, such as sessions.begin, not Memory object"),
        (no_context_manager, "no_context_manager gives no async context manager: decorate it"),
        (yields_without_decorator, "yields_without_decorator gives no async context manager: decorate it"),
        (of_two, "of_two asks for context, tenant; a unit of work is called with the context, or with nothing"),
    ],
)
def test_what_cannot_be_a_unit_of_work_is_refused(unit_of_work: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        TransactionMiddleware(unit_of_work)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"nested": "savepoints"}, r"nested='savepoints'\): it is \"join\" or \"savepoint\""),
        ({"on_publish_error": "ignore"}, r"on_publish_error='ignore'\): it is \"log\" or \"raise\""),
        ({"seconds": 0}, r"seconds=0\): it must be above 0"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        TransactionMiddleware(Memory().begin, **setting)


async def test_savepoints_need_a_database_that_is_known() -> None:
    memory = Memory()
    mediator = mediator_of({Place: place, Reserved: reserved}, TransactionMiddleware(memory.begin, nested="savepoint"))
    with pytest.raises(ConfigurationError, match="MemorySession has no savepoints that this library knows"):
        await mediator.send(Place())
    assert memory.log == ["begin", "rollback"]


def test_a_second_transaction_is_refused() -> None:
    with pytest.raises(OrderError, match="an inner transaction would commit what the outer one still may roll back"):
        mediator_of({Place: fail}, TransactionMiddleware(Memory().begin), TransactionMiddleware(Memory().begin))


# -- the end under cancellation ----------------------------------------------------------------------------------------


async def test_a_cancellation_during_the_commit_waits_for_it() -> None:
    memory = Memory()
    hooks: list[int] = []
    committing = anyio.Event()
    may_commit = anyio.Event()

    @asynccontextmanager
    async def slow() -> AsyncGenerator[MemorySession]:
        async with memory.begin() as session:
            yield session
            committing.set()
            await may_commit.wait()

    async def place_with_hook(command: Place, context: Context, session: MemorySession) -> int:
        session.rows.append(command.n)
        context.after_commit(lambda: hooks.append(1))
        return 1

    mediator = mediator_of({Place: place_with_hook}, RetryMiddleware(3), TransactionMiddleware(slow))
    results: list[int] = []
    async with anyio.create_task_group() as tasks:

        async def send() -> None:
            await mediator.send(Place())
            await checkpoint()
            results.append(1)

        tasks.start_soon(send)
        await committing.wait()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert memory.rows == []
            may_commit.set()
    assert memory.rows == [1]
    assert hooks == [1]
    assert results == []


async def test_a_cancelled_handler_is_rolled_back_to_the_end() -> None:
    memory = Memory()
    handling = anyio.Event()

    @asynccontextmanager
    async def slow() -> AsyncGenerator[MemorySession]:
        async with memory.begin() as session:
            try:
                yield session
            except BaseException:
                await checkpoint()
                memory.log.append("rolling back")
                raise

    async def hang(command: Place, session: MemorySession) -> int:
        session.rows.append(1)
        handling.set()
        await anyio.sleep_forever()
        return 1

    mediator = mediator_of({Place: hang}, RetryMiddleware(3), TransactionMiddleware(slow))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mediator.send, Place())
        await handling.wait()
        tasks.cancel_scope.cancel()
    assert memory.log == ["begin", "rolling back", "rollback"]


async def test_it_logs_under_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    mediator = mediator_of(
        {Place: place, Reserved: reserved},
        TransactionMiddleware(Memory().begin),
        PublishMiddleware(RecordingBroker(BrokerUnavailableError("away")), DESTINATIONS),
    )
    with caplog.at_level(logging.ERROR):
        await mediator.send(Place())
    assert {record.name for record in caplog.records} == {"pipeline_mediator.middlewares.transaction"}
    assert "away" not in caplog.text, "what a broker says may contain what is none of a log's business"
