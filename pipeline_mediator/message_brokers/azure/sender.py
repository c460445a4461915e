"""The sender of one queue or topic: a task that owns the link to it, and the messages that wait for that task.

A sender of the client takes half a second to open, is not for concurrent use, and is broken when it is interrupted. So
it is kept, one task uses it, and those who wait for an answer may come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from azure.servicebus import ServiceBusMessage, ServiceBusMessageBatch
from azure.servicebus.exceptions import MessageSizeExceededError

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, MessageTooLargeError
from pipeline_mediator.message_brokers.azure.errors import concerns_content, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from azure.servicebus.aio import ServiceBusClient, ServiceBusSender
    from azure.servicebus.amqp import AmqpAnnotatedMessage

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["CLOSE_SECONDS", "EntitySender", "Entry", "Limits", "Publishing", "close", "closed_error", "within"]

_R = TypeVar("_R")

CLOSE_SECONDS: Final = 5.0
_CANCEL_SECONDS: Final = 1.0
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

    def accept(self, index: int) -> None:
        """This message was stored."""
        self._answer(index, None)

    def refuse(self, index: int, message: Outgoing, error: Exception) -> None:
        """This one was not, or nobody knows; so no other of its key may follow."""
        if message.key is not None:
            self.refused.setdefault((message.destination, message.key), message.message_id)
        self._answer(index, error)

    def _answer(self, index: int, answer: Exception | None) -> None:
        self.answers[index] = answer
        if len(self.answers) == self._size and not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One message of a call, as it waits."""

    publishing: Publishing
    index: int
    message: Outgoing
    content: ServiceBusMessage | AmqpAnnotatedMessage

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for its answer."""
        return self.index not in self.publishing.answers and not self.publishing.done.done()

    def accept(self) -> None:
        """See `Publishing.accept`."""
        self.publishing.accept(self.index)

    def refuse(self, error: Exception) -> None:
        """See `Publishing.refuse`."""
        self.publishing.refuse(self.index, self.message, error)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a broker was told; in seconds and bytes."""

    timeout: float
    idle_timeout: float
    max_message_size: int | None


