"""What a consumer receives from a queue or from the subscription of a topic."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline_mediator.errors import BrokerUnavailableError, DestinationError
from pipeline_mediator.message_brokers.azure.dead_letters import AzureDeadLetters
from pipeline_mediator.message_brokers.azure.errors import explain_receiving, is_of_another_kind, lacks_entity
from pipeline_mediator.message_brokers.azure.intake import Intake
from pipeline_mediator.message_brokers.azure.locks import LockedMessages
from pipeline_mediator.message_brokers.azure.sessions import LockedSessions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType

    from pipeline_mediator.message_brokers.azure.receiver import Access
    from pipeline_mediator.message_brokers.protocol import Delivery

__all__ = ["AzureSubscription"]

_logger = logging.getLogger(__name__)


class _Locked(Protocol):
    """What this process has locked, with sessions or without."""

    async def open(self) -> None: ...
    async def run(self) -> None: ...
    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]: ...
    async def renew_due(self) -> float: ...
    async def close(self) -> None: ...


class AzureSubscription:
    """The messages of a queue, or of the subscription of a topic, for one group of handlers; see `Subscription`.

        async with broker.subscribe("orders", "warehouse", sessions=True) as subscription:
            deliveries = await subscription.receive(16)

    Made by `AzureMessageBroker.subscribe`. Messages are locked, and the locks renewed from `receive` to `settle`, by
    one task, after half their time, at the latest after 15 s; a delivery whose lock is gone is told. Whatever uses a
    link to the service does so one after the other.

    **Without sessions** there is no order. `Later` sends a copy for then and completes the message, so the entity's
    maximum delivery count does not matter; `Later(0)` abandons it, which the service counts. The copy has a message id
    of its own, since an entity that detects duplicates drops what it has seen, and the delivery the original one. That
    needs the right to send. In a topic every subscription gets the copy; those of this class skip what is not for them,
    for others see docs/azure.md.

    **With sessions** a message's session is its key. At most `max_sessions` are locked at a time, each over a
    connection of its own, and one message of each is out; after `session_idle` seconds without a message another
    session is taken. `Later` abandons the message and keeps its session locked until then, so that nothing overtakes
    it; as many sessions again may wait like that. Attempts are the service's: its maximum delivery count applies.

    What is given back is released, which the service does not count as a delivery; with sessions by giving up its
    session. `attempt` is 1, and 1 for each time that a message was abandoned, its lock ran out, or it was copied.

    `prefetch` messages may be received ahead, and are kept locked; no more of them while one has waited for half of its
    lock. Dead letters are the service's own. Entering raises `DestinationError` for an entity that does not exist or is
    of the other kind, `BrokerRefusedError` for a lack of rights, `BrokerUnavailableError`.
    """

    def __init__(self, access: Access, name: str, *, max_sessions: int, session_idle: float, prefetch: int) -> None:
        self._access = access
        self._name = name
        self._max_sessions = max_sessions
        self._session_idle = session_idle
        self._prefetch = prefetch
        self._dead_letters = AzureDeadLetters(access, name)
        self._locked: _Locked | None = None
        self._intake = Intake(prefetch)
        self._held = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._settling: asyncio.Task[Sequence[Exception | None]] | None = None

    @property
    def name(self) -> str:
        """The consumer group."""
        return self._name

    @property
    def dead_letters(self) -> AzureDeadLetters:
        """What the service keeps in the entity's dead-letter queue."""
        return self._dead_letters

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery, and return at most `limit`; see `Subscription.receive`."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one delivery")
        if self._locked is None:
            raise self._not_entered()
        return await self._intake.take(limit)

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Carry out the outcomes; see `Subscription.settle`. What has begun is ended, also for who no longer waits."""
        if self._locked is None:
            return [self._not_entered() for _ in deliveries]
        if self._settling is not None:
            await asyncio.wait((self._settling,))
        self._settling = asyncio.ensure_future(self._locked.settle(deliveries))
        return await asyncio.shield(self._settling)

    async def __aenter__(self) -> Self:
        if self._locked is not None:
            raise RuntimeError(f"subscription {self._name!r} was entered already")
        self._intake = Intake(self._prefetch)
        locked = self._make()
        self._access.join()
        try:
            await self._open(locked)
        except BaseException:
            await locked.close()
            await self._access.leave()
            raise
        self._locked = locked
        self._tasks = [asyncio.ensure_future(self._watch(one)) for one in (locked.run, partial(self._renew, locked))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        locked, self._locked = self._locked, None
        self._intake.fail(self._not_entered())
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait([*self._tasks, *([self._settling] if self._settling else [])])
            if locked is not None:
                await locked.close()
        finally:
            await self._access.leave()

    def _make(self) -> _Locked:
        if self._max_sessions:
            return LockedSessions(
                self._access,
                self._name,
                self._intake,
                self._held,
                max_sessions=self._max_sessions,
                idle=self._session_idle,
            )
        return LockedMessages(self._access, self._name, self._intake, self._held)

    async def _open(self, locked: _Locked) -> None:
        try:
            await locked.open()
        except Exception as error:
            if isinstance(error, ValueError):
                raise DestinationError(f"there can be no subscription of {self._access.place}: {error}") from error
            explained = explain_receiving(error, self._access.place, self._access.timeout)
            if lacks_entity(error) or is_of_another_kind(error):
                raise DestinationError(str(explained)) from error
            raise explained from error

    async def _renew(self, locked: _Locked) -> None:
        while True:
            self._held.clear()
            when = await locked.renew_due()
            try:
                async with asyncio.timeout_at(None if when == inf else when):
                    await self._held.wait()
            except TimeoutError:
                continue

    async def _watch(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await run()
        except Exception as error:
            _logger.exception("subscription %r has ended", self._name)
            self._intake.fail(
                BrokerUnavailableError(f"subscription {self._name!r} has ended: {error!r}. Enter it anew.")
            )

    def _not_entered(self) -> BrokerUnavailableError:
        return BrokerUnavailableError(
            f"subscription {self._name!r} is not open: receive and settle within `async with subscription`"
        )
