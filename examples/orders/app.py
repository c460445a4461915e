"""Puts the service together from two environment variables: `uvicorn examples.orders.app:create_app --factory`."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from pipeline_mediator import Mediator
from pipeline_mediator.message_brokers import MemoryBroker, MessageBroker
from pipeline_mediator.outbox import OutboxRelay

from .database import create_engine, create_tables
from .mediator import create_mediator, create_pipeline
from .payments import SandboxPayments
from .web import create_web

__all__ = ["create_app", "create_for_relay"]


def create_app() -> Starlette:
    """ORDERS_DATABASE_URL (default: SQLite, orders.db) and ORDERS_REDIS_URL (default: a broker within the process)."""
    engine = _engine()
    mediator = _mediator(engine)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        try:
            await create_tables(engine)
            async with mediator, OutboxRelay(mediator):
                yield
        finally:
            await engine.dispose()

    return create_web(mediator, lifespan)


def create_for_relay() -> Mediator:
    """For a relay in a process of its own: `python -m pipeline_mediator relay examples.orders.app:create_for_relay`."""
    return _mediator(_engine())


def _engine() -> AsyncEngine:
    return create_engine(os.environ.get("ORDERS_DATABASE_URL", "sqlite+aiosqlite:///orders.db"))


def _mediator(engine: AsyncEngine) -> Mediator:
    return create_mediator(create_pipeline(engine, _broker()), SandboxPayments())


def _broker() -> MessageBroker:
    redis_url = os.environ.get("ORDERS_REDIS_URL")
    if not redis_url:
        return MemoryBroker()
    from pipeline_mediator.message_brokers import RedisStreamBroker  # where it is not used, it need not be installed

    return RedisStreamBroker(redis_url)
