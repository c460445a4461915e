"""Events of every make, what a handler is bound to, and where, in which order and with what its handlers run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import attrs
import msgspec
import pydantic
import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    ECSTEvent,
    Event,
    EventEmitter,
    EventMap,
    IntegrationEvent,
    Mediator,
    Next,
    NotificationEvent,
    RequestMap,
)
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import (
    BindError,
    ConfigurationError,
    FrozenMapError,
    HandlerNotFoundError,
    HandlerSignatureError,
    OrderError,
)
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Broker, Database, Session

# -- events ------------------------------------------------------------------------------------------------------------


@dataclass
class Plain(DomainEvent):
    number: int


@dataclass(frozen=True, slots=True)
class Slotted(DomainEvent):
    number: int


@dataclass(frozen=True, kw_only=True)
class KeywordOnly(NotificationEvent):
    number: int


@attrs.define
class AttrsDefined(DomainEvent):
    number: int


@attrs.frozen
class AttrsFrozen(ECSTEvent):
    number: int


class Struct(msgspec.Struct, DomainEvent):
    number: int


class Model(pydantic.BaseModel, IntegrationEvent):
    number: int


MAKES: list[Any] = [Plain, Slotted, KeywordOnly, AttrsDefined, AttrsFrozen, Struct, Model]
KINDS = [Event, DomainEvent, IntegrationEvent, NotificationEvent, ECSTEvent]


class Keep:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, event: Event, context: Context) -> None:
        assert context.message is event
        self.session.rows.append(event)


@pytest.mark.parametrize("make", MAKES)
async def test_an_event_may_be_of_any_make_and_nothing_is_set_on_it(make: Any) -> None:
    database = Database()
    mediator = Mediator(event_map=EventMap().bind(make, Keep), middlewares=[TransactionMiddleware(database.begin)])
    event = make(number=1)
    before = set(dir(event))

    await mediator.emit(event)

    assert database.rows[0] is event
    assert set(dir(event)) == before


@pytest.mark.parametrize("base", KINDS)
def test_the_bases_carry_nothing(base: type[Event]) -> None:
    slotted = type("Slotted", (base,), {"__slots__": ("number",)})

    assert not hasattr(slotted(), "__dict__")
    assert not hasattr(slotted(), "__weakref__")
    assert "__init__" not in vars(base)


def test_notification_and_state_transfer_are_integration_events() -> None:
    assert issubclass(NotificationEvent, IntegrationEvent)
    assert issubclass(ECSTEvent, IntegrationEvent)
    assert not issubclass(IntegrationEvent, DomainEvent)
    assert not issubclass(DomainEvent, IntegrationEvent)


# -- bind --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderEvent(DomainEvent):
    number: int = 1


@dataclass(frozen=True)
class OrderPlaced(OrderEvent):
    pass


@dataclass(frozen=True)
class GiftPlaced(OrderPlaced):
    pass


@dataclass(frozen=True)
class StockRanLow(DomainEvent):
    sku: str = "book"


@dataclass(frozen=True)
class OrderShipped(IntegrationEvent):
    number: int = 1


Hear = Callable[[Any], Any]


def hearing(log: list[str], name: str) -> Hear:
    """An event handler that writes its name down."""

    async def hear(event: Any) -> None:
        log.append(name)

    hear.__qualname__ = name
    return hear


async def nothing(event: Any) -> None: ...


async def test_the_handlers_of_a_base_get_its_subclasses_in_the_order_of_the_binds() -> None:
    log: list[str] = []
    events = (
        EventMap()
        .bind(OrderPlaced, hearing(log, "placed"))
        .bind(Event, hearing(log, "event"))
        .bind(OrderEvent, hearing(log, "order 1"), hearing(log, "order 2"))
        .bind(GiftPlaced, hearing(log, "gift"))
    )
    mediator = Mediator(event_map=events)

    await mediator.emit(GiftPlaced())
    assert log == ["placed", "event", "order 1", "order 2", "gift"]
    log.clear()
    await mediator.emit(OrderPlaced())
    assert log == ["placed", "event", "order 1", "order 2"]
    log.clear()
    await mediator.emit(OrderEvent())
    assert log == ["event", "order 1", "order 2"]
    log.clear()
    await mediator.emit(StockRanLow())
    assert log == ["event"]


async def test_the_decorator_takes_the_type_from_the_first_parameter() -> None:
    events = EventMap()
    heard: list[Event] = []

    @events.handler
    async def hear(event: OrderPlaced) -> None:
        heard.append(event)

    await Mediator(event_map=events).emit(OrderPlaced(7))
    assert heard == [OrderPlaced(7)]
    await hear(OrderPlaced(8))
    assert heard == [OrderPlaced(7), OrderPlaced(8)]


async def test_a_decorated_handler_shares_the_scope_of_the_message() -> None:
    events = EventMap()
    database = Database()

    @events.handler
    async def hear(event: OrderPlaced, session: Session) -> None:
        session.rows.append(event)

    await Mediator(event_map=events, middlewares=[TransactionMiddleware(database.begin)]).emit(OrderPlaced())

    assert database.rows == [OrderPlaced()]
    assert hear.__name__ == "hear"


def test_a_map_knows_its_types() -> None:
    events = EventMap().bind(OrderPlaced, nothing).bind(StockRanLow, nothing).bind(OrderPlaced, hearing([], "other"))

    assert list(events) == [OrderPlaced, StockRanLow]
    assert len(events) == 2
    assert OrderPlaced in events
    assert GiftPlaced in events
    assert OrderEvent not in events
    assert OrderPlaced() not in events


async def test_include_takes_over_what_other_maps_bind() -> None:
    log: list[str] = []
    one = EventMap().bind(OrderPlaced, hearing(log, "one"))
    other = EventMap().bind(OrderPlaced, hearing(log, "other"))

    await Mediator(event_map=EventMap().include(one, other)).emit(OrderPlaced())

    assert log == ["one", "other"]


def test_include_takes_nothing_of_maps_that_do_not_fit() -> None:
    one = EventMap().bind(StockRanLow, hearing([], "one"))
    other = EventMap().bind(OrderPlaced, nothing)
    events = EventMap().bind(OrderPlaced, nothing)

    with pytest.raises(BindError, match="nothing is bound twice"):
        events.include(one, other)

    assert list(events) == [OrderPlaced]


def test_a_mediator_freezes_the_map() -> None:
    events = EventMap().bind(OrderPlaced, nothing)
    Mediator(event_map=events)

    async def hear(event: StockRanLow) -> None: ...

    for change in (
        lambda: events.bind(StockRanLow, hear),
        lambda: events.handler(hear),
        lambda: events.include(EventMap().bind(StockRanLow, hear)),
    ):
        with pytest.raises(FrozenMapError) as raised:
            change()
        assert "this EventMap is frozen" in str(raised.value)
        assert "StockRanLow cannot be bound any more" in str(raised.value)
    assert list(events) == [OrderPlaced]


class Methods:
    async def hear(self, event: Any) -> None: ...


METHODS = Methods()


@dataclass
class Forward:
    url: str

    async def handle(self, event: Any) -> None: ...


@pytest.mark.parametrize(
    "bind",
    [
        lambda: EventMap().bind(OrderPlaced, nothing).bind(OrderPlaced, nothing),
        lambda: EventMap().bind(OrderPlaced, nothing, nothing),
        lambda: EventMap().bind(OrderPlaced, METHODS.hear).bind(OrderPlaced, METHODS.hear),
        lambda: EventMap().bind(OrderPlaced, Keep).bind(OrderPlaced, Keep),
        lambda: EventMap().bind(OrderEvent, nothing).bind(OrderPlaced, nothing),
        lambda: EventMap().bind(OrderPlaced, nothing).bind(Event, nothing),
        lambda: EventMap().bind(OrderShipped, nothing, at="emit").bind(OrderShipped, nothing),
        lambda: EventMap().bind(OrderShipped, nothing, at="delivery").bind(OrderShipped, nothing, at="delivery"),
    ],
)
def test_a_handler_that_would_run_twice_for_one_event_is_refused(bind: Callable[[], EventMap]) -> None:
    with pytest.raises(BindError, match=r"is bound twice, to .*: it would run twice for one event. Remove one"):
        bind()


def test_a_handler_may_be_bound_to_several_events_and_for_both_places() -> None:
    EventMap().bind(OrderPlaced, nothing).bind(StockRanLow, nothing)
    EventMap().bind(OrderShipped, nothing, at="emit").bind(OrderShipped, nothing, at="delivery")
    EventMap().bind(OrderPlaced, Methods().hear).bind(OrderPlaced, Methods().hear)
    EventMap().bind(OrderPlaced, Forward("https://example.com"), Forward("https://example.com"))


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    number: int = 1


@pytest.mark.parametrize(
    ("event", "handlers", "options", "text"),
    [
        (int, [nothing], {}, "int is no event type"),
        (PlaceOrder, [nothing], {}, "PlaceOrder is no event type"),
        (OrderPlaced(), [nothing], {}, "OrderPlaced object is no event type"),
        (OrderPlaced, [], {}, r"EventMap.bind\(OrderPlaced\) was called without a handler"),
        (OrderPlaced, [nothing], {"at": "later"}, "at='later' for OrderPlaced: it is"),
        (OrderPlaced, [nothing], {"fan_out": "all"}, "fan_out='all' for OrderPlaced: it is"),
        (
            OrderPlaced,
            [nothing],
            {"at": "delivery"},
            'at="delivery" for OrderPlaced: a domain event stays in the process, so it is never delivered',
        ),
    ],
)
def test_a_bind_that_makes_no_sense_is_refused(event: Any, handlers: Any, options: Any, text: str) -> None:
    events = EventMap()

    with pytest.raises(BindError, match=text):
        events.bind(event, *handlers, **options)

    assert len(events) == 0


def test_the_decorator_needs_an_annotation() -> None:
    events = EventMap()

    with pytest.raises(BindError, match="nothing cannot be bound: its first parameter 'event' must be annotated"):
        events.handler(nothing)

    assert len(events) == 0


def test_a_bind_with_one_wrong_handler_binds_none() -> None:
    async def takes_stock(event: StockRanLow) -> None: ...

    events: Any = EventMap()
    with pytest.raises(HandlerSignatureError, match="it takes StockRanLow, which OrderPlaced is not"):
        events.bind(OrderPlaced, nothing, takes_stock)

    assert len(events) == 0


# -- at ----------------------------------------------------------------------------------------------------------------


def named(mediator: Mediator, event_type: type) -> dict[str, str]:
    """The handlers by route."""
    return {str(chain.route): chain.links[-1].summary for chain in mediator.routes.all_of(event_type)}


def three(log: list[str]) -> EventMap:
    return (
        EventMap()
        .bind(OrderShipped, hearing(log, "default"))
        .bind(OrderShipped, hearing(log, "emit"), at="emit")
        .bind(OrderShipped, hearing(log, "delivery"), at="delivery")
    )


async def test_without_a_destination_the_default_is_at_emission() -> None:
    log: list[str] = []
    mediator = Mediator(event_map=three(log))

    await mediator.emit(OrderShipped())

    assert log == ["default", "emit"]
    assert named(mediator, OrderShipped) == {
        "OrderShipped (event)": "default, emit",
        "OrderShipped (event from broker)": "default, delivery",
    }


async def test_with_a_destination_the_default_is_at_delivery() -> None:
    log: list[str] = []
    broker = Broker()
    mediator = Mediator(event_map=three(log), middlewares=[PublishMiddleware(broker, {OrderShipped: "orders"})])

    await mediator.emit(OrderShipped())

    assert log == ["emit"]
    assert [outgoing.destination for outgoing in broker.published] == ["orders"]
    assert named(mediator, OrderShipped) == {
        "OrderShipped (event)": "emit",
        "OrderShipped (event to orders)": "Broker → orders",
        "OrderShipped (event from broker)": "default, delivery",
    }


async def test_a_domain_event_never_has_a_destination() -> None:
    log: list[str] = []
    broker = Broker()
    mediator = Mediator(
        event_map=EventMap().bind(OrderPlaced, hearing(log, "placed")),
        middlewares=[PublishMiddleware(broker, {Event: "everything"})],
    )

    await mediator.emit(OrderPlaced())

    assert log == ["placed"]
    assert broker.published == []
    assert named(mediator, OrderPlaced) == {"OrderPlaced (event)": "placed"}


async def test_what_is_bound_for_delivery_only_is_not_run_at_emission() -> None:
    broker = Broker()
    log: list[str] = []
    events = EventMap().bind(OrderShipped, hearing(log, "delivery"), at="delivery")

    await Mediator(event_map=events, middlewares=[PublishMiddleware(broker)]).emit(OrderShipped())
    assert log == []
    assert len(broker.published) == 1

    with pytest.raises(HandlerNotFoundError, match="OrderShipped: it has neither a handler nor a destination here"):
        await Mediator(event_map=EventMap().include(events)).emit(OrderShipped())


# -- fan-out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_out", ["sequential", "collect", "concurrent"])
@pytest.mark.parametrize("forms", [("class", "class"), ("class", "object"), ("object", "class"), ("class",)])
async def test_all_handlers_of_a_bind_run_once(forms: tuple[str, ...], fan_out: Any) -> None:
    log: list[str] = []

    class First:
        async def handle(self, event: OrderPlaced) -> None:
            log.append("first")

    class Second:
        async def handle(self, event: OrderPlaced) -> None:
            log.append("second")

    handlers: list[Any] = [one if form == "class" else one() for one, form in zip((First, Second), forms, strict=False)]
    await Mediator(event_map=EventMap().bind(OrderPlaced, *handlers, fan_out=fan_out)).emit(OrderPlaced())

    assert sorted(log) == ["first", "second"][: len(forms)]


async def test_sequential_handlers_stop_at_the_first_error() -> None:
    log: list[str] = []

    async def fail(event: OrderPlaced) -> None:
        raise ValueError("no")

    events = EventMap().bind(OrderPlaced, hearing(log, "first"), fail, hearing(log, "last"))
    with pytest.raises(ValueError, match="no"):
        await Mediator(event_map=events).emit(OrderPlaced())

    assert log == ["first"]


async def test_collecting_handlers_all_run_and_all_errors_are_raised() -> None:
    log: list[str] = []
    one, other = ValueError("one"), LookupError("other")

    async def fail(event: OrderPlaced) -> None:
        raise one

    async def fail_too(event: OrderPlaced, context: Context) -> None:
        raise other

    events = EventMap().bind(
        OrderPlaced,
        hearing(log, "first"),
        fail,
        hearing(log, "second"),
        fail_too,
        hearing(log, "last"),
        fan_out="collect",
    )
    with pytest.raises(ExceptionGroup) as raised:
        await Mediator(event_map=events).emit(OrderPlaced())

    assert raised.value.exceptions == (one, other)
    assert "2 handlers of OrderPlaced failed" in str(raised.value)
    assert log == ["first", "second", "last"]


async def test_collecting_handlers_that_all_succeed_raise_nothing() -> None:
    log: list[str] = []
    events = EventMap().bind(OrderPlaced, hearing(log, "first"), hearing(log, "last"), fan_out="collect")

    await Mediator(event_map=events).emit(OrderPlaced())

    assert log == ["first", "last"]


async def test_a_cancellation_is_not_collected() -> None:
    log: list[str] = []

    async def wait(event: OrderPlaced) -> None:
        await anyio.sleep_forever()

    events = EventMap().bind(OrderPlaced, wait, hearing(log, "last"), fan_out="collect")
    with anyio.move_on_after(0) as limit:
        await Mediator(event_map=events).emit(OrderPlaced())

    assert limit.cancelled_caught
    assert log == []


async def test_concurrent_handlers_run_at_the_same_time() -> None:
    both = 2
    arrived: list[str] = []
    everybody = anyio.Event()

    async def meet(event: OrderPlaced, name: str = "") -> None:
        arrived.append(name)
        if len(arrived) == both:
            everybody.set()
        await everybody.wait()

    events = EventMap().bind(
        OrderPlaced, functools.partial(meet, name="one"), functools.partial(meet, name="other"), fan_out="concurrent"
    )
    with anyio.fail_after(5):
        await Mediator(event_map=events).emit(OrderPlaced())

    assert sorted(arrived) == ["one", "other"]


async def test_the_first_error_of_concurrent_handlers_cancels_the_others() -> None:
    log: list[str] = []
    waiting = anyio.Event()

    async def wait(event: OrderPlaced) -> None:
        waiting.set()
        try:
            await anyio.sleep_forever()
        finally:
            log.append("cancelled")

    async def fail(event: OrderPlaced) -> None:
        await waiting.wait()
        raise ValueError("no")

    events = EventMap().bind(OrderPlaced, wait, fail, fan_out="concurrent")
    with pytest.raises(ExceptionGroup) as raised, anyio.fail_after(5):
        await Mediator(event_map=events).emit(OrderPlaced())

    assert [str(error) for error in raised.value.exceptions] == ["no"]
    assert log == ["cancelled"]


async def test_groups_run_one_after_the_other() -> None:
    log: list[str] = []
    events = (
        EventMap()
        .bind(OrderPlaced, hearing(log, "sequential 1"), hearing(log, "sequential 2"))
        .bind(OrderEvent, hearing(log, "concurrent"), fan_out="concurrent")
        .bind(Event, hearing(log, "collect"), fan_out="collect")
    )

    await Mediator(event_map=events).emit(OrderPlaced())

    assert log == ["sequential 1", "sequential 2", "concurrent", "collect"]


def test_concurrent_handlers_may_not_share_a_transaction() -> None:
    events = EventMap().bind(OrderPlaced, nothing, Keep, fan_out="concurrent")

    with pytest.raises(OrderError) as raised:
        Mediator(event_map=events, middlewares=[TransactionMiddleware(Database().begin)])

    assert "HandleMiddleware (position 2) and TransactionMiddleware (position 1) exclude each other" in str(
        raised.value
    )
    assert "concurrent handlers would use one session at the same time" in str(raised.value)
    assert "scope_per_handler=True" in str(raised.value)


async def test_concurrent_handlers_may_not_share_the_emitters_transaction() -> None:
    events = EventMap().bind(OrderPlaced, nothing, fan_out="concurrent")
    requests = RequestMap()

    @requests.handler
    async def place(command: PlaceOrder, context: Context) -> int:
        context.emit(OrderPlaced())
        return 1

    database = Database()
    transaction = TransactionMiddleware(database.begin)

    class OnlyForCommands:
        role = "transaction"
        unit_of_work = transaction.unit_of_work
        seeds = transaction.seeds

        def for_route(self, route: Any) -> Any:
            return transaction if issubclass(route.message_type, Command) else None

        async def __call__(self, context: Any, call_next: Any) -> Any:
            raise NotImplementedError

    mediator = Mediator(requests, event_map=events, middlewares=[OnlyForCommands()])

    await mediator.emit(OrderPlaced())
    with pytest.raises(
        ConfigurationError, match="OrderPlaced has concurrent handlers and was emitted inside a transac"
    ):
        await mediator.send(PlaceOrder())
    assert database.log == ["begin", "rollback"]


class Resource:
    """Built once per scope."""

    made: list["Resource"] = []  # noqa: RUF012
    closed: list["Resource"] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.made.append(self)

    async def aclose(self) -> None:
        self.closed.append(self)


@pytest.mark.parametrize("fan_out", ["concurrent", "sequential", "collect"])
async def test_handlers_with_a_scope_each_share_nothing(fan_out: Any) -> None:
    Resource.made.clear()
    Resource.closed.clear()
    got: list[Resource] = []

    async def one(event: OrderPlaced, resource: Resource, context: Context) -> None:
        got.append(resource)
        context.emit(StockRanLow())

    async def other(event: OrderPlaced, resource: Resource) -> None:
        got.append(resource)

    log: list[str] = []
    events = EventMap().bind(OrderPlaced, one, other, fan_out=fan_out, scope_per_handler=True)
    database = Database()
    mediator = Mediator(
        container=PlainContainer(Resource),
        event_map=events.bind(StockRanLow, hearing(log, "low")),
        middlewares=[TransactionMiddleware(database.begin)],
    )

    await mediator.emit(OrderPlaced())

    assert len(got) == 2
    assert got[0] is not got[1]
    assert Resource.made == got
    assert sorted(map(id, Resource.closed)) == sorted(map(id, got))
    assert log == ["low"]


@pytest.mark.parametrize("fan_out", ["concurrent", "sequential", "collect"])
async def test_what_a_handler_with_a_scope_of_its_own_sends_is_in_a_transaction_of_its_own(fan_out: Any) -> None:
    database = Database()

    async def hear(event: OrderPlaced, resource: Resource) -> None:
        await mediator.emit(StockRanLow())

    requests = RequestMap()

    @requests.handler
    async def place(command: PlaceOrder, context: Context) -> int:
        context.emit(OrderPlaced())
        return 1

    mediator = Mediator(
        requests,
        PlainContainer(Resource),
        event_map=EventMap().bind(OrderPlaced, hear, fan_out=fan_out, scope_per_handler=True).bind(StockRanLow, Keep),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(PlaceOrder())

    assert database.log == ["begin", "begin", "commit", "commit"]


async def test_handlers_behind_one_with_a_scope_of_its_own_are_in_the_transaction() -> None:
    database = Database()

    async def own(event: OrderPlaced, resource: Resource) -> None: ...

    async def shared(event: OrderPlaced, session: Session) -> None:
        await mediator.emit(StockRanLow())
        session.rows.append(event)

    events = EventMap().bind(OrderPlaced, own, scope_per_handler=True).bind(OrderPlaced, shared)
    mediator = Mediator(
        container=PlainContainer(Resource),
        event_map=events.bind(StockRanLow, Keep),
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.emit(OrderPlaced())

    assert database.log == ["begin", "commit"]
    assert database.rows == [StockRanLow(), OrderPlaced()]


async def test_a_handler_with_a_scope_of_its_own_has_the_headers_and_items_of_the_event() -> None:
    seen: list[tuple[dict[str, str], dict[Any, Any], str]] = []

    async def add(context: Context, call_next: Next) -> Any:
        context.items["user"] = 1
        seen.append((context.headers, context.items, context.message_id))
        return await call_next(context)

    async def hear(event: OrderPlaced, context: Context, resource: Resource) -> None:
        seen.append((context.headers, context.items, context.message_id))

    events = EventMap().bind(OrderPlaced, hear, scope_per_handler=True)
    mediator = Mediator(container=PlainContainer(Resource), event_map=events, middlewares=[add])
    await mediator.emit(OrderPlaced(), headers={"tenant": "acme"})

    assert seen[0] == seen[1]
    assert seen[0][:2] == ({"tenant": "acme"}, {"user": 1})


async def test_handlers_without_a_scope_each_share_one() -> None:
    Resource.made.clear()
    got: list[Resource] = []

    async def one(event: OrderPlaced, resource: Resource) -> None:
        got.append(resource)

    async def other(event: OrderPlaced, resource: Resource) -> None:
        got.append(resource)

    for fan_out in ("sequential", "collect", "concurrent"):
        got.clear()
        chosen: Any = fan_out
        events = EventMap().bind(OrderPlaced, one, other, fan_out=chosen)
        await Mediator(container=PlainContainer(Resource), event_map=events).emit(OrderPlaced())
        assert got[0] is got[1]


async def test_handlers_that_need_no_scope_may_be_told_to_have_one_each() -> None:
    log: list[str] = []
    events = EventMap().bind(
        OrderPlaced, hearing(log, "one"), hearing(log, "other"), fan_out="concurrent", scope_per_handler=True
    )

    await Mediator(event_map=events, middlewares=[TransactionMiddleware(Database().begin)]).emit(OrderPlaced())

    assert sorted(log) == ["one", "other"]


# -- Diator's emitter --------------------------------------------------------------------------------------------------


async def test_the_emitter_is_the_event_half_of_a_mediator() -> None:
    log: list[str] = []
    broker = Broker()
    emitter = EventEmitter(EventMap().bind(OrderPlaced, hearing(log, "placed")), message_broker=broker)
    requests = RequestMap()

    @requests.handler
    async def place(command: PlaceOrder, context: Context) -> int:
        context.emit(OrderPlaced())
        context.emit(OrderShipped())
        return 1

    assert await Mediator(requests, event_emitter=emitter).send(PlaceOrder()) == 1

    assert log == ["placed"]
    assert [outgoing.name for outgoing in broker.published] == ["OrderShipped"]


async def test_the_emitter_emits_by_itself() -> None:
    got: list[Resource] = []

    async def hear(event: OrderPlaced, resource: Resource) -> None:
        got.append(resource)

    broker = Broker()
    emitter = EventEmitter(EventMap().bind(OrderPlaced, hear), PlainContainer(Resource), broker)

    await emitter.emit(OrderPlaced())
    await emitter.emit(OrderPlaced())
    await emitter.emit(OrderShipped())

    assert len(got) == 2
    assert len(broker.published) == 1


async def test_the_mediator_takes_the_emitters_container_if_it_has_none() -> None:
    shared = Broker("of the emitter")
    got: list[Broker] = []

    async def hear(event: OrderPlaced, broker: Broker) -> None:
        got.append(broker)

    emitter = EventEmitter(EventMap().bind(OrderPlaced, hear), PlainContainer(shared))
    await Mediator(event_emitter=emitter).emit(OrderPlaced())
    own = Broker("of the mediator")
    await Mediator(container=PlainContainer(own), event_emitter=emitter).emit(OrderPlaced())

    assert got == [shared, own]


async def test_what_an_emitter_emits_in_a_handler_joins_its_message() -> None:
    database = Database()

    async def place(command: PlaceOrder, session: Session) -> int:
        session.rows.append("placed")
        await emitter.emit(OrderPlaced())
        return 1

    emitter = EventEmitter(EventMap().bind(OrderPlaced, Keep))
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, place),
        event_emitter=emitter,
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(PlaceOrder())

    assert database.log == ["begin", "commit"]
    assert database.rows == ["placed", OrderPlaced()]


def test_an_emitter_and_an_event_map_are_too_much() -> None:
    with pytest.raises(ConfigurationError, match="pass event_map= or event_emitter=, not both"):
        Mediator(event_map=EventMap(), event_emitter=EventEmitter(EventMap()))
