"""Messages to bytes and back: a catalog of wire names, and what travels with a message."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pipeline_mediator.errors import (
    CodecError,
    ConfigurationError,
    MessageTooLargeError,
    MissingUpcasterError,
    UnknownMessageError,
    name_of,
)
from pipeline_mediator.messages import message_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import msgspec

    from pipeline_mediator.payload import PayloadForm

    Upcaster: TypeAlias = Callable[[Any], Any]
    U = TypeVar("U", bound=Upcaster)

__all__ = ["Codec", "Decoded", "Encoded", "Facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What travels with a message, apart from its fields."""

    message_id: str
    correlation_id: str | None = None
    causation_id: str | None = None
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """At most 64, 8 KiB together; `traceparent`, `tracestate` and `baggage` are among them."""
    time: datetime | None = None
    """When it was emitted, aware. None: when it is encoded."""
    sequence: str | None = None
    """Its place among the messages of its source, to be compared as text; an outbox gives it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message as a broker takes it."""

    name: str
    version: int
    body: bytes
    content_type: str
    headers: Mapping[str, str]
    """In binary mode the attributes, under the bare names of CloudEvents; a broker adds the prefix of its protocol."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A message as it was before it travelled."""

    message: Any
    facts: Facts
    source: str
    """Who sent it; message ids are unique within one source."""


