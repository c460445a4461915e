"""What a subscription holds of its broker's messages: ready, out, waiting for a time, or behind another of a key."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from pipeline_mediator.message_brokers.protocol import Delivery

__all__ = ["Held", "Holding"]


@dataclass(slots=True, eq=False)
class Held:
    """A message that its broker keeps for us until it is settled."""

    raw: Any
    """FastStream's message."""
    identity: Hashable
    """What it is the same by when it comes again."""
    position: int
    """Its place among those from the same source."""
    delivery: Delivery
    kept: float
    """When the hold on it was last known to be good, on the event loop's clock."""
    done: Any = None
    """Set when it is settled, where FastStream's handler waits for that."""
    in_lane: bool = False
    """Whether the next of its key waits for it."""
    buried: bool = False
    """Whether it is written down as a dead letter already."""


class Holding:
    """Keeps the messages of one key in order: one is ready or out at a time, or waits for its time."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Held] = {}
        self._ready: deque[Held] = deque()
        self._lanes: dict[str, list[Held]] = {}
        self._delayed: list[tuple[float, int, Held]] = []
        self._out: dict[int, Held] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    @property
    def next_due(self) -> float:
        """When the first that waits becomes ready."""
        return self._delayed[0][0] if self._delayed else math.inf

    def add(self, held: Held) -> None:
        """Take one more; the same one from an earlier time is lost, since its broker has handed it out again."""
        earlier = self._held.get(held.identity)
        if earlier is not None:
            self.lose(earlier)
        self._held[held.identity] = held
        key = held.delivery.key
        if key is None:
            self._ready.append(held)
        elif key in self._lanes:
            _insert(self._lanes[key], held)
        else:
            self._lanes[key] = []
            held.in_lane = True
            self._ready.append(held)

    def take(self, limit: int, now: float) -> list[Held]:
        """At most `limit` that are ready; they are out now."""
        while self._delayed and self._delayed[0][0] <= now:
            held = heappop(self._delayed)[2]
            if self._held.get(held.identity) is held:  # it may be lost meanwhile
                self._ready.append(held)
        taken = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
        for held in taken:
            self._out[id(held.delivery)] = held
        return taken

    def out(self, delivery: Delivery) -> Held | None:
        """What is out as this delivery, if it still is."""
        held = self._out.get(id(delivery))
        return held if held is not None and held.delivery is delivery else None

    def is_out(self, held: Held) -> bool:
        """Whether it was handed over and is not settled."""
        return id(held.delivery) in self._out

    def go_on(self, held: Held) -> None:
        """Let the next of its key become ready."""
        key = held.delivery.key
        if not held.in_lane or key is None:
            return
        held.in_lane = False
        waiting = self._lanes[key]
        if waiting:
            following = waiting.pop(0)
            following.in_lane = True
            self._ready.append(following)
        else:
            del self._lanes[key]

    def finish(self, held: Held) -> None:
        """Be done with it."""
        self.go_on(held)
        self._out.pop(id(held.delivery), None)
        if self._held.get(held.identity) is held:
            del self._held[held.identity]

    def postpone(self, held: Held, delivery: Delivery, due: float) -> None:
        """Keep it here until `due`, then hand it over as `delivery`; its key waits for it."""
        del self._out[id(held.delivery)]
        held.delivery = delivery
        heappush(self._delayed, (due, next(self._numbers), held))

    def lose(self, held: Held) -> None:
        """Its broker may have handed it to somebody else by now."""
        out = self.is_out(held)
        if held in self._ready:
            self._ready.remove(held)
        lane = self._lanes.get(held.delivery.key or "", [])
        if held in lane:
            lane.remove(held)
        self.finish(held)
        if out:
            held.delivery.lose()


def _insert(lane: list[Held], held: Held) -> None:
    """Behind those that wait already, but before later ones of its source: it may have come again."""
    source = held.delivery.destination
    places = (
        place for place, one in enumerate(lane) if one.delivery.destination == source and one.position > held.position
    )
    lane.insert(next(places, len(lane)), held)
