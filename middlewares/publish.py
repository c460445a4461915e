"""The terminal for messages that go to a broker, instead of to a local handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pipeline_mediator.codec import Facts
from pipeline_mediator.errors import DestinationError, name_of
from pipeline_mediator.events import DomainEvent, Event, IntegrationEvent
from pipeline_mediator.message_brokers.protocol import Outgoing
from pipeline_mediator.messages import key_of, message_name
from pipeline_mediator.pipeline import Inside
from pipeline_mediator.requests import Command, promised_result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.message_brokers.protocol import MessageBroker
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

    def destination_for(self, message_type: type) -> str | None:
        """Where it sends messages of this type; None for those that it lets pass."""
        if self._by_type is None:
            return self._by_function(message_type)
        return next((self._by_type[base] for base in message_type.__mro__ if base in self._by_type), None)

    def for_route(self, route: Route) -> _Publish | None:
        """Stands where a message of this type leaves the process."""
        if route.origin == "broker" or route.destination is None:
            return None
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
        if not self._broker.features.durable:
            yield f"{self.summary} keeps nothing: a message that nobody listens for is gone."

    async def __call__(self, context: Context, call_next: Next) -> None:
        message = context.message
        facts = Facts(
            message_id=context.message_id,
            correlation_id=context.correlation_id,
            causation_id=context.causation_id,
            key=key_of(message, context.key),
            headers=context.headers,
        )
        encoded = context.mediator.codec.encode(message, facts, binary=self._broker.features.headers)
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
