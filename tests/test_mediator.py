"""How messages are sent and emitted, what joins what, and how a mediator is opened and closed."""

import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    Event,
    EventMap,
    IntegrationEvent,
    Mediator,
    Next,
    Query,
    RequestMap,
    StreamQuery,
    message,
    only,
    unless,
)
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.context import AMBIENT
from pipeline_mediator.errors import (
    BindError,
    ConfigurationError,
    DestinationError,
    EmitError,
    HandlerNotFoundError,
    OrderError,
    ResolutionError,
    TransactionDoomedError,
)
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Broker, Database, Session


@dataclass(frozen=True)
class PlaceOrder(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Reserve(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Ship(Command[None]):
    number: int = 1


@dataclass(frozen=True)
class CountOrders(Query[int]):
    number: int = 1


@dataclass(frozen=True)
class ExportOrders(StreamQuery[int]):
    number: int = 1


@dataclass(frozen=True)
class Noted(DomainEvent):
    text: str = ""


@dataclass(frozen=True)
class Placed(IntegrationEvent):
    number: int = 1


@dataclass(frozen=True)
class Bare(Event):
    number: int = 1


async def count(query: CountOrders) -> int:
    return query.number


# -- what is sent and emitted ------------------------------------------------------------------------------------------


async def test_send_returns_what_the_handler_returns() -> None:
    mediator = Mediator(RequestMap().bind(CountOrders, count))

    assert await mediator.send(CountOrders(7)) == 7
    assert await mediator.send(CountOrders(8)) == 8


async def test_send_raises_what_the_handler_raises() -> None:
    error = LookupError("no such order")

    async def fail(query: CountOrders) -> int:
        raise error

    for middlewares in ([], [RetryMiddleware(2)], [TransactionMiddleware(Database().begin)]):
        with pytest.raises(LookupError) as raised:
            await Mediator(RequestMap().bind(CountOrders, fail), middlewares=middlewares).send(CountOrders())
        assert raised.value is error


def test_a_mediator_shows_its_pipeline() -> None:
    retry = RetryMiddleware(2)

    assert list(Mediator(middlewares=[retry]).pipeline) == [retry]


async def test_several_sends_at_once() -> None:
    database = Database()

    async def place(command: PlaceOrder, session: Session) -> object:
        await anyio.lowlevel.checkpoint()
        session.rows.append(command.number)
        return command.number

    mediator = Mediator(RequestMap().bind(PlaceOrder, place), middlewares=[TransactionMiddleware(database.begin)])
    results: list[object] = []

    async def send(number: int) -> None:
        results.append(await mediator.send(PlaceOrder(number)))

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(send, number)

    assert sorted(map(str, results)) == sorted(map(str, database.rows)) == ["0", "1", "2", "3", "4"]
    assert database.log.count("commit") == 5


MEDIATOR = Mediator(RequestMap().bind(CountOrders, count))
SEND: Any = MEDIATOR.send
EMIT: Any = MEDIATOR.emit


def open_stream(query: Any) -> Any:
    MEDIATOR.stream(query)


@pytest.mark.parametrize(
    ("use", "wrong", "text"),
    [
        (SEND, CountOrders, "send() takes a message, not its class: CountOrders(...)"),
        (SEND, Noted(), "Noted is a Event: mediator.emit() takes it, not send()"),
        (SEND, ExportOrders(), "ExportOrders is a StreamQuery: mediator.stream() takes it, not send()"),
        (EMIT, Noted, "emit() takes a message, not its class: Noted(...)"),
        (EMIT, CountOrders(), "CountOrders is a Request: mediator.send() takes it, not emit()"),
        (open_stream, ExportOrders, "stream() takes a message, not its class: ExportOrders(...)"),
        (open_stream, CountOrders(), "CountOrders is a Request: mediator.send() takes it, not stream()"),
        (
            SEND,
            "count",
            "str is no message: derive it from Command[R], Query[R], StreamQuery[T], DomainEvent or IntegrationEvent",
        ),
        (
            EMIT,
            None,
            (
                "NoneType is no message: derive it from Command[R], Query[R], StreamQuery[T], DomainEvent or "
                "IntegrationEvent"
            ),
        ),
    ],
)
async def test_a_message_of_the_wrong_kind_is_refused(use: Any, wrong: object, text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        await use(wrong)

    assert str(raised.value) == text


async def test_options_do_not_let_a_message_of_the_wrong_kind_in() -> None:
    with pytest.raises(ConfigurationError, match="Noted is a Event"):
        await SEND(Noted(), headers={"a": "b"})
    with pytest.raises(ConfigurationError, match="CountOrders is a Request"):
        await EMIT(CountOrders(), key="a")


async def test_a_handler_cannot_send_what_is_no_request() -> None:
    async def place(command: PlaceOrder, context: Context) -> object:
        wrong: Any = Noted()
        return await context.send(wrong)

    with pytest.raises(ConfigurationError, match=r"Noted is a Event: mediator.emit\(\) takes it, not send\(\)"):
        await Mediator(RequestMap().bind(PlaceOrder, place)).send(PlaceOrder())


# -- nobody handles it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountOrder(Query[int]):
    number: int = 1


@dataclass(frozen=True)
class CountOrdersOfToday(CountOrders):
    number: int = 1


async def test_a_request_that_nobody_handles_names_the_nearest() -> None:
    with pytest.raises(HandlerNotFoundError) as raised:
        await MEDIATOR.send(CountOrder())

    assert str(raised.value) == (
        "CountOrder: no handler is bound to it. Bind one with RequestMap.bind before the Mediator is made. Did you "
        "mean CountOrders?"
    )
    assert raised.value.message_type is CountOrder
    assert raised.value.nearest == ("CountOrders",)


async def test_a_request_that_nobody_handles_and_nothing_is_near() -> None:
    with pytest.raises(HandlerNotFoundError) as raised:
        await MEDIATOR.send(Ship())

    assert str(raised.value) == (
        "Ship: no handler is bound to it. Bind one with RequestMap.bind before the Mediator is made."
    )


async def test_a_request_does_not_inherit_the_handler_of_its_base() -> None:
    with pytest.raises(HandlerNotFoundError) as raised:
        await MEDIATOR.send(CountOrdersOfToday())

    assert str(raised.value) == (
        "CountOrdersOfToday: no handler is bound to it; one is bound to its base CountOrders, but a request needs its "
        "own. Did you mean CountOrders?"
    )


async def test_a_stream_that_nobody_handles() -> None:
    with pytest.raises(HandlerNotFoundError, match="ExportOrders: no handler is bound to it"):
        MEDIATOR.stream(ExportOrders())


@pytest.mark.parametrize("event", [Bare(), Placed()])
async def test_an_event_that_would_be_lost_is_refused(event: Event) -> None:
    text = f"{type(event).__name__}: it has neither a handler nor a destination here, so it would be lost"

    async def place(command: PlaceOrder, context: Context) -> object:
        with pytest.raises(HandlerNotFoundError, match=text):
            context.emit(event)
        return "placed"

    mediator = Mediator(RequestMap().bind(PlaceOrder, place))
    with pytest.raises(HandlerNotFoundError, match=text):
        await mediator.emit(event)
    assert await mediator.send(PlaceOrder()) == "placed"


async def test_a_bare_event_needs_a_handler_or_a_destination() -> None:
    heard: list[Event] = []

    async def hear(event: Bare) -> None:
        heard.append(event)

    broker = Broker()
    await Mediator(event_map=EventMap().bind(Bare, hear)).emit(Bare())
    await Mediator(middlewares=[PublishMiddleware(broker, {Bare: "bare"})]).emit(Bare())

    assert heard == [Bare()]
    assert len(broker.published) == 1


async def test_a_domain_event_may_go_unheard() -> None:
    log: list[str] = []

    async def log_it(context: Context, call_next: Next) -> Any:
        log.append(type(context.message).__name__)
        return await call_next(context)

    async def place(command: PlaceOrder, context: Context) -> object:
        context.emit(Noted())
        return "placed"

    mediator = Mediator(RequestMap().bind(PlaceOrder, place), middlewares=[log_it])

    await mediator.emit(Noted())
    assert await mediator.send(PlaceOrder()) == "placed"
    assert log == ["Noted", "PlaceOrder", "Noted"]


# -- the queue ---------------------------------------------------------------------------------------------------------


class Talk:
    """Handlers that write down what they do; `says` are the events that the handler of a text emits."""

    def __init__(self, says: dict[str, list[str]], middlewares: Any = ()) -> None:
        self.says = says
        self.log: list[str] = []
        requests = RequestMap().bind(PlaceOrder, self.place).bind(Reserve, self.reserve)
        self.mediator = Mediator(requests, event_map=EventMap().bind(Noted, self.note), middlewares=middlewares)

    async def place(self, command: PlaceOrder, context: Context) -> object:
        self.log.append("place begins")
        self.emit("place", context)
        if "reserve" in self.says:
            await context.send(Reserve())
        self.emit("place again", context)
        self.log.append("place ends")
        return "placed"

    async def reserve(self, command: Reserve, context: Context) -> object:
        self.log.append("reserve")
        self.emit("reserve", context)
        return None

    async def note(self, event: Noted, context: Context) -> None:
        self.log.append(event.text)
        self.emit(event.text, context)

    def emit(self, name: str, context: Context) -> None:
        for text in self.says.get(name, ()):
            context.emit(Noted(text))


MIDDLEWARES: list[Callable[[], list[Any]]] = [
    list,
    lambda: [TransactionMiddleware(Database().begin)],
    lambda: [RetryMiddleware(3)],
    lambda: [RetryMiddleware(3), TimeoutMiddleware(5)],
    lambda: [TimeoutMiddleware(5)],
    lambda: [RetryMiddleware(3), TransactionMiddleware(Database().begin)],
]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_events_are_walked_first_in_first_out_when_the_handler_has_returned(middlewares: Any) -> None:
    talk = Talk({"place": ["a", "b"], "a": ["c", "d"], "b": ["e"], "d": ["f"]}, middlewares())

    assert await talk.mediator.send(PlaceOrder()) == "placed"
    assert talk.log == ["place begins", "place ends", "a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_the_events_of_a_joined_message_wait_for_the_end_of_the_root(middlewares: Any) -> None:
    talk = Talk({"place": ["a"], "reserve": ["b"], "place again": ["c"]}, middlewares())

    await talk.mediator.send(PlaceOrder())

    assert talk.log == ["place begins", "reserve", "place ends", "a", "b", "c"]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_events_of_a_failed_attempt_are_dropped(middlewares: Any) -> None:
    talk = Talk({"place": ["a"]}, middlewares())
    tries: list[int] = []

    async def fail_once(context: Context, call_next: Next) -> Any:
        result = await call_next(context)
        tries.append(context.attempt)
        if type(context.message) is PlaceOrder and len(tries) == 1:
            raise ValueError("no")
        return result

    talk = Talk({"place": ["a"]}, [*middlewares(), fail_once])
    retries = any(isinstance(one, RetryMiddleware) for one in middlewares())
    if retries:
        await talk.mediator.send(PlaceOrder())
        assert talk.log == ["place begins", "place ends"] * 2 + ["a"]
    else:
        with pytest.raises(ValueError, match="no"):
            await talk.mediator.send(PlaceOrder())
        assert talk.log == ["place begins", "place ends"]


async def test_the_error_of_an_event_handler_is_the_error_of_the_send() -> None:
    database = Database()

    async def place(command: PlaceOrder, context: Context, session: Session) -> object:
        session.rows.append(1)
        context.emit(Noted())
        return None

    async def fail(event: Noted) -> None:
        raise LookupError("no")

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place),
        event_map=EventMap().bind(Noted, fail),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    with pytest.raises(LookupError, match="no"):
        await mediator.send(PlaceOrder())

    assert database.rows == []
    assert database.log == ["begin", "rollback"]


async def test_the_events_of_a_joined_message_that_failed_are_dropped() -> None:
    log: list[str] = []

    async def place(command: PlaceOrder, context: Context) -> object:
        context.emit(Noted("before"))
        with pytest.raises(ValueError, match="no"):
            await context.send(Reserve())
        context.emit(Noted("after"))
        return None

    async def reserve(command: Reserve, context: Context) -> object:
        context.emit(Noted("dropped"))
        raise ValueError("no")

    async def note(event: Noted) -> None:
        log.append(event.text)

    requests = RequestMap().bind(PlaceOrder, place).bind(Reserve, reserve)
    await Mediator(requests, event_map=EventMap().bind(Noted, note)).send(PlaceOrder())

    assert log == ["before", "after"]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_an_event_that_emits_itself_is_stopped(middlewares: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_mediator.unit.MAX_EVENTS", 10)
    talk = Talk({"place": ["again"], "again": ["again"]}, middlewares())

    with pytest.raises(EmitError, match="10 events were walked in one attempt and Noted is next"):
        await talk.mediator.send(PlaceOrder())

    assert talk.log.count("again") % 10 == 0


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_after_commit_hooks_run_in_order_when_the_work_is_done(middlewares: Any) -> None:
    log: list[str] = []

    async def hook() -> None:
        log.append("async hook")

    async def place(command: PlaceOrder, context: Context) -> object:
        context.after_commit(lambda: log.append("hook"))
        context.after_commit(hook)
        context.emit(Noted())
        await context.send(Reserve())
        log.append("placed")
        return "result"

    async def reserve(command: Reserve, context: Context) -> object:
        context.after_commit(lambda: log.append("hook of a joined message"))
        return None

    async def note(event: Noted) -> None:
        log.append("event")

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place).bind(Reserve, reserve),
        event_map=EventMap().bind(Noted, note),
        middlewares=middlewares(),
    )

    assert await mediator.send(PlaceOrder()) == "result"
    assert log == ["placed", "event", "hook", "async hook", "hook of a joined message"]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_hooks_of_a_failed_attempt_do_not_run(middlewares: Any) -> None:
    log: list[str] = []

    async def place(command: PlaceOrder, context: Context) -> object:
        context.after_commit(lambda: log.append(f"hook of attempt {context.attempt}"))
        if context.attempt == 1:
            raise ValueError("no")
        return None

    stack = middlewares()
    mediator = Mediator(RequestMap().bind(PlaceOrder, place), middlewares=stack)
    if any(isinstance(one, RetryMiddleware) for one in stack):
        await mediator.send(PlaceOrder())
        assert log == ["hook of attempt 2"]
    else:
        with pytest.raises(ValueError, match="no"):
            await mediator.send(PlaceOrder())
        assert log == []


async def test_a_hook_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []

    def fail() -> None:
        raise ValueError("no")

    async def place(command: PlaceOrder, context: Context) -> object:
        context.after_commit(fail)
        context.after_commit(lambda: log.append("next"))
        return "placed"

    assert await Mediator(RequestMap().bind(PlaceOrder, place)).send(PlaceOrder()) == "placed"
    assert log == ["next"]
    assert "after-commit hook failed for PlaceOrder; its outcome stands" in caplog.text


# -- joining -----------------------------------------------------------------------------------------------------------


class Resource:
    """Provided by the container, once per scope."""


class Joining:
    """A PlaceOrder whose handler calls `inside`, and a Reserve that writes down the session and the scope it got."""

    def __init__(self, inside: Callable[["Joining", Context], Awaitable[object]], *, transaction: bool = True) -> None:
        self.inside = inside
        self.database = Database()
        self.other_database = Database()
        self.resources: list[Resource] = []
        self.contexts: list[Context] = []
        requests = RequestMap().bind(PlaceOrder, self.place).bind(Reserve, self.reserve).bind(CountOrders, self.count)
        events = EventMap().bind(Noted, self.note)
        middlewares = [
            only(CountOrders, TransactionMiddleware(self.other_database.begin)),
            unless(CountOrders, TransactionMiddleware(self.database.begin)),
        ]
        self.mediator = Mediator(
            requests, PlainContainer(Resource), event_map=events, middlewares=middlewares if transaction else []
        )
        self.same = Mediator(
            requests, PlainContainer(Resource), event_map=events, middlewares=middlewares if transaction else []
        )

    async def place(self, command: PlaceOrder, context: Context, resource: Resource) -> object:
        self.keep(context, resource)
        return await self.inside(self, context)

    async def reserve(self, command: Reserve, context: Context, resource: Resource) -> object:
        self.keep(context, resource)
        return "reserved"

    async def count(self, query: CountOrders, context: Context, resource: Resource) -> int:
        self.keep(context, resource)
        return 1

    async def note(self, event: Noted, context: Context, resource: Resource) -> None:
        self.keep(context, resource)

    def keep(self, context: Context, resource: Resource) -> None:
        self.contexts.append(context)
        self.resources.append(resource)

    @property
    def joined(self) -> bool:
        """Whether the second message shared the scope of the first."""
        assert len(self.resources) == 2
        return self.resources[0] is self.resources[1]


async def send_here(joining: Joining, context: Context) -> object:
    return await joining.mediator.send(Reserve())


async def emit_here(joining: Joining, context: Context) -> object:
    await joining.mediator.emit(Noted())
    return None


async def send_by_context(joining: Joining, context: Context) -> object:
    return await context.send(Reserve())


async def send_by_context_from_a_task(joining: Joining, context: Context) -> object:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(context.send, Reserve())
    return None


async def send_with_headers(joining: Joining, context: Context) -> object:
    return await joining.mediator.send(Reserve(), headers={"tenant": "acme"}, correlation_id="other")


async def emit_with_key(joining: Joining, context: Context) -> object:
    await joining.mediator.emit(Noted(), key="key")
    return None


@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize(
    "inside", [send_here, emit_here, send_by_context, send_by_context_from_a_task, send_with_headers, emit_with_key]
)
async def test_a_message_sent_from_a_handler_joins(inside: Any, *, transaction: bool) -> None:
    joining = Joining(inside, transaction=transaction)

    await joining.mediator.send(PlaceOrder())

    assert joining.joined
    assert joining.database.log == (["begin", "commit"] if transaction else [])
    outer, inner = joining.contexts
    assert inner.parent is outer
    assert inner.unit is outer.unit


async def send_from_a_task(joining: Joining, context: Context) -> object:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(joining.mediator.send, Reserve())
    return None


async def send_through_another_mediator(joining: Joining, context: Context) -> object:
    return await joining.same.send(Reserve())


@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize("inside", [send_from_a_task, send_through_another_mediator])
async def test_what_does_not_belong_to_a_message_is_a_root_of_its_own(inside: Any, *, transaction: bool) -> None:
    joining = Joining(inside, transaction=transaction)

    await joining.mediator.send(PlaceOrder())

    assert not joining.joined
    assert joining.database.log == (["begin", "begin", "commit", "commit"] if transaction else [])
    outer, inner = joining.contexts
    assert inner.parent is None
    assert inner.causation_id == outer.message_id
    assert inner.correlation_id == outer.correlation_id


@pytest.mark.parametrize("by_context", [True, False])
async def test_a_message_of_another_unit_of_work_is_a_root_of_its_own(*, by_context: bool) -> None:
    async def inside(joining: Joining, context: Context) -> object:
        return await (context.send(CountOrders()) if by_context else joining.mediator.send(CountOrders()))

    joining = Joining(inside)
    await joining.mediator.send(PlaceOrder())

    assert not joining.joined
    assert joining.database.log == ["begin", "commit"]
    assert joining.other_database.log == ["begin", "commit"]
    assert joining.contexts[1].causation_id == joining.contexts[0].message_id


async def test_a_task_that_outlives_its_message_writes_into_a_transaction_of_its_own() -> None:
    ended, done = anyio.Event(), anyio.Event()

    async with anyio.create_task_group() as tasks:

        async def later(joining: Joining) -> None:
            await ended.wait()
            await joining.mediator.send(Reserve())
            done.set()

        async def inside(joining: Joining, context: Context) -> object:
            tasks.start_soon(later, joining)
            return None

        joining = Joining(inside)
        await joining.mediator.send(PlaceOrder())
        assert joining.database.log == ["begin", "commit"]
        ended.set()
        await done.wait()

    assert joining.database.log == ["begin", "commit"] * 2
    assert not joining.joined
    assert joining.contexts[1].causation_id == joining.contexts[0].message_id


async def test_a_joined_message_that_needs_no_transaction_joins_one_that_has() -> None:
    log: list[Any] = []

    async def place(command: PlaceOrder, context: Context, session: Session) -> object:
        log.append(session)
        return await context.send(CountOrders())

    async def count_in_it(query: CountOrders, context: Context) -> int:
        log.append(context.unit.resource)
        return 1

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place).bind(CountOrders, count_in_it),
        middlewares=[only(Command, TransactionMiddleware(Database().begin))],
    )
    await mediator.send(PlaceOrder())

    assert log[0] is log[1]


