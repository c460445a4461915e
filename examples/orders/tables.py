"""The tables, and the rules that hold for a single row."""

from datetime import datetime
from typing import Literal

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, String, UniqueConstraint, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pipeline_mediator.outbox.sqlalchemy import outbox_tables

from .errors import AlreadyCancelledError, CreditExceededError, OutOfStockError

__all__ = ["OUTBOX", "Base", "Customer", "Order", "OrderLine", "Product", "Reorder"]


class Base(DeclarativeBase):
    """Its metadata is what migrations look at."""


OUTBOX = outbox_tables(Base.metadata)
"""What other systems are to be told, until they were; `create_all` and migrations see it with the rest."""


class Customer(Base):
    """Who orders, on credit up to a limit."""

    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    credit_limit_cents: Mapped[int] = mapped_column(BigInteger)
    owed_cents: Mapped[int] = mapped_column(BigInteger, default=0)

    def owe(self, cents: int) -> None:
        """Add to what the customer owes. Raises `CreditExceededError` above the limit."""
        if self.owed_cents + cents > self.credit_limit_cents:
            left = self.credit_limit_cents - self.owed_cents
            raise CreditExceededError(f"the order is {cents} cents, and the credit left is {left} cents")
        self.owed_cents += cents


class Product(Base):
    """What there is to order, and how many are left."""

    __tablename__ = "products"
    __table_args__ = (CheckConstraint("available >= 0"),)

    sku: Mapped[str] = mapped_column(String(40), primary_key=True)
    price_cents: Mapped[int]
    available: Mapped[int]
    reorder_level: Mapped[int]

    def take(self, quantity: int) -> bool:
        """Take from the stock; True if that brought it to its reorder level. Raises `OutOfStockError`."""
        before, after = self.available, self.available - quantity
        if after < 0:
            raise OutOfStockError(f"{quantity} of {self.sku} are wanted, {before} are left")
        self.available = after
        return after <= self.reorder_level < before


class Order(Base):
    """An order as it was accepted."""

    __tablename__ = "orders"
    __table_args__ = (UniqueConstraint("customer_id", "reference"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey("customers.id"))
    reference: Mapped[str] = mapped_column(String(40))
    status: Mapped[Literal["placed", "cancelled"]] = mapped_column(String(10), default="placed")
    total_cents: Mapped[int] = mapped_column(BigInteger)
    authorisation: Mapped[str | None] = mapped_column(String(100))
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    lines: Mapped[list["OrderLine"]] = relationship(order_by="OrderLine.sku")

    def cancel(self) -> None:
        """Raises `AlreadyCancelledError`."""
        if self.status == "cancelled":
            raise AlreadyCancelledError(f"order {self.id} is already cancelled")
        self.status = "cancelled"


class OrderLine(Base):
    """One product of an order, at the price of that day."""

    __tablename__ = "order_lines"

    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("products.sku"), primary_key=True)
    quantity: Mapped[int]
    price_cents: Mapped[int]


class Reorder(Base):
    """A request to the supplier, written in the transaction of the order that made it necessary."""

    __tablename__ = "reorders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("products.sku"))
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
