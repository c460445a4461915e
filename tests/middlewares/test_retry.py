"""Another attempt is a fresh start, and only what may be repeated is."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import tenacity
from anyio.lowlevel import checkpoint

from pipeline_mediator.context import Context, Route
from pipeline_mediator.errors import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    HandlerNotFoundError,
    InvalidMessageError,
    OrderError,
    PermanentError,
    TransactionDoomedError,
    TransactionFinishedError,
)
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.requests import RequestMap, StreamQuery
from tests.middlewares.shop import AT_ONCE, Memory, MemorySession, Place, Reserve, Reserved, mediator_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator


def retry(attempts: int | None = 3, *, wait: Any = AT_ONCE, **options: Any) -> RetryMiddleware:
    return RetryMiddleware(attempts, wait=wait, **options)


class Failing:
    """A handler that raises the given errors one after the other, then succeeds."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.attempts = 0

    async def handle(self, command: Place) -> int:
        self.attempts += 1
        await checkpoint()
        if self.errors:
            raise self.errors.pop(0)
        return command.n


def failing(*errors: BaseException, **options: Any) -> tuple[Mediator, Failing]:
    handler = Failing(*errors)
    return mediator_of({Place: handler}, retry(**options)), handler


@pytest.fixture
def no_collection() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- a fresh start -----------------------------------------------------------------------------------------------------


async def test_each_attempt_has_its_own_context_scope_and_transaction() -> None:
    memory = Memory()
    contexts: list[Context] = []
    handlers: list[object] = []
    closed: list[object] = []

    class PlaceHandler:
        def __init__(self, session: MemorySession) -> None:
            self.session = session
            handlers.append(self)

        async def handle(self, command: Place, context: Context) -> int:
            contexts.append(context)
            assert self.session.rows == []
            self.session.rows.append(command.n)
            if context.attempt < 3:
                raise ConnectionError("reset")
            return 1

        async def aclose(self) -> None:
            closed.append(self)

    mediator = mediator_of({Place: PlaceHandler}, retry(), TransactionMiddleware(memory.begin))
    assert await mediator.send(Place()) == 1
    assert memory.log == ["begin", "rollback", "begin", "rollback", "begin", "commit"]
    assert memory.rows == [1]
    assert [context.attempt for context in contexts] == [1, 2, 3]
    assert len({id(context) for context in contexts}) == 3
    assert len({id(context.unit) for context in contexts}) == 3
    assert len({context.message_id for context in contexts}) == 1
    assert len(handlers) == 3
    assert closed == handlers


async def test_headers_and_items_are_as_they_were_before_the_first_attempt() -> None:
    seen: list[tuple[dict[str, str], dict[Any, Any]]] = []

    async def outside(context: Context, call_next: Any) -> Any:
        context.headers["tenant"] = "acme"
        context.items["user"] = "ada"
        return await call_next(context)

    async def place(command: Place, context: Context) -> int:
        seen.append((dict(context.headers), dict(context.items)))
        context.headers["leftover"] = "1"
        context.items["leftover"] = 1
        del context.headers["tenant"]
        if len(seen) < 3:
            raise ConnectionError("reset")
        return 1

    mediator = mediator_of({Place: place}, outside, retry())
    await mediator.send(Place())
    assert seen == [({"tenant": "acme"}, {"user": "ada"})] * 3


@pytest.mark.parametrize("transaction", [True, False])
async def test_what_a_failed_attempt_left_for_later_is_dropped(*, transaction: bool) -> None:
    walked: list[int] = []
    hooks: list[int] = []

    async def place(command: Place, context: Context) -> int:
        context.emit(Reserved(context.attempt))
        context.after_commit(lambda: hooks.append(context.attempt))
        if context.attempt < 3:
            raise ConnectionError("reset")
        return 1

    async def reserved(event: Reserved) -> None:
        walked.append(event.n)

    middlewares = [TransactionMiddleware(Memory().begin)] if transaction else []
    mediator = mediator_of({Place: place, Reserved: reserved}, retry(), *middlewares)
    await mediator.send(Place())
    assert walked == [3]
    assert hooks == [3]


@pytest.mark.parametrize("transaction", [True, False])
async def test_a_failing_event_handler_repeats_the_whole(*, transaction: bool) -> None:
    walked: list[str] = []

    async def place(command: Place, context: Context) -> int:
        walked.append("place")
        context.emit(Reserved())
        return 1

    async def reserved(event: Reserved) -> None:
        walked.append("reserved")
        if len(walked) < 4:
            raise ConnectionError("reset")

    middlewares = [TransactionMiddleware(Memory().begin)] if transaction else []
    mediator = mediator_of({Place: place, Reserved: reserved}, retry(), *middlewares)
    await mediator.send(Place())
    assert walked == ["place", "reserved"] * 2