async def test_what_is_sent_after_a_joined_message_is_caused_by_the_one_that_sends_it() -> None:
    async def inside(joining: Joining, context: Context) -> object:
        await joining.mediator.send(Reserve())
        await joining.mediator.emit(Noted())
        return None

    joining = Joining(inside)
    await joining.mediator.send(PlaceOrder())

    outer, reserved, noted = joining.contexts
    assert reserved.parent is outer
    assert noted.parent is outer


async def test_what_leaves_the_process_is_a_root_of_its_own() -> None:
    contexts: list[Context] = []

    async def look(context: Context, call_next: Next) -> Any:
        contexts.append(context)
        return await call_next(context)

    async def place(command: PlaceOrder, context: Context) -> object:
        context.emit(Placed())
        return None

    for middlewares in ([], [TransactionMiddleware(Database().begin)]):
        contexts.clear()
        mediator = Mediator(
            RequestMap().bind(PlaceOrder, place), middlewares=[look, *middlewares, PublishMiddleware(Broker())]
        )
        await mediator.send(PlaceOrder())

        outer, placed = contexts
        assert placed.parent is None
        assert placed.causation_id == outer.message_id


async def test_a_joined_message_keeps_the_headers_and_ids_that_it_is_given() -> None:
    joining = Joining(send_with_headers)
    await joining.mediator.send(PlaceOrder(), headers={"user": "1"}, correlation_id="mine")

    outer, inner = joining.contexts
    assert (outer.correlation_id, outer.headers) == ("mine", {"user": "1"})
    assert (inner.correlation_id, inner.headers) == ("other", {"user": "1", "tenant": "acme"})
    assert inner.causation_id == outer.message_id


