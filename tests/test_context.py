"""What a context tells and shares: ids, headers, items, notes; and how a handler is tested with one alone."""

import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    Mediator,
    Middleware,
    Next,
    RequestMap,
    Route,
)
from pipeline_mediator.context import new_message_id
from pipeline_mediator.errors import ConfigurationError, EmitError, TransactionFinishedError
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Database

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Outer(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Inner(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Happened(DomainEvent):
    number: int = 1


@dataclass(frozen=True)
class Followed(DomainEvent):
    number: int = 1


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_a_message_id_is_a_uuid_of_version_7() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_message_id() for _ in range(2000)]
    after = time.time_ns() // 1_000_000

    assert all(UUID7.fullmatch(one) for one in ids)
    assert all(uuid.UUID(one).version == 7 for one in ids)
    assert len(set(ids)) == len(ids)
    millisecond = [uuid.UUID(one).int >> 80 for one in ids]
    assert before <= millisecond[0] <= millisecond[-1] <= after
    assert millisecond == sorted(millisecond)


def test_message_ids_sort_by_the_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    for millisecond in (1, 2, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1):
        monkeypatch.setattr(time, "time_ns", lambda now=millisecond: now * 1_000_000 + 999_999)
        ids.append(new_message_id())

    assert ids == sorted(ids)
    assert uuid.UUID(ids[2]).int >> 80 == 1_700_000_000_000


def test_ids_are_made_once() -> None:
    context = Context(Outer())

    assert context.message_id == context.message_id
    assert context.correlation_id == context.message_id
    assert context.causation_id is None
    assert Context(Outer()).message_id != context.message_id


async def test_the_mediator_may_be_given_its_ids() -> None:
    numbers = iter(range(100))
    seen: list[tuple[str, str]] = []

    async def outer(command: Outer, context: Context) -> object:
        seen.append((context.message_id, context.correlation_id))
        return context.message_id

    mediator = Mediator(RequestMap().bind(Outer, outer), new_id=lambda: f"id {next(numbers)}")

    assert [await mediator.send(Outer()), await mediator.send(Outer())] == ["id 0", "id 1"]
    assert seen == [("id 0", "id 0"), ("id 1", "id 1")]


class Ids:
    """Every message writes down its ids; `database` gives a transaction to each root, or none."""

    def __init__(self, *, transaction: bool) -> None:
        self.of: dict[str, Context] = {}
        self.start_inner: Any = None
        middlewares = [TransactionMiddleware(Database().begin)] if transaction else []
        requests = RequestMap().bind(Outer, self.outer).bind(Inner, self.inner)
        events = EventMap().bind(Happened, self.happened).bind(Followed, self.followed)
        self.mediator = Mediator(requests, event_map=events, middlewares=middlewares)

    async def outer(self, command: Outer, context: Context) -> object:
        self.of["outer"] = context
        await self.start_inner(context)
        return None

    async def inner(self, command: Inner, context: Context) -> object:
        self.of["inner"] = context
        context.emit(Happened())
        return None

    async def happened(self, event: Happened, context: Context) -> None:
        self.of["happened"] = context
        context.emit(Followed())

    async def followed(self, event: Followed, context: Context) -> None:
        self.of["followed"] = context


async def send_in_handler(ids: Ids, context: Context) -> None:
    await ids.mediator.send(Inner())


async def send_in_context(ids: Ids, context: Context) -> None:
    await context.send(Inner())


async def send_in_child_task(ids: Ids, context: Context) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ids.mediator.send, Inner())


async def emit_in_handler(ids: Ids, context: Context) -> None:
    await ids.mediator.emit(Happened())


async def queue_in_handler(ids: Ids, context: Context) -> None:
    context.emit(Happened())


