"""The built-in middlewares, one per file; each is imported when it is first asked for."""

from typing import TYPE_CHECKING

__all__ = [
    "DeadLetterMiddleware",
    "HandleMiddleware",
    "InboxMiddleware",
    "LoggingMiddleware",
    "MetricsMiddleware",
    "OutboxMiddleware",
    "PublishMiddleware",
    "RedeliveryMiddleware",
    "RetryMiddleware",
    "TimeoutMiddleware",
    "TracingMiddleware",
    "TransactionMiddleware",
    "ValidationMiddleware",
]

if TYPE_CHECKING:
    from pipeline_mediator.middlewares.dead_letter import DeadLetterMiddleware
    from pipeline_mediator.middlewares.handle import HandleMiddleware
    from pipeline_mediator.middlewares.inbox import InboxMiddleware
    from pipeline_mediator.middlewares.logging import LoggingMiddleware
    from pipeline_mediator.middlewares.metrics import MetricsMiddleware
    from pipeline_mediator.middlewares.outbox import OutboxMiddleware
    from pipeline_mediator.middlewares.publish import PublishMiddleware
    from pipeline_mediator.middlewares.redelivery import RedeliveryMiddleware
    from pipeline_mediator.middlewares.retry import RetryMiddleware
    from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
    from pipeline_mediator.middlewares.tracing import TracingMiddleware
    from pipeline_mediator.middlewares.transaction import TransactionMiddleware
    from pipeline_mediator.middlewares.validation import ValidationMiddleware
else:
    from pipeline_mediator.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "dead_letter": ("DeadLetterMiddleware",),
            "handle": ("HandleMiddleware",),
            "inbox": ("InboxMiddleware",),
            "logging": ("LoggingMiddleware",),
            "metrics": ("MetricsMiddleware",),
            "outbox": ("OutboxMiddleware",),
            "publish": ("PublishMiddleware",),
            "redelivery": ("RedeliveryMiddleware",),
            "retry": ("RetryMiddleware",),
            "timeout": ("TimeoutMiddleware",),
            "tracing": ("TracingMiddleware",),
            "transaction": ("TransactionMiddleware",),
            "validation": ("ValidationMiddleware",),
        },
    )
