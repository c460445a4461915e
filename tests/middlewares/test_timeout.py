"""A limit on how long an attempt may take."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from pipeline_mediator.context import Context, Route
from pipeline_mediator.errors import ConfigurationError, OrderError
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.requests import Command
from tests.middlewares.shop import AT_ONCE, Memory, MemorySession, Place, Reserve, Reserved, mediator_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

SHORT = 0.02


class Hanging:
    """Hangs in the first attempts, then succeeds."""

    def __init__(self, times: int = 100) -> None:
        self.times = times
        self.attempts = 0

    async def handle(self, command: Place) -> int:
        self.attempts += 1
        if self.attempts <= self.times:
            await anyio.sleep_forever()
        return command.n


async def test_it_says_what_took_too_long_and_notes_it() -> None:
    notes: list[tuple[str, dict[str, Any]]] = []

    async def listen(context: Context, call_next: Any) -> Any:
        context.on_note(lambda name, facts: notes.append((name, dict(facts))))
        return await call_next(context)

    mediator = mediator_of({Place: Hanging()}, listen, TimeoutMiddleware(SHORT))
    with pytest.raises(TimeoutError, match=r"^Place took longer than 0\.02 s$"):
        await mediator.send(Place())
    assert notes == [("timeout", {"seconds": SHORT})]


async def test_what_is_quick_enough_is_not_touched() -> None:
    mediator = mediator_of({Place: Hanging(0)}, TimeoutMiddleware(60))
    assert await mediator.send(Place(3)) == 3


async def test_inside_retry_the_limit_is_for_each_attempt_and_is_retried() -> None:
    handler = Hanging(2)
    mediator = mediator_of({Place: handler}, RetryMiddleware(3, wait=AT_ONCE), TimeoutMiddleware(SHORT))
    assert await mediator.send(Place()) == 1
    assert handler.attempts == 3


async def test_outside_retry_it_limits_all_attempts_together_and_is_not_retried() -> None:
    handler = Hanging()
    mediator = mediator_of(
        {Place: handler},
        TimeoutMiddleware(3 * SHORT, total=True),
        RetryMiddleware(99, wait=AT_ONCE),
        TimeoutMiddleware(SHORT),
    )
    with pytest.raises(TimeoutError, match=r"Place took longer than 0\.06 s for all attempts"):
        await mediator.send(Place())
    assert 1 <= handler.attempts <= 3


async def test_the_limit_includes_the_events_that_were_emitted() -> None:
    async def place(command: Place, context: Context) -> int:
        context.emit(Reserved())
        return 1

    async def hang(event: Reserved) -> None:
        await anyio.sleep_forever()

    mediator = mediator_of({Place: place, Reserved: hang}, TimeoutMiddleware(SHORT))
    with pytest.raises(TimeoutError):
        await mediator.send(Place())


async def test_a_timed_out_transaction_is_rolled_back() -> None:
    memory = Memory()

    async def hang(command: Place, session: MemorySession) -> int:
        session.rows.append(command.n)
        await anyio.sleep_forever()
        return 1

    mediator = mediator_of({Place: hang}, TimeoutMiddleware(SHORT), TransactionMiddleware(memory.begin))
    with pytest.raises(TimeoutError):
        await mediator.send(Place())
    assert memory.log == ["begin", "rollback"]


async def test_it_has_no_effect_once_the_commit_has_begun() -> None:
    memory = Memory()

    @asynccontextmanager
    async def slow() -> AsyncGenerator[MemorySession]:
        async with memory.begin() as session:
            yield session
            await anyio.sleep(3 * SHORT)

    async def place(command: Place, session: MemorySession) -> int:
        session.rows.append(command.n)
        return command.n

    mediator = mediator_of({Place: place}, TimeoutMiddleware(SHORT), TransactionMiddleware(slow))
    assert await mediator.send(Place()) == 1
    assert memory.rows == [1]


class Export(Command[int]):
    """A message of its own, beside `Place` and `Reserve`."""


class BigExport(Export):
    """Gets what its base gets."""


def limits(*middlewares: Any) -> dict[str, str]:
    async def handle(command: Any) -> int:
        await checkpoint()
        return 1

    handlers: dict[type, Any] = dict.fromkeys((Place, Reserve, Export, BigExport), handle)
    mediator = mediator_of(handlers, *middlewares)
    found: dict[str, str] = {}
    for message_type in handlers:
        lines = mediator.describe(message_type).splitlines()
        limit = next((line.split("  ")[-1].strip() for line in lines if "Timeout" in line), "none")
        found[message_type.__name__] = limit
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seconds": None}, {"Place": "none", "Reserve": "none", "Export": "none", "BigExport": "none"}),
        ({"seconds": 5}, {"Place": "5 s", "Reserve": "5 s", "Export": "5 s", "BigExport": "5 s"}),
        (
            {"seconds": {Export: 60, Place: 1.5}},
            {"Place": "1.5 s", "Reserve": "none", "Export": "60 s", "BigExport": "60 s"},
        ),
        (
            {"seconds": {Command: 2, BigExport: 90}, "default": 7},
            {"Place": "2 s", "Reserve": "2 s", "Export": "2 s", "BigExport": "90 s"},
        ),
        (
            {"seconds": {Export: 60}, "default": 7},
            {"Place": "7 s", "Reserve": "7 s", "Export": "60 s", "BigExport": "60 s"},
        ),
    ],
)
def test_the_nearest_base_has_the_limit_and_what_has_none_has_no_timeout_in_its_chain(
    settings: dict[str, Any], expected: dict[str, str]
) -> None:
    assert limits(TimeoutMiddleware(**settings)) == expected


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), {Place: 0}])
def test_a_limit_that_means_nothing_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="it must be above 0, or None for no limit"):
        TimeoutMiddleware(seconds)


@pytest.mark.parametrize(
    ("middlewares", "problem"),
    [
        ((TimeoutMiddleware(1), RetryMiddleware(2)), "the limit is for one attempt; pass total=True"),
        ((RetryMiddleware(2), TimeoutMiddleware(1, total=True)), "total=True limits all attempts together"),
        ((TransactionMiddleware(Memory().begin), TimeoutMiddleware(1)), "a transaction must end by itself"),
    ],
)
def test_an_order_that_means_something_else_is_refused(middlewares: Any, problem: str) -> None:
    with pytest.raises(OrderError, match=problem):
        mediator_of({Place: Hanging()}, *middlewares)


async def test_a_middleware_may_call_it_by_itself() -> None:
    limit = TimeoutMiddleware({Place: SHORT})

    async def choose(context: Context, call_next: Any) -> Any:
        return await limit(context, call_next)

    async def reserve(command: Reserve) -> int:
        return command.n

    mediator = mediator_of({Place: Hanging(), Reserve: reserve}, choose)
    with pytest.raises(TimeoutError, match="Place took longer"):
        await mediator.send(Place())
    assert await mediator.send(Reserve()) == 2


def test_it_does_not_stand_in_the_chains_of_the_relay() -> None:
    """Which has limits of its own, for a whole batch."""
    assert TimeoutMiddleware(1).for_route(Route(Place, "request", "relay")) is None


class Blocking:
    """A plain function in a worker thread, which nothing can stop."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.ended = False

    def handle(self, command: Place) -> int:
        self.began.set()
        self.may_end.wait(10)
        self.ended = True
        return command.n


