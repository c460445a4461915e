"""Between the links of a subscription and its consumer: what is held, what waits to be handed over, what is wanted."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import BrokerError, BrokerRefusedError
from pipeline_mediator.message_brokers.protocol import Ack, Dead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from azure.servicebus import ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusReceiver

    from pipeline_mediator.message_brokers.protocol import Delivery, Outcome

__all__ = ["Hold", "Intake", "Lease", "carry_out", "not_held"]

_LONGEST_PAUSE: Final = 15.0
"""Between two renewals: clocks differ, so how long a lock lasts is not known that well."""
_LONGEST_REASON: Final = 256
_LONGEST_DESCRIPTION: Final = 4096


@dataclass(slots=True)
class Lease:
    """A lock, of a message or a session, in the time of the event loop."""

    renew_at: float = inf
    until: float = inf

    def starts(self, locked_until: datetime | None) -> None:
        """It was given, or renewed, and ends then."""
        if locked_until is not None:
            seconds = (locked_until - datetime.now(UTC)).total_seconds()
            now = asyncio.get_running_loop().time()
            self.renew_at, self.until = now + min(seconds / 2, _LONGEST_PAUSE), now + seconds

    def failed(self, now: float) -> None:
        """It could not be renewed; try again before it ends."""
        self.renew_at = min(now + max((self.until - now) / 4, 0.05), self.until)


@dataclass(slots=True, eq=False)
class Hold:
    """A message that this process has; the tag of its delivery."""

    message: ServiceBusReceivedMessage
    delivery: Delivery
    owner: object
    lease: Lease = field(default_factory=Lease)
    settled: bool = False
    lost: bool = False
    settling: bool = False
    """That was tried, and may be tried again; meanwhile its lock is not renewed."""
    copied: bool = False
    """The copy for later is stored, only the message itself is still there."""

    def lose(self) -> None:
        """Tell whoever handles it."""
        if not (self.lost or self.settled):
            self.lost = True
            self.delivery.lose()


class Intake:
    """What was received and waits for the consumer, which takes it in one task; links put it there.

    At most `ahead` more than asked for; none once something has waited for `patience` seconds.
    """

    def __init__(self, ahead: int) -> None:
        self.patience = inf
        self._ahead = ahead
        self._wanted = 0
        self._waiting: deque[tuple[float, Delivery]] = deque()
        self._failure: BrokerError | None = None
        self._filled = asyncio.Event()
        self._asked = asyncio.Event()

    @property
    def room(self) -> int:
        """How many more may be received now."""
        now = asyncio.get_running_loop().time()
        patient = not self._waiting or self._waiting[0][0] + self.patience > now
        return max(0, self._wanted + (self._ahead if patient else 0) - len(self._waiting))

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """These were received."""
        now = asyncio.get_running_loop().time()
        self._waiting.extend((now, delivery) for delivery in deliveries)
        self._filled.set()

    def fail(self, failure: BrokerError) -> None:
        """Nothing can be received; said to who waits now. Trying again waits for the next who asks."""
        self._failure = failure
        self._asked.clear()
        self._filled.set()

    async def wait_for_room(self) -> int:
        """Wait until something may be received; how much."""
        while self._failure is not None or self.room == 0:
            self._asked.clear()
            await self._asked.wait()
        return self.room

    async def take(self, limit: int) -> Sequence[Delivery]:
        """Wait for at least one, and return at most `limit`. Raises why nothing can be received."""
        self._failure = None
        self._wanted = limit
        self._asked.set()
        try:
            while True:
                taken: list[Delivery] = []
                while self._waiting and len(taken) < limit:
                    delivery = self._waiting.popleft()[1]
                    if not delivery.lost:
                        taken.append(delivery)
                if taken:
                    return taken
                if self._failure is not None:
                    raise self._failure
                self._filled.clear()
                self._asked.set()
                await self._filled.wait()
        finally:
            self._wanted = 0


def not_held(delivery: Delivery, subscription: str, hold: object) -> BrokerRefusedError:
    """What those get who settle what is not theirs, or no longer."""
    problem = f"message {delivery.message_id} is not out with subscription {subscription!r}"
    if isinstance(hold, Hold):
        problem = f"the lock on message {delivery.message_id} of subscription {subscription!r} was lost"
    return BrokerRefusedError(f"{problem}; it is delivered again, if it was not settled already.")


async def carry_out(receiver: ServiceBusReceiver, hold: Hold, outcome: Outcome) -> None:
    """Tell the service; what is to come later was copied already, where it has to be."""
    message: Any = hold.message
    if isinstance(outcome, Dead):
        lines = outcome.reason.splitlines() or [""]
        await receiver.dead_letter_message(
            message, reason=lines[0][:_LONGEST_REASON], error_description=outcome.reason[:_LONGEST_DESCRIPTION]
        )
    elif isinstance(outcome, Ack) or hold.copied:
        await receiver.complete_message(message)
    else:
        await receiver.abandon_message(message)
