"""Puts the services together, from environment variables: all in one process, or three that may be killed one by one.

ORDERS_DATABASE_URL (default: SQLite, orders.db); ORDERS_REDIS_URL (default: a broker within the web service, which then
does what the relay and the warehouse would do); ORDERS_TRACES (a folder for spans, see tracing.py).
"""

import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from pipeline_mediator import Consumer, Mediator
from pipeline_mediator.message_brokers import MemoryBroker, MessageBroker, Subscription
from pipeline_mediator.outbox import OutboxRelay

from .database import create_engine, create_tables
from .mediator import create_mediator, create_pipeline
from .payments import SandboxPayments
from .tracing import trace_if_told
from .warehouse import create_warehouse, create_warehouse_tables
from .web import create_web

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers import RedisStreamBroker

__all__ = ["create_app", "create_consumer", "create_for_relay"]


def create_app() -> Starlette:
    """The web service: `uvicorn examples.orders.app:create_app --factory`."""
    trace_if_told("web")
    engine = _engine()
    broker = _broker()
    mediator = _mediator(engine, broker)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(engine.dispose)
            await create_tables(engine)
            await stack.enter_async_context(mediator)
            if isinstance(broker, MemoryBroker):
                await stack.enter_async_context(await _consumer(engine, broker))
                await stack.enter_async_context(OutboxRelay(mediator))
            yield

    return create_web(mediator, lifespan)


@asynccontextmanager
async def create_for_relay() -> AsyncGenerator[OutboxRelay]:
    """Publishes what was committed: `pipeline-mediator relay examples.orders.app:create_for_relay`."""
    trace_if_told("relay")
    engine = _engine()
    try:
        yield OutboxRelay(_mediator(engine, _broker()))
    finally:
        await engine.dispose()


@asynccontextmanager
async def create_consumer() -> AsyncGenerator[Consumer]:
    """The warehouse: `pipeline-mediator consume examples.orders.app:create_consumer`."""
    trace_if_told("warehouse")
    engine = _engine()
    try:
        yield await _consumer(engine, _broker())
    finally:
        await engine.dispose()


async def _consumer(engine: AsyncEngine, broker: "MemoryBroker | RedisStreamBroker") -> Consumer:
    await create_warehouse_tables(engine)
    if isinstance(broker, MemoryBroker):
        subscription: Subscription = broker.subscribe("orders", name="warehouse")
    else:
        # What is cancelled was placed before: one warehouse at a time, a second one stands by.
        subscription = broker.subscribe("orders", name="warehouse", ordered=True, min_idle=10.0)
    # On SQLite one transaction writes at a time.
    concurrency = 1 if engine.dialect.name == "sqlite" else 16
    return Consumer(create_warehouse(engine), subscription, concurrency=concurrency)


def _engine() -> AsyncEngine:
    return create_engine(os.environ.get("ORDERS_DATABASE_URL", "sqlite+aiosqlite:///orders.db"))


def _mediator(engine: AsyncEngine, broker: MessageBroker) -> Mediator:
    return create_mediator(create_pipeline(engine, broker), SandboxPayments())


def _broker() -> "MemoryBroker | RedisStreamBroker":
    redis_url = os.environ.get("ORDERS_REDIS_URL")
    if not redis_url:
        return MemoryBroker()
    from pipeline_mediator.message_brokers import RedisStreamBroker  # where it is not used, it need not be installed

    return RedisStreamBroker(redis_url)
