"""What one consumer of a stream holds in memory: what is ready, and what has to wait behind another of its key."""

from __future__ import annotations

from collections import deque
from itertools import islice, takewhile
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from pipeline_mediator.message_brokers.protocol import Delivery

__all__ = ["Entry", "Lanes", "Lease", "Source"]

Fields: TypeAlias = "list[bytes]"
"""Names and values in turn, as Redis has them."""


class Lease:
    """One process at a time serves a stream in order; this is what we know of our turn."""

    __slots__ = ("epoch", "held", "key", "ready")

    def __init__(self, key: str) -> None:
        self.key = key
        self.held = False
        self.ready = False
        """What others had left is in the lanes; new entries may be read."""
        self.epoch = 0
        """How often it was won: what was asked for in an earlier turn does not count."""


class Source:
    """A stream that one group reads, and the keys beside it: a destination's own, or the one of its second chances."""

    __slots__ = (
        "again",
        "dead",
        "destination",
        "doubtful",
        "had",
        "held",
        "kept_at",
        "key",
        "lease",
        "scan",
        "stream",
        "times",
        "unsure_until",
    )

    def __init__(self, destination: str, stream: str, base: str, lease: Lease | None, *, again: bool) -> None:
        self.destination = destination
        self.stream = stream
        """The destination's own, in either case."""
        self.key = f"{base}:again" if again else stream
        self.times = f"{self.key}:later" if again else f"{base}:later"
        """When what waits is due, by the server's clock."""
        self.dead = f"{base}:dead"
        self.lease = lease
        self.again = again
        self.held: dict[bytes, Entry] = {}
        """What is ours until it is settled, in memory or out with a consumer."""
        self.doubtful: set[bytes] = set()
        """What was not settled because no answer came; it is tried again, or found when it has been idle."""
        self.unsure_until: float | None = None
        """An answer was lost, with entries perhaps; from then on they can be found. The event loop's time."""
        self.had = False
        """Among what is found then may be what was handed over before, by us or by the dead."""
        self.kept_at = 0.0
        """When we last asked to keep it, with success; the event loop's time."""
        self.scan: str | bytes = ""
        """Where to go on looking for what the dead have left; empty: nowhere."""

    @property
    def readable(self) -> bool:
        """Whether it is our turn, and we know of all that we were given."""
        return self.unsure_until is None and (self.lease is None or self.lease.ready)

    def forget(self) -> None:
        """Hold nothing."""
        self.held = {}
        self.doubtful = set()
        self.unsure_until = None
        self.had = False
        self.scan = ""


class Entry:
    """One entry of a stream in the hands of this consumer."""

    __slots__ = (
        "alone",
        "attempt",
        "counted",
        "delivery",
        "doubtful",
        "fields",
        "id",
        "key",
        "settled",
        "source",
        "waiting",
    )

    def __init__(
        self,
        source: Source,
        entry_id: bytes,
        fields: Fields | None,
        attempt: int,
        key: str | None,
    ) -> None:
        self.source = source
        self.id = entry_id
        self.fields = fields
        """None while it waits for so long that it is not worth the memory."""
        self.attempt = attempt
        """How often it was handed over, as far as the server knows."""
        self.counted = True
        """With the next time; the server counts what is read for the first time, and nothing else by itself."""
        self.alone = False
        """Two processes may have died of it: nothing else is to be out when it is."""
        self.key = key
        self.delivery: Delivery | None = None
        self.settled = False
        self.doubtful = False
        """It was tried to settle it, and no answer came."""
        self.waiting = False
        """It stands for one that waits for its time at the server."""


