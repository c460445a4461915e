"""The event that everybody publishes: 1 KiB of payload, and the attributes that a message of ours has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from pipeline_mediator import Codec, IntegrationEvent, message
from pipeline_mediator.codec import Facts
from pipeline_mediator.outbox.protocol import StoredMessage

__all__ = ["KEYS", "STREAM", "HandRow", "OrderPlaced", "hand_rows", "order", "stored"]

STREAM: Final = "orders"
KEYS: Final = 5000
"""Orders that the events are about: of one order some follow each other."""

_FILLING: Final = "x" * 990
_TRACE: Final = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@message("orders.placed", key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: int
    note: str


@dataclass(frozen=True, slots=True)
class HandRow:
    """What whoever writes an outbox by hand would store."""

    destination: str
    headers: str
    """JSON of the stream entry's fields, without the body."""
    body: bytes


def order(number: int, keys: int = KEYS) -> OrderPlaced:
    return OrderPlaced(number % keys, _FILLING)


def stored(count: int, keys: int = KEYS) -> Iterator[StoredMessage]:
    """As OutboxMiddleware stores them. Encoded once for each key, so that filling a table does not take all day."""
    codec = Codec(OrderPlaced, source="shop")
    known: dict[int, StoredMessage] = {}
    for number in range(count):
        place = number % keys
        if place not in known:
            known[place] = _encoded(codec, order(place))
        first = known[place]
        message_id = str(uuid4())
        yield StoredMessage(
            message_id=message_id,
            name=first.name,
            version=first.version,
            destination=first.destination,
            content_type=first.content_type,
            body=first.body,
            headers={**first.headers, "id": message_id},
            key=first.key,
        )


def _encoded(codec: Codec, event: OrderPlaced) -> StoredMessage:
    one, key = str(uuid4()), str(event.order_id)
    facts = Facts(one, correlation_id=one, causation_id=one, key=key, headers=_TRACE)
    encoded = codec.encode(event, facts, binary=True)
    content = (encoded.content_type, encoded.body, encoded.headers)
    return StoredMessage(one, encoded.name, encoded.version, STREAM, *content, key)


def hand_rows(count: int, keys: int = KEYS) -> Iterator[HandRow]:
    for one in stored(count, keys):
        headers = {**one.headers, "datacontenttype": one.content_type}
        yield HandRow(one.destination, json.dumps(headers, separators=(",", ":")), one.body)
