"""Another service: packs what was ordered. Of the orders it knows nothing but what it is told."""

from typing import Literal

from sqlalchemy import String
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pipeline_mediator import Codec, EventMap, Mediator, Pipeline
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox, inbox_table
from pipeline_mediator.middlewares import (
    DeadLetterMiddleware,
    InboxMiddleware,
    LoggingMiddleware,
    MetricsMiddleware,
    RedeliveryMiddleware,
    RetryMiddleware,
    TimeoutMiddleware,
    TracingMiddleware,
    TransactionMiddleware,
)

from .messages import OrderCancelled, OrderPlaced

__all__ = ["Base", "Parcel", "ParcelNotPackedError", "create_warehouse", "create_warehouse_tables"]


class Base(DeclarativeBase):
    """Its tables stand beside those of the orders only so that the example needs one database."""


INBOX = inbox_table(Base.metadata, name="warehouse_inbox")
"""What was handled: a message that is delivered twice packs one parcel."""


class Parcel(Base):
    """What is packed for one order."""

    __tablename__ = "parcels"

    order_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    pieces: Mapped[int]
    status: Mapped[Literal["packed", "unpacked"]] = mapped_column(String(10), default="packed")


class ParcelNotPackedError(Exception):
    """A cancellation overtook its order: once the order was delivered, it can be carried out."""


events = EventMap()


@events.handler
async def pack(event: OrderPlaced, session: AsyncSession) -> None:
    """Pack a parcel."""
    session.add(Parcel(order_id=event.order_id, pieces=sum(line.quantity for line in event.lines)))


@events.handler
async def unpack(event: OrderCancelled, session: AsyncSession) -> None:
    """Put it back on the shelf. Raises `ParcelNotPackedError`, and the message comes again later."""
    parcel = await session.get(Parcel, event.order_id)
    if parcel is None:
        raise ParcelNotPackedError(f"there is no parcel for order {event.order_id}")
    parcel.status = "unpacked"


def create_warehouse(engine: AsyncEngine) -> Mediator:
    """The same kind of stack as the orders', for what comes from a broker."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    return Mediator(
        event_map=events,
        middlewares=Pipeline(
            # What a parcel has to do with the order that it is packed for shows in one trace.
            TracingMiddleware(continue_traces=True),
            MetricsMiddleware(),
            LoggingMiddleware(),
            DeadLetterMiddleware(),
            RedeliveryMiddleware(),
            RetryMiddleware(attempts=3, on=(ConnectionError, OperationalError)),
            TimeoutMiddleware(5.0),
            TransactionMiddleware(sessions.begin),
            InboxMiddleware(SQLAlchemyInbox(INBOX, engine)),
        ),
        codec=Codec(OrderPlaced, OrderCancelled, source="warehouse"),
    )


async def create_warehouse_tables(engine: AsyncEngine) -> None:
    """Create what is not there yet."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
