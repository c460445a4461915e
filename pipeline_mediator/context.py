"""What travels along a chain: the facts of one message, and a reference to what belongs to the attempt at it."""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.unit import Unit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from pipeline_mediator.events import Event
    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.requests import Request

__all__ = [
    "AMBIENT",
    "HOPS",
    "MAX_HOPS",
    "Context",
    "Given",
    "Kind",
    "Origin",
    "Route",
    "Snapshot",
    "hops_of",
    "new_message_id",
]

R = TypeVar("R")

Kind = Literal["request", "stream", "event"]
Origin = Literal["local", "broker", "relay"]


@dataclass(frozen=True, slots=True)
class Route:
    """What a chain is compiled for."""

    message_type: type
    kind: Kind
    origin: Origin
    """Where the message came from: the application, a broker, or the outbox."""
    destination: str | None = None
    """Where a Publish middleware sends it; None on the way to local handlers."""

    def __str__(self) -> str:
        origin = "" if self.origin == "local" else f" from {self.origin}"
        destination = "" if self.destination is None else f" to {self.destination}"
        return f"{self.message_type.__name__} ({self.kind}{origin}{destination})"


class Given(NamedTuple):
    """What the caller says about a message, beside the message itself."""

    headers: Mapping[str, str] | None = None
    correlation_id: str | None = None
    key: str | None = None


class _Facts:
    """What every context of one message shares: its identity, and who listens to its notes."""

    __slots__ = ("causation_id", "correlation_id", "key", "listeners", "message_id", "sink")

    def __init__(
        self,
        message_id: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        key: str | None = None,
    ) -> None:
        self.message_id = message_id
        self.correlation_id = correlation_id
        self.causation_id = causation_id
        self.key = key
        self.listeners: list[Callable[..., None]] | None = None
        self.sink: Callable[[Any], Awaitable[None]] | None = None