@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize(
    "start", [send_in_handler, send_in_context, send_in_child_task, emit_in_handler, queue_in_handler]
)
async def test_correlation_is_kept_and_causation_is_told(start: Any, *, transaction: bool) -> None:
    ids = Ids(transaction=transaction)

    async def start_inner(context: Context) -> None:
        await start(ids, context)

    ids.start_inner = start_inner
    await ids.mediator.send(Outer(), correlation_id="conversation")

    contexts = list(ids.of.values())
    assert len(contexts) == (3 if "inner" not in ids.of else 4)
    assert {context.correlation_id for context in contexts} == {"conversation"}
    assert len({context.message_id for context in contexts}) == len(contexts)
    causes = {name: context.causation_id for name, context in ids.of.items()}
    assert causes["outer"] is None
    assert causes.get("inner", ids.of["outer"].message_id) == ids.of["outer"].message_id
    assert causes["happened"] == ids.of["inner" if "inner" in ids.of else "outer"].message_id
    assert causes["followed"] == ids.of["happened"].message_id


async def test_without_a_correlation_id_it_is_the_first_messages_own() -> None:
    ids = Ids(transaction=False)

    async def start_inner(context: Context) -> None:
        await send_in_child_task(ids, context)

    ids.start_inner = start_inner
    await ids.mediator.send(Outer())

    assert {context.correlation_id for context in ids.of.values()} == {ids.of["outer"].message_id}


# -- headers and items -------------------------------------------------------------------------------------------------


def test_headers_and_items_are_empty_at_first() -> None:
    context = Context(Outer())

    assert context.headers == {}
    assert context.items == {}
    context.headers["tenant"] = "acme"
    context.items[int] = 1
    assert context.headers == {"tenant": "acme"}
    assert context.items == {int: 1}


async def test_a_joined_message_has_copies_of_the_headers_and_items_of_its_own() -> None:
    seen: list[tuple[dict[str, str], dict[Any, Any]]] = []

    async def inner(command: Inner, context: Context) -> object:
        seen.append((dict(context.headers), dict(context.items)))
        context.headers["inner"] = "yes"
        return None

    async def outer(command: Outer, context: Context) -> object:
        context.headers["outer"] = "yes"
        context.items["outer"] = "yes"
        await context.send(Inner())
        return dict(context.headers)

    mediator = Mediator(RequestMap().bind(Outer, outer).bind(Inner, inner))

    assert await mediator.send(Outer(), headers={"tenant": "acme"}) == {"tenant": "acme", "outer": "yes"}
    assert seen == [({"tenant": "acme", "outer": "yes"}, {})]


async def test_the_callers_headers_are_not_changed() -> None:
    async def outer(command: Outer, context: Context) -> object:
        context.headers["outer"] = "yes"
        return None

    headers = {"tenant": "acme"}
    await Mediator(RequestMap().bind(Outer, outer)).send(Outer(), headers=headers)

    assert headers == {"tenant": "acme"}


# -- replace -----------------------------------------------------------------------------------------------------------


def test_a_replaced_context_is_of_the_same_message_and_attempt() -> None:
    context = Context(Outer(1), Route(Outer, "request", "local"))
    context.headers["tenant"] = "acme"
    context.attempt = 2
    context.delivery = "delivery"
    replaced = context.replace(message=Outer(2))

    assert replaced.message == Outer(2)
    assert context.message == Outer(1)
    assert replaced.message_id == context.message_id
    assert replaced.correlation_id == context.correlation_id
    assert replaced.route == context.route
    assert replaced.attempt == 2
    assert replaced.delivery == "delivery"
    assert replaced.unit is context.unit
    assert replaced.headers == {"tenant": "acme"}
    replaced.headers["own"] = "yes"
    replaced.items["shared"] = "yes"
    assert context.headers == {"tenant": "acme"}
    assert context.items == {"shared": "yes"}
    replaced.emit(Happened())
    assert context.events == [Happened()]


