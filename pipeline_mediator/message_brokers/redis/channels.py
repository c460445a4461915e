"""Listening to Redis Pub/Sub: what is said while nobody listens is not heard, and what waits here waits in memory."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import BrokerRefusedError, ConfigurationError
from pipeline_mediator.message_brokers.protocol import Dead, Delivery, Later
from pipeline_mediator.message_brokers.redis.entries import SYSTEM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.message_brokers.redis.client import RedisClient

__all__ = ["RedisChannelSubscription"]

logger = logging.getLogger(__name__)

_RIGHTS: Final = "+subscribe +ping &<channel>"
_QUIET: Final = 20.0
"""Seconds without a word after which the server is asked whether it is still there."""


class _Heard:
    """A message, and how often it was handed over."""

    __slots__ = ("attempts", "body", "channel", "out")

    def __init__(self, channel: str, body: bytes) -> None:
        self.channel = channel
        self.body = body
        self.attempts = 0
        self.out: Delivery | None = None


class RedisChannelSubscription:
    """What is published to some channels, at most once; see `Subscription`. Made by `RedisMessageBroker.subscribe`.

        async with broker.subscribe("orders", name="screens") as subscription:
            deliveries = await subscription.receive(16)
            ...                                    # each has its outcome now
            await subscription.settle(deliveries)

    For what may be missed: prices on a screen, caches to be dropped. A message is lost when the connection is down at
    that moment, when the process ends, and when `capacity` messages wait already (`dropped` counts those; a burst of
    them is one line in the log). Whoever needs each message takes `RedisStreamBroker`.

    Settling asks nothing of the server. `Later` and giving back keep the message in this process's memory, within
    `capacity`; a dead one is a line in the log, and gone. When the connection drops, `receive` raises once and the next
    call subscribes again. Order is the server's, but for what comes again; keys are not known, since the transport
    carries no headers.

    Entering raises `BrokerUnavailableError`, or `BrokerRefusedError` for missing rights.
    """

    def __init__(self, client: RedisClient, channels: Sequence[str], *, prefix: str, name: str, capacity: int) -> None:
        if not channels or not name or capacity < 1:
            raise ConfigurationError(
                f"subscription {name!r} to {channels!r} with capacity={capacity}: give it a name, a channel and a "
                "capacity above 0, subscribe('orders', name='screens')"
            )
        self._client = client
        self._name = name
        self._channels = {f"{prefix}{channel}".encode(): channel for channel in channels}
        self._capacity = capacity
        self.dropped = 0
        """Messages that came when `capacity` others waited, since it was made."""
        self._begun = False
        self._line = client.line()
        self._forget()

    def _forget(self) -> None:
        self._ready: deque[_Heard] = deque()
        self._later: list[tuple[float, int, _Heard]] = []
        self._numbers = count()
        self._out = 0
        self._bursting = 0
        self._error: Exception | None = None
        self._filled = asyncio.Event()
        self._asked = asyncio.Event()

    @property
    def name(self) -> str:
        """What the inbox knows it by."""
        return self._name

    @property
    def dead_letters(self) -> None:
        """Pub/Sub keeps nothing."""
        return

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery; see `Subscription.receive`."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one delivery")
        if not self._begun:
            raise ConfigurationError(f"subscription {self._name!r} was not entered: async with subscription: ...")
        self._asked.set()
        while True:
            self._bring_back()
            if self._ready:
                return [self._hand_over() for _ in range(min(limit, len(self._ready)))]
            if (error := self._error) is not None:
                self._error = None
                self._asked.clear()
                raise error
            self._filled.clear()
            due = self._later[0][0] - _now() if self._later else math.inf
            with suppress(TimeoutError):
                async with asyncio.timeout(None if due == math.inf else max(0.0, due)):
                    await self._filled.wait()

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Nobody is told; what has to come again is kept in memory. See `Subscription.settle`."""
        return [self._settle(delivery) for delivery in deliveries]

    def _settle(self, delivery: Delivery) -> Exception | None:
        heard = delivery.tag
        if not isinstance(heard, _Heard) or delivery.subscription != self._name:
            return BrokerRefusedError(f"message {delivery.message_id} is not out with subscription {self._name!r}")
        if heard.out is not delivery:
            return None
        heard.out = None
        self._out -= 1
        outcome = delivery.outcome
        if outcome is None:
            heard.attempts -= 1
            self._ready.appendleft(heard)
            self._filled.set()
        elif isinstance(outcome, Later):
            heappush(self._later, (_now() + outcome.delay, next(self._numbers), heard))
            self._filled.set()
        elif isinstance(outcome, Dead):
            logger.error(
                "a message from channel %r is given up after %d attempts, and Pub/Sub keeps none: %s",
                heard.channel,
                delivery.attempt,
                outcome.reason,
            )
        return None

    def _hand_over(self) -> Delivery:
        heard = self._ready.popleft()
        heard.attempts += 1
        self._out += 1
        delivery = Delivery(
            heard.channel, heard.body, None, {}, None, None, heard.attempts, self._name, tag=heard, system=SYSTEM
        )
        heard.out = delivery
        return delivery

    def _bring_back(self) -> None:
        now = _now()
        while self._later and self._later[0][0] <= now:
            self._ready.append(heappop(self._later)[2])

    async def __aenter__(self) -> Self:
        if self._begun:
            raise ConfigurationError(f"subscription {self._name!r} is entered already; make one for each consumer")
        await self._client.enter()
        self._forget()
        try:
            await self._subscribe()
        except BaseException:
            await self._hang_up()
            raise
        self._begun = True
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._begun = False
        self._task.cancel()
        await finish(self._end(), seconds=2 * self._client.timeout)

    async def _end(self) -> None:
        await asyncio.wait((self._task,))
        await self._hang_up()

    async def _hang_up(self) -> None:
        await self._line.close()
        await self._client.leave()

    async def _subscribe(self) -> None:
        # One command for each, so that each has its answer; messages may come between the answers.
        for said in await self._line.execute([("SUBSCRIBE", channel) for channel in self._channels]):
            if isinstance(said, Exception):
                raise self._client.explain(said, reading=_RIGHTS)
            self._hear(said)

    async def _listen(self) -> None:
        """One connection after another; a new one when somebody asks again after the error."""
        connected = True
        while True:
            try:
                if not connected:
                    await self._subscribe()
                    connected = True
                await self._hear_next()
            except Exception as error:  # noqa: BLE001 - whoever receives gets it
                connected = False
                await self._line.close()
                self._error = error
                self._filled.set()
                while self._is_unheard() or not self._asked.is_set():
                    self._asked.clear()
                    await self._asked.wait()

    def _is_unheard(self) -> bool:
        return self._error is not None

    async def _hear_next(self) -> None:
        try:
            said = await self._line.read(seconds=_QUIET)
        except TimeoutError:
            # A line that was cut silently says nothing either.
            (said,) = await self._line.execute([("PING",)])
        self._hear(said)

    def _hear(self, said: Any) -> None:
        # Else it is the answer to a command: of one that subscribes, or "pong".
        channel = self._channels.get(said[1]) if said[0] == b"message" else None
        if channel is None:
            return
        if len(self._ready) + len(self._later) + self._out >= self._capacity:
            if not self._bursting:
                logger.warning(
                    "subscription %r has %d messages waiting; what comes now is dropped", self._name, self._capacity
                )
            self._bursting += 1
            self.dropped += 1
            return
        if self._bursting:
            logger.warning("subscription %r takes messages again; %d were dropped", self._name, self._bursting)
            self._bursting = 0
        self._ready.append(_Heard(channel, said[2]))
        self._filled.set()


def _now() -> float:
    return asyncio.get_running_loop().time()
