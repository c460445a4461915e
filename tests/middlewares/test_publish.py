"""The terminal for what goes to a broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import pytest

from pipeline_mediator.context import Context, Route
from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    DestinationError,
    EncodeError,
    HandlerNotFoundError,
)
from pipeline_mediator.events import DomainEvent, EventMap, IntegrationEvent, NotificationEvent
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.message_brokers.memory import MemoryBroker
from pipeline_mediator.messages import message
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.requests import Command, Query, RequestMap
from tests.middlewares.shop import AT_ONCE, Place, Placed, RecordingBroker, Reserved, Shipped, mediator_of


@message("orders.paid", version=2, key="order_id")
@dataclass(frozen=True)
class Paid(NotificationEvent):
    order_id: int


@dataclass(frozen=True)
class PaidLate(Paid):
    days: int = 1


@dataclass(frozen=True)
class Ship(Command[None]):
    order_id: int


async def test_without_destinations_every_integration_event_goes_to_its_wire_name() -> None:
    broker = RecordingBroker()
    mediator = mediator_of({}, PublishMiddleware(broker))
    await mediator.emit(Paid(7))
    await mediator.emit(Placed())
    assert [one.destination for one in broker.published] == ["orders.paid", "Placed"]


async def test_the_nearest_base_class_wins() -> None:
    broker = RecordingBroker()
    mediator = mediator_of({}, PublishMiddleware(broker, {IntegrationEvent: "all", Paid: "payments"}))
    for event in (Paid(7), PaidLate(8), Placed()):
        await mediator.emit(event)
    assert [one.destination for one in broker.published] == ["payments", "payments", "all"]


async def test_destinations_may_be_a_function() -> None:
    broker = RecordingBroker()
    mediator = mediator_of(
        {}, PublishMiddleware(broker, lambda message_type: "orders" if message_type is Placed else None)
    )
    await mediator.emit(Placed())
    with pytest.raises(HandlerNotFoundError, match="neither a handler nor a destination"):
        await mediator.emit(Shipped())
    assert [one.destination for one in broker.published] == ["orders"]


async def test_of_several_the_first_with_a_destination_takes_it() -> None:
    orders, rest = RecordingBroker(), RecordingBroker()
    mediator = mediator_of({}, PublishMiddleware(orders, {Placed: "orders"}), PublishMiddleware(rest))
    await mediator.emit(Placed())
    await mediator.emit(Shipped())
    assert orders.names == ["Placed"]
    assert rest.names == ["Shipped"]
    assert "RecordingBroker → orders" in mediator.describe(Placed)


async def test_what_travels_with_the_message() -> None:
    broker = RecordingBroker()
    ids = iter(("command", "event"))
    seen: list[Context] = []

    async def place(command: Place, context: Context) -> int:
        seen.append(context)
        context.emit(Paid(7))
        return 1

    mediator = mediator_of({Place: place}, PublishMiddleware(broker), new_id=lambda: next(ids))
    await mediator.send(Place(), headers={"tenant": "acme"}, correlation_id="conversation")
    (published,) = broker.published
    assert published.name == "orders.paid"
    assert published.message_id == "event"
    assert published.key == "7"
    headers = " ".join(f"{name}={value}" for name, value in published.headers.items())
    for travels in ("conversation", "command", "acme"):
        assert travels in headers, "correlation, causation and headers travel"


async def test_a_given_key_overrides_the_field() -> None:
    broker = RecordingBroker()
    mediator = mediator_of({}, PublishMiddleware(broker))
    await mediator.emit(Paid(7), key="another")
    assert broker.published[0].key == "another"


async def test_a_publish_that_is_tried_again_has_the_same_id() -> None:
    """So that whoever has it already can tell."""
    broker = RecordingBroker(BrokerUnavailableError("away"))
    seen: list[str] = []

    async def look(context: Context, call_next: Any) -> Any:
        seen.append(context.message_id)
        return await call_next(context)

    mediator = mediator_of({}, RetryMiddleware(2, wait=AT_ONCE), look, PublishMiddleware(broker))
    await mediator.emit(Placed())
    assert len(seen) == 2
    assert seen[0] == seen[1] == broker.published[0].message_id


async def test_a_refusal_is_raised_as_it_is_and_not_tried_again() -> None:
    refusal = BrokerRefusedError("no rights")
    broker = RecordingBroker(refusal)
    mediator = mediator_of({}, RetryMiddleware(3), PublishMiddleware(broker))
    with pytest.raises(BrokerRefusedError) as caught:
        await mediator.emit(Placed())
    assert caught.value is refusal
    assert broker.attempts == 1


async def test_a_command_with_a_destination_goes_to_the_other_side() -> None:
    broker = RecordingBroker()
    mediator = mediator_of({}, PublishMiddleware(broker, {Ship: "warehouse.commands"}))
    result: object = await mediator.send(Ship(7))
    assert result is None
    assert [(one.destination, one.name) for one in broker.published] == [("warehouse.commands", "Ship")]


def test_what_came_from_a_broker_is_not_published_again() -> None:
    broker = RecordingBroker()

    async def handle(event: Placed) -> None:
        raise NotImplementedError

    mediator = Mediator(event_map=EventMap().bind(Placed, handle), middlewares=[PublishMiddleware(broker)])
    to_broker, from_broker = mediator.routes.all_of(Placed)
    assert to_broker.links[-1].role == "publish"
    assert from_broker.route.origin == "broker"
    assert not any(link.role == "publish" for link in from_broker.links)
    assert PublishMiddleware(broker).for_route(Route(Placed, "event", "broker", "Placed")) is None


async def test_a_domain_event_stays_even_if_everything_is_published() -> None:
    broker = RecordingBroker()
    await mediator_of({}, PublishMiddleware(broker)).emit(Reserved())
    assert broker.published == []


class PlaceRemotely(Command[int]):
    pass


class Ask(Query[int]):
    pass


class Inside(DomainEvent):
    pass


@pytest.mark.parametrize(
    ("message_type", "problem"),
    [
        (Inside, "Inside cannot go to 'there': a domain event stays in the process; derive it from IntegrationEvent"),
        (PlaceRemotely, r"PlaceRemotely cannot go to 'there': it promises a result \(int\), and nobody waits"),
        (Ask, "Ask cannot go to 'there': only integration events and commands without a result"),
        (int, "int cannot go to 'there': only integration events and commands without a result"),
    ],
)
def test_what_cannot_go_to_a_broker_is_refused_at_construction(message_type: type, problem: str) -> None:
    with pytest.raises(DestinationError, match=problem):
        PublishMiddleware(RecordingBroker(), {message_type: "there"})


def test_what_a_function_sends_to_a_broker_is_checked_when_its_chain_is_compiled() -> None:
    async def handle(command: PlaceRemotely) -> int:
        return 1

    with pytest.raises(DestinationError, match="PlaceRemotely cannot go to 'anywhere'"):
        Mediator(
            RequestMap().bind(PlaceRemotely, handle),
            middlewares=[PublishMiddleware(RecordingBroker(), lambda _type: "anywhere")],
        )


async def test_a_field_that_has_no_form_on_the_wire_is_named_and_nothing_is_published() -> None:
    @dataclass(frozen=True)
    class Odd(IntegrationEvent):
        thing: object

    broker = RecordingBroker()
    mediator = mediator_of({}, RetryMiddleware(3), PublishMiddleware(broker))
    with pytest.raises(EncodeError, match="thing"):
        await mediator.emit(Odd(object()))
    assert broker.attempts == 0


async def test_a_middleware_may_call_it_by_itself() -> None:
    """Such as one that chooses between two brokers for each message."""
    broker = RecordingBroker()
    publish = PublishMiddleware(broker, {Placed: "orders"})

    async def choose(context: Context, call_next: Any) -> Any:
        return await publish(context, call_next)

    async def handle(command: Place) -> int:
        return 7

    mediator = mediator_of({Place: handle}, choose, PublishMiddleware(RecordingBroker()))
    await mediator.emit(Placed())
    assert broker.names == ["Placed"]
    assert await mediator.send(Place()) == 7


async def test_the_mediator_connects_a_broker_once_however_often_it_stands_in_the_stack() -> None:
    entered: list[str] = []

    class Connected(RecordingBroker):
        async def __aenter__(self) -> Self:
            entered.append("in")
            return self

        async def __aexit__(self, *args: object) -> None:
            entered.append("out")

    broker = Connected()
    mediator = mediator_of({}, PublishMiddleware(broker, {Placed: "orders"}), PublishMiddleware(broker))
    async with mediator:
        assert entered == ["in"]
    assert entered == ["in", "out"]


def test_check_says_that_a_broker_keeps_nothing() -> None:
    warnings = mediator_of({}, PublishMiddleware(MemoryBroker(), {Placed: "orders"})).check()
    assert any("MemoryBroker → orders keeps nothing" in one for one in warnings)
    assert not any("keeps nothing" in one for one in mediator_of({}, PublishMiddleware(RecordingBroker())).check())
