"""What a broker hands over walks the pipeline, and somebody decides what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_fixed

from pipeline_mediator import (
    Codec,
    Command,
    Context,
    EventMap,
    IntegrationEvent,
    Mediator,
    PermanentError,
    Query,
    RequestMap,
    message,
)
from pipeline_mediator.codec import Facts
from pipeline_mediator.context import MAX_HOPS, hops_of
from pipeline_mediator.errors import (
    ConfigurationError,
    DecodeError,
    DeliveryExhaustedError,
    HandlerNotFoundError,
    MessageLoopError,
    OrderError,
    UnknownMessageError,
)
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Delivery, Later, Undecodable
from pipeline_mediator.middlewares import (
    DeadLetterMiddleware,
    LoggingMiddleware,
    PublishMiddleware,
    RedeliveryMiddleware,
    RetryMiddleware,
    TransactionMiddleware,
    ValidationMiddleware,
)
from tests.fakes import Broker, Database

if TYPE_CHECKING:
    pass


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: int


@message("orders.cancelled")
@dataclass(frozen=True)
class OrderCancelled(IntegrationEvent):
    order_id: int


@message("warehouse.ship", key="order_id")
@dataclass(frozen=True)
class Ship(Command):
    order_id: int


@message("warehouse.weigh")
@dataclass(frozen=True)
class Weigh(Command[float]):
    order_id: int


@dataclass(frozen=True)
class Stock(Query[int]):
    sku: str


CODEC = Codec(OrderPlaced, OrderCancelled, Ship, source="shop")


def delivery_of(message: object, *, attempt: int = 1, **facts: Any) -> Delivery:
    encoded = CODEC.encode(message, Facts("1", "c", **facts), binary=True)
    return Delivery(
        "orders", encoded.body, encoded.content_type, encoded.headers, "1", None, attempt, subscription="warehouse"
    )


def raw(body: bytes, content_type: str | None = None, attempt: int = 1) -> Delivery:
    return Delivery("orders", body, content_type, {}, "1", None, attempt, "warehouse")


def mediator_of(handler: Any, *middlewares: Any, **options: Any) -> Mediator:
    return Mediator(event_map=EventMap().bind(OrderPlaced, handler), middlewares=middlewares, codec=CODEC, **options)


class Handler:
    """Notes what it gets, and raises its errors one by one."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.contexts: list[Context] = []

    async def handle(self, event: OrderPlaced, context: Context) -> None:
        self.contexts.append(context)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error


DECIDE = (DeadLetterMiddleware(), RedeliveryMiddleware(3, wait=wait_fixed(7)))


async def test_it_is_decoded_handled_and_acknowledged() -> None:
    handler = Handler()
    delivery = delivery_of(OrderPlaced(7), sequence="0005", headers={"tenant": "acme"})

    await mediator_of(handler).deliver(delivery)

    (context,) = handler.contexts
    assert context.message == OrderPlaced(7)
    assert (context.message_id, context.correlation_id) == ("1", "c")
    assert context.headers["tenant"] == "acme"
    assert context.delivery is delivery
    assert (delivery.source, delivery.sequence, delivery.outcome) == ("shop", "0005", Ack())


async def test_what_it_causes_belongs_to_its_conversation_and_counts_the_hop() -> None:
    broker = Broker()

    async def handle(event: OrderPlaced, context: Context) -> None:
        context.emit(OrderCancelled(event.order_id))

    mediator = mediator_of(handle, PublishMiddleware(broker, {OrderCancelled: "cancelled"}))
    await mediator.deliver(delivery_of(OrderPlaced(7)))

    (published,) = broker.published
    facts = CODEC.decode(published.body, published.content_type, published.headers).facts
    assert (facts.correlation_id, facts.causation_id, facts.headers) == ("c", "1", {"hops": "1"})


