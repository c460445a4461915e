"""The dead-letter queue that Service Bus keeps for every queue and subscription."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, TypeVar

from azure.servicebus import ServiceBusSubQueue

from pipeline_mediator.errors import BrokerError
from pipeline_mediator.message_brokers.azure.errors import explain_receiving
from pipeline_mediator.message_brokers.azure.messages import copy_of, delivery_of, outgoing_of, reason_of
from pipeline_mediator.message_brokers.azure.receiver import ReceiverLink, give_back
from pipeline_mediator.message_brokers.azure.sender import within
from pipeline_mediator.message_brokers.protocol import DeadDelivery

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from azure.servicebus import ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusReceiver

    from pipeline_mediator.message_brokers.azure.receiver import Access

__all__ = ["AzureDeadLetters"]

_logger = logging.getLogger(__name__)

_R = TypeVar("_R")

_PAGE: Final = 100
_MOST_COUNTED: Final = 100_000
_MOST_PASSED: Final = 2_000
_WAIT_SECONDS: Final = 1.0
"""Without another message; then there is none, or somebody else has it."""


class AzureDeadLetters:
    """What a subscription has given up, and what the service did: deliveries that failed too often, or were too old.

    See `DeadLetterQueue`. An id is the sequence number. The service tells no count: they are looked at page by page,
    up to 100,000. It gives no message by its number either: to retry or drop one, up to 2,000 before it are locked
    meanwhile, and what lies deeper is not found. `retry` sends a copy, with a message id of its own and its session;
    for a topic it goes to the topic, marked for this subscription (see `AzureSubscription`). When a message died is not
    known.
    """

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self._name = name

    async def count(self) -> int:
        """How many there are, those included that somebody has locked."""
        return await self._use(self._count)

    async def list(self, limit: int, /, *, after: str | None = None) -> Sequence[DeadDelivery]:
        """Oldest first; see `DeadLetterQueue.list`."""
        first = 1 if after is None else int(after) + 1

        async def look(receiver: ServiceBusReceiver) -> Sequence[DeadDelivery]:
            found: list[DeadDelivery] = []
            while len(found) < limit:
                begin = int(found[-1].id) + 1 if found else first
                page = await self._peek(receiver, begin, min(limit - len(found), _PAGE))
                if not page:
                    break
                found.extend(self._dead(message) for message in page)
            return found

        return await self._use(look)

    async def retry(self, ids: Sequence[str], /) -> int:
        """Sent again first, then completed here."""

        async def send(message: ServiceBusReceivedMessage) -> None:
            copy = copy_of(message, attempts=0, only=self._access.subscription)
            delivery = delivery_of(message, self._access.entity, self._name)
            (error,) = await self._access.send([(outgoing_of(delivery), copy)])
            if error is not None:
                raise error

        return await self._use(lambda receiver: self._finish(receiver, ids, send))

    async def drop(self, ids: Sequence[str], /) -> int:
        """Completed, without anything else."""
        return await self._use(lambda receiver: self._finish(receiver, ids, None))

    async def _count(self, receiver: ServiceBusReceiver) -> int:
        count, first = 0, 1
        while count < _MOST_COUNTED and (page := await self._peek(receiver, first, _PAGE)):
            count += len(page)
            first = (page[-1].sequence_number or first) + 1
        return count

    async def _peek(self, receiver: ServiceBusReceiver, first: int, limit: int) -> Sequence[ServiceBusReceivedMessage]:
        peeking = receiver.peek_messages(limit, sequence_number=first, timeout=self._access.timeout)
        return await within(self._access.timeout, peeking)

    def _dead(self, message: ServiceBusReceivedMessage) -> DeadDelivery:
        delivery = delivery_of(message, self._access.entity, self._name)
        dropped = {"DeadLetterReason", "DeadLetterErrorDescription"}
        delivery.headers = {name: value for name, value in delivery.headers.items() if name not in dropped}
        return DeadDelivery(str(message.sequence_number), delivery, reason_of(message))

    async def _finish(
        self,
        receiver: ServiceBusReceiver,
        ids: Sequence[str],
        before: Callable[[ServiceBusReceivedMessage], Coroutine[Any, Any, None]] | None,
    ) -> int:
        wanted = set(ids)
        passed: list[ServiceBusReceivedMessage] = []
        count = 0
        try:
            while wanted and len(passed) < _MOST_PASSED:
                receiving = receiver.receive_messages(_PAGE, max_wait_time=_WAIT_SECONDS)
                messages = await within(self._access.timeout, receiving)
                if not messages:
                    break
                # Those that are passed stay locked, or they would come again; all of this page, whatever fails.
                passed.extend(messages)
                for message in messages:
                    if str(message.sequence_number) in wanted:
                        if before is not None:
                            await before(message)
                        await within(self._access.timeout, receiver.complete_message(message))
                        wanted.discard(str(message.sequence_number))
                        passed.remove(message)
                        count += 1
        finally:
            await self._release(receiver, passed)
        return count

    async def _release(self, receiver: ServiceBusReceiver, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        try:
            for message in messages:
                await give_back(receiver, message, self._access.timeout)
        except Exception as error:  # noqa: BLE001 - their locks run out
            _logger.info("dead letters of %s stay locked for a while: %s", self._access.place, type(error).__name__)

    async def _use(self, use: Callable[[ServiceBusReceiver], Coroutine[Any, Any, _R]]) -> _R:
        link = ReceiverLink(self._make, self._access.timeout)
        self._access.join()
        try:
            return await link.call(use)
        except Exception as error:
            if isinstance(error, BrokerError):
                raise
            raise explain_receiving(error, f"the dead letters of {self._access.place}", self._access.timeout) from error
        finally:
            await link.close()
            await self._access.leave()

    def _make(self) -> ServiceBusReceiver:
        return self._access.receiver(sub_queue=ServiceBusSubQueue.DEAD_LETTER)
