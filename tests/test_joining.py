"""What joins what, and what a mediator says about several mistakes at once."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    IntegrationEvent,
    Mediator,
    Next,
    Query,
    RequestMap,
    StreamQuery,
    only,
)
from pipeline_mediator.errors import ConfigurationError, OrderError
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.pipeline import Inside
from tests.fakes import Database, Recorder, Session


@dataclass(frozen=True)
class Outer(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Middle(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Inner(Command[object]):
    number: int = 1


@dataclass(frozen=True)
class Ask(Query[int]):
    number: int = 1


@dataclass(frozen=True)
class Noted(DomainEvent):
    text: str = ""


@dataclass(frozen=True)
class Placed(IntegrationEvent):
    number: int = 1


@dataclass(frozen=True)
class Numbers(StreamQuery[int]):
    number: int = 1


async def inner(command: Inner, session: Session) -> object:
    session.rows.append("inner")
    return None


# -- joins of joined messages ------------------------------------------------------------------------------------------


async def test_what_a_joined_message_sends_through_the_mediator_joins_too() -> None:
    database = Database()

    async def outer(command: Outer, context: Context) -> object:
        return await context.send(Middle())

    async def middle(command: Middle) -> object:
        return await mediator.send(Inner())

    mediator = Mediator(
        RequestMap().bind(Outer, outer).bind(Middle, middle).bind(Inner, inner),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(Outer())
    assert database.log == ["begin", "commit"]


async def test_what_an_event_handler_sends_joins_the_transaction_of_the_emitter() -> None:
    database = Database()

    async def outer(command: Outer, context: Context) -> object:
        context.emit(Noted())
        return None

    async def note(event: Noted) -> None:
        await mediator.send(Inner())

    mediator = Mediator(
        RequestMap().bind(Outer, outer).bind(Inner, inner),
        event_map=EventMap().bind(Noted, note),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(Outer())
    assert database.log == ["begin", "commit"]


# -- a replaced context and a failed joined message --------------------------------------------------------------------


async def test_events_of_a_failed_joined_message_are_dropped_behind_a_replaced_context() -> None:
    log: list[str] = []

    async def replace(context: Context, call_next: Next) -> Any:
        return await call_next(context.replace(headers={"a": "b"}))

    async def outer(command: Outer, context: Context) -> object:
        with pytest.raises(ValueError, match="no"):
            await context.send(Middle())
        return None

    async def middle(command: Middle, context: Context) -> object:
        context.emit(Noted("dropped"))
        raise ValueError("no")

    async def note(event: Noted) -> None:
        log.append(event.text)

    mediator = Mediator(
        RequestMap().bind(Outer, outer).bind(Middle, middle),
        event_map=EventMap().bind(Noted, note),
        middlewares=[replace],
    )
    await mediator.send(Outer())
    assert log == []


# -- a unit of work need not be hashable -------------------------------------------------------------------------------


async def test_a_unit_of_work_need_not_be_hashable() -> None:
    @dataclass
    class Tenants:
        name: str = "acme"

        def __call__(self) -> Any:
            return Database().begin()

    async def outer(command: Outer, context: Context) -> object:
        return await context.send(Middle())

    async def middle(command: Middle) -> object: ...

    await Mediator(
        RequestMap().bind(Outer, outer).bind(Middle, middle), middlewares=[TransactionMiddleware(Tenants())]
    ).send(Outer())


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_a_stream_that_was_left_says_so() -> None:
    async def numbers(query: Numbers) -> AsyncIterator[int]:
        yield 1

    async with Mediator(RequestMap().bind(Numbers, numbers)).stream(Numbers()) as items:
        pass
    with pytest.raises(ConfigurationError):  # today: anyio.ClosedResourceError
        await anext(items)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [Noted, Middle(), 5])
async def test_context_emit_says_what_is_wrong_with_what_is_no_event(wrong: Any) -> None:
    async def outer(command: Outer, context: Context) -> object:
        context.emit(wrong)
        return None

    with pytest.raises(ConfigurationError):  # today: HandlerNotFoundError of `type`, `Middle`, `int`
        await Mediator(RequestMap().bind(Outer, outer)).send(Outer())


def test_an_order_error_lists_the_violations_of_all_chains() -> None:
    class Needs(Recorder):
        def __init__(self, role: str) -> None:
            super().__init__(role, [])
            self.rules = (Inside(role, "it must", required=True),)

    async def outer(command: Outer) -> object: ...

    async def ask(query: Ask) -> int:
        return 1

    with pytest.raises(OrderError) as raised:
        Mediator(
            RequestMap().bind(Outer, outer).bind(Ask, ask),
            middlewares=[only(Command, Needs("a")), only(Query, Needs("b"))],
        )
    assert len(raised.value.violations) == 2


def test_maps_are_not_frozen_by_a_mediator_that_could_not_be_made() -> None:
    async def ask(query: Ask) -> int:
        return 1

    async def outer(command: Outer) -> object: ...

    class Needs(Recorder):
        rules = (Inside("a", "it must", required=True),)

    requests = RequestMap().bind(Ask, ask)
    with pytest.raises(OrderError):
        Mediator(requests, middlewares=[Needs("a", [])])
    requests.bind(Outer, outer)
