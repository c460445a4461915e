"""What an entry of a stream says, whoever wrote it: read as a delivery, kept as a dead letter, shown from there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

from pipeline_mediator.message_brokers.protocol import DeadDelivery, Delivery

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SYSTEM", "as_text", "buried", "dead_delivery", "delivery_of", "key_of", "original"]

SYSTEM: Final = "redis"
"""`messaging.system` of the OpenTelemetry conventions."""

Fields: TypeAlias = "Sequence[bytes]"

_PROVENANCE: Final = ("dead-reason", "dead-stream", "dead-group", "dead-id", "dead-attempts")
_NAMES: Final = {
    name.encode(): name
    for name in (
        *("specversion", "id", "source", "type", "time", "dataversion", "subject", "partitionkey", "sequence"),
        *("correlationid", "causationid", "traceparent", "tracestate", "headers"),
    )
}
_BEHIND: Final = 2 * len(_PROVENANCE)
_LONGEST_REASON: Final = 2000


def as_text(value: bytes) -> str:
    """What is no text is made visible, so that whoever reads the event can say what is wrong with it."""
    return value.decode("utf-8", "backslashreplace")


def delivery_of(fields: Fields, destination: str, subscription: str, attempt: int, tag: object) -> Delivery:
    """Attributes are headers; what carries no `data` has an empty body, which no codec takes for an event."""
    pairs = dict(zip(fields[::2], fields[1::2], strict=False))
    body = pairs.pop(b"data", b"")
    content_type = pairs.pop(b"datacontenttype", None)
    known = _NAMES.get
    try:
        headers = {known(name) or name.decode(): value.decode() for name, value in pairs.items()}
    except UnicodeDecodeError:
        headers = {as_text(name): as_text(value) for name, value in pairs.items()}
    return Delivery(
        destination,
        body,
        None if content_type is None else as_text(content_type),
        headers,
        headers.get("id"),
        headers.get("partitionkey"),
        attempt,
        subscription,
        tag=tag,
        system=SYSTEM,
    )


def key_of(fields: Fields) -> str | None:
    """The key by which order is kept; of several the last, as in headers."""
    if b"partitionkey" not in fields:
        return None
    for index in range(len(fields) - 2, -1, -2):
        if fields[index] == b"partitionkey":
            return as_text(fields[index + 1])
    return None


def buried(delivery: Delivery, fields: Fields, entry_id: bytes, stream: str, reason: str) -> list[str | bytes | int]:
    """Why and where from, then the fields as they were."""
    about: tuple[str | bytes | int, ...] = (
        reason[:_LONGEST_REASON],
        stream,
        delivery.subscription,
        entry_id,
        delivery.attempt,
    )
    words: list[str | bytes | int] = []
    for name, value in zip(_PROVENANCE, about, strict=True):
        words += (name, value)
    return [*words, *fields]


def original(fields: Fields) -> Fields:
    """The fields of a dead letter as they were before it died."""
    return fields[_BEHIND:] if fields[0] == _PROVENANCE[0].encode() else fields


def dead_delivery(letter_id: str, entry_id: bytes, fields: Fields, destination: str, group: str) -> DeadDelivery:
    """A dead letter as it is shown to people."""
    about = dict(zip(fields[:_BEHIND:2], fields[1:_BEHIND:2], strict=False))
    attempts = about.get(b"dead-attempts", b"")
    return DeadDelivery(
        letter_id,
        delivery_of(original(fields), destination, group, int(attempts) if attempts.isdigit() else 0, None),
        as_text(about.get(b"dead-reason", b"")),
        datetime.fromtimestamp(int(entry_id.partition(b"-")[0]) / 1000, UTC),
    )
