"""What the service can be asked, and what it tells others. Money is in cents."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from pipeline_mediator import Command, DomainEvent, IntegrationEvent, Query, StreamQuery, message

__all__ = [
    "CancelOrder",
    "ExportOrders",
    "ExportedOrder",
    "GetOrder",
    "Line",
    "OrderCancelled",
    "OrderPlaced",
    "OrderView",
    "PlaceOrder",
    "Receipt",
    "StockRanLow",
]

Id = Annotated[int, Meta(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class Line:
    """So many of one product."""

    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to PlaceOrder."""

    order_id: int
    total_cents: int


@dataclass(frozen=True, slots=True)
class PlaceOrder(Command[Receipt]):
    """Take the products from stock and have their price authorised; all of it, or nothing."""

    customer_id: Id
    reference: str
    """The customer's own number for this order; sent a second time, it is refused."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class CancelOrder(Command):
    """Put the products back and lift the customer's debt."""

    order_id: Id


@dataclass(frozen=True, slots=True)
class OrderView:
    """The answer to GetOrder."""

    order_id: int
    customer_id: int
    reference: str
    status: str
    total_cents: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class GetOrder(Query[OrderView]):
    """One order with its lines."""

    order_id: Id


@dataclass(frozen=True, slots=True)
class ExportedOrder:
    """One row of the export."""

    order_id: int
    customer_id: int
    reference: str
    status: str
    total_cents: int


@dataclass(frozen=True, slots=True)
class ExportOrders(StreamQuery[ExportedOrder]):
    """Every order, row by row, oldest first."""


@dataclass(frozen=True, slots=True)
class StockRanLow(DomainEvent):
    """What is left of a product reached its reorder level."""

    sku: str
    order_id: int
    """The order that took the stock below the level."""


@message("orders.placed", key="order_id")
@dataclass(frozen=True, slots=True)
class OrderPlaced(IntegrationEvent):
    """Told to other systems once the order is committed."""

    order_id: int
    customer_id: int
    total_cents: int
    lines: tuple[Line, ...]


@message("orders.cancelled", key="order_id")
@dataclass(frozen=True, slots=True)
class OrderCancelled(IntegrationEvent):
    """Told to other systems once the cancellation is committed."""

    order_id: int
    total_cents: int