class Codec:
    """Writes messages as CloudEvents 1.0 with a JSON payload, and reads them by their names in a catalog.

        codec = Codec(OrderPlaced, source="shop")
        encoded = codec.encode(OrderPlaced(order_id=1), Facts(message_id="42"))
        codec.decode(encoded.body, encoded.content_type).message        # OrderPlaced(order_id=1)

    A type is found by what `@message` called it, never imported by what the wire says; a payload of an older version
    goes through the `upcaster`s first. `source` says who sends (a URI reference, such as "shop" or
    "https://shop.example"). `max_size` is in bytes, envelope included; it is checked before anything is read. `clock`
    gives an aware time.

    Raises `ConfigurationError` for two types with one name and version, or a `source` that is none.
    """

    def __init__(
        self,
        *types: type,
        source: str = "pipeline-mediator",
        max_size: int = 256 * 1024,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if not source.isascii() or not source.isprintable() or not source or " " in source:
            raise ConfigurationError(f"{source!r} is no source: give a URI reference such as 'shop', without spaces")
        if max_size < 1:
            raise ConfigurationError(f"max_size is {max_size}: give a number of bytes above 0")
        self._source = source
        self._max_size = max_size
        self._clock = clock
        self._types: dict[tuple[str, int], type] = {}
        self._upcasters: dict[tuple[str, int], Upcaster] = {}
        self._forms: dict[type, PayloadForm] = {}
        self.register(*types)

    @property
    def types(self) -> Mapping[tuple[str, int], type]:
        """The catalog: every known type by wire name and version."""
        return MappingProxyType(self._types)

    def register(self, *types: type) -> None:
        """Add types to the catalog; one that is in it already is fine."""
        for message_type in types:
            name = message_name(message_type)
            self._refuse_both(name.name, name.version, message_type, self._upcasters.get((name.name, name.version)))
            existing = self._types.setdefault((name.name, name.version), message_type)
            if existing is not message_type:
                raise ConfigurationError(
                    f"{_place(existing)} and {_place(message_type)} are both called {name.name!r} in version "
                    f"{name.version} on the wire, so neither could be told from the other. Give one of them another "
                    "name or version with @message(...)."
                )

    def find(self, name: str, version: int) -> type | None:
        """The type of this name, in this version or else in the newest that is known; None for an unknown name."""
        exact = self._types.get((name, version))
        if exact is not None:
            return exact
        versions = [known for known_name, known in self._types if known_name == name]
        return self._types[name, max(versions)] if versions else None

    def upcaster(self, name: str, version: int, /) -> Callable[[U], U]:
        """Register a function that turns the payload of an older version into that of the next one.

            @codec.upcaster("orders.placed", 1)
            def add_currency(payload: dict[str, Any]) -> dict[str, Any]:
                return {**payload, "currency": "EUR"}

        Upcasters follow each other until a version is reached that has a type. A payload is plain data, as JSON has it;
        it may be changed in place, and has to be returned.

        Raises `ConfigurationError` for a version below 1, or one that has an upcaster or a type already.
        """
        if version < 1:
            raise ConfigurationError(f"upcaster({name!r}, {version}): versions start at 1")

        def decorate(upcaster: U) -> U:
            self._refuse_both(name, version, self._types.get((name, version)), upcaster)
            existing = self._upcasters.setdefault((name, version), upcaster)
            if existing is not upcaster:
                raise ConfigurationError(
                    f"{name_of(existing)} and {name_of(upcaster)} both are the upcaster of {name!r} from version "
                    f"{version} to {version + 1}. Remove one."
                )
            return upcaster

        return decorate

    def encode(self, message: object, facts: Facts, *, binary: bool = False) -> Encoded:
        """The message as bytes: structured, or in `binary` mode for a transport that carries headers.

        Raises `EncodeError` (what has no form on the wire), `UnknownMessageError` (type not registered),
        `MessageTooLargeError`.
        """
        # Not at the top: a program that never sends a message away does not load msgspec.
        from pipeline_mediator import cloudevents

        message_type = type(message)
        name = message_name(message_type)
        if self._types.get((name.name, name.version)) is not message_type:
            raise self.unknown(name.name, name.version)
        event = cloudevents.new_event(
            message_type,
            self._form(message_type).encode(message),
            facts.headers,
            source=self._source,
            type=name.name,
            dataversion=name.version,
            time=facts.time or self._clock(),
            id=facts.message_id,
            correlationid=facts.correlation_id,
            causationid=facts.causation_id,
            partitionkey=facts.key,
            sequence=facts.sequence,
        )
        body, content_type, headers = cloudevents.write_event(event, binary=binary)
        self._check_size(name.name, body, headers)
        return Encoded(name.name, name.version, body, content_type, headers)

    def decode(self, body: bytes, content_type: str | None = None, headers: Mapping[str, str] | None = None) -> Decoded:
        """The message in what arrived; None as the content type is what a transport without one has.

        Raises `DecodeError` (what is wrong and where, without the payload), `UnknownMessageError` (no such name, or a
        version newer than any here), `MissingUpcasterError` (an older one), `MessageTooLargeError`.
        """
        from pipeline_mediator import cloudevents

        headers = headers or {}
        self._check_size("what arrived", body, headers)
        event = cloudevents.read_event(body, content_type, headers)
        version = event.dataversion or 1
        message_type = self._types.get((event.type, version))
        payload: msgspec.Raw | bytes = event.data
        if message_type is None:
            message_type, payload = self._upcast(event.type, version, payload)
        facts = Facts(
            message_id=event.id,
            correlation_id=event.correlationid,
            causation_id=event.causationid,
            key=event.partitionkey,
            headers=cloudevents.headers_of(event),
            time=event.time,
            sequence=event.sequence,
        )
        return Decoded(self._form(message_type).decode(payload), facts, event.source)

    def _upcast(self, name: str, version: int, payload: msgspec.Raw | bytes) -> tuple[type, bytes]:
        from pipeline_mediator.payload import upcast

        reached = version
        upcasters: list[Upcaster] = []
        while (message_type := self._types.get((name, reached))) is None:
            upcaster = self._upcasters.get((name, reached))
            if upcaster is None:
                raise self._unreadable(name, version, reached)
            upcasters.append(upcaster)
            reached += 1
        return message_type, upcast(name, version, payload, upcasters)

    def _unreadable(self, name: str, version: int, reached: int) -> CodecError:
        newer = [known for known_name, known in self._types if known_name == name and known > reached]
        if newer:
            return MissingUpcasterError(name, version, reached, min(newer))
        return self.unknown(name, version)

    def _form(self, message_type: type) -> PayloadForm:
        form = self._forms.get(message_type)
        if form is None:
            from pipeline_mediator.payload import payload_form

            form = self._forms[message_type] = payload_form(message_type)
        return form

    def _refuse_both(self, name: str, version: int, message_type: type | None, upcaster: Upcaster | None) -> None:
        if message_type is not None and upcaster is not None:
            raise ConfigurationError(
                f"{name!r} in version {version} has a type, {_place(message_type)}, and an upcaster, "
                f"{name_of(upcaster)}, so what arrives could become either. Remove the upcaster, or leave that type "
                "out of the codec, the maps and the destinations."
            )

    def _check_size(self, name: str, body: bytes, headers: Mapping[str, str]) -> None:
        size = len(body) + sum(map(len, headers)) + sum(map(len, headers.values()))
        if size > self._max_size:
            raise MessageTooLargeError(name, size, self._max_size)

    def unknown(self, name: str, version: int) -> UnknownMessageError:
        """The error for a wire name that no type has, with those that come near."""
        near = get_close_matches(name[:100], {known for known, _ in self._types}, 3)
        known = sorted(key for key in self._types if key[0] in near)
        return UnknownMessageError(name[:100], version, [f"{name!r} in version {version}" for name, version in known])


def _place(message_type: type) -> str:
    return f"{message_type.__module__}.{message_type.__qualname__}"
