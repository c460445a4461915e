"""The terminal of local handlers: what a call costs, Diator's `events` property, worker threads, and standing alone."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    Event,
    EventMap,
    Mediator,
    Next,
    RequestHandler,
    RequestMap,
    Route,
    StreamQuery,
)
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import ConfigurationError, HandlerNotFoundError
from pipeline_mediator.middlewares.handle import HandleMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Database, Session


@dataclass(frozen=True)
class Join(Command[object]):
    name: str = "a"
    fails: bool = False


@dataclass(frozen=True)
class Leave(Command[object]):
    pass


@dataclass(frozen=True)
class Listed(StreamQuery[int]):
    limit: int = 2


@dataclass(frozen=True)
class Joined(DomainEvent):
    name: str


@dataclass(frozen=True)
class Greeted(DomainEvent):
    name: str


# -- the events property -----------------------------------------------------------------------------------------------


class JoinHandler(RequestHandler[Join, None]):
    """As Diator's handlers are."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> None:
        for number in (1, 2, 3):
            self._events.append(Joined(f"{request.name}{number}"))
        if request.fails:
            raise ValueError("no")


class SyncJoinHandler:
    @cached_property
    def events(self) -> list[Event]:
        return []

    def handle(self, request: Join) -> None:
        self.events.append(Joined(request.name))


class JoinHandlerWithContext(JoinHandler):
    async def handle(self, request: Join, context: Context | None = None) -> None:
        assert context is not None
        context.emit(Greeted(request.name))
        self._events.append(Joined(request.name))


class Heard:
    """Writes down the names of the events, by the message that emitted them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.by_message: dict[object, list[str]] = {}

    async def joined(self, event: Joined, context: Context) -> None:
        self.names.append(event.name)
        assert context.parent is not None
        self.by_message.setdefault(context.parent.message, []).append(event.name)

    async def greeted(self, event: Greeted, context: Context) -> None:
        self.names.append(f"hello {event.name}")


def mediator_of(heard: Heard, handler: Any, *middlewares: Any, container: Any = None) -> Mediator:
    events = EventMap().bind(Joined, heard.joined).bind(Greeted, heard.greeted)
    return Mediator(RequestMap().bind(Join, handler), container, event_map=events, middlewares=middlewares)


async def test_collected_events_are_walked_first_in_first_out() -> None:
    heard = Heard()

    await mediator_of(heard, JoinHandler).send(Join())

    assert heard.names == ["a1", "a2", "a3"]


@pytest.mark.parametrize(
    ("handler", "names"),
    [(SyncJoinHandler, ["a"]), (SyncJoinHandler(), ["a"]), (JoinHandlerWithContext, ["hello a", "a"])],
)
async def test_plain_handlers_and_handlers_with_a_context_may_collect(handler: Any, names: list[str]) -> None:
    heard = Heard()

    await mediator_of(heard, handler).send(Join())

    assert heard.names == names


class Singleton:
    """A container whose handlers live as long as it does, as a library's singletons do."""

    def __init__(self) -> None:
        self.made: dict[type, Any] = {}

    def prepare(self, wanted: Any, seeded: Any, /) -> None: ...

    def open(self, seeds: Any, /) -> "Singleton":
        return self

    is_async = False

    def get(self, wanted: type, /) -> Any:
        return self.made.setdefault(wanted, wanted())

    def close(self, error: BaseException | None, /) -> None: ...


async def test_a_handler_that_lives_longer_is_emptied() -> None:
    for handler, container in ((JoinHandler(), None), (JoinHandler, Singleton())):
        heard = Heard()
        mediator = mediator_of(heard, handler, container=container)
        await mediator.send(Join("a"))
        await mediator.send(Join("b"))

        assert heard.names == ["a1", "a2", "a3", "b1", "b2", "b3"]


async def test_what_a_failed_message_collected_is_not_emitted_by_the_next() -> None:
    heard = Heard()
    mediator = mediator_of(heard, JoinHandler())

    with pytest.raises(ValueError, match="no"):
        await mediator.send(Join("a", fails=True))
    await mediator.send(Join("b"))

    assert heard.names == ["b1", "b2", "b3"]


