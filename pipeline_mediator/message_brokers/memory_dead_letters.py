"""What the subscriptions of a MemoryBroker have given up, the latest of it, with the reason."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from itertools import count, islice
from typing import TYPE_CHECKING

from anyio.lowlevel import checkpoint

from pipeline_mediator.message_brokers.memory_queue import closed_error
from pipeline_mediator.message_brokers.protocol import DeadDelivery

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline_mediator.message_brokers.memory_queue import Queue
    from pipeline_mediator.message_brokers.protocol import Delivery, Outgoing

__all__ = ["DeadLetters", "MemoryDeadLetterQueue"]

_logger = logging.getLogger(__name__)


class DeadLetters:
    """The dead letters of all subscriptions of a broker, at most `capacity`, oldest first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers = count(1)
        self._letters: dict[int, tuple[DeadDelivery, Outgoing]] = {}

    def add(self, delivery: Delivery, message: Outgoing, reason: str) -> None:
        """Keep one more; the oldest makes room for it."""
        if len(self._letters) == self._capacity:
            lost = self._letters.pop(next(iter(self._letters)))[0].delivery
            _logger.warning("the oldest dead letter is dropped: message %s of %s", lost.message_id, lost.destination)
        number = next(self._numbers)
        self._letters[number] = (DeadDelivery(str(number), delivery, reason, datetime.now(UTC)), message)

    def of(self, subscription: str, *, after: int = 0) -> Iterator[DeadDelivery]:
        """Those of one subscription, behind the one with that number."""
        for number, (letter, _) in self._letters.items():
            if number > after and letter.delivery.subscription == subscription:
                yield letter

    def deliveries(self) -> Iterator[Delivery]:
        """All of them, oldest first."""
        return (letter.delivery for letter, _ in self._letters.values())

    def find(self, subscription: str, letter_id: str) -> Outgoing | None:
        """The message of a dead letter, if that subscription has it."""
        number = _number(letter_id)
        if number not in self._letters:
            return None
        letter, message = self._letters[number]
        return message if letter.delivery.subscription == subscription else None

    def drop(self, letter_id: str) -> None:
        """Forget one."""
        self._letters.pop(_number(letter_id), None)


class MemoryDeadLetterQueue:
    """What one subscription has given up; see `DeadLetterQueue`. Gone with the process, as its broker is."""

    def __init__(self, queue: Queue, letters: DeadLetters) -> None:
        self._queue = queue
        self._letters = letters

    async def count(self) -> int:
        """How many there are."""
        await checkpoint()
        return sum(1 for _ in self._letters.of(self._queue.name))

    async def list(self, limit: int, /, *, after: str | None = None) -> Sequence[DeadDelivery]:
        """At most `limit` of them, oldest first, beginning behind the id `after`."""
        await checkpoint()
        letters = self._letters.of(self._queue.name, after=0 if after is None else _number(after))
        return list(islice(letters, limit))

    async def retry(self, ids: Sequence[str], /) -> int:
        """Deliver them again; waits for room. Raises `BrokerUnavailableError` once the subscription is closed."""
        await checkpoint()
        retried = 0
        for letter_id in ids:
            message = self._letters.find(self._queue.name, letter_id)
            if message is None:
                continue
            copy = await self._queue.put(message)
            if copy.lost:
                raise closed_error()
            self._letters.drop(letter_id)
            retried += 1
        return retried

    async def drop(self, ids: Sequence[str], /) -> int:
        """Delete them for good; how many there were."""
        await checkpoint()
        found = {one for one in ids if self._letters.find(self._queue.name, one) is not None}
        for letter_id in found:
            self._letters.drop(letter_id)
        return len(found)


def _number(letter_id: str) -> int:
    return int(letter_id) if letter_id.isdecimal() else 0
