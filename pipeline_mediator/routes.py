"""Which chains a message walks: found by its type, compiled once."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar, Final

from pipeline_mediator.chain import Chain, compile_chain, destination_of, unwrapped
from pipeline_mediator.context import Route
from pipeline_mediator.errors import DestinationError, HandlerNotFoundError, OrderError
from pipeline_mediator.events import DomainEvent, ECSTEvent, Event, IntegrationEvent, NotificationEvent
from pipeline_mediator.requests import Command, Query, Request, StreamQuery
from pipeline_mediator.unit import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline_mediator.context import Context, Kind
    from pipeline_mediator.events import EventMap
    from pipeline_mediator.message_brokers.protocol import Undecodable
    from pipeline_mediator.pipeline import Middleware, Next
    from pipeline_mediator.requests import RequestMap

__all__ = ["Routes"]

_KINDS = frozenset(
    {Event, DomainEvent, IntegrationEvent, NotificationEvent, ECSTEvent, Request, Command, Query, StreamQuery}
)
"""The bases: handlers and destinations may name them, but no message is of exactly such a type."""


class Routes:
    """The chains of one mediator.

    A request has one chain. An event that is emitted has one to its local handlers, one to its destination, or both; a
    message that came back from a broker has one more.
    """

    def __init__(
        self,
        requests: RequestMap,
        events: EventMap,
        middlewares: Sequence[Middleware],
        on_wire: Callable[[type], None],
    ) -> None:
        self._requests = requests
        self._events = events
        self._middlewares = middlewares
        self._on_wire = on_wire
        self._of_request: dict[type, Chain] = {}
        self._of_event: dict[type, tuple[Chain, ...]] = {}
        self._undecodable: Chain | None = None
        self._of_relay: dict[tuple[int, str], Chain] = {}
        self._of_delivery: dict[type, Chain | None] = {}

    def message_types(self) -> list[type]:
        """Every type that is bound or has a destination of its own, requests first."""
        mapped = [one for middleware in self._middlewares for one in getattr(middleware, "message_types", ())]
        return [one for one in dict.fromkeys((*self._requests, *self._events, *mapped)) if one not in _KINDS]

    def compile_all(self) -> None:
        """Compile the chains of every type that is bound; one `OrderError` lists what is wrong with any of them."""
        found: dict[str, str] = {}
        for message_type in self.message_types():
            try:
                self.all_of(message_type)
            except OrderError as error:
                # Named for the first chain that has it: most stand in every chain.
                for violation in error.violations:
                    found.setdefault(violation.partition(": ")[2], violation)
        if found:
            raise OrderError(list(found.values()))

    def destination_for(self, message_type: type) -> str | None:
        """Where the pipeline publishes messages of this type; None for those that stay in the process."""
        leaves = _is_any(message_type, Event, Command) and not _is_any(message_type, DomainEvent)
        if not leaves:
            return None
        return destination_of(message_type, self._middlewares)

    def of_request(self, message_type: type) -> Chain:
        """The chain of a request that is sent. Raises `HandlerNotFoundError`."""
        chain = self._of_request.get(message_type)
        if chain is None:
            kind: Kind = "stream" if _is_any(message_type, StreamQuery) else "request"
            chain = self._compile(Route(message_type, kind, "local", self.destination_for(message_type)))
            self._of_request[message_type] = chain
        return chain

    def of_event(self, event_type: type) -> tuple[Chain, ...]:
        """The chains of an event that is emitted, local handlers first; `HandlerNotFoundError` if it has none."""
        chains = self._of_event.get(event_type)
        if chains is None:
            chains = self._emission(event_type)
            if not chains:
                raise HandlerNotFoundError(
                    event_type,
                    "it has neither a handler nor a destination here, so it would be lost. Bind a handler with "
                    "EventMap.bind, give it a destination in PublishMiddleware, or derive it from DomainEvent if it "
                    "may go unheard.",
                )
            self._of_event[event_type] = chains
        return chains

    def all_of(self, message_type: type) -> tuple[Chain, ...]:
        """Every chain that such a message may walk: sent or emitted here, published by a relay, and coming back."""
        delivered = self._delivered(message_type)
        if not _is_any(message_type, Event):
            entered: tuple[Chain, ...] = (self.of_request(message_type),)
        elif delivered:
            # An event that this process only consumes has no chain of emission; that is no mistake.
            entered = self._emission(message_type)
        else:
            entered = self.of_event(message_type)
        stored = [chain.route.destination for chain in entered if chain.has("outbox")]
        return (*entered, *(self.relayed(message_type, one) for one in stored if one is not None), *delivered)

    def relayed(self, message_type: type | None, destination: str) -> Chain:
        """The chain by which a relay publishes stored messages: the same for all that go to one place of one broker.

        `message_type` is None for a type that this process does not know; its messages are published as they were
        stored if there is one Publish middleware only. Raises `DestinationError` where it cannot be told who publishes.
        """
        # Not at the top: a program without an outbox does not load it.
        from pipeline_mediator.outbox.protocol import Relayed

        publishers = [one for one in self._middlewares if hasattr(unwrapped(one), "destination_for")]
        claiming = publishers
        if message_type is not None:
            claiming = [one for one in publishers if destination_of(message_type, (one,)) is not None][:1]
        if len(claiming) != 1:
            raise DestinationError(_nobody_publishes(message_type, destination, len(publishers)))
        publisher = claiming[0]
        chain = self._of_relay.get((id(publisher), destination))
        if chain is None:
            # The conditions around the publisher chose the type when it was stored; here are batches of several.
            middlewares = [
                unwrapped(one) if one is publisher else one
                for one in self._middlewares
                if one is publisher or one not in publishers
            ]
            chain = compile_chain(Route(Relayed, "event", "relay", destination), middlewares, attempt)
            self._of_relay[id(publisher), destination] = chain
        return chain

    def delivered(self, message_type: type) -> Chain | None:
        """The chain of what a broker hands over; None if nobody here handles messages of this type."""
        if message_type not in self._of_delivery:
            chains = self._delivered(message_type) or self._remote_command(message_type)
            self._of_delivery[message_type] = chains[0] if chains else None
        return self._of_delivery[message_type]

    def undecodable(self) -> Chain:
        """The chain of what cannot be read: as far as it does not need the message."""
        # Not at the top: a program that consumes nothing does not load it.
        from pipeline_mediator.message_brokers.protocol import Undecodable

        if self._undecodable is None:
            outside = takewhile(lambda one: getattr(one, "role", None) not in _INSIDE, self._middlewares)
            route = Route(Undecodable, "event", "broker")
            self._undecodable = compile_chain(route, (*outside, _fail), attempt)
        return self._undecodable

    def _emission(self, event_type: type) -> tuple[Chain, ...]:
        destination = self.destination_for(event_type)
        routes: list[Route] = []
        bound = any(binding.runs("local", destination) for binding in self._events.bindings_for(event_type))
        if bound or _is_any(event_type, DomainEvent):
            routes.append(Route(event_type, "event", "local"))
        if destination is not None:
            routes.append(Route(event_type, "event", "local", destination))
        return tuple(self._compile(route) for route in routes)

    def _delivered(self, message_type: type) -> tuple[Chain, ...]:
        if _is_any(message_type, IntegrationEvent):
            comes = any(binding.runs("broker", None) for binding in self._events.bindings_for(message_type))
            return (self._compile(Route(message_type, "event", "broker")),) if comes else ()
        return () if self.destination_for(message_type) is None else self._remote_command(message_type)

    def _remote_command(self, message_type: type) -> tuple[Chain, ...]:
        """Where a command is handled that was sent elsewhere. A query, or what promises a result, never comes so."""
        comes = _is_any(message_type, Command) and message_type in self._requests
        return (self._compile(Route(message_type, "request", "broker")),) if comes else ()

    def _compile(self, route: Route) -> Chain:
        if route.destination is not None or route.origin == "broker":
            self._on_wire(route.message_type)
        return compile_chain(route, self._middlewares, attempt)


class _Fail:
    """The terminal of what cannot be read."""

    role: ClassVar[str] = "handle"
    ends_chain: ClassVar[bool] = True
    summary: ClassVar[str] = "raises what is wrong with it"

    async def __call__(self, context: Context, call_next: Next) -> None:
        undecodable: Undecodable = context.message
        undecodable.fail()


_fail: Final = _Fail()

_INSIDE: Final = frozenset({"validation", "retry", "timeout", "transaction", "inbox", "outbox", "publish", "handle"})
"""Roles of middlewares that need the message itself; what stands outside all of them sees undecodable ones too."""


def _nobody_publishes(message_type: type | None, destination: str, publishers: int) -> str:
    if message_type is None:
        return (
            f"a message for {destination!r} is of a type that is not known here, so it cannot be told which of "
            f"{publishers} Publish middlewares sends it. Name the type in Codec(...), or in a destination mapping."
        )
    return (
        f"{message_type.__name__} was stored for {destination!r}, but no Publish middleware has a destination for it "
        "any more. Give it one until the outbox is empty of it."
    )


def _is_any(message_type: type, *kinds: type) -> bool:
    return issubclass(message_type, kinds)