@pytest.mark.parametrize("replaced", [True, False])
async def test_what_a_further_attempt_sends_joins_it(*, replaced: bool) -> None:
    database = Database()

    async def replace(context: Context, call_next: Next) -> Any:
        return await call_next(context.replace(headers={"tenant": "acme"}) if replaced else context)

    async def place(command: PlaceOrder, context: Context) -> object:
        if context.attempt == 1:
            raise ValueError("no")
        return await mediator.send(Reserve())

    async def reserve(command: Reserve, session: Session) -> object:
        session.rows.append(command)
        return None

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place).bind(Reserve, reserve),
        middlewares=[RetryMiddleware(2), replace, TransactionMiddleware(database.begin)],
    )
    await mediator.send(PlaceOrder())

    assert database.log == ["begin", "rollback", "begin", "commit"]


async def test_a_joined_failure_dooms_the_transaction_even_if_it_is_caught() -> None:
    async def inside(joining: Joining, context: Context) -> object:
        with pytest.raises(ZeroDivisionError):
            await context.send(Reserve())
        return None

    joining = Joining(inside)

    async def fail(command: Reserve) -> object:
        raise ZeroDivisionError

    requests: Any = RequestMap().bind(PlaceOrder, joining.place).bind(Reserve, fail)
    database = Database()
    mediator = Mediator(requests, PlainContainer(Resource), middlewares=[TransactionMiddleware(database.begin)])
    with pytest.raises(TransactionDoomedError, match="Reserve, sent from its handler, failed inside"):
        await mediator.send(PlaceOrder())

    assert database.log == ["begin", "rollback"]


