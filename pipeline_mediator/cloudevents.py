"""CloudEvents 1.0 around a JSON payload: structured (all in the body) or binary (attributes beside the body).

https://github.com/cloudevents/spec, with its JSON format and its extensions "Distributed Tracing", "Partitioning",
"Sequence" and "Correlation"; `dataversion`, `baggage` and `headers` are extensions of ours.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from pipeline_mediator.errors import DecodeError, EncodeError
from pipeline_mediator.payload_faults import attempt, what_is_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "MAX_HEADERS",
    "MAX_HEADER_BYTES",
    "STRUCTURED",
    "CloudEvent",
    "headers_of",
    "new_event",
    "read_event",
    "structured",
    "write_event",
]

STRUCTURED: Final = "application/cloudevents+json"
MAX_HEADERS: Final = 64
MAX_HEADER_BYTES: Final = 8 * 1024

_JSON: Final = "application/json"
_TRACE_HEADERS: Final = ("traceparent", "tracestate", "baggage")
"""Headers that other systems look for; they travel as attributes of their own."""

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Time = Annotated[datetime, msgspec.Meta(tz=True)]
_Version = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

_ILLEGAL: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_PREFIX: Final = re.compile(r"(?:cloudevents[:_]|ce[-_])", re.IGNORECASE)
"""What the protocol bindings (AMQP, HTTP, Kafka) put before an attribute's name."""


class CloudEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The attributes that this library writes and reads, in the order in which they stand on the wire.

    Attribute names are [a-z0-9] and their values are scalars, so headers, whose names are the application's, travel as
    one text: `headers` holds a JSON object of them. An attribute that is not listed is passed over.
    """

    specversion: str
    id: _Text
    source: _Text
    type: _Text
    dataversion: _Version | None = None
    time: _Time | None = None
    correlationid: str | None = None
    causationid: str | None = None
    partitionkey: str | None = None
    sequence: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    baggage: str | None = None
    headers: str | None = None
    datacontenttype: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    data_base64: bytes | None = None


def new_event(message_type: type, payload: bytes, headers: Mapping[str, str], **attributes: Any) -> CloudEvent:
    """The event of one message, `payload` being its JSON. Raises `EncodeError` for an attribute with no form."""
    for name, value in attributes.items():
        if isinstance(value, str) and not _is_legal(value):
            problem = f"the attribute {name} of its CloudEvent would be empty or hold control characters"
            raise EncodeError(message_type, None, problem)
    time: datetime = attributes["time"]
    if time.utcoffset() is None:
        raise EncodeError(message_type, None, "its time has no time zone; give an aware datetime")
    attributes["time"] = time.astimezone(UTC)
    own: dict[str, Any] = {name: headers[name] for name in _TRACE_HEADERS if _is_legal(headers.get(name, ""))}
    rest = {name: value for name, value in headers.items() if name not in own}
    return CloudEvent(
        specversion="1.0",
        datacontenttype=_JSON,
        data=msgspec.Raw(payload),
        headers=_pack(message_type, rest) if rest else None,
        **own,
        **attributes,
    )


def headers_of(event: CloudEvent) -> dict[str, str]:
    """The headers that `new_event` was given. Raises `DecodeError`."""
    headers: dict[str, str] = {}
    if event.headers is not None:
        headers = _attempt("$.headers", _HEADERS.decode, event.headers)
    for name in _TRACE_HEADERS:
        if (value := getattr(event, name)) is not None:
            headers[name] = value
    return headers


def write_event(event: CloudEvent, *, binary: bool) -> tuple[bytes, str, dict[str, str]]:
    """Body, content type and attributes; attributes only in `binary` mode, and under their bare names."""
    if not binary:
        return _ENCODER.encode(event), STRUCTURED, {}
    attributes: dict[str, str] = {}
    for name in _ATTRIBUTES:
        value = getattr(event, name)
        if value is not None:
            attributes[name] = value.isoformat() if name == "time" else str(value)
    return bytes(event.data), _JSON, attributes


def structured(body: bytes, content_type: str, attributes: Mapping[str, str]) -> tuple[bytes, str]:
    """Body and content type of the structured form of an event that was written in binary mode.

    The payload is not looked into. Raises `DecodeError` for attributes that are none.
    """
    body, content_type, _ = write_event(_read_binary(body, content_type, attributes), binary=False)
    return body, content_type


def read_event(body: bytes, content_type: str | None, headers: Mapping[str, str]) -> CloudEvent:
    """Read either mode, told apart as the bindings say: by the content type, else by the attribute `specversion`.

    `event.data` is JSON that has not been looked into. Raises `DecodeError`.
    """
    structured = content_type is not None and content_type.lower().startswith("application/cloudevents")
    attributes: Mapping[str, str] = {}
    if not structured:
        bare = "specversion" in headers
        attributes = headers if bare else {_PREFIX.sub("", name, count=1): value for name, value in headers.items()}
    if "specversion" in attributes:
        event = _read_binary(body, content_type, attributes)
    elif structured or content_type is None:
        event = _read_structured(body, content_type)
    else:
        problem = f"no CloudEvent: the content type is not {STRUCTURED}, and there is no attribute specversion"
        raise DecodeError(None, "$", problem)
    if event.specversion != "1.0":
        raise DecodeError(None, "$.specversion", "only CloudEvents 1.0 is read")
    if not _is_json(event.datacontenttype or _JSON):
        raise DecodeError(None, "$.datacontenttype", "the payload is not JSON")
    return event


def _read_structured(body: bytes, content_type: str | None) -> CloudEvent:
    if content_type is not None and _media_type(content_type) != STRUCTURED:
        raise DecodeError(None, "$", f"of the structured forms of a CloudEvent only {STRUCTURED} is read")
    event: CloudEvent = _attempt("$", _DECODER.decode, body)
    if event.data_base64 is not None:
        event.data = msgspec.Raw(event.data_base64)
    return event


def _read_binary(body: bytes, content_type: str | None, attributes: Mapping[str, str]) -> CloudEvent:
    known: dict[str, Any] = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
    if "dataversion" in known:
        known["dataversion"] = _attempt("$.dataversion", int, known["dataversion"])
    if known.get("time", "").isdecimal():
        known["time"] = _attempt("$.time", _from_milliseconds, known["time"])
    event: CloudEvent = _attempt("$", msgspec.convert, known, CloudEvent)
    event.datacontenttype = content_type
    event.data = msgspec.Raw(body)
    return event


def _from_milliseconds(time: str) -> datetime:
    """AMQP has a type for points in time; this is what some clients make of it."""
    return datetime.fromtimestamp(int(time) / 1000, UTC)


def _attempt(root: str, read: Callable[..., Any], *arguments: Any) -> Any:
    result, error = attempt(read, *arguments)
    if error is not None:
        where, problem = what_is_wrong(error)
        raise DecodeError(None, root + where.removeprefix("$"), problem)
    return result


def _pack(message_type: type, headers: Mapping[str, Any]) -> str:
    for name, value in headers.items():
        if not isinstance(value, str) or _SURROGATE.search(name + value):
            raise EncodeError(message_type, None, f"its header {name!r} is no text, or no text that UTF-8 can carry")
    # ASCII throughout, so that it may stand in an attribute whatever the headers hold.
    text = json.dumps(headers, separators=(",", ":"))
    if len(headers) > MAX_HEADERS or len(text) > MAX_HEADER_BYTES:
        problem = (
            f"its {len(headers)} headers are {len(text)} bytes; at most {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes "
            "together travel. Put what belongs to the message into its fields."
        )
        raise EncodeError(message_type, None, problem)
    return text


def _is_legal(text: str) -> bool:
    if text.isascii() and text.isprintable():
        return text != ""
    return _ILLEGAL.search(text) is None


def _is_json(content_type: str) -> bool:
    media_type = _media_type(content_type)
    return media_type == _JSON or media_type.endswith("+json")


def _media_type(content_type: str) -> str:
    return content_type.lower().partition(";")[0].strip()


_ATTRIBUTES: Final = tuple(
    name for name in CloudEvent.__struct_fields__ if name not in ("datacontenttype", "data", "data_base64")
)
_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(CloudEvent)
_HEADERS: Final = msgspec.json.Decoder(dict[str, str])
