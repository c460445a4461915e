"""CloudEvents 1.0 around a JSON payload: structured (all in the body) or binary (attributes beside the body).

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md, with its JSON format and its extensions
"Distributed Tracing" and "Partitioning"; `correlationid` and `causationid` are the names of its "Correlation" extension.
"""

from __future__ import annotations

import base64
import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from pipeline_mediator.errors import DecodeError
from pipeline_mediator.payload_faults import attempt, what_is_wrong

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["STRUCTURED", "CloudEvent", "is_legal", "read_event", "write_binary", "write_structured"]

STRUCTURED: Final = "application/cloudevents+json"
JSON: Final = "application/json"

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Time = Annotated[datetime, msgspec.Meta(tz=True)]

_ILLEGAL: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_PREFIX: Final = re.compile(r"(?:cloudevents[:_]|ce[-_])", re.IGNORECASE)
"""What the protocol bindings (AMQP, HTTP, Kafka) put before an attribute's name."""


class CloudEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The attributes that this library writes and reads, in the order in which they stand on the wire.

    Attribute names are [a-z0-9] and their values are scalars, so headers, whose names are the application's, travel as one
    text: `headers` holds a JSON object of them. An attribute that is not listed is passed over.
    """

    specversion: str = msgspec.field(default_factory=lambda: "1.0")
    id: _Text
    source: _Text
    type: _Text
    dataversion: int | None = None
    time: _Time | None = None
    correlationid: str | None = None
    causationid: str | None = None
    partitionkey: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    baggage: str | None = None
    headers: str | None = None
    datacontenttype: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    data_base64: bytes | None = None


def is_legal(text: str) -> bool:
    """Whether an attribute may hold this text: not empty, no control characters, no lone surrogates."""
    return bool(text) and _ILLEGAL.search(text) is None


def write_structured(event: CloudEvent) -> bytes:
    """Everything in one JSON object, for transports without headers."""
    return _ENCODER.encode(event)


def write_binary(event: CloudEvent) -> tuple[bytes, dict[str, str]]:
    """The payload, and the attributes under their bare names; a broker adds the prefix that its binding asks for."""
    attributes: dict[str, str] = {}
    for name in _ATTRIBUTES:
        value = getattr(event, name)
        if value is not None:
            attributes[name] = _rfc3339(value) if name == "time" else str(value)
    return bytes(event.data), attributes


def read_event(body: bytes, content_type: str | None, headers: Mapping[str, str]) -> CloudEvent:
    """Read either mode, told apart as the bindings say: by the content type, else by the attribute `specversion`.

    `event.data` is JSON that has not been looked into. Raises `DecodeError`.
    """
    structured = content_type is not None and content_type.lower().startswith("application/cloudevents")
    attributes = {} if structured else {_PREFIX.sub("", name, count=1): value for name, value in headers.items()}
    if "specversion" in attributes:
        event = _read_binary(body, content_type, attributes)
    elif structured or content_type is None:
        event = _read_structured(body, content_type)
    else:
        raise DecodeError(None, "$", f"no CloudEvent: the content type is neither {STRUCTURED} nor are there attributes")
    if event.specversion != "1.0":
        raise DecodeError(None, "$.specversion", "only CloudEvents 1.0 is spoken here")
    return event


def _read_structured(body: bytes, content_type: str | None) -> CloudEvent:
    if content_type is not None and content_type.lower().partition(";")[0].strip() != STRUCTURED:
        raise DecodeError(None, "$", f"of the structured forms of a CloudEvent only {STRUCTURED} is read")
    event = _attempt(_DECODER.decode, body)
    if event.data_base64 is not None:
        event.data = msgspec.Raw(event.data_base64)
    _check_json(event.datacontenttype or JSON)
    return event


def _read_binary(body: bytes, content_type: str | None, attributes: Mapping[str, str]) -> CloudEvent:
    known: dict[str, Any] = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
    if str(known.get("dataversion", "")).isdecimal():
        known["dataversion"] = int(known["dataversion"])
    event = _attempt(msgspec.convert, known, CloudEvent)
    event.datacontenttype = content_type or JSON
    _check_json(event.datacontenttype)
    event.data = msgspec.Raw(body)
    return event


def _attempt(read: Any, *arguments: Any) -> CloudEvent:
    event, error = attempt(read, *arguments)
    if error is not None:
        raise DecodeError(None, *what_is_wrong(error)) from None
    return event


def _check_json(content_type: str) -> None:
    media_type = content_type.lower().partition(";")[0].strip()
    if media_type != JSON and not media_type.endswith("+json"):
        raise DecodeError(None, "$.datacontenttype", "the payload is not JSON")


_ATTRIBUTES: Final = tuple(
    name for name in CloudEvent.__struct_fields__ if name not in ("datacontenttype", "data", "data_base64")
)
_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(CloudEvent)
