"""The seam to a broker: bytes, headers, a destination and a key go out, one answer per message comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = ["BrokerFeatures", "MessageBroker", "Outgoing"]


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
