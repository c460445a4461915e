"""Throws bytes at the decoder, led by what they reach of it: no error but the library's own, and no memory that grows.

    pip install atheris && python -m tests.fuzz_codec corpus -max_total_time=300 -rss_limit_mb=512

Not part of the test suite; what it found stands there as an example.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from importlib import import_module
from typing import Any
from uuid import UUID

# Not installed where the types are checked.
atheris: Any = import_module("atheris")

with atheris.instrument_imports(include=["pipeline_mediator"]):
    from pipeline_mediator import Codec, IntegrationEvent, message
    from pipeline_mediator.errors import CodecError

    # Loaded when first needed, which would be too late to follow it.
    for late in ("cloudevents", "payload", "payload_faults"):
        import_module(f"pipeline_mediator.{late}")


@message("line")
@dataclass(frozen=True)
class Line:
    sku: str
    quantity: int
    price: Decimal


@message("orders.placed", version=2, key="order_id")
@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: UUID
    placed_at: datetime
    lines: list[Line]
    notes: dict[str, str | None]


CODEC = Codec(OrderPlaced, source="shop", max_size=16 * 1024)


@CODEC.upcaster("orders.placed", 1)
def add_notes(payload: dict[str, Any]) -> dict[str, Any]:
    return {**payload, "notes": {}}


_TYPES = [None, "application/json", "application/cloudevents+json", "application/cloudevents+xml", "text/plain", ""]
_BARE = {"specversion": "1.0", "id": "1", "source": "shop", "type": "orders.placed"}


def decode(data: bytes) -> None:
    """One delivery: the first byte says of what kind; `name=value` lines up to an empty one are headers; the body."""
    kind, rest = data[0] if data else 0, data[1:]
    content_type = _TYPES[kind % len(_TYPES)]
    headers = dict(_BARE) if kind & 0x80 else {}
    if kind & 0x40:
        head, _, rest = rest.partition(b"\n\n")
        lines = head.decode("utf-8", "replace").split("\n")
        headers |= dict(line.split("=", 1) for line in lines if "=" in line)
    with contextlib.suppress(CodecError):
        CODEC.decode(rest, content_type, headers)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
