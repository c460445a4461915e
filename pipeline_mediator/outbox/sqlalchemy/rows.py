"""Messages as rows, and rows as messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from pipeline_mediator.errors import OutboxError
from pipeline_mediator.outbox.protocol import Failure, StoredMessage, StoredRow
from pipeline_mediator.outbox.sqlalchemy.tables import NAME_LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COLUMNS", "columns_of", "message_of", "row_of"]

_read_headers = msgspec.json.Decoder(dict[str, str]).decode
_write_headers = msgspec.json.Encoder().encode

COLUMNS = ("message_id", "name", "version", "destination", "content_type", "headers", "body", "key", "lane")
"""What the application stores of a message."""

_NAMES = ("message_id", "name", "destination", "content_type", "key")


def columns_of(message: StoredMessage) -> dict[str, Any]:
    """What the application stores of a message; the rest of its row is the same for all."""
    columns = {
        "message_id": message.message_id,
        "name": message.name,
        "version": message.version,
        "destination": message.destination,
        "content_type": message.content_type,
        "headers": _write_headers(message.headers).decode(),
        "body": message.body,
        "key": message.key,
        "lane": message.lane,
    }
    for column in _NAMES:
        # Not every database refuses what is too long: one cuts it off, and another message has that key.
        if len(columns[column] or "") > NAME_LENGTH:
            raise OutboxError(
                f"{column} of {message.name[:NAME_LENGTH]} has {len(columns[column])} characters; the outbox keeps at "
                f"most {NAME_LENGTH}. Use a shorter one, or a digest of it."
            )
    return columns


def message_of(row: Any) -> StoredMessage:
    """The message of a row; without its headers where nobody can read them."""
    try:
        return _message_of(row)
    except ValueError:
        _, message_id, name, version, destination, content_type, _, body, key = row[:9]
        return StoredMessage(message_id, name, version, destination, content_type, body, {}, key)


def _message_of(row: Any) -> StoredMessage:
    _, message_id, name, version, destination, content_type, headers, body, key = row[:9]
    return StoredMessage(message_id, name, version, destination, content_type, body, _read_headers(headers), key)


def row_of(row: Any) -> StoredRow | Failure:
    """The row as the relay gets it, or what is wrong with it."""
    try:
        return StoredRow(row[0], _message_of(row), row[9], float(row[10]))
    except ValueError as error:
        return Failure(row[0], f"unreadable headers: {type(error).__name__}", None)
