"""Streams: the chain spans all items, and every way of leaving ends it properly."""

import gc
import weakref
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    Mediator,
    Next,
    RequestMap,
    StreamQuery,
)
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Database, Recorder, Session


@dataclass(frozen=True)
class Count(StreamQuery[int]):
    limit: int = 3
    fails_at: int = -1


@dataclass(frozen=True)
class CountTwice(Command[object]):
    limit: int = 3


@dataclass(frozen=True)
class Counted(DomainEvent):
    limit: int = 3


class Counting:
    """A handler that writes down what happens to it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.attempts = 0

    async def handle(self, query: Count, context: Context) -> AsyncIterator[int]:
        self.attempts += 1
        self.log.append("begin")
        try:
            for number in range(query.limit):
                if number == query.fails_at:
                    raise ValueError(f"at {number}")
                self.log.append(f"yield {number}")
                yield number
            self.log.append("end")
        finally:
            self.log.append("closed")


def counting(*middlewares: Any) -> tuple[Counting, Mediator]:
    handler = Counting()
    return handler, Mediator(RequestMap().bind(Count, handler), middlewares=middlewares)


async def read(mediator: Mediator, query: Count) -> list[int]:
    async with mediator.stream(query) as items:
        return [item async for item in items]


# -- all of it ---------------------------------------------------------------------------------------------------------


async def test_the_items_arrive_in_order() -> None:
    handler, mediator = counting()

    assert await read(mediator, Count(3)) == [0, 1, 2]
    assert await read(mediator, Count(0)) == []
    assert handler.log == ["begin", "yield 0", "yield 1", "yield 2", "end", "closed", "begin", "end", "closed"]


async def test_every_middleware_spans_the_whole_stream() -> None:
    log: list[str] = []
    handler, mediator = counting(Recorder("outer", log), Recorder("inner", log))
    handler.log = log

    async with mediator.stream(Count(1)) as items:
        assert log == []
        assert [item async for item in items] == [0]
        log.append("read all")

    assert log == ["> outer", "> inner", "begin", "yield 0", "end", "closed", "< inner", "< outer", "read all"]


async def test_a_transaction_spans_the_stream_and_is_committed_at_its_end() -> None:
    database = Database()

    async def count(query: Count, session: Session) -> AsyncIterator[int]:
        for number in range(query.limit):
            session.rows.append(number)
            yield number

    mediator = Mediator(RequestMap().bind(Count, count), middlewares=[TransactionMiddleware(database.begin)])
    async with mediator.stream(Count(2)) as items:
        assert await anext(items) == 0
        assert database.log == ["begin"]
        assert [item async for item in items] == [1]
        assert database.log == ["begin", "commit"]
    assert database.rows == [0, 1]


async def test_events_are_walked_at_the_end_of_the_stream() -> None:
    heard: list[object] = []

    async def count(query: Count, context: Context) -> AsyncIterator[int]:
        context.emit(Counted(query.limit))
        yield 0
        assert heard == []
        yield 1

    async def hear(event: Counted) -> None:
        heard.append(event)

    mediator = Mediator(RequestMap().bind(Count, count), event_map=EventMap().bind(Counted, hear))

    assert await read(mediator, Count(7)) == [0, 1]
    assert heard == [Counted(7)]


async def test_a_stream_has_headers_and_is_caused_by_the_message_at_work() -> None:
    seen: list[Context] = []
    database = Database()

    async def count(query: Count, context: Context) -> AsyncIterator[int]:
        seen.append(context)
        yield 1

    async def twice(command: CountTwice, context: Context) -> object:
        seen.append(context)
        async with mediator.stream(Count(), headers={"tenant": "acme"}) as items:
            return [item async for item in items]

    mediator = Mediator(
        RequestMap().bind(Count, count).bind(CountTwice, twice), middlewares=[TransactionMiddleware(database.begin)]
    )

    assert await mediator.send(CountTwice()) == [1]
    outer, stream = seen
    assert stream.headers == {"tenant": "acme"}
    assert stream.parent is None
    assert (stream.causation_id, stream.correlation_id) == (outer.message_id, outer.correlation_id)
    assert database.log == ["begin", "begin", "commit", "commit"]


async def test_what_a_stream_sends_joins_it() -> None:
    database = Database()

    async def count(query: Count, session: Session) -> AsyncIterator[int]:
        session.rows.append("stream")
        await mediator.send(CountTwice())
        yield 1

    async def twice(command: CountTwice, session: Session) -> object:
        session.rows.append("joined")
        return None

    mediator = Mediator(
        RequestMap().bind(Count, count).bind(CountTwice, twice), middlewares=[TransactionMiddleware(database.begin)]
    )

    assert await read(mediator, Count()) == [1]
    assert database.log == ["begin", "commit"]
    assert database.rows == ["stream", "joined"]


async def test_the_generator_is_not_ahead_by_more_than_one_item() -> None:
    handler, mediator = counting()
    yielded = [f"yield {number}" for number in range(4)]

    async with mediator.stream(Count(4)) as items:
        for number in range(4):
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            assert [line for line in handler.log if line in yielded] == yielded[: number + 1]
            assert await anext(items) == number


async def test_two_streams_at_once_do_not_mix() -> None:
    _, mediator = counting()

    async with mediator.stream(Count(2)) as one, mediator.stream(Count(3)) as other:
        assert [await anext(one), await anext(other), await anext(other), await anext(one)] == [0, 0, 1, 1]
        assert [item async for item in one] == []
        assert [item async for item in other] == [2]


# -- leaving early -----------------------------------------------------------------------------------------------------


async def test_leaving_early_closes_the_generator_and_cancels_the_chain() -> None:
    database = Database()
    ended: list[str] = []

    async def watch(context: Context, call_next: Next) -> Any:
        try:
            await call_next(context)
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    handler, mediator = counting(watch, TransactionMiddleware(database.begin))
    async with mediator.stream(Count(5)) as items:
        async for item in items:
            if item == 1:
                break

    assert handler.log[-1] == "closed"
    assert "end" not in handler.log
    assert "yield 3" not in handler.log
    assert ended == ["cancelled"]
    assert database.log == ["begin", "rollback"]


async def test_leaving_before_the_first_item_closes_what_was_begun() -> None:
    handler, mediator = counting()

    async with mediator.stream(Count(5)):
        pass
    assert handler.log in ([], ["begin", "yield 0", "closed"])

    handler.log.clear()
    async with mediator.stream(Count(5)):
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
    assert handler.log == ["begin", "yield 0", "closed"]


async def test_a_generator_may_await_while_it_is_closed() -> None:
    closed: list[str] = []

    async def count(query: Count) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("after waiting")

    async with Mediator(RequestMap().bind(Count, count)).stream(Count()) as items:
        assert await anext(items) == 1
    assert closed == ["after waiting"]


TENANT: ContextVar[str] = ContextVar("TENANT", default="nobody")


async def test_a_generator_is_closed_in_the_task_that_ran_it() -> None:
    closed: list[str] = []

    async def count(query: Count) -> AsyncIterator[int]:
        token = TENANT.set("acme")
        try:
            yield 1
            yield 2
        finally:
            TENANT.reset(token)
            closed.append(TENANT.get())

    async with Mediator(RequestMap().bind(Count, count)).stream(Count()) as items:
        assert await anext(items) == 1

    assert closed == ["nobody"]


async def test_an_iterator_that_is_no_generator_needs_no_closing() -> None:
    class Numbers:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> "Numbers":
            return self

        async def __anext__(self) -> int:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

    def count(query: Count) -> AsyncIterator[int]:
        return Numbers()

    assert await read(Mediator(RequestMap().bind(Count, count)), Count()) == [1, 0]


async def test_a_stream_may_be_cancelled_from_outside() -> None:
    closed: list[str] = []

    async def count(query: Count) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("after waiting")

    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with Mediator(RequestMap().bind(Count, count)).stream(Count(5)) as items:
            await anext(items)
            scope.cancel()
            await anyio.sleep_forever()

    assert scope.cancelled_caught
    assert closed == ["after waiting"]


async def test_a_generator_is_closed_though_a_timeout_has_cut_it_off() -> None:
    closed: list[str] = []

    async def count(query: Count) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("after waiting")

    mediator = Mediator(RequestMap().bind(Count, count), middlewares=[TimeoutMiddleware(0.01)])
    async with mediator.stream(Count()) as items:
        assert await anext(items) == 1
        with anyio.fail_after(5):
            while not closed:  # noqa: ASYNC110 - the timeout is what is waited for
                await anyio.sleep(0.001)
        with pytest.raises(TimeoutError):
            await anext(items)


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_an_error_is_raised_by_the_iteration_as_it_is() -> None:
    handler, mediator = counting()
    error: BaseException | None = None

    async with mediator.stream(Count(5, fails_at=2)) as items:
        assert [await anext(items), await anext(items)] == [0, 1]
        try:
            await anext(items)
        except ValueError as raised:
            error = raised

    assert str(error) == "at 2"
    assert handler.log[-1] == "closed"
    with pytest.raises(ValueError, match="at 2"):
        await read(mediator, Count(5, fails_at=2))


async def test_an_error_in_the_iteration_may_be_caught_inside_the_block() -> None:
    _, mediator = counting()

    async with mediator.stream(Count(5, fails_at=0)) as items:
        with pytest.raises(ValueError, match="at 0"):
            await anext(items)
        with pytest.raises(StopAsyncIteration):
            await anext(items)


async def test_an_error_after_the_last_item_is_raised_by_the_iteration() -> None:
    async def fail_to_commit(context: Context, call_next: Next) -> Any:
        await call_next(context)
        raise ConnectionError("no commit")

    _, mediator = counting(fail_to_commit)
    async with mediator.stream(Count(1)) as items:
        assert await anext(items) == 0
        with pytest.raises(ConnectionError, match="no commit"):
            await anext(items)


async def test_an_error_while_leaving_is_raised_when_the_block_ends() -> None:
    async def count(query: Count) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ConnectionError("cannot close")

    with pytest.raises(ConnectionError, match="cannot close"):
        async with Mediator(RequestMap().bind(Count, count)).stream(Count()) as items:
            assert await anext(items) == 1


async def test_an_error_that_nobody_iterated_to_is_raised_when_the_block_ends() -> None:
    _, mediator = counting()

    async def open_only() -> None:
        async with mediator.stream(Count(5, fails_at=0)):
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

    with pytest.raises(ValueError, match="at 0"):
        await open_only()


async def test_the_error_of_the_block_wins() -> None:
    async def count(query: Count) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ConnectionError("cannot close")

    error = LookupError("the block's own")

    async def fail_inside() -> None:
        async with Mediator(RequestMap().bind(Count, count)).stream(Count()) as items:
            assert await anext(items) == 1
            raise error

    with pytest.raises(LookupError) as raised:
        await fail_inside()
    assert raised.value is error


# -- retry and timeout -------------------------------------------------------------------------------------------------


async def test_a_stream_is_tried_again_before_its_first_item() -> None:
    handler, mediator = counting(RetryMiddleware(3))
    mediator_query = Count(3, fails_at=0)

    with pytest.raises(ValueError, match="at 0"):
        await read(mediator, mediator_query)
    assert handler.attempts == 3

    async def fail_first(query: Count, context: Context) -> AsyncIterator[int]:
        if context.attempt == 1:
            raise ValueError("no")
        yield context.attempt

    retried = Mediator(RequestMap().bind(Count, fail_first), middlewares=[RetryMiddleware(3)])
    assert await read(retried, Count()) == [2]


@pytest.mark.parametrize("transaction", [True, False])
async def test_a_stream_is_not_tried_again_after_its_first_item(*, transaction: bool) -> None:
    database = Database()
    handler, mediator = counting(RetryMiddleware(3), *([TransactionMiddleware(database.begin)] if transaction else []))

    with pytest.raises(ValueError, match="at 1"):
        await read(mediator, Count(3, fails_at=1))

    assert handler.attempts == 1
    assert database.log == (["begin", "rollback"] if transaction else [])


async def test_a_timeout_limits_the_whole_stream() -> None:
    async def count(query: Count) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    mediator = Mediator(RequestMap().bind(Count, count), middlewares=[TimeoutMiddleware(0.01)])
    async with mediator.stream(Count()) as items:
        assert await anext(items) == 1
        with pytest.raises(TimeoutError, match=r"Count took longer than 0\.01 s"):
            await anext(items)


# -- how it is opened --------------------------------------------------------------------------------------------------


async def test_a_stream_is_opened_before_it_is_read() -> None:
    _, mediator = counting()
    stream = mediator.stream(Count())

    with pytest.raises(ConfigurationError, match="open the stream first: `async with mediator"):
        await anext(stream)


async def test_a_stream_is_opened_once() -> None:
    _, mediator = counting()
    stream = mediator.stream(Count(1))

    async with stream as items:
        with pytest.raises(ConfigurationError, match=r"a stream is opened once; call mediator.stream\(query\) again"):
            await stream.__aenter__()
        assert [item async for item in items] == [0]
    with pytest.raises(ConfigurationError, match="a stream is opened once"):
        await stream.__aenter__()


async def test_a_stream_that_was_not_opened_may_be_left() -> None:
    handler, mediator = counting()

    await mediator.stream(Count()).__aexit__(None, None, None)

    assert handler.log == []


async def test_a_dependency_of_a_stream_is_ended_with_it() -> None:
    closed: list[str] = []

    class Cursor:
        async def aclose(self) -> None:
            closed.append("cursor")

    class Handler:
        def __init__(self, cursor: Cursor) -> None:
            self.cursor = cursor

        async def handle(self, query: Count) -> AsyncIterator[int]:
            yield 1
            yield 2
            assert closed == []

    mediator = Mediator(RequestMap().bind(Count, Handler), PlainContainer(Cursor))
    assert await read(mediator, Count()) == [1, 2]
    assert closed == ["cursor"]

    async with mediator.stream(Count()) as items:
        assert await anext(items) == 1
    assert closed == ["cursor"] * 2


# -- no context is kept alive ------------------------------------------------------------------------------------------


async def read_all(mediator: Mediator, query: Count) -> None:
    await read(mediator, query)


async def leave_early(mediator: Mediator, query: Count) -> None:
    async with mediator.stream(query) as items:
        await anext(items)


async def fail(mediator: Mediator, query: Count) -> None:
    try:
        await read(mediator, Count(3, fails_at=1))
    except ValueError:
        return
    raise AssertionError("did not fail")


@pytest.mark.parametrize("middlewares", [[], [RetryMiddleware(2)], [TransactionMiddleware(Database().begin)]])
@pytest.mark.parametrize("use", [read_all, leave_early, fail])
async def test_no_context_is_kept_alive(use: Any, middlewares: Any) -> None:
    seen: list[weakref.ref[Any]] = []

    async def watch(context: Context, call_next: Next) -> Any:
        seen.append(weakref.ref(context))
        seen.append(weakref.ref(context.unit))
        return await call_next(context)

    _, mediator = counting(*middlewares, watch)
    await use(mediator, Count(3))
    seen.clear()
    gc.collect()
    gc.disable()
    try:
        await use(mediator, Count(3))
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert len(seen) == 2
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


async def stream_lines(mediator: Mediator) -> AsyncGenerator[str]:
    async with mediator.stream(Count(3)) as items:
        async for item in items:
            yield str(item)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_generator_that_nobody_closes_ends_its_stream() -> None:
    """As a web framework leaves it when the client has gone: the garbage collector closes it, in another task."""
    handler, mediator = counting()
    lines = stream_lines(mediator)
    assert await anext(lines) == "0"
    del lines
    gc.collect()
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert handler.log[0] == "begin"
    assert handler.log[-1] == "closed"
    assert "yield 2" not in handler.log
