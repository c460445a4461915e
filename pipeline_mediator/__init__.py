"""An async CQRS mediator with one ordered chain of middlewares for send, emit, publish and consume."""

from typing import TYPE_CHECKING

__all__ = [
    "Codec",
    "Command",
    "Consumer",
    "Context",
    "DomainEvent",
    "ECSTEvent",
    "Event",
    "EventEmitter",
    "EventHandler",
    "EventMap",
    "IntegrationEvent",
    "Mediator",
    "MediatorError",
    "Middleware",
    "Next",
    "NotificationEvent",
    "PermanentError",
    "Pipeline",
    "Query",
    "Request",
    "RequestHandler",
    "RequestMap",
    "Route",
    "Stream",
    "StreamQuery",
    "message",
    "only",
    "unless",
]

if TYPE_CHECKING:
    from pipeline_mediator.codec import Codec
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.errors import MediatorError, PermanentError
    from pipeline_mediator.events import (
        DomainEvent,
        ECSTEvent,
        Event,
        EventEmitter,
        EventHandler,
        EventMap,
        IntegrationEvent,
        NotificationEvent,
    )
    from pipeline_mediator.mediator import Mediator, Stream
    from pipeline_mediator.messages import message
    from pipeline_mediator.pipeline import Middleware, Next, Pipeline, only, unless
    from pipeline_mediator.requests import Command, Query, Request, RequestHandler, RequestMap, StreamQuery
else:
    from pipeline_mediator.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "codec": ("Codec",),
            "consumer": ("Consumer",),
            "context": ("Context", "Route"),
            "errors": ("MediatorError", "PermanentError"),
            "events": (
                "DomainEvent",
                "ECSTEvent",
                "Event",
                "EventEmitter",
                "EventHandler",
                "EventMap",
                "IntegrationEvent",
                "NotificationEvent",
            ),
            "mediator": ("Mediator", "Stream"),
            "messages": ("message",),
            "pipeline": ("Middleware", "Next", "Pipeline", "only", "unless"),
            "requests": ("Command", "Query", "Request", "RequestHandler", "RequestMap", "StreamQuery"),
        },
    )
