"""The sender of one queue or topic: a task that owns the link to it, and the messages that wait for that task.

A sender of the client takes half a second to open, is not for concurrent use, and is broken when it is interrupted. So it
is kept, one task uses it, and those who wait for an answer may come and go.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from azure.servicebus import ServiceBusMessage, ServiceBusMessageBatch
from azure.servicebus.exceptions import MessageSizeExceededError

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, MessageTooLargeError
from pipeline_mediator.message_brokers.azure_errors import concerns_content, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from azure.servicebus.aio import ServiceBusClient, ServiceBusSender

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["CLOSE_SECONDS", "EntitySender", "Entry", "Limits", "Publishing", "close", "closed_error"]

_logger = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 5.0
_UNLIMITED: Final = 2**31 - 1


class Publishing:
    """One call of `publish`, and what became of its messages so far."""

    __slots__ = ("_size", "answers", "deadline", "done", "failures", "refused")

    def __init__(self, size: int, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + timeout
        self.done: asyncio.Future[None] = loop.create_future()
        """Cancelled if nobody waits any longer."""
        self.answers: dict[int, Exception | None] = {}
        self.failures: dict[str, Exception] = {}
        """By entity, why nothing more of this call is sent there."""
        self.refused: dict[tuple[str, str], str] = {}
        """By entity and key, the message after which no other of the key is sent."""
        self._size = size

    def answer(self, index: int, answer: Exception | None) -> None:
        self.answers[index] = answer
        if len(self.answers) == self._size and not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One message of a call, as it waits; without content, it only wants the link to be open."""

    publishing: Publishing
    index: int
    message: Outgoing | None = None
    content: ServiceBusMessage | None = None

    @property
    def key(self) -> str | None:
        return None if self.message is None else self.message.key

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for its answer."""
        return self.index not in self.publishing.answers and not self.publishing.done.done()

    def accept(self) -> None:
        self.publishing.answer(self.index, None)

    def refuse(self, entity: str, error: Exception) -> None:
        if self.message is not None and self.message.key is not None:
            self.publishing.refused.setdefault((entity, self.message.key), self.message.message_id)
        self.publishing.answer(self.index, error)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a broker was told; seconds and bytes."""

    timeout: float
    idle_timeout: float
    max_message_size: int | None


