"""The terminal for messages that go to a broker, instead of to a local handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from pipeline_mediator.errors import DestinationError, name_of
from pipeline_mediator.events import DomainEvent, Event, IntegrationEvent
from pipeline_mediator.message_brokers.protocol import Outgoing
from pipeline_mediator.messages import message_name
from pipeline_mediator.outbox.protocol import Published
from pipeline_mediator.pipeline import Inside
from pipeline_mediator.requests import Command, promised_result
from pipeline_mediator.telemetry import error_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.message_brokers.protocol import MessageBroker
    from pipeline_mediator.outbox.protocol import Relayed, StoredRow
    from pipeline_mediator.pipeline import Chain, Next

__all__ = ["PublishMiddleware"]


class PublishMiddleware:
    """Ends the chain of what it has a destination for, in a broker; everything else passes on.

        PublishMiddleware(broker)                                    # every integration event, to its wire name
        PublishMiddleware(broker, {OrderPlaced: "orders", ShipOrder: "warehouse.commands"})
        PublishMiddleware(broker, {IntegrationEvent: "shop.events"}) # the nearest base class wins
        PublishMiddleware(broker, lambda message_type: ...)          # a destination, or None

    Several may follow each other; the first that has a destination for a type takes it. A command with a destination is
    handled on the other side; it returns None, so a `Command[R]` that promises a result is refused. What came from a
    broker is not published again.

    The broker is connected by `async with mediator`. Source of the idea: Symfony Messenger's SendMessageMiddleware.

    Raises `DestinationError` for a type that cannot go to a broker; when a message is published, the broker's
    `BrokerError`, or a `CodecError`.
    """

    role: ClassVar[str] = "publish"
    rules: ClassVar = (Inside("outbox", "the outbox stores what would otherwise be published here"),)

    # Mapping's key is invariant: with `type` for Any, a dict[type[OrderPlaced], str] in a variable would be refused.
    def __init__(
        self,
        broker: MessageBroker,
        destinations: Mapping[Any, str] | Callable[[type], str | None] | None = None,
    ) -> None:
        self._broker = broker
        self._destinations = destinations
        self._by_type: dict[type, str] | None = None
        self._by_function: Callable[[type], str | None] = _to_its_wire_name
        if isinstance(destinations, Mapping):
            self._by_type = {**destinations}
            for message_type, destination in self._by_type.items():
                _refuse_unless_publishable(message_type, destination)
        elif destinations is not None:
            self._by_function = destinations
        self.message_types: tuple[type, ...] = tuple(self._by_type or ())
        self.resources = (broker,)

    def to(self, broker: MessageBroker) -> PublishMiddleware:
        """The same destinations, in another broker: in a test, for example."""
        return PublishMiddleware(broker, self._destinations)

    def destination_for(self, message_type: type) -> str | None:
        """Where it sends messages of this type; None for those that it lets pass."""
        if self._by_type is None:
            return self._by_function(message_type)
        return next((self._by_type[base] for base in message_type.__mro__ if base in self._by_type), None)

    def for_route(self, route: Route) -> _Publish | _PublishStored | None:
        """Stands where a message of this type leaves the process; in the relay's chains, where a batch of them does."""
        if route.origin == "broker" or route.destination is None:
            return None
        if route.origin == "relay":
            return _PublishStored(self._broker, route.destination)
        destination = self.destination_for(route.message_type)
        if destination is None:
            return None
        _refuse_unless_publishable(route.message_type, destination)
        return _Publish(self._broker, destination)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Publish the message if it has a destination; a mediator compiles `for_route` instead."""
        publishing = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if publishing is None else publishing(context, call_next))


class _Publish:
    """The terminal of one route: its message goes to one destination."""

    ends_chain: ClassVar[bool] = True

    def __init__(self, broker: MessageBroker, destination: str) -> None:
        self._broker = broker
        self._destination = destination
        self.summary = f"{name_of(broker).removesuffix(' object')} → {destination}"

    def warnings_for(self, chain: Chain) -> Iterable[str]:
        if chain.publishes:
            yield (
                "emitted inside a transaction it is published after the commit, at most once: a crash in between loses "
                "it. An OutboxMiddleware before the PublishMiddleware stores it in the transaction."
            )
        yield from _warnings_about(self._broker, self.summary)

    async def __call__(self, context: Context, call_next: Next) -> None:
        facts, encoded = context.mediator.encode(context, binary=self._broker.features.headers)
        outgoing = Outgoing(
            destination=self._destination,
            body=encoded.body,
            content_type=encoded.content_type,
            message_id=facts.message_id,
            name=encoded.name,
            key=facts.key,
            headers=encoded.headers,
        )
        context.note("publish", system=self._broker.features.system)
        (refusal,) = await self._broker.publish((outgoing,))
        if refusal is not None:
            raise refusal


class _PublishStored:
    """The terminal of the relay's chain for one destination: what the outbox kept goes to the broker as it was stored.

    Of the messages of one key none is sent after one that was refused, whatever the broker promises.
    """

    ends_chain: ClassVar[bool] = True

    def __init__(self, broker: MessageBroker, destination: str) -> None:
        self._broker = broker
        self._features = broker.features
        self.summary = f"{name_of(broker).removesuffix(' object')} → {destination}"

    def warnings_for(self, _chain: Chain) -> Iterable[str]:
        return _warnings_about(self._broker, self.summary)

    async def __call__(self, context: Context, call_next: Next) -> Published:
        batch: Relayed = context.message
        context.note("publish", system=self._features.system, count=len(batch))
        accepted: list[int] = []
        refused: list[tuple[int, Exception]] = []
        refused_keys: set[str] = set()
        rest: Sequence[StoredRow] = batch
        while rest and monotonic() < batch.deadline:
            rows, rest = self._next_call(rest, refused_keys)
            for row, error in zip(rows, await self._publish(rows), strict=True):
                key = row.message.key
                if error is None:
                    accepted.append(row.id)
                elif key is None or key not in refused_keys:
                    refused.append((row.id, error))
                    if key is not None:
                        refused_keys.add(key)
        if refused:
            context.note("refused", count=len(refused), error=error_type(refused[0][1]))
        return Published(accepted, refused)

    async def _publish(self, rows: Sequence[StoredRow]) -> Sequence[Exception | None]:
        try:
            return await self._broker.publish([self._outgoing(row) for row in rows]) if rows else ()
        except Exception as error:  # noqa: BLE001 - a broker that raises where it should answer: nothing is known
            return [error for _ in rows]

    def _next_call(
        self, rows: Sequence[StoredRow], refused_keys: set[str]
    ) -> tuple[Sequence[StoredRow], Sequence[StoredRow]]:
        """What to hand to the broker at once, and the rest."""
        if self._features.ordered_by_key and not refused_keys:
            return rows[:MAX_PER_CALL], rows[MAX_PER_CALL:]
        once_a_key = not self._features.ordered_by_key
        called: list[StoredRow] = []
        rest: list[StoredRow] = []
        keys = set(refused_keys)
        for row in rows:
            key = row.message.key
            if key in refused_keys:
                continue
            if len(called) == MAX_PER_CALL or key in keys:
                rest.append(row)
                continue
            called.append(row)
            if once_a_key and key is not None:
                keys.add(key)
        return called, rest

    def _outgoing(self, row: StoredRow) -> Outgoing:
        message = row.message
        # Compared as text by whoever wants to know the order, so all are of one length: an id has at most 19 digits.
        headers: Mapping[str, str] = {**message.headers, "sequence": f"{row.id:019d}"}
        body, content_type = message.body, message.content_type
        if not self._features.headers:
            from pipeline_mediator.cloudevents import structured

            body, content_type = structured(body, content_type, headers)
            headers = {}
        return Outgoing(
            destination=message.destination,
            body=body,
            content_type=content_type,
            message_id=message.message_id,
            name=message.name,
            key=message.key,
            headers=headers,
        )


MAX_PER_CALL: Final = 250
"""Messages per call of the broker: between two calls the relay's deadline is looked at."""


def _warnings_about(broker: MessageBroker, summary: str) -> Iterable[str]:
    if not broker.features.durable:
        yield f"{summary} keeps nothing: a message that nobody listens for is gone."


def _to_its_wire_name(message_type: type) -> str | None:
    return message_name(message_type).name if issubclass(message_type, IntegrationEvent) else None


def _refuse_unless_publishable(message_type: type, destination: str) -> None:
    problem = None
    if issubclass(message_type, DomainEvent):
        problem = "a domain event stays in the process; derive it from IntegrationEvent"
    elif issubclass(message_type, Command):
        promised: object = promised_result(cast("type", message_type))
        if promised not in {type(None), None}:
            problem = (
                f"it promises a result ({name_of(promised)}), and nobody waits on the other side; derive it from "
                "Command[None]"
            )
    elif not issubclass(message_type, Event):
        problem = "only integration events and commands without a result can be handled on the other side"
    if problem is not None:
        raise DestinationError(f"{message_type.__name__} cannot go to {destination!r}: {problem}")
