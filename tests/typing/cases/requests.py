"""What `send` returns and what `RequestMap.bind` takes, for every library that a message may be written with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import attrs
import msgspec
import pydantic

from pipeline_mediator import Command, Context, Mediator, Query, Request, RequestHandler, RequestMap, StreamQuery


@dataclass(frozen=True, slots=True)
class PlaceOrder(Command[int]):
    sku: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenameOrder(Command[str]):
    order_id: int
    name: str = "unnamed"


@dataclass
class DeleteOrder(Command):
    order_id: int


@dataclass(frozen=True, kw_only=True)
class FromDiator(Request):
    meeting_id: int


@dataclass(frozen=True)
class ListOrders(Query[list[int]]):
    limit: int


@dataclass(frozen=True)
class FindOrder(Query[int | None]):
    sku: str


@dataclass(frozen=True)
class ExportOrders(StreamQuery[str]):
    prefix: str


class PydanticOrder(pydantic.BaseModel, Command[int], frozen=True):
    sku: str


class MsgspecOrder(msgspec.Struct, Command[int], frozen=True):
    sku: str


@attrs.frozen
class AttrsOrder(Command[int]):
    sku: str


# -- send --------------------------------------------------------------------------------------------------------------


async def results(mediator: Mediator, context: Context) -> Sequence[int]:
    assert_type(await mediator.send(PlaceOrder("book")), int)
    assert_type(await mediator.send(RenameOrder(order_id=1)), str)
    assert_type(await mediator.send(DeleteOrder(1)), None)
    assert_type(await mediator.send(FromDiator(meeting_id=1)), Any)
    assert_type(await mediator.send(FindOrder("book")), int | None)
    assert_type(await mediator.send(PydanticOrder(sku="book")), int)
    assert_type(await mediator.send(MsgspecOrder("book")), int)
    assert_type(await mediator.send(AttrsOrder("book")), int)
    assert_type(await mediator.send(PlaceOrder("book"), headers={"tenant": "acme"}, correlation_id="1"), int)
    assert_type(await context.send(PlaceOrder("book")), int)
    # Where a wider type is asked for, it is not taken for the request's own.
    wider: int | None = await mediator.send(PlaceOrder("book"))
    anything: object = await mediator.send(PlaceOrder("book"))
    print(wider, anything, await mediator.send(PlaceOrder("book")))
    number, numbers = await asyncio.gather(mediator.send(PlaceOrder("book")), mediator.send(ListOrders(10)))
    assert_type(number, int)
    assert_type(numbers, list[int])
    return await mediator.send(ListOrders(10))


async def refused_results(mediator: Mediator) -> None:
    text: str = await mediator.send(PlaceOrder("book"))  # expect-error
    await mediator.send("book")  # expect-error
    await mediator.send(PlaceOrder)  # expect-error
    await mediator.send(ExportOrders("a"))  # expect-error
    await mediator.send(PlaceOrder("book"), headers={"tenant": 1})  # expect-error
    PlaceOrder(1)  # expect-error
    print(text)


# -- bind --------------------------------------------------------------------------------------------------------------


class Repository: ...


class PlaceOrderHandler:
    def __init__(self, repository: Repository) -> None: ...

    async def handle(self, command: PlaceOrder, context: Context) -> int:
        return 1


class WithoutContext:
    async def handle(self, any_name: PlaceOrder) -> int:
        return 1


class Synchronous:
    def handle(self, command: PlaceOrder) -> int:
        return 1


class Narrower:
    async def handle(self, command: PlaceOrder) -> bool:
        return True


class Derived(RequestHandler[PlaceOrder, int]):
    async def handle(self, request: PlaceOrder) -> int:
        return 1


class DeleteOrderHandler:
    async def handle(self, command: DeleteOrder) -> None: ...


class FromDiatorHandler(RequestHandler[FromDiator, None]):
    async def handle(self, request: FromDiator) -> None: ...


class FindOrderHandler:
    async def handle(self, query: FindOrder) -> int | None: ...


class ExportOrdersHandler:
    async def handle(self, query: ExportOrders, context: Context) -> AsyncIterator[str]:
        yield ""


class WrongResult:
    async def handle(self, command: PlaceOrder) -> str:
        return ""


class WrongMessage:
    async def handle(self, command: RenameOrder) -> int:
        return 1


class DerivedWrongResult(RequestHandler[PlaceOrder, str]):
    async def handle(self, request: PlaceOrder) -> str:
        return ""


class WrongItems:
    async def handle(self, query: ExportOrders) -> AsyncIterator[int]:
        yield 1


class NoHandle:
    async def run(self, command: PlaceOrder) -> int:
        return 1


async def place(command: PlaceOrder, repository: Repository, context: Context) -> int:
    return 1


def place_in_a_thread(command: PlaceOrder) -> int:
    return 1


async def place_any(command: Command[Any]) -> int:
    return 1


async def place_pydantic(command: PydanticOrder) -> int:
    return 1


async def place_msgspec(command: MsgspecOrder) -> int:
    return 1


async def place_attrs(command: AttrsOrder, context: Context) -> int:
    return 1


async def export(query: ExportOrders) -> AsyncIterator[str]:
    yield ""


async def wrong_result(command: PlaceOrder) -> str:
    return ""


async def wrong_message(command: RenameOrder) -> int:
    return 1


requests = RequestMap()
requests.bind(PlaceOrder, PlaceOrderHandler).bind(PlaceOrder, PlaceOrderHandler(Repository()))
requests.bind(PlaceOrder, WithoutContext).bind(PlaceOrder, Synchronous).bind(PlaceOrder, Synchronous())
requests.bind(PlaceOrder, Narrower).bind(PlaceOrder, Derived).bind(PlaceOrder, Derived())
requests.bind(PlaceOrder, place).bind(PlaceOrder, place_in_a_thread).bind(PlaceOrder, place_any)
requests.bind(PydanticOrder, place_pydantic).bind(MsgspecOrder, place_msgspec).bind(AttrsOrder, place_attrs)
requests.bind(DeleteOrder, DeleteOrderHandler).bind(FromDiator, FromDiatorHandler).bind(FindOrder, FindOrderHandler)
requests.bind(ExportOrders, ExportOrdersHandler).bind(ExportOrders, ExportOrdersHandler()).bind(ExportOrders, export)
assert_type(requests.bind(PlaceOrder, place), RequestMap)

requests.bind(PlaceOrder, WrongResult)  # expect-error
requests.bind(PlaceOrder, WrongResult())  # expect-error
requests.bind(PlaceOrder, WrongMessage)  # expect-error
requests.bind(PlaceOrder, WrongMessage())  # expect-error
requests.bind(PlaceOrder, DerivedWrongResult)  # expect-error
requests.bind(PlaceOrder, NoHandle)  # expect-error
requests.bind(PlaceOrder, wrong_result)  # expect-error
requests.bind(PlaceOrder, wrong_message)  # expect-error
requests.bind(PydanticOrder, place_msgspec)  # expect-error
requests.bind(MsgspecOrder, place_attrs)  # expect-error
requests.bind(AttrsOrder, place_pydantic)  # expect-error
requests.bind(DeleteOrder, place)  # expect-error
requests.bind(ExportOrders, Synchronous)  # expect-error
requests.bind(ExportOrders, WrongItems)  # expect-error
requests.bind(PlaceOrder, export)  # expect-error
requests.bind(Repository, place)  # expect-error


# -- @map.handler ------------------------------------------------------------------------------------------------------


@requests.handler
async def decorated(command: PlaceOrder, repository: Repository) -> int:
    return 1


async def a_decorated_function_keeps_its_type() -> None:
    assert_type(await decorated(PlaceOrder("book"), Repository()), int)
    await decorated("book", Repository())  # expect-error