async def test_two_applications_do_not_answer_each_other_for_ever() -> None:
    async def handle(event: OrderPlaced, context: Context) -> None:
        await context.mediator.emit(OrderCancelled(event.order_id))

    mediator = mediator_of(handle, DeadLetterMiddleware(), PublishMiddleware(Broker(), {OrderCancelled: "cancelled"}))
    await mediator.deliver(delivery_of(OrderPlaced(7), headers={"hops": str(MAX_HOPS - 1)}))
    circling = delivery_of(OrderPlaced(7), headers={"hops": str(MAX_HOPS)})
    with pytest.raises(MessageLoopError, match=f"{MAX_HOPS + 1} deliveries, each caused by the one before"):
        await mediator.deliver(circling)
    assert isinstance(circling.outcome, Dead)


@pytest.mark.parametrize(("hops", "counted"), [("3", 3), ("", 0), ("-1", 0), ("x", 0), ("99999", 0), ("٣", 0)])
def test_a_header_that_is_no_number_of_hops_counts_as_none(hops: str, counted: int) -> None:
    assert hops_of({"hops": hops}) == counted


async def test_what_came_from_a_broker_is_not_published_again() -> None:
    broker, handler = Broker(), Handler()
    mediator = mediator_of(handler, PublishMiddleware(broker, {OrderPlaced: "orders"}))

    await mediator.deliver(delivery_of(OrderPlaced(7)))

    assert len(handler.contexts) == 1
    assert broker.published == []


async def test_a_known_type_that_nobody_here_handles_is_passed_over() -> None:
    delivery = delivery_of(OrderCancelled(7))
    await mediator_of(Handler(), *DECIDE).deliver(delivery)
    assert delivery.outcome == Ack()


# -- commands ----------------------------------------------------------------------------------------------------------


async def test_a_command_goes_to_its_destination_and_is_handled_on_the_other_side() -> None:
    broker = Broker()
    handled: list[object] = []

    async def ship(command: Ship) -> None:
        handled.append(command)

    web = Mediator(codec=CODEC, middlewares=[PublishMiddleware(broker, {Ship: "commands"})])
    await web.send(Ship(7))
    (sent,) = broker.published
    assert (sent.destination, sent.key, handled) == ("commands", "7", [])

    warehouse = Mediator(RequestMap().bind(Ship, ship), codec=Codec(Ship))
    delivery = Delivery("commands", sent.body, sent.content_type, sent.headers, sent.message_id, "7", 1, "warehouse")
    await warehouse.deliver(delivery)
    assert handled == [Ship(7)]
    assert delivery.outcome == Ack()


async def test_a_command_that_was_not_named_for_the_wire_cannot_be_sent_from_outside() -> None:
    """A handler bound for this process alone is not opened to whoever may write to the queue."""
    handled: list[object] = []

    async def ship(command: Ship) -> None:
        handled.append(command)

    mediator = Mediator(RequestMap().bind(Ship, ship), middlewares=DECIDE)
    delivery = delivery_of(Ship(7))
    with pytest.raises(UnknownMessageError):
        await mediator.deliver(delivery)
    assert handled == []
    assert isinstance(delivery.outcome, Dead)


async def test_a_command_that_nobody_here_handles_is_not_lost() -> None:
    """An event may be meant for others; a command is meant for whoever gets it."""
    mediator = Mediator(codec=CODEC, middlewares=DECIDE)
    for attempt, outcome in ((1, Later), (3, Dead)):
        delivery = delivery_of(Ship(7), attempt=attempt)
        with pytest.raises(HandlerNotFoundError, match="Ship"):
            await mediator.deliver(delivery)
        assert isinstance(delivery.outcome, outcome)


@pytest.mark.parametrize("message_type", [Weigh, Stock])
def test_what_promises_a_result_cannot_be_sent_away(message_type: type) -> None:
    with pytest.raises(ConfigurationError, match=message_type.__name__):
        Mediator(middlewares=[PublishMiddleware(Broker(), {message_type: "commands"})])