class EntitySender:
    """Sends what is put into it, in order, as many messages at a time as one transfer holds, whoever they are from.

    Its task runs while there is something to send, and for `idle_timeout` after; then the link is closed. `start` starts
    it. Raises `ValueError` for an entity that the client is not for.
    """

    def __init__(
        self,
        client: ServiceBusClient,
        namespace: str,
        entity: str,
        limits: Limits,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._entity = entity
        self._limits = limits
        self._start = start
        self._link: ServiceBusSender | None = self._new_link()
        self._queue: deque[Entry] = deque()
        self._taken: Sequence[Entry] = ()
        self._filled = asyncio.Event()
        self._resting = False
        self._ending = False
        self._task: asyncio.Task[None] | None = None
        self._shared: Literal["by all", "by one key", "by none"] = "by all"
        """What may go in one transfer: partitioned entities refuse some together that they take one by one."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is on its way."""
        return not self._queue and (self._resting or self._task is None)

    def put(self, entry: Entry) -> None:
        """Send it when its turn comes; `entry.publishing` gets the answer."""
        self._queue.append(entry)
        self._filled.set()
        if self._task is None:
            self._task = self._start(self._run())

    def end(self) -> None:
        """Close the link when all is sent that waits now."""
        self._ending = True
        self._filled.set()

    async def _run(self) -> None:
        try:
            while await self._is_filled():
                await self._send_some()
        finally:
            self._task = None
            for entry in (*self._taken, *self._queue):  # there are some only if the task is cancelled
                if entry.wanted:
                    entry.refuse(self._entity, closed_error(self._namespace))
            self._queue.clear()
            await self._close_link()

    async def _is_filled(self) -> bool:
        """Wait until there is something to send; False when the link is not needed any more."""
        while not self._queue and not self._ending:
            self._filled.clear()
            self._resting = True
            try:
                async with asyncio.timeout(self._limits.idle_timeout):
                    await self._filled.wait()
            except TimeoutError:
                break
            finally:
                self._resting = False
        return bool(self._queue)

    async def _send_some(self) -> None:
        """Send as much as goes into one transfer."""
        try:
            async with asyncio.timeout_at(self._queue[-1].publishing.deadline):
                batch = await self._new_batch()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told, and the next have a new link
            self._taken = tuple(self._queue)
            self._queue.clear()
            await self._fail(self._taken, error)
        else:
            self._taken = self._fill(batch)
            if self._taken:
                await self._send(self._taken, batch)
        self._taken = ()

    def _fill(self, batch: ServiceBusMessageBatch) -> list[Entry]:
        """Move into the batch what waits and fits, or the first one alone, if it is too large for any batch."""
        entries: list[Entry] = []
        passed_over: list[Entry] = []
        while self._queue:
            entry = self._queue.popleft()
            if not self._is_due(entry):
                continue
            if entry.content is None:
                entry.accept()
            elif entries and not self._may_share(entries[0], entry):
                passed_over.append(entry)
            elif self._add(batch, entry):
                entries.append(entry)
            elif entries:
                passed_over.append(entry)
                break
            elif self._goes_alone(batch, entry):
                entries.append(entry)
                break
        self._queue.extendleft(reversed(passed_over))
        return entries

    def _is_due(self, entry: Entry) -> bool:
        """Whether it is to be sent, after what became of those before it."""
        publishing = entry.publishing
        if not entry.wanted:
            return False
        if error := publishing.failures.get(self._entity):
            entry.refuse(self._entity, self._explain(error))
            return False
        if entry.key is not None and (refused := publishing.refused.get((self._entity, entry.key))):
            entry.refuse(
                self._entity,
                BrokerUnavailableError(
                    f"not sent to {self._entity!r} at {self._namespace}: message {refused}, which comes before it and has "
                    "the same key, was not accepted. Publish it again after that one."
                ),
            )
            return False
        return True

    def _may_share(self, first: Entry, other: Entry) -> bool:
        return self._shared == "by all" or (self._shared == "by one key" and first.key == other.key)

    def _add(self, batch: ServiceBusMessageBatch, entry: Entry) -> bool:
        assert entry.content is not None
        try:
            batch.add_message(entry.content)
        except MessageSizeExceededError:
            return False
        return True

    def _goes_alone(self, batch: ServiceBusMessageBatch, entry: Entry) -> bool:
        """Whether one that no batch holds may be sent; else it is refused."""
        assert entry.content is not None
        assert entry.message is not None
        measure = ServiceBusMessageBatch(_UNLIMITED)
        measure.add_message(entry.content)
        size, limit = measure.size_in_bytes, max(batch.max_size_in_bytes, self._limits.max_message_size or 0)
        if size > limit:
            entry.refuse(self._entity, MessageTooLargeError(entry.message.name, size, limit))
        return size <= limit

    async def _send(self, entries: Sequence[Entry], batch: ServiceBusMessageBatch | None = None) -> bool:
        """Send them in one transfer; if what is in it is refused, in smaller ones, until it is known which they are.

        Whether all were accepted. A transfer is accepted or refused as a whole.
        """
        error = await self._transfer(entries, batch)
        if error is None:
            for entry in entries:
                entry.accept()
        elif not concerns_content(error):
            await self._fail(entries, error)
        elif len(entries) > 1:
            return await self._send_apart(entries)
        else:
            entries[0].refuse(self._entity, self._explain(error))
        return error is None

    async def _send_apart(self, entries: Sequence[Entry]) -> bool:
        by_key: dict[str | None, list[Entry]] = {}
        for entry in entries:
            by_key.setdefault(entry.key, []).append(entry)
        several = len(by_key) > 1
        all_accepted = True
        for part in by_key.values() if several else [[entry] for entry in entries]:
            due = [entry for entry in part if self._is_due(entry)]
            all_accepted &= len(due) == len(part) and await self._send(due)
        if all_accepted:
            self._shared = "by one key" if several else "by none"
        return all_accepted

    async def _transfer(self, entries: Sequence[Entry], batch: ServiceBusMessageBatch | None) -> Exception | None:
        deadline = max(entry.publishing.deadline for entry in entries)
        try:
            async with asyncio.timeout_at(deadline):
                content: ServiceBusMessage | ServiceBusMessageBatch | None = entries[0].content
                if len(entries) > 1:
                    content = batch or await self._batch_of(entries)
                assert content is not None
                assert self._link is not None
                # The client's own timeout keeps the link usable; but it does not fire in every case.
                remaining = deadline - asyncio.get_running_loop().time()
                await self._link.send_messages(content, timeout=max(remaining, 0.001))
        except Exception as error:  # noqa: BLE001 - as in _send_some
            return error
        return None

    async def _batch_of(self, entries: Sequence[Entry]) -> ServiceBusMessageBatch:
        batch = await self._new_batch()
        for entry in entries:
            self._add(batch, entry)
        return batch

    async def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        """Nothing is known about these, and the link is not used again; what else waits of their calls is not tried."""
        for entry in entries:
            entry.publishing.failures[self._entity] = error
            if entry.wanted:
                entry.refuse(self._entity, self._explain(error))
        await self._close_link()

    async def _new_batch(self) -> ServiceBusMessageBatch:
        """An empty batch, as large as the service takes it; opens the link for that, if need be."""
        if self._link is None:
            self._link = self._new_link()
        return await self._link.create_message_batch()

    def _new_link(self) -> ServiceBusSender:
        # For a topic as well: the two have one set of names and are sent to in the same way.
        return self._client.get_queue_sender(self._entity)

    async def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await close(link)

    def _explain(self, error: Exception) -> Exception:
        return explain(error, self._namespace, self._entity, self._limits.timeout)


async def close(link: ServiceBusSender) -> None:
    """Close it, or give up in time."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await link.close()
    except Exception:  # noqa: BLE001 - what is not needed any more
        _logger.debug("a sender of Service Bus did not close", exc_info=True)


def closed_error(namespace: str) -> Exception:
    """What those get who come too late, or waited when it ended."""
    return BrokerUnavailableError(f"the broker for {namespace} was closed")