async def test_the_ambient_message_is_gone_after_the_send() -> None:
    seen: list[Any] = []

    async def place(command: PlaceOrder, context: Context) -> object:
        seen.append(AMBIENT.get())
        if command.number == 0:
            raise ValueError("no")
        return context

    mediator = Mediator(RequestMap().bind(PlaceOrder, place))
    context = await mediator.send(PlaceOrder(1))
    assert seen == [context]
    assert AMBIENT.get() is None
    with pytest.raises(ValueError, match="no"):
        await mediator.send(PlaceOrder(0))
    assert AMBIENT.get() is None


# -- options -----------------------------------------------------------------------------------------------------------


async def test_headers_key_and_correlation_id_reach_the_context() -> None:
    seen: list[tuple[dict[str, str], str, str | None, str | None]] = []

    async def look(context: Context, call_next: Next) -> Any:
        seen.append((dict(context.headers), context.correlation_id, context.causation_id, context.key))
        return await call_next(context)

    mediator = Mediator(RequestMap().bind(CountOrders, count), middlewares=[look], new_id=lambda: "id")

    for _ in range(2):
        # The second time, the way to the handlers is known.
        seen.clear()
        assert await mediator.send(CountOrders(), headers={"tenant": "acme"}) == 1
        assert await mediator.send(CountOrders(), correlation_id="conversation") == 1
        await mediator.emit(Noted(), headers={"tenant": "acme"})
        await mediator.emit(Noted(), correlation_id="conversation")
        await mediator.emit(Noted(), "key")
        await mediator.emit(Noted())
        assert seen == [
            ({"tenant": "acme"}, "id", None, None),
            ({}, "conversation", None, None),
            ({"tenant": "acme"}, "id", None, None),
            ({}, "conversation", None, None),
            ({}, "id", None, "key"),
            ({}, "id", None, None),
        ]


