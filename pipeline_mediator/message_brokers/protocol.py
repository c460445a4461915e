"""The seam to a broker: messages go out as bytes and are answered one by one; deliveries come in and are settled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

from pipeline_mediator.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

    from pipeline_mediator.errors import MediatorError

__all__ = [
    "Ack",
    "BrokerFeatures",
    "Dead",
    "DeadDelivery",
    "DeadLetterQueue",
    "Delivery",
    "Later",
    "MessageBroker",
    "Outcome",
    "Outgoing",
    "Subscription",
    "Undecodable",
]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One encoded message on its way to a broker."""

    destination: str
    """Channel, stream, topic, subject or queue."""
    body: bytes
    content_type: str
    message_id: str
    name: str
    """The wire name of the message's type, for brokers that show it to people."""
    key: str | None = None
    """Messages of one key stay in order where the broker can do that."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Attributes for transports that carry headers; a structured body already has them inside."""
    not_before: datetime | None = None
    """Receivers get it then at the earliest, an aware time; a broker that cannot keep messages back does not."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The delivery is done with."""


@dataclass(frozen=True, slots=True)
class Later:
    """Deliver it again, `delay` seconds from now or after."""

    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Dead:
    """Give up on it: keep it as a dead letter, with the reason."""

    reason: str


Outcome = Ack | Later | Dead


@dataclass(slots=True, eq=False)
class Delivery:
    """A message as a broker handed it over. Who handles it decides the `outcome`; the subscription carries it out."""

    destination: str
    body: bytes
    content_type: str | None
    """None where the transport carries none."""
    headers: Mapping[str, str]
    message_id: str | None
    """As the transport tells it; the one in the body counts."""
    key: str | None
    attempt: int
    """1 for the first time it is handed over."""
    subscription: str
    """The consumer group that it was handed to."""
    system: str = ""
    """`messaging.system` of the OpenTelemetry conventions."""
    source: str = ""
    """Who sent it, as its envelope says; ids are unique within one source. Set by whoever decodes it."""
    sequence: str | None = None
    """Its place among the messages of its source, to be compared as text; None if its envelope does not say. Set by
    whoever decodes it."""
    tag: object = None
    """What the subscription knows it by; nobody else's business."""
    outcome: Outcome | None = None
    lost: bool = False
    """The broker may have handed it to somebody else by now: it is not to be handled further, nor settled."""
    on_lost: Callable[[], None] | None = None
    """Set by whoever handles it: called when it is lost."""

    def lose(self) -> None:
        """Told by the subscription when its hold on the message is gone (a lock that ran out, a dead connection)."""
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class Undecodable:
    """The message of the chain that a delivery walks which cannot be read: past whatever observes and decides.

    Nothing of it reaches validation, transaction or handlers. So does a command that nobody here handles.
    """

    __slots__ = ("_error", "body")

    def __init__(self, body: bytes, error: MediatorError) -> None:
        self.body = body
        self._error: MediatorError | None = error

    def fail(self) -> NoReturn:
        """Raise what is wrong with it, once: an error that is kept keeps the frames that it passed through."""
        error, self._error = self._error, None
        if error is None:
            raise DecodeError(None, "$", "it could not be read")
        try:
            raise error
        finally:
            del error


@dataclass(frozen=True, slots=True)
class BrokerFeatures:
    """What a broker promises; the conformance suite holds it to that, and `Mediator.check()` warns by it."""

    system: str
    """`messaging.system` of the OpenTelemetry conventions."""
    durable: bool
    """Whether a message that was accepted survives when nobody listens."""
    headers: bool
    """Whether the transport carries headers beside the body."""
    ordered_by_key: bool
    max_message_size: int | None = None
    """Bytes, None where there is no limit of the broker's own."""


class MessageBroker(Protocol):
    """Where a Publish middleware hands messages over.

    `async with broker` connects and disconnects; a broker that was not entered connects when it is first used. A client
    that was handed to the broker is never closed by it.
    """

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises."""
        ...

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Hand the batch over; one entry per message, in order: None for accepted, or why it was not.

        Errors are of this library (`BrokerUnavailableError`, `BrokerRefusedError`, ...), with the client's own as
        `__cause__`. Of the messages of one key, none after a refused one is accepted where the features say
        `ordered_by_key`. Bounded in time.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class DeadDelivery:
    """A delivery that was given up, as its broker keeps it: body and headers are as they came."""

    id: str
    """What `DeadLetterQueue` knows it by."""
    delivery: Delivery
    reason: str
    died_at: datetime | None = None
    """Aware; None where the broker does not say."""


class DeadLetterQueue(Protocol):
    """What one subscription has given up: `subscription.dead_letters`, where a broker keeps dead letters.

    Usable within `async with` of its broker, whether the subscription was entered or not. Raises `BrokerError`.
    """

    async def count(self) -> int:
        """How many there are."""
        ...

    async def list(self, limit: int, /, *, after: str | None = None) -> Sequence[DeadDelivery]:
        """At most `limit` of them, oldest first, beginning behind the id `after`."""
        ...

    async def retry(self, ids: Sequence[str], /) -> int:
        """Deliver them again to this subscription, their attempts counted from 1; how many there were.

        Written where they are delivered from before they are taken from here: a crash in between leaves both.
        """
        ...

    async def drop(self, ids: Sequence[str], /) -> int:
        """Delete them for good; how many there were."""
        ...


class Subscription(Protocol):
    """Where a consumer gets deliveries from: the messages of some destinations, handed to one group of handlers.

    `async with subscription` begins and ends it. What was handed over and not settled when it ends is delivered again,
    where the broker keeps messages.
    """

    @property
    def name(self) -> str:
        """The consumer group, and with the message id the inbox's key."""
        ...

    @property
    def dead_letters(self) -> DeadLetterQueue | None:
        """What it has given up; None where the broker keeps none."""
        ...

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery, and return at most `limit`. Cancelling it loses none.

        Of the messages of one key the next is handed over when the one before it is about to be settled; where the
        broker keeps their order, not before that one is done with if it has to come again. Called by one task at a
        time, beside `settle`. What was handed over is kept from others until it is settled, however long that takes;
        where that fails, the delivery is told that it is lost.

        Raises `BrokerUnavailableError` while the broker is away, at once or after a wait of its own; called again, it
        connects again. Raises another `BrokerError` for what does not get better by itself.
        """
        ...

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Carry out the outcomes; a delivery without one is given back at once, and that counts as no attempt.

        One entry per delivery, in order: None, or why it could not be settled, which leaves it to be delivered again.
        After a `BrokerUnavailableError` it may be tried again: settling what was settled already does no harm. Called
        by one task at a time. A dead letter that cannot be written leaves the message where it was.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...
