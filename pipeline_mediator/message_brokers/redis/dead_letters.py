"""The dead letters of a consumer group: a stream of its own for each stream that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_mediator.message_brokers.redis.entries import dead_delivery, original

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator.message_brokers.protocol import DeadDelivery
    from pipeline_mediator.message_brokers.redis.client import RedisClient

__all__ = ["RedisDeadLetters", "Shelf"]


class Shelf:
    """The dead letters from one destination, and the stream that its second chances are read from."""

    __slots__ = ("again", "dead", "destination")

    def __init__(self, destination: str, dead: str, again: str) -> None:
        self.destination = destination
        self.dead = dead
        self.again = again


class RedisDeadLetters:
    """See `DeadLetterQueue`. An id is the entry's in the stream of dead letters, and the destination: `1700-0/orders`.

    Raises `BrokerUnavailableError`, `BrokerRefusedError`; `ValueError` for what is no such id.
    """

    def __init__(self, client: RedisClient, group: str, shelves: Sequence[Shelf], rights: str) -> None:
        self._client = client
        self._group = group
        self._shelves = {shelf.destination: shelf for shelf in shelves}
        self._rights = rights

    async def count(self) -> int:
        """How many there are."""
        return sum(await self._ask([("XLEN", shelf.dead) for shelf in self._shelves.values()]))

    async def list(self, limit: int, /, *, after: str | None = None) -> Sequence[DeadDelivery]:
        """Oldest first, over all streams; see `DeadLetterQueue.list`."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one dead letter")
        bound = None if after is None else self._parse(after)
        shelves = [*self._shelves.values()]
        commands = [("XRANGE", shelf.dead, _start(shelf, bound), "+", "COUNT", limit) for shelf in shelves]
        found = [
            (_order(entry_id), shelf.destination, entry_id, fields)
            for shelf, reply in zip(shelves, await self._ask(commands), strict=True)
            for entry_id, fields in reply
        ]
        found.sort(key=lambda one: one[:2])
        return [
            dead_delivery(f"{entry_id.decode()}/{destination}", entry_id, fields, destination, self._group)
            for _, destination, entry_id, fields in found[:limit]
        ]

    async def retry(self, ids: Sequence[str], /) -> int:
        """Only this group gets them again; see `DeadLetterQueue.retry`."""
        places = [self._parse(one) for one in dict.fromkeys(ids)]
        replies = await self._ask([("XRANGE", shelf.dead, entry_id, entry_id) for shelf, entry_id in places])
        there = [(shelf, reply[0]) for (shelf, _), reply in zip(places, replies, strict=True) if reply]
        # Two steps: in a transaction the second would be done even if the first is refused.
        await self._ask([("XADD", shelf.again, "*", *original(fields)) for shelf, (_, fields) in there])
        await self._ask([("XDEL", shelf.dead, entry_id) for shelf, (entry_id, _) in there])
        return len(there)

    async def drop(self, ids: Sequence[str], /) -> int:
        """Delete them for good; how many there were."""
        places = [self._parse(one) for one in dict.fromkeys(ids)]
        return sum(await self._ask([("XDEL", shelf.dead, entry_id) for shelf, entry_id in places]))

    def _parse(self, text: str) -> tuple[Shelf, str]:
        entry_id, slash, destination = text.partition("/")
        time, _, number = entry_id.partition("-")
        if not (slash and time.isdecimal() and number.isdecimal() and destination in self._shelves):
            raise ValueError(f"{text!r} is no dead letter of group {self._group!r}: `list` has their ids")
        return self._shelves[destination], entry_id

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> Sequence[Any]:
        if not commands:
            return []
        line = self._client.line()
        try:
            replies = await line.execute(commands)
        finally:
            await line.close()
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                raise self._client.explain(reply, command[1], reading=self._rights)
        return replies


def _order(entry_id: bytes) -> tuple[int, int]:
    time, _, number = entry_id.partition(b"-")
    return int(time), int(number)


def _start(shelf: Shelf, after: tuple[Shelf, str] | None) -> str:
    """Of two with one id, the first is that of the destination that sorts first."""
    if after is None:
        return "-"
    behind, entry_id = after
    return entry_id if shelf.destination > behind.destination else f"({entry_id}"