async def test_options_reach_a_handler_that_wants_no_context() -> None:
    mediator = Mediator(RequestMap().bind(CountOrders, count))

    assert await mediator.send(CountOrders(7), headers={"tenant": "acme"}) == 7


async def test_the_callers_transaction_is_used_and_left_to_the_caller() -> None:
    database = Database()
    session = Session()

    async def place(command: PlaceOrder, session: Session, context: Context) -> object:
        session.rows.append(command.number)
        await context.send(Reserve(2))
        await mediator.send(Reserve(3))
        context.emit(Noted())
        return "placed"

    async def reserve(command: Reserve, session: Session) -> object:
        session.rows.append(command.number)
        return None

    async def note(event: Noted, session: Session) -> None:
        session.rows.append("noted")

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place).bind(Reserve, reserve),
        event_map=EventMap().bind(Noted, note),
        middlewares=[RetryMiddleware(3), TransactionMiddleware(database.begin)],
    )

    for _ in range(2):
        session.rows.clear()
        assert await mediator.send(PlaceOrder(1), transaction=session) == "placed"
        assert session.rows == [1, 2, 3, "noted"]
    assert database.log == []


async def test_a_callers_transaction_needs_a_transaction_middleware() -> None:
    with pytest.raises(
        ConfigurationError, match=r"CountOrders \(request\): send\(..., transaction=...\) needs a Transact"
    ):
        await MEDIATOR.send(CountOrders(), transaction=Session())


async def test_what_leaves_the_process_cannot_be_emitted_in_a_callers_transaction() -> None:
    async def place(command: PlaceOrder, context: Context) -> object:
        context.emit(Placed())
        return None

    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place),
        middlewares=[TransactionMiddleware(Database().begin), PublishMiddleware(broker)],
    )
    with pytest.raises(EmitError, match="Placed goes to 'Placed' and was emitted inside send"):
        await mediator.send(PlaceOrder(), transaction=Session())
    assert broker.published == []


async def test_headers_and_correlation_of_what_waits_for_the_commit_travel() -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def place(command: PlaceOrder) -> object:
        await mediator.emit(Placed(), headers={"traceparent": trace}, correlation_id="mine")
        assert broker.published == []
        return None

    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place),
        middlewares=[TransactionMiddleware(Database().begin), PublishMiddleware(broker)],
    )
    await mediator.send(PlaceOrder())

    (outgoing,) = broker.published
    assert b'"correlationid":"mine"' in outgoing.body
    assert trace.encode() in outgoing.body