class EntitySender:
    """Sends what is put into it, in order, as many messages at a time as one transfer holds, whoever they are from.

    Its task runs while there is something to send, and for `idle_timeout` after that; then the link is closed. `start`
    starts it. Raises `ValueError` for an entity that the client is not for.
    """

    def __init__(
        self,
        client: ServiceBusClient,
        entity: str,
        place: str,
        limits: Limits,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._client = client
        self._entity = entity
        self._place = place
        self._limits = limits
        self._start = start
        self._new_link()  # only to see that the client is for it
        self._link: ServiceBusSender | None = None
        self._openers: list[asyncio.Future[Exception | None]] = []
        self._queue: deque[Entry] = deque()
        self._taken: Sequence[Entry] = ()
        self._filled = asyncio.Event()
        self._resting = False
        self._ending = False
        self._task: asyncio.Task[None] | None = None
        self._shared: Literal["by all", "by one key", "by none"] = "by all"
        """A transfer. Partitioned entities refuse some messages together that they take apart."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is on its way."""
        return not (self._queue or self._openers) and (self._resting or self._task is None)

    def open(self) -> asyncio.Future[Exception | None]:
        """Open the link, if it is not; None, or why that failed."""
        opened: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._openers.append(opened)
        self._wake()
        return opened

    def put(self, entry: Entry) -> None:
        """Send it when its turn comes; `entry.publishing` gets the answer."""
        self._queue.append(entry)
        self._wake()

    def end(self) -> None:
        """Close the link when all is sent that waits now."""
        self._ending = True
        self._filled.set()

    def _wake(self) -> None:
        self._filled.set()
        if self._task is None:
            self._task = self._start(self._run())

    async def _run(self) -> None:
        try:
            while await self._is_filled():
                await self._send_some()
        finally:
            self._task = None
            self._give_up()
            link, self._link = self._link, None
            if link is not None:
                await close(link)

    def _give_up(self) -> None:
        """Let nobody wait for a task that was cancelled."""
        for entry in (*self._taken, *self._queue):
            if entry.wanted:
                entry.refuse(closed_error(self._place))
        self._queue.clear()
        self._answer_openers(closed_error(self._place))

    async def _is_filled(self) -> bool:
        """Wait until there is something to do; False when the link is not needed any more."""
        while not (self._queue or self._openers or self._ending):
            self._filled.clear()
            self._resting = True
            try:
                async with asyncio.timeout(self._limits.idle_timeout):
                    await self._filled.wait()
            except TimeoutError:
                break
            finally:
                self._resting = False
        return bool(self._queue or self._openers)

    async def _send_some(self) -> None:
        """Send as much as goes into one transfer."""
        try:
            batch = await self._new_batch()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told, and the next get a new link
            self._taken = tuple(self._queue)
            self._queue.clear()
            self._answer_openers(error)
            self._fail(self._taken, error)
        else:
            self._answer_openers(None)
            self._taken = self._fill(batch)
            if self._taken:
                await self._send(self._taken, batch)
        self._taken = ()

    def _answer_openers(self, error: Exception | None) -> None:
        for opened in self._openers:
            if not opened.done():
                opened.set_result(error and self._explain(error))
        self._openers.clear()

    def _fill(self, batch: ServiceBusMessageBatch) -> list[Entry]:
        """Move into the batch what waits and fits; or take the first alone, if it is too large for any batch."""
        entries: list[Entry] = []
        passed_over: list[Entry] = []
        while self._queue:
            entry = self._queue.popleft()
            if not self._is_due(entry):
                continue
            if entries and self._shared == "by one key" and entry.message.key != entries[0].message.key:
                passed_over.append(entry)
            elif entries and self._shared == "by none":
                passed_over.append(entry)
                break
            elif self._fits(batch, entry):
                entries.append(entry)
            elif entries and entry.wanted:
                passed_over.append(entry)
                break
            elif entry.wanted and self._goes_alone(batch, entry):
                entries.append(entry)
                break
        self._queue.extendleft(reversed(passed_over))
        return entries

    def _is_due(self, entry: Entry) -> bool:
        """Whether it is still to be sent, after what became of those before it."""
        publishing, message = entry.publishing, entry.message
        if not entry.wanted:
            return False
        if error := publishing.failures.get(self._entity):
            entry.refuse(self._explain(error))
            return False
        if message.key is not None and (refused := publishing.refused.get((self._entity, message.key))):
            problem = (
                f"message {message.message_id} was not sent to {self._place}, because message {refused}, which comes "
                "before it and has the same key, was not accepted. Publish it after that one."
            )
            entry.refuse(BrokerUnavailableError(problem))
            return False
        return True

    def _fits(self, batch: ServiceBusMessageBatch, entry: Entry) -> bool:
        """Whether it is in the batch now; what no batch could carry is refused."""
        try:
            batch.add_message(entry.content)
        except MessageSizeExceededError:
            return False
        except Exception as error:  # noqa: BLE001 - one message must not end the task that others rely on
            problem = f"message {entry.message.message_id} cannot be written in AMQP ({type(error).__name__}: {error})"
            entry.refuse(BrokerRefusedError(problem))
            return False
        return True

    def _goes_alone(self, batch: ServiceBusMessageBatch, entry: Entry) -> bool:
        """Whether one that no batch holds may be sent; else it is refused."""
        measure = ServiceBusMessageBatch(_UNLIMITED)
        measure.add_message(entry.content)
        size, limit = measure.size_in_bytes, max(batch.max_size_in_bytes, self._limits.max_message_size or 0)
        if size > limit:
            entry.refuse(MessageTooLargeError(entry.message.name, size, limit))
        return size <= limit

    async def _send(self, entries: Sequence[Entry], batch: ServiceBusMessageBatch | None = None) -> bool:
        """Send them in one transfer, which is accepted as a whole or refused as a whole; whether all were accepted.

        If it is refused for what is in it, in smaller ones, until it is known what that was.
        """
        error = await self._transfer(entries, batch)
        if error is None:
            for entry in entries:
                entry.accept()
        elif not concerns_content(error):
            self._fail(entries, error)
        elif len(entries) > 1:
            return await self._send_apart(entries)
        else:
            entries[0].refuse(self._explain(error))
        return error is None

    async def _send_apart(self, entries: Sequence[Entry]) -> bool:
        by_key: dict[str | None, list[Entry]] = {}
        for entry in entries:
            by_key.setdefault(entry.message.key, []).append(entry)
        several = len(by_key) > 1
        all_accepted = True
        for part in by_key.values() if several else [[entry] for entry in entries]:
            due = [entry for entry in part if self._is_due(entry)]
            accepted = bool(due) and await self._send(due)
            all_accepted &= accepted and len(due) == len(part)
        if all_accepted:
            self._shared = "by one key" if several else "by none"
        return all_accepted

    async def _transfer(self, entries: Sequence[Entry], batch: ServiceBusMessageBatch | None) -> Exception | None:
        try:
            content: ServiceBusMessage | AmqpAnnotatedMessage | ServiceBusMessageBatch = entries[0].content
            if len(entries) > 1:
                content = batch or await self._batch_of(entries)
            link = self._link or await self._open_link()
            latest = max(entry.publishing.deadline for entry in entries)
            seconds = max(latest - asyncio.get_running_loop().time(), 0.001)
            # The client's own timeout ends in better order, but does not work in every case.
            await within(seconds, link.send_messages(content, timeout=seconds))
        except Exception as error:  # noqa: BLE001 - as in _send_some
            return error
        return None

    async def _batch_of(self, entries: Sequence[Entry]) -> ServiceBusMessageBatch:
        batch = await self._new_batch()
        for entry in entries:
            batch.add_message(entry.content)
        return batch

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        """What became of these is not known: use the link no more, and try nothing else of the calls they are from."""
        for entry in entries:
            entry.publishing.failures[self._entity] = error
            if entry.wanted:
                entry.refuse(self._explain(error))
        link, self._link = self._link, None
        if link is not None:
            _ = self._start(close(link))  # takes up to a second, in which a new one can be opened

    async def _new_batch(self) -> ServiceBusMessageBatch:
        """An empty one, as large as the service takes it from this link."""
        link = self._link or await self._open_link()
        return await link.create_message_batch()

    async def _open_link(self) -> ServiceBusSender:
        link = self._new_link()
        await within(self._limits.timeout, link.__aenter__())
        self._link = link
        return link

    def _new_link(self) -> ServiceBusSender:
        # For a topic as well: the two have one set of names, and are sent to in the same way.
        return self._client.get_queue_sender(self._entity)

    def _explain(self, error: Exception) -> Exception:
        return explain(error, self._place, self._limits.timeout)


async def close(link: ServiceBusSender) -> None:
    """Close it, or give up in time; it is not needed any more."""
    with contextlib.suppress(Exception):
        await within(CLOSE_SECONDS, link.close())


async def within(seconds: float, working: Coroutine[Any, Any, _R]) -> _R:
    """What the client returns, or `TimeoutError`. On Python 3.11 it may overlook that it is cancelled, the first time.

    It works in a task of its own, so that what it leaves behind goes with that: a task keeps its last cancellation.
    """
    task = asyncio.ensure_future(working)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        for _ in range(3):
            if not task.done():
                task.cancel()
                await asyncio.wait((task,), timeout=_CANCEL_SECONDS)
    if not task.done() or task.cancelled():
        raise TimeoutError
    return task.result()


def closed_error(place: str) -> Exception:
    """What those get who come too late, or waited when it ended."""
    return BrokerUnavailableError(f"the broker for {place} was closed")
