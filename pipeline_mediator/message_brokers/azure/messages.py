"""Messages of Service Bus as deliveries, and copies of them to be sent again."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from azure.servicebus.amqp import AmqpAnnotatedMessage, AmqpMessageBodyType, AmqpMessageHeader, AmqpMessageProperties

from pipeline_mediator.message_brokers.protocol import Delivery, Outgoing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from azure.servicebus import ServiceBusReceivedMessage

__all__ = ["SYSTEM", "addressee", "copy_of", "delivery_of", "outgoing_of", "reason_of"]

SYSTEM: Final = "servicebus"
"""`messaging.system` of the OpenTelemetry conventions."""

_ATTEMPTS: Final = "pipeline_mediator_attempts"
"""How often the message was handled before this copy of it was sent."""
_ID: Final = "pipeline_mediator_id"
"""The message's id. A copy has one of its own: an entity that detects duplicates accepts it otherwise, and drops it."""
_ONLY: Final = "pipeline_mediator_only"
"""The one subscription of a topic that a copy is for."""
_OURS: Final = frozenset({_ATTEMPTS, _ID, _ONLY})
_REASON: Final = "DeadLetterReason"
_DESCRIPTION: Final = "DeadLetterErrorDescription"
_PARTITION_KEY: Final = "x-opt-partition-key"
_SCHEDULED: Final = "x-opt-scheduled-enqueue-time"
_LONGEST_ID: Final = 128


def delivery_of(message: ServiceBusReceivedMessage, destination: str, subscription: str) -> Delivery:
    """The message as it is handed over; the client gives texts as bytes, so whatever is bytes is made text."""
    properties = _properties_of(message)
    own_id = properties.get(_ID)
    return Delivery(
        destination=destination,
        body=_body_of(message),
        content_type=_optional_text(message.content_type),
        headers={name: _text(value) for name, value in properties.items() if name not in _OURS},
        message_id=_optional_text(message.message_id) if own_id is None else _text(own_id) or None,
        key=_optional_text(message.session_id) or _optional_text(message.partition_key),
        attempt=_number(properties.get(_ATTEMPTS)) + (message.delivery_count or 0) + 1,
        subscription=subscription,
        system=SYSTEM,
    )


def addressee(message: ServiceBusReceivedMessage) -> str | None:
    """The only subscription that is to handle it; None for every one."""
    return _optional_text(_properties_of(message).get(_ONLY))


def reason_of(message: ServiceBusReceivedMessage) -> str:
    """Why it is a dead letter, as far as that is known."""
    reason, description = message.dead_letter_reason or "", message.dead_letter_error_description or ""
    if description.startswith(reason):
        return description
    return f"{reason}: {description}" if description else reason


def outgoing_of(delivery: Delivery) -> Outgoing:
    """What a sender wants to know of a copy."""
    return Outgoing(
        destination=delivery.destination,
        body=b"",
        content_type="",
        message_id=delivery.message_id or "without an id",
        name=f"a copy of {delivery.message_id}",
    )


def copy_of(
    message: ServiceBusReceivedMessage, *, attempts: int, only: str | None, not_before: datetime | None = None
) -> AmqpAnnotatedMessage:
    """The same message, to be sent to where it came from; `attempts` are those that count already."""
    raw = message.raw_amqp_message
    original: Any = raw.properties or AmqpMessageProperties()
    properties = {name: value for name, value in _properties_of(message).items() if name not in {_REASON, _DESCRIPTION}}
    kept = properties.get(_ID)
    own_id = (_optional_text(message.message_id) or "") if kept is None else _text(kept)
    # The client sends texts as texts only if they are `str`, and bytes that are no text not at all.
    properties = {name: _text(value) if isinstance(value, bytes) else value for name, value in properties.items()} | {
        _ATTEMPTS: attempts,
        _ID: own_id,
    }
    if only is not None:
        properties[_ONLY] = only
    annotations: dict[str, Any] = {}
    if not_before is not None:
        annotations[_SCHEDULED] = not_before
    if original.group_id is None and message.partition_key is not None:
        annotations[_PARTITION_KEY] = _text(message.partition_key)
    suffix = f"~{uuid4().hex[:16]}"
    return AmqpAnnotatedMessage(
        **_body_arguments(message),
        properties=AmqpMessageProperties(
            message_id=own_id[: _LONGEST_ID - len(suffix)] + suffix,
            user_id=original.user_id,
            to=_optional_text(original.to),
            subject=_optional_text(original.subject),
            reply_to=_optional_text(original.reply_to),
            correlation_id=_optional_text(original.correlation_id),
            content_type=_optional_text(original.content_type),
            content_encoding=_optional_text(original.content_encoding),
            creation_time=original.creation_time,
            group_id=_optional_text(original.group_id),
            reply_to_group_id=_optional_text(original.reply_to_group_id),
        ),
        header=AmqpMessageHeader(time_to_live=raw.header.time_to_live) if raw.header else None,
        application_properties=properties,
        annotations=annotations or None,
    )


def _body_arguments(message: ServiceBusReceivedMessage) -> dict[str, Any]:
    raw = message.raw_amqp_message
    if raw.body_type == AmqpMessageBodyType.VALUE:
        return {"value_body": _texts(raw.body)}
    if raw.body_type == AmqpMessageBodyType.SEQUENCE:
        return {"sequence_body": [_texts(section) for section in raw.body]}
    return {"data_body": [bytes(section) for section in raw.body]}


def _body_of(message: ServiceBusReceivedMessage) -> bytes:
    """Data as it is, a text or bytes in a value as well; anything else as JSON, so that a decoder can look at it."""
    raw = message.raw_amqp_message
    if raw.body_type == AmqpMessageBodyType.DATA:
        return b"".join(bytes(section) for section in raw.body)
    content: Any = raw.body
    if raw.body_type == AmqpMessageBodyType.SEQUENCE:
        content = [element for section in raw.body for element in section]
    if content is None:
        return b""
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else json.dumps(_plain(content)).encode()


def _plain(value: Any) -> Any:
    """What JSON has a form for."""
    inside: Any = value
    if isinstance(value, dict):
        return {_text(name): _plain(one) for name, one in inside.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in inside]
    return value if value is None or isinstance(value, bool | int | float) else _text(value)


def _texts(value: Any) -> Any:
    """Bytes that are a text as a text, at any depth: on the wire they were, and the client does not tell."""
    inside: Any = value
    if isinstance(value, dict):
        return {_texts(name): _texts(one) for name, one in inside.items()}
    if isinstance(value, list | tuple):
        return [_texts(one) for one in inside]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _properties_of(message: ServiceBusReceivedMessage) -> Mapping[str, Any]:
    return {_text(name): value for name, value in (message.application_properties or {}).items()}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