class Lanes:
    """Entries in the order in which they may be handed out: of one key one at a time.

    A lane is `blocked` while its head waits for its time at the server (only where order is kept over redelivery); what
    comes behind it then is kept without its fields, and asked for again when it is its turn.
    """

    def __init__(self) -> None:
        self.bodies = 0
        """Entries with fields that were not handed out."""
        self.absent: list[Entry] = []
        """Whose turn it is, as soon as somebody got their fields."""
        self._ready: deque[Entry] = deque()
        self._lanes: dict[tuple[str, str], deque[Entry] | None] = {}
        self._blocked: dict[tuple[str, str], Entry] = {}
        self._expected = 0

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, entry: Entry) -> None:
        """One that was just read or claimed."""
        self.bodies += 1
        if entry.key is None:
            self._ready.append(entry)
            return
        name = (entry.source.destination, entry.key)
        if name not in self._lanes:
            self._lanes[name] = None
            self._ready.append(entry)
        elif (head := self._blocked.get(name)) is not None and _same(head, entry):
            del self._blocked[name]
            self._ready.append(entry)
        elif not (self._expected and self._replace(name, entry)):
            self._append(name, entry)
            if head is not None:
                entry.fields = None
                self.bodies -= 1

    def expect(self, entry: Entry) -> None:
        """One that waits for its time at the server, though its key's later ones are to wait for it."""
        entry.waiting = True
        entry.fields = None
        if entry.key is None:
            return
        name = (entry.source.destination, entry.key)
        if name in self._lanes:
            self._expected += 1
            self._append(name, entry)
        else:
            self._lanes[name] = None
            self._blocked[name] = entry

    @property
    def head(self) -> Entry | None:
        """Whose turn it is first."""
        return self._ready[0] if self._ready else None

    def take(self, limit: int) -> Iterator[Entry]:
        """At most `limit` that may be handed out now, up to the first that is not counted yet."""
        ready = self._ready
        for _ in range(min(limit, len(ready))):
            entry = ready.popleft()
            if not entry.counted:
                ready.appendleft(entry)
                return
            self.bodies -= 1
            yield entry

    def uncounted(self, limit: int) -> list[Entry]:
        """What of the next `limit` is to be counted: one that is handed out alone, or all before the next such."""
        if (head := self.head) is not None and head.alone:
            return [] if head.counted else [head]
        leading = takewhile(lambda entry: not entry.alone, islice(self._ready, limit))
        return [entry for entry in leading if not entry.counted]

    def present(self, entry: Entry) -> None:
        """An absent one has its fields again."""
        self.bodies += 1
        self._ready.append(entry)

    def block(self, entry: Entry) -> None:
        """It was handed out and has to come again; its lane waits for it."""
        entry.waiting = True
        entry.fields = None
        if entry.key is not None:
            self._blocked[entry.source.destination, entry.key] = entry

    def done(self, entry: Entry) -> None:
        """It holds nothing up any longer: the next of its key may be handed out."""
        if entry.key is not None:
            self._go_on((entry.source.destination, entry.key))

    def gone(self, source: Source, entry_ids: Collection[bytes]) -> None:
        """These will not come again, so nothing is to wait for them."""
        if self._expected:
            for name, lane in self._lanes.items():
                left = [one for one in lane or () if not (one.waiting and one.source is source and one.id in entry_ids)]
                self._expected -= len(lane or ()) - len(left)
                self._lanes[name] = deque(left) if left else None
        for name, head in list(self._blocked.items()):
            if head.source is source and head.id in entry_ids:
                del self._blocked[name]
                self._go_on(name)

    def unblock(self) -> None:
        """Nobody knows what will come again: wait for nothing."""
        while self._blocked:
            self._go_on(self._blocked.popitem()[0])

    def forget(self, sources: Iterable[Source]) -> None:
        """Drop all that came from these."""
        dropped = set(sources)
        destinations = {source.destination for source in dropped}
        entries = [entry for entry in self._ready if entry.source not in dropped]
        lanes = [entry for lane in self._lanes.values() if lane for entry in lane if entry.source not in dropped]
        self.absent = [entry for entry in self.absent if entry.source not in dropped]
        self._ready = deque(entries)
        self._lanes = {name: lane for name, lane in self._lanes.items() if name[0] not in destinations}
        self._blocked = {name: entry for name, entry in self._blocked.items() if name[0] not in destinations}
        # A destination's two streams share its lanes, and are dropped together.
        self._expected = sum(1 for entry in lanes if entry.waiting)
        self.bodies = len(entries) + sum(1 for entry in lanes if entry.fields is not None)

    def _go_on(self, name: tuple[str, str]) -> None:
        lane = self._lanes.get(name)
        if not lane:
            self._lanes.pop(name, None)
            return
        following = lane.popleft()
        if following.waiting:
            self._expected -= 1
            self._blocked[name] = following
        elif following.fields is None:
            self.absent.append(following)
        else:
            self._ready.append(following)

    def _append(self, name: tuple[str, str], entry: Entry) -> None:
        lane = self._lanes[name]
        if lane is None:
            self._lanes[name] = deque((entry,))
        else:
            lane.append(entry)

    def _replace(self, name: tuple[str, str], entry: Entry) -> bool:
        """It was expected, further back in its lane."""
        lane = self._lanes[name]
        for index, other in enumerate(lane or ()):
            if other.waiting and _same(other, entry) and lane is not None:
                lane[index] = entry
                self._expected -= 1
                return True
        return False


def _same(left: Entry, right: Entry) -> bool:
    return left.id == right.id and left.source is right.source
