"""Events, and the map that binds them to any number of handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, Protocol, Self, TypeAlias, TypeVar

from pipeline_mediator.errors import BindError, FrozenMapError, name_of
from pipeline_mediator.handlers import UNKNOWN, Handler, message_type_of, read_handler

if TYPE_CHECKING:
    from pipeline_mediator.container import Container
    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.message_brokers.protocol import MessageBroker

__all__ = [
    "At",
    "Binding",
    "DomainEvent",
    "ECSTEvent",
    "Event",
    "EventEmitter",
    "EventHandler",
    "EventMap",
    "FanOut",
    "IntegrationEvent",
    "NotificationEvent",
]

E = TypeVar("E", bound="Event")
E_contra = TypeVar("E_contra", contravariant=True)
F = TypeVar("F", bound=Callable[..., Any])

At: TypeAlias = Literal["emit", "delivery"]
FanOut: TypeAlias = Literal["sequential", "concurrent", "collect"]


class Event:
    """A fact, in the past tense. Carries no fields: an event may be a dataclass, attrs, msgspec or pydantic class."""

    __slots__ = ()


class DomainEvent(Event):
    """Stays in the process; without handlers it is legal, and nothing happens."""

    __slots__ = ()


class IntegrationEvent(Event):
    """For other systems: it goes to the destination that a Publish middleware has for it."""

    __slots__ = ()


class NotificationEvent(IntegrationEvent):
    """Says only that something happened; who wants to know more asks."""

    __slots__ = ()


class ECSTEvent(IntegrationEvent):
    """Carries the state itself, so that nobody has to ask (event-carried state transfer)."""

    __slots__ = ()


class EventHandler(Protocol[E_contra]):
    """What handles an event; to derive from it is optional. `handle(message)` or `handle(message, context)`."""

    async def handle(self, message: E_contra, /) -> None:
        """React to the event."""
        ...


class _Handles(Protocol[E_contra]):
    def handle(self, message: E_contra, /, *args: Any, **kwargs: Any) -> Any: ...


if TYPE_CHECKING:
    X = TypeVar("X")
    HandlerOf = type[_Handles[X]] | _Handles[X] | Callable[Concatenate[X, ...], Any]


@dataclass(frozen=True, slots=True)
class Binding:
    """One `bind`: handlers of an event type that run in the same place and in the same way."""

    event_type: type[Event]
    handlers: tuple[Handler, ...]
    at: At | None
    fan_out: FanOut
    scope_per_handler: bool

    def runs(self, origin: str, destination: str | None) -> bool:
        """Whether its handlers run for an event of this origin that has this destination."""
        if origin == "broker":
            return self.at != "emit"
        return self.at == "emit" or (self.at is None and destination is None)


class EventMap:
    """Binds event types to handlers; the handlers of an event also get its subclasses.

        events = EventMap().bind(OrderPlaced, ReserveStock, at="emit").bind(OrderPlaced, NotifyWarehouse)

        @events.handler
        async def warn(event: StockRanLow) -> None: ...

    `at="emit"` runs the handlers in the emitter's transaction, `at="delivery"` when the event comes back from a broker.
    Without it: at delivery for an integration event that has a destination, at emission for everything else.

    `fan_out`: "sequential" (the first error stops), "collect" (all run, then an ExceptionGroup), or "concurrent" (a
    task each; the first error cancels the others and is raised in an ExceptionGroup). Concurrent handlers may not share
    a transaction; `scope_per_handler=True` gives each a scope of its own, without the transaction's session.

    Raises `HandlerSignatureError`, `FrozenMapError` once a mediator has compiled the map, and `BindError` for what else
    cannot be, such as a handler that would run twice for one event.
    """

    def __init__(self) -> None:
        self._bindings: list[Binding] = []
        self._frozen = False

    def bind(
        self,
        event: type[E],
        *handlers: HandlerOf[E],
        at: At | None = None,
        fan_out: FanOut = "sequential",
        scope_per_handler: bool = False,
    ) -> Self:
        """Bind handlers to an event type and its subclasses."""
        return self._bind(event, handlers, at, fan_out, scope_per_handler=scope_per_handler)

    def handler(self, function: F) -> F:
        """Bind a function to the event type that its first parameter is annotated with."""
        self._bind(message_type_of(function), (function,), None, "sequential", scope_per_handler=False)
        return function

    def include(self, *maps: EventMap) -> Self:
        """Take over what other maps bind."""
        before = list(self._bindings)
        try:
            for other in maps:
                for binding in other._bindings:
                    self._add(binding)
        except BindError:
            self._bindings = before
            raise
        return self

    def _bind(
        self, event: Any, targets: tuple[Any, ...], at: At | None, fan_out: FanOut, *, scope_per_handler: bool
    ) -> Self:
        if not _is_event_type(event):
            raise BindError(
                f"{name_of(event)} is no event type: derive it from DomainEvent (stays in the process) or "
                "IntegrationEvent (for other systems)"
            )
        if not targets:
            raise BindError(f"EventMap.bind({event.__name__}) was called without a handler")
        if at not in {None, "emit", "delivery"}:
            raise BindError(f'at={at!r} for {event.__name__}: it is "emit", "delivery" or left out')
        if fan_out not in {"sequential", "concurrent", "collect"}:
            raise BindError(f'fan_out={fan_out!r} for {event.__name__}: it is "sequential", "concurrent" or "collect"')
        if at == "delivery" and issubclass(event, DomainEvent):
            raise BindError(
                f'at="delivery" for {event.__name__}: a domain event stays in the process, so it is never delivered. '
                "Leave at= out, or derive it from IntegrationEvent"
            )
        handlers = tuple(read_handler(target, event, result=UNKNOWN) for target in targets)
        return self._add(Binding(event, handlers, at, fan_out, scope_per_handler))

    def _add(self, binding: Binding) -> Self:
        if self._frozen:
            raise FrozenMapError("this EventMap", binding.event_type)
        earlier: list[tuple[Handler, Binding]] = [(one, other) for other in self._bindings for one in other.handlers]
        for handler in binding.handlers:
            for one, other in earlier:
                if _same(one.target, handler.target) and _meet(other, binding):
                    raise BindError(
                        f"{handler.name} is bound twice, to {other.event_type.__name__} and to "
                        f"{binding.event_type.__name__}: it would run twice for one event. Remove one of the two "
                        "binds; to "
                        'run it at emission and at delivery, say at="emit" in one and at="delivery" in the other.'
                    )
            earlier.append((handler, binding))
        self._bindings.append(binding)
        return self

    def bindings_for(self, event_type: type) -> list[Binding]:
        """What is bound to this event type and to its bases, in the order of the binds."""
        return [binding for binding in self._bindings if issubclass(event_type, binding.event_type)]

    def freeze(self) -> None:
        """Refuse further binds; a mediator does this when it compiles the map."""
        self._frozen = True

    def __contains__(self, event_type: object) -> bool:
        return isinstance(event_type, type) and bool(self.bindings_for(event_type))

    def __iter__(self) -> Iterator[type[Event]]:
        return iter(dict.fromkeys(binding.event_type for binding in self._bindings))

    def __len__(self) -> int:
        return len({binding.event_type for binding in self._bindings})


def _is_event_type(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Event)


def _same(one: object, other: object) -> bool:
    """Whether two targets are one; a bound method is a new object each time it is asked for."""
    return one is other or (isinstance(one, MethodType) and one == other)


def _meet(one: Binding, other: Binding) -> bool:
    """Whether there are events that both bindings run for."""
    related = issubclass(one.event_type, other.event_type) or issubclass(other.event_type, one.event_type)
    return related and (one.at == other.at or None in (one.at, other.at))


class EventEmitter:
    """The event half of a mediator, as Diator has it: an event map, and perhaps a broker for integration events.

    Hand it to `Mediator(event_emitter=...)`: what it emits then goes through that mediator. New code needs no emitter;
    it passes `event_map=` and a `PublishMiddleware`.
    """

    def __init__(
        self,
        event_map: EventMap,
        container: Container | None = None,
        message_broker: MessageBroker | None = None,
    ) -> None:
        self.event_map = event_map
        self.container = container
        self.message_broker = message_broker
        self.mediator: Mediator | None = None
        """The mediator that this was handed to; without one, it makes one of its own when it is first used."""

    async def emit(self, event: Event, /) -> None:
        """Emit an event as `Mediator.emit` does: from inside a handler it joins that handler's message."""
        if self.mediator is None:
            from pipeline_mediator.mediator import Mediator

            self.mediator = Mediator(event_emitter=self)
        await self.mediator.emit(event)
