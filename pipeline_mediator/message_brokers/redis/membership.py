"""A consumer's place in a group of Redis Streams: its names, its connection for commands, what it holds."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pipeline_mediator.errors import DestinationError
from pipeline_mediator.message_brokers.redis.client import lacks_group, says
from pipeline_mediator.message_brokers.redis.entries import key_of
from pipeline_mediator.message_brokers.redis.lanes import Entry, Lanes, Lease, Source
from pipeline_mediator.message_brokers.redis.scripts import COUNT, LEAVE, POSTPONE, TAKE, WAITING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator.message_brokers.redis.client import RedisClient, RedisLine

__all__ = ["KEPT", "RIGHTS", "Command", "Membership", "chunks", "now", "wait"]

logger = logging.getLogger(__name__)

Command: TypeAlias = "Sequence[Any]"

RIGHTS: Final = (
    "+xadd +xack +xclaim +xdel +xgroup +xinfo +xlen +xpending +xrange +xreadgroup +zadd +zcard +zrange +zrangebyscore "
    "+zrem +zscore +get +set +del +pexpire +time +eval +multi +exec ~<stream> ~{<stream>}:<group>:*"
)
KEPT: Final = 0.9
"""The part of `min_idle` after which what was not kept is given up: a little before others may have it."""

_AHEAD = 4
_LEAST_AHEAD = 128
_MOST_HELD = 10_000
_CHUNK = 500
_SHORTEST = 0.05
_SUSPECT = 2
"""How often an entry was handed over: if the dead have left it then, two processes may have died of it."""


class Membership:
    """What the parts of a subscription share: reader, keeper and settler."""

    def __init__(
        self,
        client: RedisClient,
        destinations: Sequence[str],
        *,
        prefix: str,
        group: str,
        consumer: str | None,
        min_idle: float,
        ordered: bool,
    ) -> None:
        self.client = client
        self.group = group
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        self.min_idle = min_idle
        self.sources: list[Source] = []
        self.leases: list[Lease] = []
        for destination in destinations:
            key = prefix + destination
            # In a cluster they have to be where the stream is; its own braces, if it has some, say where that is.
            base = f"{key if '{' in key else '{' + key + '}'}:{group}"
            lease = Lease(f"{base}:lease") if ordered else None
            self.leases += [lease] if lease else []
            self.sources += [Source(destination, key, base, lease, again=again) for again in (False, True)]
        self.begin()

    def begin(self) -> None:
        """Hold nothing, know of no turn."""
        self.lanes = Lanes()
        self.limit = 0
        """The most that was asked for at once; before somebody asks, nothing is read."""
        self.error: Exception | None = None
        """For the next `receive`."""
        self.filled = asyncio.Event()
        """Something for `receive`."""
        self.room = asyncio.Event()
        """Something for the reader."""
        self.poke = asyncio.Event()
        """Something for the keeper before its time."""
        self.take_at = 0.0
        """When to look for what is due."""
        self.line: RedisLine = self.client.line()
        self.strays: list[int] = []
        """Connections that were given up in the middle of a read, as the server calls them."""
        for source in self.sources:
            source.forget()
        for lease in self.leases:
            lease.held = lease.ready = False

    def free(self) -> int:
        """How much more may be read ahead."""
        if not self.limit:
            return 0
        held = sum(len(source.held) for source in self.sources)
        return min(max(_AHEAD * self.limit, _LEAST_AHEAD) - self.lanes.bodies, _MOST_HELD - held)

    def free_for_what_comes_again(self) -> int:
        """Beside what is read ahead: that may be waiting for just this, or take long to go."""
        if not self.lanes and sum(len(source.held) for source in self.sources) < 2 * _MOST_HELD:
            return self.limit
        return min(self.free() + self.limit, self.limit)

    def add(self, source: Source, entry_id: bytes, fields: list[bytes]) -> None:
        """One that was just read, for the first time."""
        if entry_id not in source.held:
            entry = source.held[entry_id] = Entry(source, entry_id, fields, 1, key_of(fields))
            source.doubtful.discard(entry_id)
            self.lanes.add(entry)

    def add_again(self, source: Source, entry_id: bytes, fields: list[bytes], attempt: int, *, left: bool) -> None:
        """One that comes again, handed over `attempt` times at most so far; `left` by the dead."""
        if entry_id not in source.held:
            entry = source.held[entry_id] = Entry(source, entry_id, fields, attempt, key_of(fields))
            entry.counted = False
            # What we ourselves could not settle comes like what the dead have left.
            entry.alone = left and attempt >= _SUSPECT and entry_id not in source.doubtful
            source.doubtful.discard(entry_id)
            self.lanes.add(entry)

    def holds(self, entry: Entry) -> bool:
        """Whether it is ours still, and not settled."""
        return entry.source.held.get(entry.id) is entry

    def is_anything_out(self) -> bool:
        """Whether something that was handed over is not settled."""
        return any(one.delivery is not None for source in self.sources for one in source.held.values())

    async def count(self, entries: Sequence[Entry]) -> None:
        """Have the server know that these are about to be handed over, and drop what is not ours any more.

        Done twice, it counts once.
        """
        by_source: dict[Source, list[Entry]] = {}
        for entry in entries:
            if self.holds(entry):
                by_source.setdefault(entry.source, []).append(entry)
            else:
                entry.counted = True  # passed over when it is its turn
        parts = [(source, chunk) for source, some in by_source.items() for chunk in chunks(some)]
        commands: list[Command] = []
        for source, chunk in parts:
            words = [word for entry in chunk for word in (entry.id, entry.attempt + 1)]
            commands.append(("EVAL", COUNT, 1, source.key, self.group, self.consumer, *words))
        replies = await self.ask(commands) if commands else []
        for (source, chunk), reply in zip(parts, replies, strict=True):
            self.check(source.key, reply)
            for entry in chunk:
                entry.attempt += 1
                entry.counted = True
                if entry.id in reply and self.holds(entry):
                    del source.held[entry.id]

    def served_by(self, lease: Lease) -> list[Source]:
        """The streams of one turn."""
        return [source for source in self.sources if source.lease is lease]

    def deadline(self) -> float:
        """When the first of what is ours is to be given up."""
        return min(source.kept_at for source in self.sources) + KEPT * self.min_idle

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Wait no longer than things are ours: that they are lost has to be told in time."""
        left = self.deadline() - now()
        return await self.line.execute(commands, seconds=min(self.client.timeout, max(_SHORTEST, left)))

    async def make_groups(self, start: str) -> None:
        """Make those that are not there. Raises `DestinationError`, `BrokerError`."""
        commands = [
            ("XGROUP", "CREATE", source.key, self.group, "0" if source.again else start, "MKSTREAM")
            for source in self.sources
        ]
        for source, reply in zip(self.sources, await self.line.execute(commands), strict=True):
            if not says(reply, "BUSYGROUP"):
                self.check(source.key, reply)

    async def make_groups_again(self) -> None:
        """Somebody deleted them; nothing that was not read may be left out."""
        logger.warning(
            "group %r, or a stream of it, has vanished from %s; it is made again, and begins with the oldest entry",
            self.group,
            self.client.place,
        )
        await self.make_groups("0")
        self.lanes.unblock()

    def check(self, place: str, reply: object) -> None:
        """Raise what the server said of this key, if it is an error."""
        if says(reply, "WRONGTYPE"):
            raise DestinationError(
                f"{self.client.place} has something else under the name {place!r} than group {self.group!r} needs "
                "there. Choose another stream or group, or delete that key."
            )
        if isinstance(reply, Exception):
            raise self.client.explain(reply, place, reading=RIGHTS)

    async def find_again(self, source: Source) -> None:
        """What the server gave us, though the answer that said so was lost."""
        start: bytes = b"-"
        found: list[Any] = [None] * _CHUNK
        while len(found) == _CHUNK:
            command = ("XPENDING", source.key, self.group, start, "+", _CHUNK, self.consumer)
            (found,) = await self.ask([command])
            if lacks_group(found):
                return  # whoever reads next makes it again
            self.check(source.key, found)
            unknown = [one for one in found if one[0] not in source.held and one[0] not in source.doubtful]
            replies = await self.ask([("XRANGE", source.key, one[0], one[0]) for one in unknown]) if unknown else []
            for (entry_id, _, _, attempt), reply in zip(unknown, replies, strict=True):
                self.check(source.key, reply)
                if reply and attempt == 1 and not source.had:
                    self.add(source, entry_id, reply[0][1])
                elif reply:
                    self.add_again(source, entry_id, reply[0][1], attempt, left=True)
            start = b"(" + found[-1][0] if found else start

    async def give_back(self, source: Source, *, died: bool = False) -> None:
        """All that is ours at the server, for others to have at once; what was not handed over counts as no attempt.

        `died`: it belongs to one who had our name before us.
        """
        start: bytes = b"-"
        while True:
            command = ("XPENDING", source.key, self.group, start, "+", _CHUNK, self.consumer)
            (found,) = await self.line.execute([command])
            if lacks_group(found) or not found:
                return
            self.check(source.key, found)
            words: list[Any] = []
            for entry_id, _, _, attempt in found:
                words += (entry_id, attempt, -1) if died else self._giving_back(source, entry_id, attempt)
            for reply in await self.line.execute([self.postponing(source, words)]):
                self.check(source.key, reply)
            start = b"(" + found[-1][0]

    def _giving_back(self, source: Source, entry_id: bytes, attempt: int) -> tuple[bytes, int, int]:
        entry = source.held.get(entry_id)
        if entry is not None:
            out = entry.delivery is not None
            return (entry_id, entry.attempt - (entry.counted and not out), -1 if entry.alone else 0)
        doubtful = entry_id in source.doubtful
        counted = doubtful or (attempt == 1 and not source.had)
        return (entry_id, attempt - counted, 0 if doubtful or attempt < _SUSPECT else -1)

    def taking(self, source: Source, room: int, start: str | bytes, *, all_of_it: bool) -> Command:
        """Claim what is due, and what the dead have left."""
        idle = 0 if all_of_it else round(self.min_idle * 1000)
        words = (self.group, self.consumer, WAITING, room, idle, start, int(all_of_it))
        return ("EVAL", TAKE, 2, source.key, source.times, *words)

    def postponing(self, source: Source, words: Sequence[Any]) -> Command:
        """Ids, counts and milliseconds in turn; -1 for now, as the dead have left it."""
        return ("EVAL", POSTPONE, 2, source.key, source.times, self.group, self.consumer, WAITING, *words)

    def leaving(self, source: Source, consumer: str) -> Command:
        """Delete this consumer's name, and those of the dead, if nothing is pending in them."""
        idle = round(max(2 * self.min_idle, 1.0) * 1000)
        return ("EVAL", LEAVE, 1, source.key, self.group, consumer, WAITING, idle)


def now() -> float:
    """The event loop's time."""
    return asyncio.get_running_loop().time()


def chunks(items: Sequence[Any]) -> list[list[Any]]:
    """As many at a time as one script is to keep the server busy with."""
    return [list(items[begin : begin + _CHUNK]) for begin in range(0, len(items), _CHUNK)]


async def wait(event: asyncio.Event, seconds: float) -> None:
    """For the event, or so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
