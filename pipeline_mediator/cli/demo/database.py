"""The demo's tables: in a database that has none of that name, and gone when it ends."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, inspect, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncSession

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.errors import MissingExtraError
from pipeline_mediator.examples.orders.database import create_engine, create_tables
from pipeline_mediator.examples.orders.tables import OUTBOX, Base, Customer, Order, OrderLine, Product, Reorder
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Contents", "open_engine", "own_tables", "read_contents", "unpublished", "until_published"]

SECONDS = 10.0
"""How long the database may take to answer, and the relay to publish one message more."""

LOOK = 0.05
"""Seconds from one look into the outbox to the next."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in the database."""

    placed: dict[int, int]
    """Cents by order, cancelled ones too."""
    known: dict[str, int]
    """Orders by their payment key."""
    cancelled: dict[int, int]
    in_lines: int
    """Cents of all order lines together."""
    owed: int
    """Cents that all customers owe together."""
    available: int
    """Products in stock."""
    reorders: int


def open_engine(url: str) -> AsyncEngine:
    """The application's engine. Raises `CommandError` for a URL that leads nowhere."""
    try:
        return create_engine(url)
    except ModuleNotFoundError as error:
        extra = {"asyncpg": "postgresql"}.get(error.name or "")
        if extra is None:
            raise CommandError(
                f"the database URL asks for the driver {error.name}, which is not installed. Install it, or name "
                "another, as in postgresql+asyncpg://"
            ) from error
        raise MissingExtraError(f"a database at {make_url(url).drivername}://", str(error.name), extra) from error
    except NoSuchModuleError as error:
        raise CommandError(f"the database URL names no database that SQLAlchemy knows: {error}") from error
    except InvalidRequestError as error:
        raise CommandError(f"the database URL needs an async driver, such as postgresql+asyncpg://: {error}") from error
    except ArgumentError:
        # Its text quotes the URL, password included.
        raise CommandError(
            "this is no database URL. It looks like postgresql+asyncpg://<user>:<password>@<host>:<port>/<database>"
        ) from None


@asynccontextmanager
async def own_tables(engine: AsyncEngine, orders: int) -> AsyncGenerator[None]:
    """The application's tables with a stock that `orders` orders will nearly empty; dropped at the end.

    Raises `CommandError` if the database cannot be used, or already has a table of one of these names.
    """
    with _explained(engine):
        async with asyncio.timeout(SECONDS), engine.connect() as connection:
            taken = await connection.run_sync(_taken)
        if taken:
            raise CommandError(
                f"{_place(engine)} already has tables of these names: {', '.join(taken)}. The demo does not touch what "
                "is not its own: give it an empty database."
            )
    try:
        with _explained(engine):
            await create_tables(engine)
            await _supply(engine, orders)
        yield
    finally:
        with _explained(engine):
            async with asyncio.timeout(SECONDS), engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)


async def _supply(engine: AsyncEngine, orders: int) -> None:
    cheap = Product.sku.in_(["book", "lamp", "paper", "pen"])
    rich = Customer.name.in_(["Ada", "Grace", "Edsger"])
    async with engine.begin() as connection:
        await connection.execute(update(Product).where(cheap).values(available=Product.reorder_level + orders * 2 // 3))
        await connection.execute(update(Customer).where(rich).values(credit_limit_cents=100_000 * orders))


async def read_contents(engine: AsyncEngine) -> Contents:
    """Count, in one transaction, apart from the application."""
    with _explained(engine):
        async with asyncio.timeout(SECONDS), AsyncSession(engine) as session:
            columns = select(Order.id, Order.customer_id, Order.reference, Order.total_cents, Order.status)
            orders = (await session.execute(columns)).all()

            async def total(expression: Any) -> int:
                return int(await session.scalar(select(func.coalesce(func.sum(expression), 0))) or 0)

            return Contents(
                placed={order.id: order.total_cents for order in orders},
                known={f"{order.customer_id}/{order.reference}": order.id for order in orders},
                cancelled={order.id: order.total_cents for order in orders if order.status == "cancelled"},
                in_lines=await total(OrderLine.quantity * OrderLine.price_cents),
                owed=await total(Customer.owed_cents),
                available=await total(Product.available),
                reorders=await session.scalar(select(func.count(Reorder.id))) or 0,
            )


async def unpublished(engine: AsyncEngine) -> int:
    """How many messages are in the outbox."""
    with _explained(engine):
        async with asyncio.timeout(SECONDS):
            return (await SQLAlchemyOutbox(engine, OUTBOX).health()).pending


async def until_published(engine: AsyncEngine) -> None:
    """Wait until a relay has emptied the outbox. Raises `CommandError` if it gets no further."""
    fewest = await unpublished(engine)
    stuck_at = monotonic() + SECONDS
    while left := await unpublished(engine):
        if left < fewest:
            fewest, stuck_at = left, monotonic() + SECONDS
        if monotonic() > stuck_at:
            raise CommandError(f"the relay gets no further: {left} messages are still in the outbox")
        await asyncio.sleep(LOOK)


def _taken(connection: Connection) -> list[str]:
    return sorted(Base.metadata.tables.keys() & set(inspect(connection).get_table_names()))


@contextmanager
def _explained(engine: AsyncEngine) -> Generator[None]:
    """Whatever a driver raises here, the database cannot be used; each driver has exceptions of its own for that."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = getattr(error, "orig", None) or error
        first_line = (str(reason) or type(reason).__name__).splitlines()[0]
        raise CommandError(f"{_place(engine)} cannot be used: {first_line}") from error


def _place(engine: AsyncEngine) -> str:
    return f"the database at {engine.url.render_as_string(hide_password=True)}"