# -- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delivery", "error"),
    [
        (raw(b"\xff\x00"), DecodeError),
        (raw(b"{}"), DecodeError),
        (raw(b"{}", "text/plain"), DecodeError),
        (raw(b'{"specversion":"1.0","id":"1","source":"s","type":"nobody.knows"}'), UnknownMessageError),
        (
            raw(b'{"specversion":"1.0","id":"1","source":"s","type":"orders.placed","data":{"order_id":"x"}}'),
            DecodeError,
        ),
    ],
    ids=["no JSON", "no CloudEvent", "another type", "unknown", "wrong field"],
)
async def test_what_cannot_be_read_is_given_up_with_its_bytes(delivery: Delivery, error: type[Exception]) -> None:
    handler = Handler()
    seen: list[object] = []

    async def observe(context: Context, call_next: Any) -> Any:
        seen.append(context.message)
        return await call_next(context)

    body = delivery.body
    mediator = mediator_of(
        handler,
        observe,
        LoggingMiddleware(),
        *DECIDE,
        ValidationMiddleware({OrderPlaced: lambda _: None}),
        TransactionMiddleware(Database().begin),
    )
    with pytest.raises(error):
        await mediator.deliver(delivery)

    assert isinstance(delivery.outcome, Dead)
    assert delivery.outcome.reason.startswith(error.__name__)
    assert delivery.body == body
    assert handler.contexts == []
    (undecodable,) = seen
    assert isinstance(undecodable, Undecodable)
    assert undecodable.body == body


async def test_what_cannot_be_read_needs_no_transaction() -> None:
    """With the database away it would come again and again."""
    database = Database()
    mediator = mediator_of(Handler(), *DECIDE, RetryMiddleware(3), TransactionMiddleware(database.begin))
    with pytest.raises(DecodeError):
        await mediator.deliver(raw(b"?"))
    assert database.log == []


async def test_the_error_of_what_cannot_be_read_is_not_kept() -> None:
    undecodable = Undecodable(b"?", DecodeError(None, "$", "no JSON"))
    for problem in ("no JSON", "could not be read"):
        with pytest.raises(DecodeError, match=problem):
            undecodable.fail()


async def test_unknown_types_can_be_passed_over() -> None:
    delivery = raw(b'{"specversion":"1.0","id":"1","source":"s","type":"nobody.knows"}')
    await mediator_of(Handler(), *DECIDE).deliver(delivery, skip_unknown=True)
    assert delivery.outcome == Ack()
    broken = raw(b"?")
    with pytest.raises(DecodeError):
        await mediator_of(Handler(), *DECIDE).deliver(broken, skip_unknown=True)
    assert isinstance(broken.outcome, Dead)


# -- who decides -------------------------------------------------------------------------------------------------------


async def test_without_a_decision_the_outcome_is_open() -> None:
    delivery = delivery_of(OrderPlaced(7))
    with pytest.raises(BrokenPipeError):
        await mediator_of(Handler(BrokenPipeError())).deliver(delivery)
    assert delivery.outcome is None


async def test_what_failed_comes_again_until_its_attempts_are_used_up() -> None:
    outcomes: list[object] = []
    for attempt in (1, 2, 3):
        delivery = delivery_of(OrderPlaced(7), attempt=attempt)
        with pytest.raises(BrokenPipeError):
            await mediator_of(Handler(BrokenPipeError("gone")), *DECIDE).deliver(delivery)
        outcomes.append(delivery.outcome)
    assert outcomes == [Later(7), Later(7), Dead("BrokenPipeError: gone")]


async def test_what_ended_every_process_is_given_up_without_being_handled() -> None:
    handler = Handler()
    delivery = delivery_of(OrderPlaced(7), attempt=4)
    with pytest.raises(DeliveryExhaustedError, match="attempt 4 of 3"):
        await mediator_of(handler, *DECIDE).deliver(delivery)
    assert handler.contexts == []
    assert isinstance(delivery.outcome, Dead)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (PermanentError("never"), Dead("PermanentError: never")),
        (ExceptionGroup("both", [PermanentError("a"), PermanentError("b")]), Dead),
        (ExceptionGroup("one", [PermanentError("a"), BrokenPipeError()]), Later(7)),
        (ConfigurationError("a deployment that is mended may help"), Later(7)),
    ],
)
async def test_what_is_permanent_does_not_come_again(error: Exception, outcome: Any) -> None:
    delivery = delivery_of(OrderPlaced(7))
    with pytest.raises(type(error)):
        await mediator_of(Handler(error), *DECIDE).deliver(delivery)
    assert delivery.outcome == outcome or isinstance(delivery.outcome, outcome)


