"""What is measured: the rows of the report, and what this library wants to reach in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["BASELINE", "BUILT_IN", "CASES", "LIMITS", "STARTUP", "Case", "Limit"]


@dataclass(frozen=True, slots=True)
class Case:
    """One row. An adapter that has a method of this name takes part in it."""

    name: str
    title: str
    what: str


CASES: Final = (
    Case("send", "send", "a request to its one handler"),
    Case("send_context", "send, context", "a request to its one handler, which takes the context as well"),
    Case("send_new", "send, new message", "a request to its one handler, and every message is made inside the loop"),
    Case("functions", "5 functions", "through five middlewares that only pass on, written as functions"),
    Case("objects", "5 objects", "through five middlewares that only pass on, written as objects"),
    Case("emit_1", "emit to 1", "an event to one handler"),
    Case("emit_10", "emit to 10", "an event to ten handlers, one after the other where the library can"),
    Case("scope", "scope per send", "a request to a handler with a dependency that lives as long as the message"),
    Case(
        "scope_alone", "container alone", "what the container takes for that: scope opened, handler got, scope closed"
    ),
)

BASELINE: Final = "passed_on"
"""The row that the built-in middlewares are put into; what they add is told by the difference to it."""

BUILT_IN: Final = (
    Case(BASELINE, "one pass-through function", "what the others are added to"),
    Case("another", "a second pass-through", "the least that a middleware can cost"),
    Case("retry", "Retry", "RetryMiddleware(attempts=3), nothing fails"),
    Case("timeout", "Timeout, unset", "TimeoutMiddleware()"),
    Case("logging", "Logging, level off", "LoggingMiddleware() on a logger that is not enabled for it"),
    Case("tracing", "Tracing, no provider", "TracingMiddleware() without a tracer provider"),
    Case("metrics", "Metrics, no provider", "MetricsMiddleware() without a meter provider"),
    Case("validation", "Validation", "ValidationMiddleware with one validator that accepts"),
    Case("transaction", "Transaction", "TransactionMiddleware on a unit of work that does nothing"),
    Case("all", "all seven", "all of them together"),
)

STARTUP: Final = "startup"
"""Name of the row that is measured in fresh processes."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What this library wants to reach in one row."""

    case: str
    at_most: float
    unit: str
    """`x`: times a bare call. `ns`: added to the row `beside`. `ms`: added to importing asyncio."""
    beside: str = ""
    setup: str = "class"


LIMITS: Final = (
    Limit("send", 3.5, "x"),
    Limit("send_context", 5.5, "x"),
    Limit("functions", 10.5, "x"),
    Limit("objects", 11.0, "x"),
    Limit("emit_1", 3.5, "x"),
    Limit("emit_10", 17.0, "x"),
    Limit("scope", 600, "ns", "scope_alone", "rodi"),
    Limit("retry", 300, "ns", BASELINE, "built-in"),
    Limit("timeout", 300, "ns", BASELINE, "built-in"),
    Limit("logging", 300, "ns", BASELINE, "built-in"),
    Limit("tracing", 300, "ns", BASELINE, "built-in"),
    Limit(STARTUP, 15, "ms"),
)
