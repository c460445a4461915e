"""One link to receive from: whoever uses it, one after the other, and what waits for messages makes way for the rest.

A receiver of the client is not for concurrent use: a settlement beside a waiting receive takes a fifth of a second
instead of a fifth of a millisecond. So a receive that waits is interrupted. What arrived for it stays in the client's
own queue, and the next receive gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from azure.servicebus.exceptions import MessageLockLostError, MessageNotFoundError, SessionLockLostError

from pipeline_mediator.message_brokers.azure.sender import CLOSE_SECONDS, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from azure.servicebus import ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusClient, ServiceBusReceiver
    from azure.servicebus.amqp import AmqpAnnotatedMessage

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["LOST", "Access", "ReceiverLink", "give_back"]

_logger = logging.getLogger(__name__)

_R = TypeVar("_R")

LOST: Final = (MessageLockLostError, MessageNotFoundError, SessionLockLostError)
"""What the client raises when a message, or its session, is not ours any more."""
_UNDISTURBED_SECONDS: Final = 0.02
"""For so long a receive is not interrupted, so that it gets somewhere between settlements that follow each other."""
_AT_ONCE: Final = 1e-9
"""The client takes no 0; with this it returns what it has."""
_CANCEL_SECONDS: Final = 0.01
_CANCELS: Final = 300


@dataclass(frozen=True, slots=True)
class Access:
    """What a subscription needs of its broker."""

    client: ServiceBusClient
    entity: str
    subscription: str | None
    place: str
    timeout: float
    send: Callable[[Sequence[tuple[Outgoing, AmqpAnnotatedMessage]]], Awaitable[Sequence[Exception | None]]]
    join: Callable[[], None]
    leave: Callable[[], Awaitable[None]]

    def receiver(self, **settings: Any) -> ServiceBusReceiver:
        """A new receiver of the client's, not opened. Raises `ValueError` for an entity that the client is not for."""
        if self.subscription is None:
            return self.client.get_queue_receiver(self.entity, **settings)
        return self.client.get_subscription_receiver(self.entity, self.subscription, **settings)


class ReceiverLink:
    """A receiver of the client, opened when it is first used, and again after it failed where `reopens` says so."""

    def __init__(self, make: Callable[[], ServiceBusReceiver], timeout: float, *, reopens: bool = True) -> None:
        self._make = make
        self._timeout = timeout
        self._reopens = reopens
        self._receiver: ServiceBusReceiver | None = None
        self._lock = asyncio.Lock()
        self._callers = 0
        self._called = asyncio.Event()
        self._closed = False

    async def open(self, seconds: float | None = None) -> ServiceBusReceiver:
        """Open it now, within so many seconds."""
        if self._closed:
            raise ConnectionError("the link was closed")
        if self._receiver is None:
            receiver = self._make()
            try:
                await within(seconds or self._timeout, receiver.__aenter__())
            except BaseException:
                await _close(receiver)
                raise
            self._receiver = receiver
        return self._receiver

    async def call(self, use: Callable[[ServiceBusReceiver], Coroutine[Any, Any, _R]]) -> _R:
        """Use the receiver for something that is answered soon."""
        self._callers += 1
        self._called.set()
        try:
            async with self._lock:
                return await self._use(use)
        finally:
            self._callers -= 1
            if self._callers == 0:
                self._called.clear()

    async def fetch(self, limit: int, seconds: float) -> list[ServiceBusReceivedMessage]:
        """Wait so long for at least one message, and return at most `limit`."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + seconds
        messages: list[ServiceBusReceivedMessage] = []
        while not messages and (left := latest - loop.time()) > 0:
            async with self._lock:
                messages = await self._use(lambda receiver: self._receive(receiver, limit, left))
        return messages

    async def close(self) -> None:
        """Close it, in time, after what is under way; it is not opened again."""
        self._closed = True
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            await _close(receiver)

    async def _use(self, use: Callable[[ServiceBusReceiver], Coroutine[Any, Any, _R]]) -> _R:
        receiver = await self.open()
        try:
            return await use(receiver)
        except LOST:
            raise
        except Exception:
            self._receiver = None
            self._closed = self._closed or not self._reopens
            await _close(receiver)
            raise

    async def _receive(
        self, receiver: ServiceBusReceiver, limit: int, seconds: float
    ) -> list[ServiceBusReceivedMessage]:
        undisturbed = min(_UNDISTURBED_SECONDS, seconds)
        messages = await self._receive_for(receiver, limit, undisturbed)
        # One is enough to end this wait: for more the client would wait on.
        return messages or await self._receive_for(receiver, 1, seconds - undisturbed, self._called)

    async def _receive_for(
        self, receiver: ServiceBusReceiver, limit: int, seconds: float, called: asyncio.Event | None = None
    ) -> list[ServiceBusReceivedMessage]:
        if seconds <= 0 or (called is not None and called.is_set()):
            return []
        receiving = asyncio.ensure_future(receiver.receive_messages(limit, max_wait_time=seconds + 1.0))
        interrupting = asyncio.ensure_future(called.wait()) if called is not None else None
        tasks: list[asyncio.Task[Any]] = [task for task in (receiving, interrupting) if task is not None]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if interrupting is not None:
                interrupting.cancel()
            await _stop(receiving)
        if not receiving.cancelled():
            return receiving.result()
        return await receiver.receive_messages(limit, max_wait_time=_AT_ONCE)


async def give_back(receiver: ServiceBusReceiver, message: ServiceBusReceivedMessage, seconds: float) -> None:
    """Let others have it, as if it had never been received.

    The service counts what is abandoned, not what is released, and the client has no name for releasing; it does it
    itself to what it did not ask for. Where that is not possible, because the message came over a link that is gone,
    it is abandoned.
    """
    releasing: Any = getattr(getattr(receiver, "_handler", None), "settle_messages_async", None)
    number, tag = getattr(message, "_delivery_id", None), getattr(message, "_delivery_tag", None)
    released = False
    if releasing is not None and number is not None and tag is not None:
        try:
            await within(seconds, releasing(number, tag, "released", await_outcome=True, outcome_timeout=seconds))
            released = True
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - not the client's public errors; the link does not know the message
            _logger.debug("message cannot be released: %s", type(error).__name__)
    if not released:
        await within(seconds, receiver.abandon_message(message))


async def _stop(task: asyncio.Task[Any]) -> None:
    """Cancel it, as often as it takes: on Python 3.11 what it waits in may overlook that, when something arrives."""
    for _ in range(_CANCELS):
        if task.done():
            break
        task.cancel()
        await asyncio.wait((task,), timeout=_CANCEL_SECONDS)
    if not task.done():
        raise TimeoutError
    if not task.cancelled():
        task.exception()  # seen, whether it is raised or not


async def _close(receiver: ServiceBusReceiver) -> None:
    with contextlib.suppress(Exception):
        await within(CLOSE_SECONDS, receiver.close())
