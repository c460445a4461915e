"""Requests of every make, and the map that binds each to its one handler."""

import copy
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from pipeline_mediator import Command, DomainEvent, Mediator, Query, Request, RequestMap, StreamQuery
from pipeline_mediator.errors import BindError, DuplicateHandlerError, FrozenMapError, HandlerSignatureError
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Database, Session

# -- messages ----------------------------------------------------------------------------------------------------------


@dataclass
class Plain(Command[int]):
    number: int


@dataclass(frozen=True)
class Frozen(Command[int]):
    number: int


@dataclass(frozen=True, slots=True)
class Slotted(Command[int]):
    number: int


@dataclass(kw_only=True)
class KeywordOnly(Command[int]):
    number: int


@dataclass(slots=True, kw_only=True)
class SlottedKeywordOnly(Query[int]):
    number: int


@attrs.define
class AttrsDefined(Command[int]):
    number: int


@attrs.frozen
class AttrsFrozen(Query[int]):
    number: int


class Struct(msgspec.Struct, Command[int]):
    number: int


class FrozenStruct(msgspec.Struct, Query[int], frozen=True, kw_only=True):
    number: int


class Model(pydantic.BaseModel, Command[int]):
    number: int


class FrozenModel(pydantic.BaseModel, Request[int], frozen=True):
    number: int


MAKES: list[Any] = [
    Plain,
    Frozen,
    Slotted,
    KeywordOnly,
    SlottedKeywordOnly,
    AttrsDefined,
    AttrsFrozen,
    Struct,
    FrozenStruct,
    Model,
    FrozenModel,
]