async def test_what_was_committed_is_done_whatever_is_raised_afterwards() -> None:
    database = Database()

    async def fail_late(context: Context, call_next: Any) -> None:
        await call_next(context)
        raise BrokenPipeError

    handler = Handler()
    delivery = delivery_of(OrderPlaced(7))
    mediator = mediator_of(handler, *DECIDE, fail_late, TransactionMiddleware(database.begin))
    with pytest.raises(BrokenPipeError):
        await mediator.deliver(delivery)
    assert database.log == ["begin", "commit"]
    assert delivery.outcome == Ack()


async def test_a_retry_that_helps_decides_nothing() -> None:
    handler = Handler(BrokenPipeError(), None)
    delivery = delivery_of(OrderPlaced(7))
    await mediator_of(handler, *DECIDE, RetryMiddleware(2, wait=wait_fixed(0))).deliver(delivery)
    assert len(handler.contexts) == 2
    assert delivery.outcome == Ack()


async def test_decisions_are_noted() -> None:
    notes: list[tuple[str, Any]] = []

    async def listen(context: Context, call_next: Any) -> Any:
        context.on_note(lambda name, facts: notes.append((name, dict(facts))))
        return await call_next(context)

    for attempt in (2, 3):
        with pytest.raises(BrokenPipeError):
            await mediator_of(Handler(BrokenPipeError()), listen, *DECIDE).deliver(
                delivery_of(OrderPlaced(7), attempt=attempt)
            )
    assert notes == [
        ("redelivery", {"deliveries": 2, "error": "BrokenPipeError", "delay": 7.0}),
        ("dead letter", {"error": "BrokenPipeError"}),
    ]


async def test_the_reason_is_bounded() -> None:
    delivery = delivery_of(OrderPlaced(7))
    with pytest.raises(PermanentError):
        await mediator_of(Handler(PermanentError("x" * 100_000)), *DECIDE).deliver(delivery)
    assert isinstance(delivery.outcome, Dead)
    assert len(delivery.outcome.reason) == 1000


def test_they_stand_where_they_see_everything() -> None:
    with pytest.raises(OrderError) as failure:
        mediator_of(
            Handler(),
            TransactionMiddleware(Database().begin),
            RetryMiddleware(3),
            RedeliveryMiddleware(),
            DeadLetterMiddleware(),
        )
    text = str(failure.value)
    assert "RedeliveryMiddleware" in text
    assert "DeadLetterMiddleware" in text


def test_they_cost_a_local_message_nothing() -> None:
    mediator = Mediator(event_map=EventMap().bind(OrderPlaced, Handler()), middlewares=DECIDE)
    (local,) = mediator.routes.of_event(OrderPlaced)
    assert [link.role for link in local.links] == ["handle"]


def test_an_attempt_is_the_least() -> None:
    with pytest.raises(ConfigurationError, match="attempts=0"):
        RedeliveryMiddleware(0)


@pytest.mark.parametrize(("decides", "warned"), [((), True), (DECIDE, False)])
def test_check_tells_of_what_would_come_again_for_ever(decides: tuple[Any, ...], *, warned: bool) -> None:
    async def ship(command: Ship) -> None: ...

    mediator = Mediator(
        RequestMap().bind(Ship, ship),
        event_map=EventMap().bind(OrderPlaced, Handler()),
        middlewares=[*decides, PublishMiddleware(Broker(), {OrderPlaced: "orders", Ship: "commands"})],
    )
    told = [text for text in mediator.check() if "comes again for ever" in text]
    assert bool(told) is warned
    if warned:
        assert "OrderPlaced (event from broker)" in told[0]
        assert "Ship (request from broker)" in told[0]


def test_check_tells_nothing_of_what_stays_in_the_process() -> None:
    assert Mediator(event_map=EventMap().bind(OrderPlaced, Handler())).check() == []
