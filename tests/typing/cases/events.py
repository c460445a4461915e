"""What `EventMap.bind` takes, and what may be emitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_type

import attrs
import msgspec
import pydantic

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    ECSTEvent,
    Event,
    EventHandler,
    EventMap,
    IntegrationEvent,
    Mediator,
    NotificationEvent,
    message,
)


@dataclass(frozen=True)
class StockRanLow(DomainEvent):
    sku: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceChanged(DomainEvent):
    sku: str


class OrderPlaced(pydantic.BaseModel, IntegrationEvent, frozen=True):
    order_id: int


class OrderShipped(msgspec.Struct, NotificationEvent, frozen=True):
    order_id: int


@message("orders.state", version=2, key="order_id")
@attrs.frozen
class OrderState(ECSTEvent):
    order_id: int


class OnStockRanLow:
    async def handle(self, event: StockRanLow) -> None: ...


class WithContext:
    async def handle(self, event: StockRanLow, context: Context) -> None: ...


class OnAnyEvent(EventHandler[Event]):
    def __init__(self, connections: int) -> None: ...

    async def handle(self, any_name: Event) -> None: ...


class OnEitherEvent:
    async def handle(self, event: StockRanLow | PriceChanged) -> None: ...


class NoHandle:
    async def run(self, event: StockRanLow) -> None: ...


async def on_price(event: PriceChanged, context: Context) -> None: ...
def on_any(event: Event) -> None: ...
async def on_placed(event: OrderPlaced, connections: int) -> None: ...
async def on_shipped(event: OrderShipped) -> None: ...
async def on_state(event: OrderState) -> None: ...
async def on_integration(event: IntegrationEvent) -> None: ...


events = EventMap()
events.bind(StockRanLow, OnStockRanLow, WithContext, OnAnyEvent, OnAnyEvent(1), OnEitherEvent, on_any)
events.bind(PriceChanged, on_price).bind(Event, on_any, OnAnyEvent).bind(OrderPlaced, on_placed, on_integration)
events.bind(OrderShipped, on_shipped).bind(OrderState, on_state).bind(IntegrationEvent, on_integration)
events.bind(OrderPlaced, on_placed, at="emit", fan_out="concurrent", scope_per_handler=True)
assert_type(events.bind(StockRanLow, OnStockRanLow), EventMap)

events.bind(PriceChanged, OnStockRanLow)  # expect-error
events.bind(PriceChanged, OnStockRanLow())  # expect-error
events.bind(StockRanLow, on_price)  # expect-error
events.bind(StockRanLow, OnAnyEvent, on_price)  # expect-error
events.bind(Event, OnStockRanLow)  # expect-error
events.bind(StockRanLow, NoHandle)  # expect-error
events.bind(IntegrationEvent, on_placed)  # expect-error
events.bind(OrderShipped, on_placed)  # expect-error
events.bind(OrderPlaced, on_placed, at="commit")  # expect-error
events.bind(OrderPlaced, on_placed, fan_out="parallel")  # expect-error


@events.handler
async def decorated(event: StockRanLow) -> None: ...


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    sku: str


async def emitting(mediator: Mediator, context: Context) -> None:
    await mediator.emit(StockRanLow("book"))
    await mediator.emit(OrderPlaced(order_id=1), key="1", headers={"tenant": "acme"})
    context.emit(OrderState(1), key="1")
    context.emit(OrderShipped(1))
    assert_type(context.events, list[Event])
    await decorated(StockRanLow("book"))

    await mediator.emit(PlaceOrder("book"))  # expect-error
    await mediator.emit(StockRanLow)  # expect-error
    await mediator.send(StockRanLow("book"))  # expect-error
    context.emit("book")  # expect-error
    context.emit(OrderShipped(1), key=1)  # expect-error
    await decorated(PriceChanged(sku="book"))  # expect-error
