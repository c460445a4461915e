"""What Tracing, Metrics and Logging have in common: OpenTelemetry's names for messaging, and what a failure is called.

https://github.com/open-telemetry/semantic-conventions, docs/messaging, v1.44.0; of these only `error.type` is stable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline_mediator.context import Route

__all__ = [
    "BATCH_MESSAGE_COUNT",
    "CANCELLED",
    "CONVERSATION_ID",
    "ERROR_TYPE",
    "MESSAGE_ID",
    "OPERATION_NAME",
    "OPERATION_TYPE",
    "SCHEMA_URL",
    "SCOPE",
    "SYSTEM",
    "attributes_of",
    "delivery_attributes",
    "error_type",
    "library_version",
    "plain_facts",
    "span_name",
]

SCOPE: Final = "pipeline_mediator"
"""Name of the instrumentation scope, `messaging.system` of what stays in the process, and prefix of our own names."""

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

SYSTEM: Final = "messaging.system"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
DESTINATION: Final = "messaging.destination.name"
CONSUMER_GROUP: Final = "messaging.consumer.group.name"
MESSAGE_ID: Final = "messaging.message.id"
CONVERSATION_ID: Final = "messaging.message.conversation_id"
BATCH_MESSAGE_COUNT: Final = "messaging.batch.message_count"
ERROR_TYPE: Final = "error.type"
MESSAGE_TYPE: Final = f"{SCOPE}.message_type"

CANCELLED: Final = "cancelled"


def attributes_of(route: Route) -> dict[str, str]:
    """What is known about a message's operation before there is a message: to send it away, or to process it."""
    operation = "process" if route.destination is None else "send"
    return {
        SYSTEM: SCOPE,
        OPERATION_NAME: operation,
        OPERATION_TYPE: operation,
        DESTINATION: route.destination or route.message_type.__name__,
        MESSAGE_TYPE: route.message_type.__name__,
    }


def delivery_attributes(delivery: Any) -> dict[str, str]:
    """What only the delivery tells: where it was waiting, and for whom."""
    known = {
        SYSTEM: getattr(delivery, "system", None),
        DESTINATION: getattr(delivery, "destination", None),
        CONSUMER_GROUP: getattr(delivery, "subscription", None),
    }
    return {name: value for name, value in known.items() if value}


def span_name(attributes: Mapping[str, str]) -> str:
    """Such as "process PlaceOrder" or "send shop.orders"."""
    return f"{attributes[OPERATION_NAME]} {attributes[DESTINATION]}"


def error_type(error: BaseException) -> str:
    """The full name of its class; for what is no `Exception` "cancelled", on asyncio and trio alike."""
    if not isinstance(error, Exception):
        return CANCELLED
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def plain_facts(facts: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """The facts of a note as text and numbers; of any other object only its type's name, for it may be the payload."""
    return {name: _plain(value) for name, value in facts.items()}


def _plain(value: object) -> str | bool | int | float:
    if isinstance(value, str | bool | int | float):
        return value
    return value.__name__ if isinstance(value, type) else type(value).__name__


def library_version() -> str | None:
    """The installed version of this library; None in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pipeline-mediator")
    except PackageNotFoundError:
        return None