def test_headers_alone_may_be_replaced() -> None:
    context = Context(Outer(1))
    headers = {"tenant": "acme"}
    replaced = context.replace(headers=headers)
    headers["tenant"] = "umbrella"

    assert replaced.message is context.message
    assert replaced.headers == {"tenant": "acme"}
    assert context.headers == {}
    assert context.replace().headers == {}


def test_a_message_of_another_type_is_refused() -> None:
    @dataclass(frozen=True)
    class Narrower(Outer):
        pass

    for message in (Inner(), Narrower()):
        with pytest.raises(ConfigurationError) as raised:
            Context(Outer()).replace(message=message)
        assert f"a middleware replaced a Outer by a {type(message).__name__}" in str(raised.value)
        assert "Return the result of context.send(...) instead" in str(raised.value)


# -- notes -------------------------------------------------------------------------------------------------------------


def test_notes_reach_everybody_who_listens() -> None:
    context = Context(Outer())
    heard: list[Any] = []
    context.note("nobody listens", count=0)
    context.on_note(lambda name, facts: heard.append((name, dict(facts))))
    context.on_note(lambda name, facts: heard.append(name))
    context.note("retry", attempt=2)
    context.replace(message=Outer(2)).note("replaced")

    assert heard == [("retry", {"attempt": 2}), "retry", ("replaced", {}), "replaced"]


async def test_an_outer_middleware_hears_what_happens_inside_in_every_attempt() -> None:
    heard: list[tuple[str, Any]] = []

    async def listen(context: Context, call_next: Next) -> Any:
        context.on_note(lambda name, facts: heard.append((name, dict(facts).get("attempt"))))
        return await call_next(context)

    async def outer(command: Outer, context: Context) -> object:
        context.note("handling", attempt=context.attempt)
        if context.attempt < 3:
            raise ValueError("no")
        return context.attempt

    mediator = Mediator(RequestMap().bind(Outer, outer), middlewares=[listen, RetryMiddleware(3)])

    assert await mediator.send(Outer()) == 3
    assert heard == [("handling", 1), ("retry", 2), ("handling", 2), ("retry", 3), ("handling", 3)]


async def test_notes_of_a_joined_message_are_its_own() -> None:
    heard: list[tuple[str, str]] = []

    async def listen(context: Context, call_next: Next) -> Any:
        context.on_note(lambda name, facts: heard.append((type(context.message).__name__, name)))
        return await call_next(context)

    async def inner(command: Inner, context: Context) -> object:
        context.note("inside")
        return None

    async def outer(command: Outer, context: Context) -> object:
        return await context.send(Inner())

    await Mediator(RequestMap().bind(Outer, outer).bind(Inner, inner), middlewares=[listen]).send(Outer())

    assert heard == [("Inner", "inside")]


# -- attempts ----------------------------------------------------------------------------------------------------------


async def test_a_further_attempt_starts_from_the_headers_and_items_before_the_first() -> None:
    seen: list[tuple[int, dict[str, str], dict[Any, Any], str]] = []

    async def outer_middleware(context: Context, call_next: Next) -> Any:
        context.headers["outer"] = "yes"
        context.items["outer"] = "yes"
        return await call_next(context)

    async def outer(command: Outer, context: Context) -> object:
        seen.append((context.attempt, dict(context.headers), dict(context.items), context.message_id))
        context.headers["left"] = "behind"
        context.items["left"] = "behind"
        context.emit(Happened(context.attempt))
        if context.attempt < 3:
            raise ValueError("no")
        return [event.number for event in context.events if isinstance(event, Happened)]

    mediator = Mediator(RequestMap().bind(Outer, outer), middlewares=[outer_middleware, RetryMiddleware(3)])

    assert await mediator.send(Outer()) == [3]
    outer_items = {"outer": "yes"}
    assert [one[:3] for one in seen] == [(number, outer_items, outer_items) for number in (1, 2, 3)]
    assert len({one[3] for one in seen}) == 1


# -- alone, as in a unit test ------------------------------------------------------------------------------------------