async def test_the_note_says_which_attempt_comes_and_why() -> None:
    notes: list[tuple[str, dict[str, Any]]] = []

    async def listen(context: Context, call_next: Any) -> Any:
        context.on_note(lambda name, facts: notes.append((name, dict(facts))))
        return await call_next(context)

    mediator = mediator_of({Place: Failing(ConnectionError("secret"), TimeoutError())}, listen, retry())
    await mediator.send(Place())
    assert notes == [
        ("retry", {"attempt": 2, "error": "ConnectionError", "wait": 0.0}),
        ("retry", {"attempt": 3, "error": "TimeoutError", "wait": 0.0}),
    ]


# -- which errors ------------------------------------------------------------------------------------------------------


class MyPermanentError(PermanentError):
    pass


class _RefusedError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        MyPermanentError("no"),
        InvalidMessageError(Place, "n must be positive"),
        ConfigurationError("wrong"),
        HandlerNotFoundError(Place, "nobody"),
        CommitOutcomeUnknownError(Place),
        ExceptionGroup("two", [ConnectionError(), MyPermanentError()]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("on", [None, Exception])
async def test_never_repeated_even_where_the_policy_names_every_exception(error: Exception, on: Any) -> None:
    mediator, handler = failing(error, on=on)
    with pytest.raises(type(error)) as caught:
        await mediator.send(Place())
    assert caught.value is error
    assert handler.attempts == 1
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("reset"),
        _RefusedError(),
        TransactionDoomedError(Reserve, Place, "ConnectionError"),
        ExceptionGroup("one", [ConnectionError()]),
        ExceptionGroup("nested", [ExceptionGroup("two", [ConnectionError(), TimeoutError()])]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_repeated_without_a_policy(error: Exception) -> None:
    mediator, handler = failing(error)
    assert await mediator.send(Place()) == 1
    assert handler.attempts == 2


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ConnectionResetError(), 2),
        (TimeoutError(), 2),
        (ValueError(), 1),
        (ExceptionGroup("both named", [ConnectionResetError(), TimeoutError()]), 2),
        (ExceptionGroup("one is not", [ConnectionResetError(), ValueError()]), 1),
        (ExceptionGroup("a group of one", [ConnectionResetError()]), 2),
    ],
)
async def test_on_names_the_errors(error: Exception, attempts: int) -> None:
    mediator, handler = failing(error, on=(ConnectionError, TimeoutError))
    if attempts == 1:
        with pytest.raises(type(error)):
            await mediator.send(Place())
    else:
        await mediator.send(Place())
    assert handler.attempts == attempts


async def test_on_may_name_the_unknown_outcome() -> None:
    mediator, handler = failing(CommitOutcomeUnknownError(Place), on=CommitOutcomeUnknownError)
    assert await mediator.send(Place()) == 1
    assert handler.attempts == 2


async def test_a_cancelled_attempt_is_not_repeated() -> None:
    attempts: list[int] = []
    started = anyio.Event()

    async def hang(command: Place) -> int:
        attempts.append(1)
        started.set()
        await anyio.sleep_forever()
        return 1

    mediator = mediator_of({Place: hang}, retry())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mediator.send, Place())
        await started.wait()
        tasks.cancel_scope.cancel()
    assert attempts == [1]