async def test_an_event_has_the_headers_of_the_message_that_emitted_it() -> None:
    seen: dict[str, dict[str, str]] = {}

    async def look(context: Context, call_next: Next) -> Any:
        seen[type(context.message).__name__] = dict(context.headers)
        return await call_next(context)

    async def place(command: PlaceOrder, context: Context) -> object:
        context.emit(Placed())
        context.emit(Noted())
        return None

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place),
        middlewares=[look, TransactionMiddleware(Database().begin), PublishMiddleware(Broker())],
    )
    await mediator.send(PlaceOrder(), headers={"tenant": "acme"})

    assert seen == {"PlaceOrder": {"tenant": "acme"}, "Noted": {"tenant": "acme"}, "Placed": {"tenant": "acme"}}


async def test_what_is_sent_behind_a_replaced_context_joins() -> None:
    database = Database()

    async def replace(context: Context, call_next: Next) -> Any:
        return await call_next(context.replace(headers={"tenant": "acme"}))

    async def place(command: PlaceOrder) -> object:
        return await mediator.send(Reserve())

    async def reserve(command: Reserve, session: Session) -> object:
        session.rows.append(command)
        return None

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place).bind(Reserve, reserve),
        middlewares=[replace, TransactionMiddleware(database.begin), replace],
    )
    await mediator.send(PlaceOrder())

    assert database.log == ["begin", "commit"]


# -- brokers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shipped(IntegrationEvent):
    number: int = 1


async def test_brokers_are_opened_once_and_closed_in_reverse() -> None:
    log: list[str] = []
    one, other = Broker("one", log), Broker("other", log)
    mediator = Mediator(
        middlewares=[
            PublishMiddleware(one, {Placed: "placed"}),
            PublishMiddleware(other, {Shipped: "shipped"}),
            PublishMiddleware(one),
        ]
    )

    async with mediator as entered:
        assert entered is mediator
        assert log == ["open one", "open other"]
    assert log == ["open one", "open other", "close other", "close one"]
    async with mediator:
        pass
    assert log == ["open one", "open other", "close other", "close one"] * 2


async def test_brokers_are_closed_when_the_block_fails() -> None:
    broker = Broker()

    with pytest.raises(ValueError, match="no"):
        async with Mediator(middlewares=[PublishMiddleware(broker)]):
            raise ValueError("no")

    assert broker.log == ["open broker", "close broker"]


async def test_what_was_opened_is_closed_when_a_broker_cannot_be() -> None:
    class Unreachable(Broker):
        async def __aenter__(self) -> Any:
            raise ConnectionError("refused")

    log: list[str] = []
    middlewares = [PublishMiddleware(Broker(name, log), {Placed: "x"}) for name in ("one", "other")]
    mediator = Mediator(middlewares=[*middlewares, PublishMiddleware(Unreachable())])

    with pytest.raises(ConnectionError, match="refused"):
        await mediator.__aenter__()
    assert log == ["open one", "open other", "close other", "close one"]
    with pytest.raises(ConnectionError, match="refused"):
        await mediator.__aenter__()


async def test_a_mediator_is_entered_once() -> None:
    broker = Broker()
    mediator = Mediator(middlewares=[PublishMiddleware(broker)])

    async with mediator:
        with pytest.raises(
            ConfigurationError, match="this mediator is already open; enter it once, at the start of the ap"
        ):
            await mediator.__aenter__()
        assert broker.log == ["open broker"]
    await mediator.__aexit__(None, None, None)
    assert broker.log == ["open broker", "close broker"]


async def test_a_mediator_without_brokers_need_not_be_entered() -> None:
    async with Mediator(RequestMap().bind(CountOrders, count)) as mediator:
        assert await mediator.send(CountOrders(3)) == 3
    assert await mediator.send(CountOrders(4)) == 4


# -- what is wrong with the set-up -------------------------------------------------------------------------------------


class Missing:
    pass


class AlsoMissing:
    pass


class NeedsMissing:
    def __init__(self, missing: Missing) -> None: ...

    async def handle(self, command: PlaceOrder) -> object: ...


async def needs_also(event: Noted, also: AlsoMissing, resource: Resource) -> None: ...


async def send_first(mediator: Mediator) -> None:
    await mediator.send(CountOrders())


async def emit_first(mediator: Mediator) -> None:
    await mediator.emit(Noted())


async def enter(mediator: Mediator) -> None:
    async with mediator:
        pass


async def check(mediator: Mediator) -> None:
    mediator.check()


async def stream(mediator: Mediator) -> None:
    mediator.stream(ExportOrders())


@pytest.mark.parametrize("first", [send_first, emit_first, enter, check, stream])
async def test_dependencies_that_do_not_resolve_are_one_error_before_the_first_message(first: Any) -> None:
    handled: list[object] = []

    async def counted(query: CountOrders) -> int:
        handled.append(query)
        return 1

    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, NeedsMissing).bind(CountOrders, counted),
        PlainContainer(Resource),
        event_map=EventMap().bind(Noted, needs_also),
        middlewares=[PublishMiddleware(broker)],
    )

    for _ in range(2):
        with pytest.raises(ResolutionError) as raised:
            await first(mediator)
        assert len(raised.value.missing) == 2
        assert "NeedsMissing(missing: Missing)" in str(raised.value)
        assert "AlsoMissing" in str(raised.value)
        assert raised.value.__notes__ == ["needs_also(also: AlsoMissing) asks for it"]
    assert handled == []
    assert broker.log == []


