"""Messages as rows, and rows as messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from pipeline_mediator.errors import OutboxError
from pipeline_mediator.outbox.protocol import StoredMessage
from pipeline_mediator.outbox.sqlalchemy.tables import NAME_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COLUMNS", "columns_of", "message_of", "read_headers"]

COLUMNS = ("message_id", "name", "version", "destination", "content_type", "headers", "body", "key", "lane")
"""What the application stores of a message; the rest of its row is the same for all."""

read_headers: Callable[[str], dict[str, str]] = msgspec.json.Decoder(dict[str, str]).decode
"""Raises `ValueError` for what is not an object of texts."""
_write_headers = msgspec.json.Encoder().encode


def columns_of(message: StoredMessage) -> dict[str, Any]:
    """The columns of a message; raises `OutboxError` for a name that the table has no room for."""
    names = {
        "message_id": message.message_id,
        "name": message.name,
        "destination": message.destination,
        "content_type": message.content_type,
        "key": message.key,
    }
    for column, text in names.items():
        # Not every database refuses what is too long: one cuts it off, and there another message has that key.
        if text is not None and len(text) > NAME_LENGTH:
            raise OutboxError(
                f"{column} of {message.name[:NAME_LENGTH]} has {len(text)} characters; the outbox keeps at most "
                f"{NAME_LENGTH}. Use a shorter one, or a digest of it."
            )
    return {
        **names,
        "version": message.version,
        "headers": _write_headers(message.headers).decode(),
        "body": message.body,
        "lane": message.lane,
    }


def message_of(row: Any) -> StoredMessage:
    """The message of a row that begins with its id and `COLUMNS` up to the key; without headers nobody can read."""
    _, message_id, name, version, destination, content_type, headers, body, key, *_ = row
    try:
        attributes = read_headers(headers)
    except ValueError:
        attributes = {}
    return StoredMessage(message_id, name, version, destination, content_type, body, attributes, key)