async def test_a_cancellation_while_it_waits_ends_it() -> None:
    handler = Failing(ConnectionError(), ConnectionError())
    waiting = anyio.Event()

    def wait(_state: tenacity.RetryCallState) -> float:
        waiting.set()
        return 3600.0

    mediator = mediator_of({Place: handler}, retry(wait=wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mediator.send, Place())
        await waiting.wait()
        tasks.cancel_scope.cancel()
    assert handler.attempts == 1


# -- tenacity's strategies ---------------------------------------------------------------------------------------------


async def test_the_last_error_is_raised_as_it_is_with_a_note() -> None:
    errors = [ConnectionError(str(n)) for n in range(1, 5)]
    mediator, handler = failing(*errors, attempts=3)
    with pytest.raises(ConnectionError, match="3") as caught:
        await mediator.send(Place())
    assert caught.value is errors[2]
    assert caught.value.__notes__ == ["Place failed in each of 3 attempts"]
    assert caught.value.__context__ is None
    assert handler.attempts == 3


async def test_one_attempt_stands_in_no_chain() -> None:
    error = ConnectionError("reset")
    mediator = mediator_of({Place: Failing(error)}, RetryMiddleware(1))
    assert "RetryMiddleware" not in mediator.describe()
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert not hasattr(error, "__notes__")


async def test_stop_after_attempt() -> None:
    errors = [ConnectionError() for _ in range(9)]
    mediator, handler = failing(*errors, attempts=None, stop=tenacity.stop_after_attempt(4))
    assert "until its stop strategy says so" in mediator.describe()
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert handler.attempts == 4


async def test_stop_after_delay_counts_from_the_first_attempt() -> None:
    async def slow(command: Place) -> int:
        attempts.append(1)
        await anyio.sleep(0.03)
        raise ConnectionError("reset")

    attempts: list[int] = []
    mediator = mediator_of({Place: slow}, retry(None, stop=tenacity.stop_after_delay(0.02)))
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert attempts == [1]


async def test_stop_before_delay_looks_at_the_wait() -> None:
    mediator, handler = failing(
        *[ConnectionError() for _ in range(9)],
        attempts=None,
        stop=tenacity.stop_before_delay(60),
        wait=tenacity.wait_fixed(3600),
    )
    with anyio.fail_after(5), pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert handler.attempts == 1


async def test_stop_strategies_combine() -> None:
    stop = tenacity.stop_after_delay(3600) | tenacity.stop_after_attempt(2)
    mediator, handler = failing(*[ConnectionError() for _ in range(9)], attempts=None, stop=stop)
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert handler.attempts == 2


async def test_wait_strategies_see_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    wait = tenacity.wait_exponential(multiplier=1) + tenacity.wait_fixed(0.5)
    handler = Failing(*[ConnectionError() for _ in range(3)])
    mediator = mediator_of({Place: handler}, RetryMiddleware(5, wait=wait))
    await mediator.send(Place())
    assert slept == [1.5, 2.5, 4.5]


async def test_wait_strategies_see_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)

    class BusyError(Exception):
        retry_after = 7.0

    def wait(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        return getattr(state.outcome.exception(), "retry_after", 0.0)

    handler = Failing(BusyError(), ExceptionGroup("of one", [BusyError()]), ConnectionError())
    mediator = mediator_of({Place: handler}, RetryMiddleware(5, wait=wait))
    await mediator.send(Place())
    assert slept == [7.0, 7.0, 0.0]


async def test_the_default_wait_is_random_and_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    async def sleep(seconds: float) -> None:
        assert seconds == limits[-1]

    def highest(_low: float, high: float) -> float:
        limits.append(high)
        return high

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr("random.uniform", highest)
    handler = Failing(*[ConnectionError() for _ in range(7)])
    await mediator_of({Place: handler}, RetryMiddleware(8)).send(Place())
    assert limits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]