async def test_a_plain_function_is_waited_for() -> None:
    handler = Blocking()
    mediator = mediator_of({Place: handler}, TimeoutMiddleware(SHORT))
    async with anyio.create_task_group() as tasks:

        async def end_it() -> None:
            await anyio.to_thread.run_sync(handler.began.wait)
            await anyio.sleep(3 * SHORT)
            assert not handler.ended
            handler.may_end.set()

        tasks.start_soon(end_it)
        with pytest.raises(TimeoutError):
            await mediator.send(Place())
        assert handler.ended
    assert any("a Timeout cannot stop it" in warning for warning in mediator.check())


async def test_a_plain_function_is_waited_for_when_its_scope_is_cancelled() -> None:
    """Its transaction must not end while it still works, whoever gave up."""
    handler = Blocking()
    memory = Memory()
    mediator = mediator_of({Place: handler}, TransactionMiddleware(memory.begin))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mediator.send, Place())
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(handler.began.wait)
            tasks.cancel_scope.cancel()
            await anyio.sleep(SHORT)
            assert memory.log == ["begin"]
            handler.may_end.set()
    assert handler.ended


class TestAsyncio:
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    async def test_a_plain_function_is_waited_for_when_its_task_is_cancelled(self) -> None:
        handler = Blocking()
        memory = Memory()
        mediator = mediator_of({Place: handler}, TransactionMiddleware(memory.begin))
        task = asyncio.ensure_future(mediator.send(Place()))
        await asyncio.to_thread(handler.began.wait)
        task.cancel()
        await asyncio.sleep(SHORT)
        log = list(memory.log)
        handler.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["begin"], "its transaction ended while it still worked"
        assert handler.ended
