"""What a message type is called on the wire, and which of its fields is the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline_mediator.errors import BindError, ConfigurationError, name_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MessageName", "key_of", "message", "message_name"]

M = TypeVar("M")

_ATTRIBUTE = "__pipeline_mediator_message__"


@dataclass(frozen=True, slots=True)
class MessageName:
    """The name, version and key field under which a message type travels."""

    name: str
    version: int = 1
    key: str | None = None


def message(name: str, /, *, version: int = 1, key: str | None = None) -> Callable[[type[M]], type[M]]:
    """Say what a message type is called on the wire, apart from what its class is called in the code.

    `key` names the field whose value orders and partitions (lane, session id, partition key). Subclasses do not inherit
    the name: two types with one name could not be told apart.

        @message("orders.placed", version=2, key="order_id")
        @dataclass(frozen=True)
        class OrderPlaced(IntegrationEvent):
            order_id: int

    Raises `BindError` for an empty name or a version below 1.
    """
    if not isinstance(name, str) or not name or any(character.isspace() for character in name):
        raise BindError(
            f"{name_of(name) if isinstance(name, type) else repr(name)} is no wire name: give a text that is not empty "
            "and "
            'has no white space, as in @message("orders.placed")'
        )
    if version < 1:
        raise BindError(f"version {version} of {name!r}: versions start at 1")

    def decorate(message_type: type[M]) -> type[M]:
        setattr(message_type, _ATTRIBUTE, MessageName(name, version, key))
        return message_type

    return decorate


def message_name(message_type: type) -> MessageName:
    """The name given by `message`; without it the class's own name, version 1, no key."""
    declared = vars(message_type).get(_ATTRIBUTE)
    return declared if isinstance(declared, MessageName) else MessageName(message_type.__name__)


def key_of(message: object, key: str | None = None) -> str | None:
    """The key that `message` travels under: `key` if given, else the value of the field that its type names.

    None, also as the field's value, is no key. Raises `ConfigurationError` for a field that the message does not have.
    """
    if key is not None:
        return key
    field = message_name(type(message)).key
    if field is None:
        return None
    value = getattr(message, field, _MISSING)
    if value is _MISSING:
        raise ConfigurationError(
            f"@message of {type(message).__name__} names {field!r} as its key, but it has no such field; name one that "
            "it has"
        )
    return None if value is None else str(value)


_MISSING: Any = object()