class PlaceOrderHandler:
    async def handle(self, command: Outer, context: Context) -> str:
        context.emit(Happened(command.number), key="a")
        context.emit(Followed(command.number))
        context.after_commit(lambda: None)
        context.note("placed", number=command.number)
        context.headers["placed"] = "yes"
        return context.correlation_id


async def test_a_handler_is_tested_with_a_context_alone() -> None:
    context = Context(Outer(7))

    assert await PlaceOrderHandler().handle(context.message, context) == context.message_id
    assert context.events == [Happened(7), Followed(7)]
    assert context.headers == {"placed": "yes"}
    assert (context.attempt, context.parent, context.delivery, context.route, context.key) == (
        1,
        None,
        None,
        None,
        None,
    )
    assert repr(context) == "<Context of Outer, attempt 1>"


def test_a_context_without_events_has_none() -> None:
    assert Context(Outer()).events == []


async def test_to_send_from_a_context_alone_is_refused() -> None:
    context = Context(Outer())

    for use in (lambda: context.mediator, lambda: context.sink):
        with pytest.raises(ConfigurationError):
            use()
    with pytest.raises(
        ConfigurationError, match="this context was made without a mediator, as in the unit test of a hand"
    ):
        await context.send(Inner())
    with pytest.raises(ConfigurationError, match=r"this context is not of a stream; call mediator.stream\(query\)"):
        _ = context.sink


async def test_a_context_shows_its_route() -> None:
    async def outer(command: Outer, context: Context) -> object:
        return repr(context)

    assert await Mediator(RequestMap().bind(Outer, outer)).send(Outer()) == "<Context of Outer (request), attempt 1>"


# -- after the end -----------------------------------------------------------------------------------------------------


async def keep(command: Outer, context: Context) -> object:
    context.emit(Happened())
    return context


async def test_nothing_is_queued_after_the_end() -> None:
    async def inner(command: Inner) -> object: ...

    requests = RequestMap().bind(Outer, keep).bind(Inner, inner)
    stacks: list[list[Middleware]] = [[], [TransactionMiddleware(Database().begin)], [RetryMiddleware(2)]]
    for middlewares in stacks:
        mediator = Mediator(requests, middlewares=middlewares)
        context: Any = await mediator.send(Outer())

        with pytest.raises(
            TransactionFinishedError, match="Happened was emitted after the events of this attempt had bee"
        ):
            context.emit(Happened())
        with pytest.raises(TransactionFinishedError, match="after_commit was called after the attempt had ended"):
            context.after_commit(lambda: None)
        with pytest.raises(TransactionFinishedError, match="Inner was sent from Outer, whose attempt has ended"):
            await context.send(Inner())


async def test_nothing_is_lost_after_the_end_of_a_message_that_had_queued_nothing() -> None:
    async def outer(command: Outer, context: Context) -> object:
        return context

    async def inner(command: Inner) -> object: ...

    context: Any = await Mediator(RequestMap().bind(Outer, outer).bind(Inner, inner)).send(Outer())

    assert context.events == []
    with pytest.raises(TransactionFinishedError):
        context.emit(Happened())
    with pytest.raises(TransactionFinishedError):
        context.after_commit(lambda: None)
    with pytest.raises(TransactionFinishedError):
        await context.send(Inner())


async def test_nothing_is_queued_while_the_attempt_fails() -> None:
    kept: list[Context] = []

    async def outer(command: Outer, context: Context) -> object:
        kept.append(context)
        context.emit(Happened())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await Mediator(RequestMap().bind(Outer, outer)).send(Outer())
    with pytest.raises(TransactionFinishedError):
        kept[0].emit(Happened())


def test_too_many_events_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_mediator.unit.MAX_EVENTS", 3)
    context = Context(Outer())
    for number in range(3):
        context.emit(Happened(number))

    with pytest.raises(EmitError, match="Happened: 3 events already wait in this attempt"):
        context.emit(Happened(3))
    assert len(context.events) == 3