class SlowHandler(JoinHandler):
    """Collects one event before it waits, and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work = 0

    async def handle(self, request: Join) -> None:
        self._events.append(Joined(f"{request.name}1"))
        self.at_work += 1
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        self.at_work -= 1
        if request.fails:
            raise ValueError("no")
        self._events.append(Joined(f"{request.name}2"))


@pytest.mark.parametrize("by_object", [True, False])
async def test_concurrent_messages_do_not_mix_their_events(*, by_object: bool) -> None:
    heard = Heard()
    handler = SlowHandler()
    container = Singleton()
    container.made[SlowHandler] = handler
    mediator = mediator_of(heard, handler if by_object else SlowHandler, container=None if by_object else container)
    failed: list[str] = []

    async def send(name: str) -> None:
        try:
            await mediator.send(Join(name, fails=name == "b"))
        except ValueError:
            failed.append(name)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for name in "abcd":
                tasks.start_soon(send, name)

    assert failed == ["b"]
    assert heard.by_message == {Join(name): [f"{name}1", f"{name}2"] for name in "acd"}
    assert handler.events == []


async def test_a_message_that_joins_does_not_wait_for_the_one_that_it_joins() -> None:
    class Recursive(JoinHandler):
        async def handle(self, request: Join, context: Context | None = None) -> None:
            assert context is not None
            self._events.append(Joined(request.name))
            if len(request.name) < 3:
                await context.send(Join(request.name + "+"))
            self._events.append(Joined(f"{request.name} done"))

    heard = Heard()
    with anyio.fail_after(5):
        await mediator_of(heard, Recursive()).send(Join("a"))

    assert heard.names == ["a", "a+", "a++", "a++ done", "a+ done", "a done"]


async def test_one_who_waits_for_a_handler_may_be_cancelled() -> None:
    heard = Heard()
    handler = SlowHandler()
    mediator = mediator_of(heard, handler)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mediator.send, Join("a"))
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(0):
            await mediator.send(Join("b"))

    assert heard.names == ["a1", "a2"]
    await mediator.send(Join("c"))
    assert heard.names == ["a1", "a2", "c1", "c2"]


async def test_other_collections_than_lists_are_emptied_too() -> None:
    class Queueing:
        def __init__(self) -> None:
            self.events: deque[Event] = deque()

        async def handle(self, request: Join) -> None:
            self.events.append(Joined(request.name))

    class Fixed:
        async def handle(self, request: Join) -> None: ...

        @property
        def events(self) -> tuple[Event, ...]:
            return (Joined("fixed"),)

    heard = Heard()
    queueing = mediator_of(heard, Queueing())
    await queueing.send(Join("a"))
    await queueing.send(Join("b"))
    await mediator_of(heard, Fixed).send(Join("c"))

    assert heard.names == ["a", "b", "fixed"]


async def test_something_else_called_events_is_left_alone() -> None:
    class Store:
        stored: ClassVar[list[str]] = []

    class Handler:
        def __init__(self, events: Store) -> None:
            self.events = events

        async def handle(self, request: Join) -> None:
            self.events.stored.append(request.name)

    await mediator_of(Heard(), Handler(Store())).send(Join("a"))
    await mediator_of(Heard(), Handler, container=PlainContainer(Store())).send(Join("b"))

    assert Store.stored == ["a", "b"]


async def test_each_attempt_collects_its_own() -> None:
    attempts: list[int] = []

    class FailsOnce(JoinHandler):
        async def handle(self, request: Join) -> None:
            attempts.append(1)
            self._events.append(Joined(f"attempt {len(attempts)}"))
            if len(attempts) == 1:
                raise ValueError("no")

    heard = Heard()
    await mediator_of(heard, FailsOnce(), RetryMiddleware(2)).send(Join())

    assert heard.names == ["attempt 2"]


async def test_an_event_handler_may_collect_too() -> None:
    class Greet:
        def __init__(self) -> None:
            self.events: list[Event] = []

        async def handle(self, event: Joined) -> None:
            self.events.append(Greeted(event.name))

    heard = Heard()
    events = EventMap().bind(Joined, Greet()).bind(Greeted, heard.greeted)
    mediator = Mediator(event_map=events)
    await mediator.emit(Joined("a"))
    await mediator.emit(Joined("b"))

    assert heard.names == ["hello a", "hello b"]


async def test_a_stream_may_collect_too() -> None:
    class Lists:
        def __init__(self) -> None:
            self.events: list[Event] = []

        async def handle(self, query: Listed) -> AsyncIterator[int]:
            for number in range(query.limit):
                self.events.append(Greeted(str(number)))
                yield number

    heard = Heard()
    mediator = Mediator(RequestMap().bind(Listed, Lists()), event_map=EventMap().bind(Greeted, heard.greeted))
    for _ in range(2):
        async with mediator.stream(Listed(2)) as items:
            assert [item async for item in items] == [0, 1]

    assert heard.names == ["hello 0", "hello 1"] * 2


async def test_an_event_that_nobody_takes_fails_the_message_and_is_dropped() -> None:
    class Lost(Event):
        pass

    class Loses(JoinHandler):
        async def handle(self, request: Join) -> None:
            self._events.append(Lost() if request.fails else Joined(request.name))

    heard = Heard()
    mediator = mediator_of(heard, Loses())
    with pytest.raises(HandlerNotFoundError, match="Lost: it has neither a handler nor a destination"):
        await mediator.send(Join("a", fails=True))
    await mediator.send(Join("b"))

    assert heard.names == ["b"]


# -- what a call costs -------------------------------------------------------------------------------------------------


async def test_a_handler_that_needs_nothing_is_called_without_a_context_and_a_scope(monkeypatch: Any) -> None:
    class Handler:
        async def handle(self, command: Join) -> object:
            return command.name

    async def hear(event: Joined) -> None: ...

    opened: list[object] = []

    class Counting(PlainContainer):
        def open(self, seeds: Any, /) -> Any:
            opened.append(seeds)
            return super().open(seeds)

    mediator = Mediator(RequestMap().bind(Join, Handler), Counting(), event_map=EventMap().bind(Joined, hear, Silent()))
    monkeypatch.setattr("pipeline_mediator.mediator.Context", None)

    assert await mediator.send(Join("a")) == "a"
    await mediator.emit(Joined("a"))
    assert opened == []


class Silent:
    async def handle(self, event: Joined) -> None: ...


class JoinInSession:
    def __init__(self, session: Session) -> None: ...

    async def handle(self, command: Join, context: Context) -> object:
        await context.send(Leave())
        context.emit(Joined(command.name))
        return None


class LeaveInSession:
    def __init__(self, session: Session) -> None: ...

    async def handle(self, command: Leave) -> object: ...


class HearInSession:
    def __init__(self, session: Session) -> None: ...

    async def handle(self, event: Joined) -> None: ...


async def test_one_scope_is_opened_for_a_message_and_all_that_joins_it() -> None:
    opened: list[dict[type, object]] = []

    class Counting(PlainContainer):
        def open(self, seeds: Any, /) -> Any:
            opened.append(dict(seeds))
            return super().open(seeds)

    async def hear(event: Joined, session: Session) -> None: ...

    database = Database()
    mediator = Mediator(
        RequestMap().bind(Join, JoinInSession).bind(Leave, LeaveInSession),
        Counting(),
        event_map=EventMap().bind(Joined, hear, HearInSession),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(Join())

    assert [set(seeds) for seeds in opened] == [{Context, Session}]


class AsyncContainer:
    """A container that resolves asynchronously."""

    def prepare(self, wanted: Any, seeded: Any, /) -> None: ...

    def open(self, seeds: Any, /) -> "AsyncContainer":
        return self

    is_async = True

    async def get(self, wanted: type, /) -> Any:
        await anyio.lowlevel.checkpoint()
        return wanted()

    def close(self, error: BaseException | None, /) -> None: ...


class Greeter:
    name = "greeter"


async def test_a_container_may_resolve_asynchronously() -> None:
    class WithContext:
        async def handle(self, command: Join, context: Context) -> object:
            return context.message

    class WithoutContext:
        async def handle(self, command: Join) -> object:
            return command

    async def function(command: Join, greeter: Greeter) -> object:
        return greeter.name

    for handler, result in ((WithContext, Join()), (WithoutContext, Join()), (function, "greeter")):
        bind: Any = RequestMap().bind
        assert await Mediator(bind(Join, handler), AsyncContainer()).send(Join()) == result


# -- worker threads ----------------------------------------------------------------------------------------------------


@contextmanager
def blocked() -> Generator[tuple[threading.Event, threading.Event, list[str]]]:
    """What a handler in a worker thread waits for; set in the end, so that no thread is left behind."""
    begun, may_end, log = threading.Event(), threading.Event(), list[str]()
    try:
        yield begun, may_end, log
    finally:
        may_end.set()


async def wait_for(event: threading.Event) -> None:
    with anyio.fail_after(5):
        while not event.is_set():  # noqa: ASYNC110 - of another thread
            await anyio.sleep(0.001)


async def test_a_worker_thread_is_waited_for_when_its_message_is_cancelled() -> None:
    with blocked() as (begun, may_end, log):

        def handle(command: Join) -> object:
            begun.set()
            may_end.wait(5)
            log.append("thread ended")
            return None

        database = Database()
        mediator = Mediator(RequestMap().bind(Join, handle), middlewares=[TransactionMiddleware(database.begin)])

        async def send() -> None:
            try:
                await mediator.send(Join())
            finally:
                log.append("send ended")

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                await wait_for(begun)
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    for _ in range(5):
                        await anyio.lowlevel.checkpoint()
                    assert log == []
                    assert database.log == ["begin"]
                    may_end.set()

    assert log == ["thread ended", "send ended"]
    assert database.log == ["begin", "rollback"]


async def test_a_worker_thread_is_waited_for_when_its_task_is_cancelled(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio's tasks cannot be cancelled one by one")
    with blocked() as (begun, may_end, log):

        def handle(command: Join) -> object:
            begun.set()
            may_end.wait(5)
            log.append("thread ended")
            return None

        task = asyncio.create_task(Mediator(RequestMap().bind(Join, handle)).send(Join()))
        await wait_for(begun)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert log == ["thread ended"]


# -- standing alone ----------------------------------------------------------------------------------------------------


def handle_alone() -> HandleMiddleware:
    async def join(command: Join) -> object:
        return command.name

    return HandleMiddleware(RequestMap().bind(Join, join), EventMap(), PlainContainer(), lambda _: None)


async def after(context: Context) -> str:
    return "call_next was called"


async def test_it_may_be_called_as_a_middleware() -> None:
    assert await handle_alone()(Context(Join("a"), Route(Join, "request", "local")), after) == "a"
    to_broker = Context(Join("a"), Route(Join, "request", "local", "warehouse"))
    assert await handle_alone()(to_broker, after) == "call_next was called"
    with pytest.raises(ConfigurationError, match="HandleMiddleware was called with a context that has no route"):
        await handle_alone()(Context(Join("a")), after)


async def test_what_stands_in_a_chain_may_be_called_as_a_middleware() -> None:
    link = handle_alone().for_route(Route(Join, "request", "local"))

    assert link is not None
    assert link.summary.endswith("join")
    assert await link(Context(Join("a")), after) == "a"


async def test_a_pipeline_of_the_users_may_end_in_it() -> None:
    seen: list[str] = []

    async def look(context: Context, call_next: Next) -> Any:
        seen.append(type(context.message).__name__)
        return await call_next(context)

    async def join(command: Join) -> object:
        return command.name

    assert await Mediator(RequestMap().bind(Join, join), middlewares=[look]).send(Join("a")) == "a"
    assert seen == ["Join"]


async def test_handlers_that_need_nothing_run_in_turn_each_time_anew() -> None:
    made: list[str] = []

    class First:
        def __init__(self) -> None:
            made.append("first")

        async def handle(self, event: Joined) -> None:
            made.append(f"first handles {event.name}")

    class Second:
        def __init__(self) -> None:
            made.append("second")

        async def handle(self, event: Joined) -> None:
            raise LookupError(event.name)

    class Third:
        async def handle(self, event: Joined) -> None:
            made.append("third")

    mediator = Mediator(event_map=EventMap().bind(Joined, First, Second, Third))
    for name in ("a", "b"):
        with pytest.raises(LookupError, match=name):
            await mediator.emit(Joined(name))
    assert made == ["first", "first handles a", "second", "first", "first handles b", "second"]