@pytest.mark.parametrize(
    ("strategy", "error", "attempts"),
    [
        (tenacity.retry_if_exception_type(ConnectionError), ConnectionResetError(), 2),
        (tenacity.retry_if_exception_type(ConnectionError), ValueError(), 1),
        (tenacity.retry_if_not_exception_type(ValueError), ValueError(), 1),
        (tenacity.retry_if_exception_message(match="deadlock"), RuntimeError("deadlock detected"), 2),
        (tenacity.retry_if_exception_message(match="deadlock"), RuntimeError("no"), 1),
        (tenacity.retry_if_exception(lambda error: bool(error.args)), ConnectionError("reset"), 2),
        (tenacity.retry_if_exception_type(ConnectionError), ExceptionGroup("one is not", [OSError(), ValueError()]), 1),
        (tenacity.retry_if_exception_type(OSError), ExceptionGroup("both", [OSError(), ConnectionError()]), 2),
        (tenacity.retry_if_exception_type(PermanentError), MyPermanentError(), 1),
        (tenacity.retry_if_exception_type(CommitOutcomeUnknownError), CommitOutcomeUnknownError(Place), 1),
    ],
)
async def test_retry_strategies(strategy: Any, error: Exception, attempts: int) -> None:
    mediator, handler = failing(error, retry=strategy)
    if attempts == 1:
        with pytest.raises(type(error)):
            await mediator.send(Place())
    else:
        await mediator.send(Place())
    assert handler.attempts == attempts


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"attempts": 3, "stop": tenacity.stop_never}, "pass attempts= or stop=, not both"),
        ({"on": OSError, "retry": tenacity.retry_always}, "pass on= or retry=, not both"),
        ({"attempts": 0}, r"attempts=0\): the first try counts"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        RetryMiddleware(**settings)


# -- where it stands ---------------------------------------------------------------------------------------------------


def test_inside_a_transaction_it_is_refused() -> None:
    with pytest.raises(OrderError, match="a transaction that failed cannot be used again"):
        mediator_of({Place: Failing()}, TransactionMiddleware(Memory().begin), RetryMiddleware(3))


async def test_a_root_without_a_transaction_joins_and_repeats_like_one_with() -> None:
    """An attempt means the same with and without a transaction: the handler, and what it sends, and its events."""
    log: list[str] = []

    async def place(command: Place, context: Context) -> int:
        log.append(f"place {context.attempt}")
        return await context.send(Reserve())

    async def reserve(command: Reserve, context: Context) -> int:
        log.append("reserve")
        if len(log) < 4:
            raise ConnectionError("reset")
        return 2

    mediator = mediator_of({Place: place, Reserve: reserve}, retry())
    assert await mediator.send(Place()) == 2
    assert log == ["place 1", "reserve", "place 2", "reserve"]


def test_it_does_not_stand_in_the_chains_of_the_relay() -> None:
    """Which comes back to what failed by a back-off of its own."""
    assert RetryMiddleware(3).for_route(Route(Place, "request", "relay")) is None


class Count(StreamQuery[int]):
    pass


@pytest.mark.parametrize("fails_at", [0, 2])
async def test_a_stream_is_repeated_only_before_its_first_item(fails_at: int) -> None:
    attempts: list[int] = []

    async def count(query: Count) -> AsyncGenerator[int]:
        attempts.append(1)
        for n in range(4):
            if n == fails_at and len(attempts) == 1:
                raise ConnectionError("reset")
            yield n

    mediator = Mediator(RequestMap().bind(Count, count), middlewares=[retry()])
    items: list[int] = []

    async def read() -> None:
        async with mediator.stream(Count()) as stream:
            async for item in stream:
                items.append(item)  # noqa: PERF401 - kept up to the error

    if fails_at == 0:
        await read()
        assert items == [0, 1, 2, 3]
        assert len(attempts) == 2
    else:
        with pytest.raises(ConnectionError):
            await read()
        assert items == [0, 1]
        assert len(attempts) == 1


# -- nothing is kept alive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["success", "failure", "success at once"])
@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.usefixtures("no_collection")
async def test_no_context_is_kept_alive(ends: str, *, transaction: bool, limited: bool) -> None:
    contexts: list[weakref.ref[Context]] = []
    units: list[weakref.ref[Any]] = []

    async def place(command: Place, context: Context) -> int:
        contexts.append(weakref.ref(context))
        units.append(weakref.ref(context.unit))
        context.items["self"] = "something"
        context.emit(Reserved())
        await context.send(Reserve())
        context.after_commit(lambda: None)
        if ends != "success at once" and (ends == "failure" or len(contexts) < 3):
            raise ConnectionError("reset")
        return 1

    async def reserve(command: Reserve, context: Context) -> int:
        units.append(weakref.ref(context.unit))
        return 1

    async def reserved(event: Reserved, context: Context) -> None:
        units.append(weakref.ref(context.unit))

    mediator = mediator_of(
        {Place: place, Reserve: reserve, Reserved: reserved},
        retry(),
        *([TimeoutMiddleware(30)] if limited else []),
        *([TransactionMiddleware(Memory().begin)] if transaction else []),
    )
    await quietly(mediator.send, Place())
    assert len(contexts) == (1 if ends == "success at once" else 3)
    await checkpoint()
    assert [one() for one in contexts] == [None] * len(contexts)
    assert [one() for one in units] == [None] * len(units)


@pytest.mark.parametrize("ends", ["success", "failure"])
@pytest.mark.usefixtures("no_collection")
async def test_no_context_is_kept_alive_by_a_handler_that_takes_none(ends: str) -> None:
    """Where nothing asks for a unit, nobody would end it."""
    handler = Failing(*[ConnectionError() for _ in range(2 if ends == "success" else 3)])
    mediator = mediator_of({Place: handler}, retry())
    before = contexts_alive()
    await quietly(mediator.send, Place())
    await checkpoint()
    assert handler.attempts == 3
    assert contexts_alive() == before


def contexts_alive() -> int:
    return sum(isinstance(one, Context) for one in gc.get_objects())


@pytest.mark.parametrize("attempts", [1, 3])
async def test_after_the_end_of_an_attempt_nothing_is_queued_in_it(attempts: int) -> None:
    """Not even where it went well at last, and nothing in it had needed a unit."""
    kept: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        kept.append(context)
        if len(kept) < attempts:
            raise ConnectionError("reset")
        return 1

    mediator = mediator_of({Place: place}, retry())
    await mediator.send(Place())
    assert len(kept) == attempts
    for context in kept:
        with pytest.raises(TransactionFinishedError):
            context.emit(Reserved())


async def quietly(send: Callable[..., Any], message: Place) -> None:
    """In a frame of its own, so that the error is gone when it returns."""
    try:
        await send(message)
    except ConnectionError:
        return