class Double:
    """Takes a session, so that a scope is opened and a transaction runs."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, message: Any, context: Any) -> int:
        self.session.rows.append(message)
        result: int = message.number * 2
        return result


@pytest.mark.parametrize("make", MAKES)
async def test_a_request_may_be_of_any_make(make: Any) -> None:
    database = Database()
    requests: Any = RequestMap()
    mediator = Mediator(
        requests.bind(make, Double), middlewares=[RetryMiddleware(2), TransactionMiddleware(database.begin)]
    )
    message = make(number=21)

    assert await mediator.send(message) == 42
    assert database.rows == [message]
    assert database.rows[0] is message


@pytest.mark.parametrize("make", MAKES)
async def test_nothing_is_set_on_a_request(make: Any) -> None:
    requests: Any = RequestMap()
    mediator = Mediator(
        requests.bind(make, Double), middlewares=[RetryMiddleware(2), TransactionMiddleware(Database().begin)]
    )
    message = make(number=21)
    before = copy.deepcopy(getattr(message, "__dict__", None)), set(dir(message))

    await mediator.send(message)

    assert (getattr(message, "__dict__", None), set(dir(message))) == before


@pytest.mark.parametrize("make", MAKES)
def test_the_promised_result_is_read_from_any_make(make: Any) -> None:
    async def wrong(message: Any) -> str:
        return str(message)

    with pytest.raises(HandlerSignatureError, match="it returns str, but the message promises int"):
        RequestMap().bind(make, wrong)


@pytest.mark.parametrize("base", [Request, Command, Query, StreamQuery])
def test_the_bases_carry_nothing(base: type) -> None:
    slotted = type("Slotted", (base,), {"__slots__": ("number",)})

    assert not hasattr(slotted(), "__dict__")
    assert not hasattr(slotted(), "__weakref__")
    assert "__init__" not in vars(base)


# -- bind --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    sku: str


@dataclass(frozen=True)
class CountOrders(Query[int]):
    sku: str


@dataclass(frozen=True)
class ExportOrders(StreamQuery[str]):
    prefix: str


@dataclass(frozen=True)
class OrderPlaced(DomainEvent):
    sku: str


async def place_order(command: PlaceOrder) -> int:
    return len(command.sku)


async def place_order_twice(command: PlaceOrder) -> int:
    return 2 * len(command.sku)


async def count_orders(query: CountOrders) -> int:
    return 7


def test_bind_returns_the_map_so_that_binds_chain() -> None:
    requests = RequestMap().bind(PlaceOrder, place_order).bind(CountOrders, count_orders)

    assert list(requests) == [PlaceOrder, CountOrders]
    assert len(requests) == 2
    assert PlaceOrder in requests
    assert ExportOrders not in requests
    assert [] not in requests


async def test_the_decorator_takes_the_type_from_the_first_parameter() -> None:
    requests = RequestMap()

    @requests.handler
    async def place(command: PlaceOrder) -> int:
        return len(command.sku)

    assert await Mediator(requests).send(PlaceOrder("book")) == 4
    assert await place(PlaceOrder("a book")) == 6


@pytest.mark.parametrize("annotations", [{}, {"command": "missing.PlaceOrder"}, {"command": Any}])
def test_the_decorator_needs_an_annotation(annotations: dict[str, Any]) -> None:
    async def place(command: Any) -> int:
        return 1

    place.__annotations__ = annotations
    with pytest.raises(HandlerSignatureError) as raised:
        RequestMap().handler(place)

    assert str(raised.value) == (
        "test_the_decorator_needs_an_annotation.<locals>.place cannot be bound: its first parameter 'command' must be "
        "annotated with the message type, and that type must be importable at run time"
    )


def test_the_decorator_needs_one_type() -> None:
    async def both(message: PlaceOrder | CountOrders) -> int:
        return 1

    with pytest.raises(HandlerSignatureError, match="must be annotated with the message type"):
        RequestMap().handler(both)


def test_the_decorator_takes_streams() -> None:
    requests = RequestMap()

    @requests.handler
    async def export(query: ExportOrders) -> AsyncIterator[str]:
        yield query.prefix

    assert ExportOrders in requests
    assert export.__name__ == "export"


def test_a_second_handler_is_refused_and_the_first_stays() -> None:
    requests = RequestMap().bind(PlaceOrder, place_order)

    with pytest.raises(DuplicateHandlerError) as raised:
        requests.bind(PlaceOrder, place_order_twice)

    assert str(raised.value) == (
        "PlaceOrder is already bound to place_order; a request has exactly one handler, so place_order_twice was "
        "refused. Remove one of the two binds."
    )
    assert (raised.value.message_type, raised.value.existing, raised.value.refused) == (
        PlaceOrder,
        place_order,
        place_order_twice,
    )
    handler = requests.get(PlaceOrder)
    assert handler is not None
    assert handler.target is place_order


async def test_include_takes_over_what_other_maps_bind() -> None:
    orders = RequestMap().bind(PlaceOrder, place_order)
    counts = RequestMap().bind(CountOrders, count_orders)

    mediator = Mediator(RequestMap().include(orders, counts))

    assert await mediator.send(PlaceOrder("book")) == 4
    assert await mediator.send(CountOrders("book")) == 7


def test_include_refuses_a_request_that_two_maps_bind_and_takes_nothing_of_them() -> None:
    requests = RequestMap().bind(PlaceOrder, place_order)
    other = RequestMap().bind(CountOrders, count_orders).bind(PlaceOrder, place_order_twice)

    with pytest.raises(DuplicateHandlerError, match="PlaceOrder is already bound to place_order"):
        requests.include(other)

    assert list(requests) == [PlaceOrder]


def test_include_refuses_two_maps_that_bind_the_same() -> None:
    one = RequestMap().bind(PlaceOrder, place_order)
    other = RequestMap().bind(PlaceOrder, place_order_twice)
    requests = RequestMap()

    with pytest.raises(DuplicateHandlerError):
        requests.include(one, other)

    assert list(requests) == []


def test_a_mediator_freezes_the_map() -> None:
    requests = RequestMap().bind(PlaceOrder, place_order)
    Mediator(requests)

    for change in (
        lambda: requests.bind(CountOrders, count_orders),
        lambda: requests.handler(count_orders),
        lambda: requests.include(RequestMap().bind(CountOrders, count_orders)),
    ):
        with pytest.raises(FrozenMapError) as raised:
            change()
        assert "this RequestMap is frozen" in str(raised.value)
        assert "CountOrders" in str(raised.value)
        assert "Bind every handler before the Mediator is constructed" in str(raised.value)
    assert list(requests) == [PlaceOrder]


def test_a_frozen_map_may_serve_two_mediators() -> None:
    requests = RequestMap().bind(PlaceOrder, place_order)

    Mediator(requests)
    Mediator(requests)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (int, "int is no request type"),
        (PlaceOrder("book"), "PlaceOrder object is no request type"),
        (OrderPlaced, "OrderPlaced is no request type"),
        (OrderPlaced, "An event is bound with EventMap."),
        (Command[int], r"Command\[int\] is no request type"),
        (None, "None is no request type"),
    ],
)
def test_only_request_types_are_bound(wrong: Any, text: str) -> None:
    with pytest.raises(BindError, match=text) as raised:
        RequestMap().bind(wrong, place_order)

    assert ("An event is bound with EventMap" in str(raised.value)) is (wrong is OrderPlaced)


@pytest.mark.parametrize("kind", [Request, Command, Query, StreamQuery])
def test_a_kind_of_request_is_not_bound(kind: Any) -> None:
    async def handle(message: Any) -> Any: ...

    with pytest.raises(BindError, match=f"{kind.__name__} is a kind of request; .* bind the classes derived from it"):
        RequestMap().bind(kind, handle)