async def test_a_container_is_prepared_once_with_what_handlers_want_and_what_is_seeded() -> None:
    calls: list[tuple[set[type], set[type]]] = []

    class Watched(PlainContainer):
        def prepare(self, wanted: Any, seeded: Any, /) -> None:
            calls.append((set(wanted), set(seeded)))
            super().prepare(wanted, seeded)

    class Handler:
        def __init__(self, session: Session) -> None: ...

        async def handle(self, command: PlaceOrder) -> object: ...

    async def note(event: Noted, session: Session, resource: Resource) -> None: ...

    async def count_in_it(query: CountOrders, context: Context) -> int:
        return 1

    mediator = Mediator(
        RequestMap().bind(PlaceOrder, Handler).bind(CountOrders, count_in_it),
        Watched(Resource),
        event_map=EventMap().bind(Noted, note),
        middlewares=[TransactionMiddleware(Database().begin)],
    )
    assert calls == []
    await mediator.send(CountOrders())
    await mediator.send(PlaceOrder())
    await mediator.emit(Noted())

    assert calls == [({Handler, Session, Resource}, {Context, Session})]


def test_an_order_that_breaks_a_rule_is_found_at_construction() -> None:
    with pytest.raises(OrderError, match=r"RetryMiddleware \(position 2\) must stand outside TransactionMiddleware"):
        Mediator(
            RequestMap().bind(CountOrders, count),
            middlewares=[TransactionMiddleware(Database().begin), RetryMiddleware()],
        )


def test_maps_are_not_frozen_by_a_mediator_that_could_not_be_made() -> None:
    requests = RequestMap().bind(CountOrders, count)
    wrong: Any = Resource
    with pytest.raises(ConfigurationError):
        Mediator(requests, middlewares=[wrong])

    requests.bind(ExportOrders, export)


async def export(query: ExportOrders) -> AsyncIterator[int]:
    yield query.number


# -- remote commands and the loop guard --------------------------------------------------------------------------------


async def test_a_remote_command_is_published_and_not_handled() -> None:
    handled: list[Ship] = []

    async def ship(command: Ship) -> None:
        handled.append(command)

    broker = Broker()
    mediator = Mediator(RequestMap().bind(Ship, ship), middlewares=[PublishMiddleware(broker, {Ship: "warehouse"})])

    result: object = await mediator.send(Ship(7))
    assert result is None
    assert handled == []
    (outgoing,) = broker.published
    assert (outgoing.destination, outgoing.name) == ("warehouse", "Ship")
    assert b'"number":7' in outgoing.body


async def test_a_remote_command_needs_no_handler_here() -> None:
    broker = Broker()
    mediator = Mediator(middlewares=[PublishMiddleware(broker, {Ship: "warehouse"})])

    await mediator.send(Ship())

    assert len(broker.published) == 1
    assert [chain.route.origin for chain in mediator.routes.all_of(Ship)] == ["local"]


@dataclass(frozen=True)
class Numbered(Command[int]):
    number: int = 1


@pytest.mark.parametrize("command", [PlaceOrder, Numbered])
def test_a_command_that_promises_a_result_cannot_be_remote(command: type) -> None:
    with pytest.raises(DestinationError, match=f"{command.__name__} cannot go to 'orders': it promises a result"):
        PublishMiddleware(Broker(), {command: "orders"})


def test_a_command_that_promises_a_result_cannot_be_remote_by_its_base_either() -> None:
    async def handle(command: Numbered) -> int:
        return 1

    with pytest.raises(DestinationError, match=r"Numbered cannot go to 'everything': it promises a result \(int\)"):
        Mediator(
            RequestMap().bind(Numbered, handle), middlewares=[PublishMiddleware(Broker(), {Command: "everything"})]
        )


async def test_a_query_never_leaves_the_process() -> None:
    broker = Broker()
    mediator = Mediator(RequestMap().bind(CountOrders, count), middlewares=[PublishMiddleware(broker, lambda _: "all")])

    assert await mediator.send(CountOrders(7)) == 7
    assert broker.published == []


async def test_a_refusal_of_the_broker_is_raised() -> None:
    broker = Broker()
    broker.fails_with = ConnectionError("gone")
    mediator = Mediator(middlewares=[PublishMiddleware(broker, {Ship: "warehouse"})])

    with pytest.raises(ConnectionError, match="gone"):
        await mediator.send(Ship())


async def test_what_came_from_a_broker_is_not_published_again() -> None:
    heard: list[object] = []

    async def hear(event: Placed) -> None:
        heard.append(event)

    async def ship(command: Ship) -> None:
        heard.append(command)

    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(Ship, ship),
        event_map=EventMap().bind(Placed, hear),
        middlewares=[PublishMiddleware(broker, {Ship: "warehouse", Placed: "orders"})],
    )

    for message_sent in (Placed(), Ship()):
        out, back = mediator.routes.all_of(type(message_sent))
        assert (out.route.origin, back.route.origin) == ("local", "broker")
        assert [link.role for link in out.links] == ["publish"]
        assert [link.role for link in back.links] == ["handle"]
        await back.call(Context(message_sent, back.route, mediator))
    assert heard == [Placed(), Ship()]
    assert broker.published == []


async def test_the_key_names_itself_by_the_field_of_the_type() -> None:
    @message("orders.keyed", version=2, key="number")
    @dataclass(frozen=True)
    class Keyed(IntegrationEvent):
        number: int | None

    broker = Broker()
    mediator = Mediator(middlewares=[PublishMiddleware(broker)])
    await mediator.emit(Keyed(7))
    await mediator.emit(Keyed(7), "other")
    await mediator.emit(Keyed(None))

    assert [outgoing.key for outgoing in broker.published] == ["7", "other", None]
    assert {outgoing.destination for outgoing in broker.published} == {"orders.keyed"}