class Context:
    """The facts of one message on its way through a chain.

    `Context(message)` is enough for the unit test of a handler; `context.events` then lists what it emitted.

        context = Context(PlaceOrder("book"))
        order_id = await PlaceOrderHandler(session).handle(context.message, context)
        assert context.events == [OrderPlaced(order_id)]

    In an application the mediator makes it. Everything that costs something is made when first asked for.
    """

    __slots__ = (
        "__weakref__",
        "_facts",
        "_headers",
        "_items",
        "_mediator",
        "attempt",
        "begun_unit",
        "delivery",
        "message",
        "parent",
        "route",
    )

    def __init__(
        self,
        message: Any,
        route: Route | None = None,
        mediator: Mediator | None = None,
        parent: Context | None = None,
    ) -> None:
        self.message = message
        self.route = route
        self._mediator = mediator
        self.parent = parent
        """The message that this one joined: both share one attempt. None for a root."""
        self.attempt = 1
        """1 for the first attempt; counted by RetryMiddleware."""
        self.delivery: Any = None
        """How the broker handed the message over; None for what did not come from a broker."""
        self._facts: _Facts | None = None
        self.begun_unit: Unit | None = None
        """What `unit` returns, or None while nothing has asked for it."""
        self._headers: dict[str, str] | None = None
        self._items: dict[Any, Any] | None = None

    # -- identity ------------------------------------------------------------------------------------------------------

    @property
    def message_id(self) -> str:
        """UUIDv7, made when first asked for; the same for every attempt."""
        facts = self._shared_facts()
        if facts.message_id is None:
            facts.message_id = new_message_id() if self._mediator is None else self._mediator.new_id()
        return facts.message_id

    @property
    def correlation_id(self) -> str:
        """Constant over a conversation: the root message's, which without another is its own message id."""
        facts = self._shared_facts()
        if facts.correlation_id is None:
            facts.correlation_id = self.message_id if self.parent is None else self.parent.correlation_id
        return facts.correlation_id

    @property
    def causation_id(self) -> str | None:
        """The id of the message that caused this one; None for the first of a conversation."""
        facts = self._shared_facts()
        if facts.causation_id is None and self.parent is not None:
            facts.causation_id = self.parent.message_id
        return facts.causation_id

    @property
    def key(self) -> str | None:
        """The key given to `emit`; None leaves it to the field that the message's type names."""
        return None if self._facts is None else self._facts.key

    # -- what a middleware may add -------------------------------------------------------------------------------------

    @property
    def headers(self) -> dict[str, str]:
        """Strings that travel on to a broker. What a failed attempt added is gone in the next one."""
        if self._headers is None:
            self._headers = {} if self.parent is None else dict(self.parent.headers)
        return self._headers

    @property
    def items(self) -> dict[Any, Any]:
        """Facts for other middlewares and the handler; they never leave the process."""
        if self._items is None:
            self._items = {}
        return self._items

    def replace(self, *, message: Any = None, headers: Mapping[str, str] | None = None) -> Context:
        """A context for the rest of the chain with another message of the same type, or with other headers.

        Both contexts are of one message: they share its identity and its attempt. Raises `ConfigurationError` for a
        message of another type, because the chain was compiled for this one.
        """
        if message is not None and type(message) is not type(self.message):
            raise ConfigurationError(
                f"a middleware replaced a {type(self.message).__name__} by a {type(message).__name__}; the chain was "
                "compiled for the first. Return the result of context.send(...) instead."
            )
        new = self._derive(self.message if message is None else message)
        new.begun_unit = self.unit
        new.attempt = self.attempt
        if headers is not None:
            new._headers = dict(headers)
        elif self._headers is not None:
            new._headers = dict(self._headers)
        new._items = self._items = self.items
        return new

    def note(self, name: str, /, **facts: Any) -> None:
        """Tell the middlewares around this one what happened, for example `note("retry", attempt=2, error=...)`.

        Tracing, Logging and Metrics listen; nobody else needs to know who does.
        """
        if self._facts is not None and self._facts.listeners is not None:
            for listener in self._facts.listeners:
                listener(name, facts)

    def on_note(self, listener: Callable[[str, Mapping[str, Any]], None], /) -> None:
        """Call `listener(name, facts)` for every note of this message from here on."""
        facts = self._shared_facts()
        if facts.listeners is None:
            facts.listeners = []
        facts.listeners.append(listener)

    # -- what belongs to the attempt -----------------------------------------------------------------------------------

    @property
    def unit(self) -> Unit:
        """What belongs to this attempt, shared with every message that joined it."""
        if self.begun_unit is None:
            self.begun_unit = Unit(self) if self.parent is None else self.parent.unit
        return self.begun_unit

    @property
    def events(self) -> list[Event]:
        """The events queued in this attempt and not yet walked, in order."""
        return [] if self.begun_unit is None else [queued.event for queued in self.begun_unit.events]

    def emit(self, event: Event, /, key: str | None = None) -> None:
        """Queue an event; the attempt walks its queue, first in first out, when the handler has returned.

        `key` overrides the field that the event's type names. If the attempt fails, so does the queue: its events are
        dropped. Raises `HandlerNotFoundError` for an event that nobody takes, and `TransactionFinishedError` once the
        attempt has ended.
        """
        if self._mediator is not None:
            self._mediator.check_event(event)
        self.unit.queue(event, key, self)

    async def send(self, request: Request[R], /) -> R:
        """Send a request inside this attempt, from whatever task: it shares the transaction and the scope.

        Raises `TransactionFinishedError` once the attempt has ended.
        """
        result: R = await self.mediator.join(request, self)
        return result

    def after_commit(self, hook: Callable[[], Awaitable[object] | None], /) -> None:
        """Call `hook` when the attempt has committed (without a transaction: when it has ended well).

        Hooks run in order. What one raises is logged and counted, not raised: the work is done. A hook of an attempt
        that fails never runs.
        """
        self.unit.add_hook(hook, self)

    @property
    def mediator(self) -> Mediator:
        """The mediator that this message goes through."""
        if self._mediator is None:
            raise ConfigurationError(
                "this context was made without a mediator, as in the unit test of a handler; to send from it, test "
                "through a Mediator"
            )
        return self._mediator

    # -- for the mediator and for middlewares that repeat --------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What further attempts start from; taken before the first one."""
        if self._headers is None and self._items is None:
            return _NO_FACTS
        return Snapshot(
            None if self._headers is None else dict(self._headers), None if self._items is None else dict(self._items)
        )

    def further_attempt(self, number: int, before: Snapshot) -> Context:
        """A fresh context with a fresh unit, for attempt `number` at the same message."""
        new = self._derive(self.message)
        new.attempt = number
        if self.begun_unit is not None:
            new.begun_unit = self.begun_unit.succeed(new)
        new._headers = None if before.headers is None else dict(before.headers)
        new._items = None if before.items is None else dict(before.items)
        return new

    def alone(self) -> Context:
        """A context of the same message with a unit of its own, for a handler that must not share one."""
        new = self._derive(self.message)
        new.parent = None
        new.attempt = self.attempt
        new._headers = None if self._headers is None else dict(self._headers)
        new._items = self._items
        return new

    @property
    def sink(self) -> Callable[[Any], Awaitable[None]]:
        """Where the items of a stream go."""
        sink = self._shared_facts().sink
        if sink is None:
            raise ConfigurationError("this context is not of a stream; call mediator.stream(query)")
        return sink

    @sink.setter
    def sink(self, sink: Callable[[Any], Awaitable[None]]) -> None:
        self._shared_facts().sink = sink

    def identify(
        self,
        *,
        message_id: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        key: str | None = None,
    ) -> None:
        """Give the message an identity that it already has; called before the chain is walked."""
        self._facts = _Facts(message_id, correlation_id, causation_id, key)

    def is_same_message(self, other: Context) -> bool:
        """Whether both are of one message: the same context, or one that was made from the other by `replace`."""
        return self is other or (self._facts is not None and self._facts is other._facts)

    def _derive(self, message: Any) -> Context:
        new = Context(message, self.route, self._mediator, self.parent)
        new.delivery = self.delivery
        new._facts = self._shared_facts()
        return new

    def _shared_facts(self) -> _Facts:
        if self._facts is None:
            self._facts = _Facts()
        return self._facts

    def __repr__(self) -> str:
        return f"<Context of {self.route or type(self.message).__name__}, attempt {self.attempt}>"


class Snapshot(NamedTuple):
    """Headers and items as they were before the first attempt."""

    headers: dict[str, str] | None
    items: dict[Any, Any] | None


_NO_FACTS = Snapshot(None, None)


AMBIENT: ContextVar[Context | None] = ContextVar("pipeline_mediator.context", default=None)
"""The message that is being handled; copied into the tasks that its handler starts."""


HOPS = "hops"
"""The header that counts deliveries, each of which caused the next."""
MAX_HOPS = 32
_MOST_DIGITS = 4


def hops_of(headers: Mapping[str, str]) -> int:
    """How many deliveries led here; what is no number counts as none."""
    hops = headers.get(HOPS, "")
    return int(hops) if hops.isascii() and hops.isdecimal() and len(hops) <= _MOST_DIGITS else 0


def new_message_id() -> str:
    """A UUIDv7 (RFC 9562): sorts by the millisecond it was made in, so that an index on it does not fragment."""
    # Not at the top: a program whose messages never ask for their ids does not load it.
    from uuid import UUID

    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(UUID(int=value))
