"""How a message becomes the headers of a transport that takes text lines only, and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["attributes_of", "decode_headers", "decode_values", "encode_headers"]

# Their own specifications say what they are made of; a second encoding would be read by nobody else.
_AS_IT_IS: Final = frozenset({"traceparent", "tracestate", "baggage"})
_UNSAFE: Final = re.compile(r"[^\x20-\x7e]|%|^ | $")


def attributes_of(message: Outgoing) -> dict[str, str]:
    """A message's headers: the CloudEvent's attributes under their own names, with its id, key and content type."""
    attributes = {"id": message.message_id}
    if message.key is not None:
        attributes["partitionkey"] = message.key
    attributes.update(message.headers)
    attributes["datacontenttype"] = message.content_type
    return attributes


def encode_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Percent-encode what would not survive as a line of ASCII, as CloudEvents' HTTP binding does."""
    return {name: value if name in _AS_IT_IS else _UNSAFE.sub(_percent, value) for name, value in headers.items()}


def decode_headers(headers: Mapping[str, object]) -> dict[str, str]:
    """The text of each header; one that is not UTF-8 is left as it came."""
    return {str(name): _decode(str(name), value) for name, value in headers.items()}


def decode_values(headers: Mapping[str, object]) -> dict[str, str]:
    """Headers of a transport that takes any text, each as text."""
    return {str(name): _text(value) for name, value in headers.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes | bytearray) else str(value)


def _decode(name: str, value: object) -> str:
    text = _text(value)
    if name in _AS_IT_IS or "%" not in text:
        return text
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "backslashreplace"))