async def test_a_key_that_names_no_field_is_told() -> None:
    @message("orders.mistyped", key="numbr")
    @dataclass(frozen=True)
    class Mistyped(IntegrationEvent):
        number: int

    mediator = Mediator(middlewares=[PublishMiddleware(Broker())])
    with pytest.raises(
        ConfigurationError, match="@message of Mistyped names 'numbr' as its key, but it has no such field"
    ):
        await mediator.emit(Mistyped(7))


@pytest.mark.parametrize(
    ("name", "shown"), [(Placed, "Placed"), ("", "''"), ("orders placed", "'orders placed'"), (None, "None")]
)
def test_a_wire_name_is_a_text(name: Any, shown: str) -> None:
    with pytest.raises(BindError) as raised:
        message(name)

    assert str(raised.value) == (
        f"{shown} is no wire name: give a text that is not empty and has no white space, as in "
        '@message("orders.placed")'
    )


# -- no context is kept alive ------------------------------------------------------------------------------------------


@contextmanager
def without_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def let_go() -> None:
    """What an event loop still holds itself, such as the handle of a cancelled timer, it drops in its next turns."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


class Watched:
    """Keeps weak references to every context that comes by."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []

    async def __call__(self, context: Context, call_next: Next) -> Any:
        self.seen.append(weakref.ref(context))
        self.seen.append(weakref.ref(context.unit))
        return await call_next(context)

    @property
    def alive(self) -> list[object]:
        return [context for one in self.seen if (context := one()) is not None]


async def place_and_emit(command: PlaceOrder, context: Context, resource: Resource) -> object:
    context.emit(Noted("a"))
    context.after_commit(lambda: None)
    await context.send(Reserve(command.number))
    return "placed"


async def reserve_or_fail(command: Reserve, context: Context) -> object:
    if command.number == 0:
        raise ValueError("no")
    return None


async def place_and_catch(command: PlaceOrder, context: Context) -> object:
    try:
        await context.send(Reserve(0))
    except ValueError:
        return "caught"
    return None


async def hear_or_fail(event: Noted) -> None:
    if event.text == "fail":
        raise ValueError("no")


async def hear_too(event: Noted, context: Context) -> None:
    if event.text == "fail":
        raise LookupError("no")


@pytest.mark.parametrize("fan_out", ["sequential", "collect", "concurrent"])
@pytest.mark.parametrize("middlewares", MIDDLEWARES)
async def test_no_context_is_kept_alive(middlewares: Any, fan_out: Any) -> None:
    watched = Watched()
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place_and_emit).bind(Reserve, reserve_or_fail),
        PlainContainer(Resource),
        event_map=EventMap().bind(
            Noted, hear_or_fail, hear_too, fan_out=fan_out, scope_per_handler=fan_out == "concurrent"
        ),
        middlewares=[*middlewares(), watched],
    )

    async def fails(call: Any) -> None:
        # In a frame of its own, which is gone when the contexts are counted.
        try:
            await call
        except (ValueError, ExceptionGroup):
            return
        raise AssertionError("did not fail")

    await mediator.send(PlaceOrder())
    watched.seen.clear()
    with without_collector():
        await mediator.send(PlaceOrder())
        await mediator.emit(Noted())
        await fails(mediator.send(PlaceOrder(0)))
        await fails(mediator.emit(Noted("fail")))

        assert len(watched.seen) >= 2 * 6
        await let_go()
        assert watched.alive == []


async def test_no_context_is_kept_alive_by_an_error_of_a_worker_thread() -> None:
    watched = Watched()

    def fail(command: PlaceOrder, context: Context) -> object:
        raise ValueError("no")

    mediator = Mediator(RequestMap().bind(PlaceOrder, fail), middlewares=[watched])

    async def fails() -> None:
        try:
            await mediator.send(PlaceOrder())
        except ValueError:
            return
        raise AssertionError("did not fail")

    await fails()
    watched.seen.clear()
    with without_collector():
        await fails()
        assert len(watched.seen) == 2
        with anyio.fail_after(5):
            # The thread itself lets go a little later than it answers.
            while watched.alive:  # noqa: ASYNC110 - nothing tells when
                await anyio.sleep(0.001)


async def test_no_context_is_kept_alive_by_an_error_that_a_handler_caught() -> None:
    watched = Watched()
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place_and_catch).bind(Reserve, reserve_or_fail), middlewares=[watched]
    )
    await mediator.send(PlaceOrder())
    watched.seen.clear()
    with without_collector():
        assert await mediator.send(PlaceOrder()) == "caught"
        await let_go()
        assert watched.alive == []


async def test_an_error_that_is_kept_keeps_no_context_once_it_is_let_go() -> None:
    watched = Watched()
    mediator = Mediator(RequestMap().bind(Reserve, reserve_or_fail), middlewares=[RetryMiddleware(2), watched])
    with pytest.raises(ValueError, match="no"):
        await mediator.send(Reserve(0))
    watched.seen.clear()
    with without_collector():
        kept: BaseException | None = None
        try:
            await mediator.send(Reserve(0))
        except ValueError as error:
            kept = error
        assert kept is not None
        del kept
        await let_go()
        assert watched.alive == []


async def test_cancelled_work_keeps_no_context() -> None:
    watched = Watched()

    async def wait(command: PlaceOrder) -> None:
        await anyio.sleep_forever()

    mediator = Mediator(RequestMap().bind(PlaceOrder, wait), middlewares=[*MIDDLEWARES[5](), watched])

    async def cancelled() -> None:
        with anyio.move_on_after(0):
            await mediator.send(PlaceOrder())

    await cancelled()
    watched.seen.clear()
    with without_collector():
        await cancelled()
        assert len(watched.seen) == 2
        await let_go()
        assert watched.alive == []
