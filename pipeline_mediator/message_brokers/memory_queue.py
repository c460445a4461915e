"""What waits in one subscription of a MemoryBroker: who is next, who has to wait, who is out with a consumer."""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final

import anyio

from pipeline_mediator.errors import BrokerUnavailableError
from pipeline_mediator.message_brokers.protocol import Delivery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["SYSTEM", "Copy", "Queue", "closed_error"]

SYSTEM: Final = "memory"
"""`messaging.system` of the OpenTelemetry conventions."""


class Copy:
    """A message in one subscription."""

    __slots__ = ("_done", "attempts", "delivery", "lost", "message", "subscription")

    def __init__(self, message: Outgoing, subscription: str) -> None:
        self.message = message
        self.subscription = subscription
        self.attempts = 0
        self.delivery: Delivery | None = None
        self.lost = False
        self._done = anyio.Event()

    @property
    def settled(self) -> bool:
        """Whether its publisher need not wait for it any longer."""
        return self._done.is_set()

    async def wait(self) -> None:
        """Wait until it is settled."""
        if not self._done.is_set():
            await self._done.wait()

    def settle(self, *, lost: bool = False) -> None:
        """Let its publishers go on; `lost` if nobody will handle it."""
        self.lost = lost
        self._done.set()

    def hand_over(self) -> Delivery:
        """The next attempt at it."""
        self.attempts += 1
        self.delivery = Delivery(
            destination=self.message.destination,
            body=self.message.body,
            content_type=self.message.content_type,
            headers=dict(self.message.headers),
            message_id=self.message.message_id,
            key=self.message.key,
            attempt=self.attempts,
            subscription=self.subscription,
            tag=self,
            system=SYSTEM,
        )
        return self.delivery


class Signal:
    """Wakes all who wait, as often as there is something to look at."""

    def __init__(self) -> None:
        self._waiting: set[anyio.Event] = set()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        event = anyio.Event()
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)

    def notify(self) -> None:
        """Wake all who wait at this moment."""
        for event in self._waiting:
            event.set()


class Queue:
    """The copies of one subscription: ready, out with a consumer, delayed, or behind another of their key.

    A key's first copy holds its lane until it is settled for good, so a delayed one is not overtaken.
    """

    def __init__(self, name: str, destinations: frozenset[str], capacity: int) -> None:
        self.name = name
        self.destinations = destinations
        self.closed = False
        self.filled = Signal()
        self._capacity = capacity
        self._room = Signal()
        self._copies: dict[tuple[str, str], Copy] = {}
        self._ready: deque[Copy] = deque()
        self._lanes: dict[tuple[str, str], deque[Copy]] = {}
        self._delayed: list[tuple[float, int, Copy]] = []
        self._out: set[Copy] = set()
        self._numbers = count()

    @property
    def next_due(self) -> float:
        """When the first delayed copy becomes ready, on anyio's clock."""
        return self._delayed[0][0] if self._delayed else math.inf

    async def put(self, message: Outgoing) -> Copy:
        """Add a copy, as soon as there is room; one that is still here is not added again."""
        identity = (message.destination, message.message_id)
        while identity not in self._copies and len(self._copies) >= self._capacity and not self.closed:
            await self._room.wait()
        if identity in self._copies:
            return self._copies[identity]
        copy = Copy(message, self.name)
        if self.closed:
            copy.settle(lost=True)
            return copy
        self._copies[identity] = copy
        lane = None if message.key is None else (message.destination, message.key)
        if lane in self._lanes:
            self._lanes[lane].append(copy)
        else:
            if lane is not None:
                self._lanes[lane] = deque()
            self._ready.append(copy)
            self.filled.notify()
        return copy

    def take(self, limit: int, now: float) -> Iterator[Copy]:
        """At most `limit` copies that are ready; they are out with a consumer now."""
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heappop(self._delayed)[2])
        for _ in range(min(limit, len(self._ready))):
            copy = self._ready.popleft()
            self._out.add(copy)
            yield copy

    def holds(self, copy: Copy) -> bool:
        """Whether this copy is out with a consumer."""
        return copy in self._out

    def postpone(self, copy: Copy, due: float) -> None:
        """Take a copy back, and make it ready again at `due`; its lane waits for it."""
        self._out.remove(copy)
        heappush(self._delayed, (due, next(self._numbers), copy))
        self.filled.notify()

    def finish(self, copy: Copy) -> None:
        """Be done with a copy; the next of its key becomes ready."""
        message = copy.message
        self._out.remove(copy)
        del self._copies[message.destination, message.message_id]
        if message.key is not None:
            lane = (message.destination, message.key)
            if self._lanes[lane]:
                self._ready.append(self._lanes[lane].popleft())
                self.filled.notify()
            else:
                del self._lanes[lane]
        copy.settle()
        self._room.notify()

    def close(self) -> None:
        """Drop all copies, and wake everyone who waits for one or for room."""
        self.closed = True
        for copy in self._copies.values():
            copy.settle(lost=True)
        self._copies.clear()
        self._ready.clear()
        self._lanes.clear()
        self._delayed.clear()
        self._out.clear()
        self.filled.notify()
        self._room.notify()


def closed_error() -> BrokerUnavailableError:
    """What those get who wait, or come too late."""
    return BrokerUnavailableError("the subscription, or its MemoryBroker, was closed before the message was settled")
