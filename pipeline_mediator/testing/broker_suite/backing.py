"""What the tests of a broker ask of whoever runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import DeadLetterQueue, MessageBroker, Subscription

__all__ = ["BrokerCases", "Transport", "TransportFeatures"]


class Transport(Protocol):
    """What the tests need: brokers, and subscriptions of the destinations `orders` and `returns`.

    Both destinations are there and empty, and nobody has subscribed to them.
    """

    def broker(self) -> MessageBroker:
        """A broker that was not entered; where `several_clients`, on connections of its own."""
        ...

    def subscribe(self, broker: MessageBroker, /, *destinations: str, name: str) -> Subscription:
        """A subscription that was not entered, for one of the groups `warehouse` and `mail`.

        Let its hold on a delivery be short, where that can be set: see `TransportFeatures.hold`.
        """
        ...

    async def crash(self, subscription: Subscription, /) -> None:
        """Let the process of this subscription die: nothing is said to the broker, nothing is given back."""
        ...


@dataclass(frozen=True, slots=True)
class TransportFeatures:
    """In what brokers differ. What is False is not tested, so say why where the broker is described."""

    several_clients: bool = True
    """Two brokers with clients of their own see the same messages, as two processes do."""
    answers_when_settled: bool = False
    """`publish` answers when every subscription has settled the message, not when the broker has it."""
    keeps_while_nobody_listens: bool = True
    """A group that was there before gets what was published while none of its subscriptions was."""
    several_destinations: bool = True
    """One subscription can have several."""
    several_groups: bool = True
    """Each group gets a copy."""
    competes: bool = True
    """Two subscriptions of one group share its messages."""
    message_ids: bool = True
    keys: bool = True
    """A delivery tells message id, and key."""
    keyless: bool = True
    """Messages may be without a key; otherwise the tests give each that has none one of its own."""
    content_types: bool = True
    headers: bool = True
    """A delivery has the headers of what was published."""
    any_header: bool = True
    """They may have any text as their value, not only what HTTP would take."""
    redelivers: bool = True
    """What is given back or postponed comes again."""
    outlives_subscription: bool = True
    """What is not settled when its subscription ends comes again to the next one of its group."""
    survives_death: float | None = None
    """After how many seconds at most what a dead process had comes again; None where a test cannot let one die."""
    hold: float | None = None
    """For how long a delivery is kept from others unless the subscription keeps the hold up; None where for ever."""
    delays: bool = True
    """`Later(delay)` keeps a message back; without it, it comes again at once."""
    keeps_postponed: bool = True
    """What waits for its time comes at that time, also if its subscription has ended meanwhile."""
    counts_attempts: bool = True
    """`Later` raises the attempt by one."""
    gives_back_uncounted: bool = True
    """What is given back has the same attempt when it comes again."""
    ordered_by_key: bool = True
    """Of one key one delivery is out at a time, in the order they were published in."""
    ordered_behind_postponed: bool = True
    """A message that has to come again holds back the later ones of its key."""
    dead_letters: bool = True
    """`subscription.dead_letters` is there."""
    keeps_dead_letters: bool = True
    """They are there for other clients too, and when the subscription has ended."""
    large: int = 200_000
    """Bytes of a message that has to pass whole."""
    many: int = 300
    """How many messages have to pass in one go."""
    seconds: float = 20.0
    """What takes longer hangs."""
    quiet: float = 0.3
    """Seconds after which one that has not come does not come."""


class BrokerCases:
    """What all of them have in common."""

    features: ClassVar[TransportFeatures] = TransportFeatures()
    pytestmark: ClassVar[Any] = pytest.mark.anyio

    @pytest.fixture
    async def transport(self) -> Transport:
        """The broker's place, empty; override it."""
        raise NotImplementedError

    def needs(self, *features: str) -> None:
        """Skip the test for brokers that do not promise what it is about."""
        missing = [name for name in features if not getattr(self.features, name)]
        if missing:
            pytest.skip(f"not promised: {', '.join(missing)}")

    def letters(self, subscription: Subscription) -> DeadLetterQueue:
        """The dead letters of a subscription that has them."""
        assert subscription.dead_letters is not None, "the features say that it keeps dead letters"  # noqa: S101 - a test
        return subscription.dead_letters
