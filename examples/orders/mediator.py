"""The one pipeline that every order, query and event goes through."""

from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from pipeline_mediator import Codec, Mediator, Pipeline, StreamQuery
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import BrokerUnavailableError
from pipeline_mediator.message_brokers import MessageBroker
from pipeline_mediator.middlewares import (
    LoggingMiddleware,
    MetricsMiddleware,
    OutboxMiddleware,
    PublishMiddleware,
    RetryMiddleware,
    TimeoutMiddleware,
    TracingMiddleware,
    TransactionMiddleware,
    ValidationMiddleware,
)
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox

from .handlers import events, requests
from .messages import OrderCancelled, OrderPlaced, PlaceOrder
from .payments import Payments
from .tables import OUTBOX
from .validation import lines_are_sensible, reference_is_plain

__all__ = ["MAY_PASS", "create_mediator", "create_pipeline"]

MAY_PASS = (ConnectionError, OperationalError, BrokerUnavailableError)
"""Errors that another attempt may help against. A bug is not among them."""


def create_pipeline(engine: AsyncEngine, broker: MessageBroker) -> Pipeline:
    """Outermost first; each message walks what concerns it."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    return Pipeline(
        TracingMiddleware(),
        MetricsMiddleware(),
        LoggingMiddleware(),
        ValidationMiddleware({PlaceOrder: [reference_is_plain, lines_are_sensible]}),
        RetryMiddleware(attempts=3, on=MAY_PASS),
        TimeoutMiddleware({StreamQuery: 60.0}, default=5.0),
        TransactionMiddleware(sessions.begin),
        # `notify` wakes relays in other processes at once; it is PostgreSQL's, and nothing elsewhere.
        OutboxMiddleware(SQLAlchemyOutbox(engine, OUTBOX, notify=True)),
        PublishMiddleware(broker, {OrderPlaced: "orders", OrderCancelled: "orders"}),
    )


def create_mediator(pipeline: Pipeline, payments: Payments) -> Mediator:
    """The handlers behind the pipeline."""
    return Mediator(
        requests,
        PlainContainer(payments),
        event_map=events,
        middlewares=pipeline,
        codec=Codec(source="orders"),
    )
