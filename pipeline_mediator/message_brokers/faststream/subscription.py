"""Deliveries from any FastStream broker: acknowledged when they are settled, not when FastStream's handler returns."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError
from pipeline_mediator.message_brokers.faststream.held import Held, Holding
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Delivery, Later

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.message_brokers.faststream.broker import FastStreamBroker
    from pipeline_mediator.message_brokers.protocol import DeadLetterQueue

__all__ = ["Consuming", "FastStreamSubscription"]

_LOOK_SECONDS = 1.0
"""How often a receive that waits looks whether the broker is still there."""


class Consuming(Protocol):
    """What one kind of broker does for a subscription."""

    @property
    def hold(self) -> float | None:
        """For how many seconds the broker keeps a message for us unless it is told again; None for ever."""
        ...

    @property
    def waits(self) -> bool:
        """Whether FastStream's handler has to wait until its message is settled: the broker counts by position."""
        ...

    @property
    def dead_letters(self) -> DeadLetterQueue | None:
        """What was given up; None where it is the broker's own tools that read it."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the client has a connection at this moment."""
        ...

    async def open(self, take: Callable[[Any, str], Awaitable[None]]) -> None:
        """Check what is there, make what is missing, and have messages taken, with their destination."""
        ...

    async def close(self) -> None:
        """Have no more taken."""
        ...

    def read(self, raw: Any, destination: str, now: float) -> Held:
        """A message as a delivery. Must not raise: what cannot be read is handed over as it is."""
        ...

    async def keep(self, held: Held) -> None:
        """Tell the broker that it is still being worked on."""
        ...

    async def ack(self, held: Held) -> None:
        """It is done with."""
        ...

    async def back(self, held: Held, delay: float) -> bool:
        """Have the broker deliver it again after `delay`; False where it must be kept here instead."""
        ...

    async def release(self, held: Held) -> None:
        """The subscription ends: have it delivered again at once."""
        ...

    async def bury(self, held: Held, reason: str) -> None:
        """Write it down as a dead letter; it is acknowledged afterwards."""
        ...

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of the client as one of ours."""
        ...


class FastStreamSubscription:
    """Messages of some destinations, handed to one group of handlers; see `Subscription`.

    Made by `FastStreamBroker.subscribe`, which says what each kind of broker can do. asyncio only.
    """

    def __init__(self, broker: FastStreamBroker, consuming: Consuming, name: str, *, prefetch: int) -> None:
        self._broker = broker
        self._consuming = consuming
        self._name = name
        self._prefetch = prefetch
        self._holding = Holding()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._open = False
        self._keeping: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The consumer group."""
        return self._name

    @property
    def dead_letters(self) -> DeadLetterQueue | None:
        """What it has given up; None where it is the broker's own tools that read it."""
        return self._consuming.dead_letters

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery, and return at most `limit`; see `Subscription.receive`."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one delivery")
        loop = asyncio.get_running_loop()
        while True:
            if not self._open:
                raise BrokerUnavailableError(f"subscription {self._name!r} is not open: receive within `async with`")
            # Nothing is awaited between taking and returning, so that a cancellation loses none.
            if taken := self._holding.take(limit, loop.time()):
                return [held.delivery for held in taken]
            if not self._consuming.connected:
                await asyncio.sleep(_LOOK_SECONDS)
                if not self._consuming.connected:
                    raise BrokerUnavailableError(
                        f"subscription {self._name!r} has no connection to its broker; FastStream's client is to "
                        "connect again by itself"
                    )
            self._changed.clear()
            with anyio.move_on_after(min(_LOOK_SECONDS, max(0.0, self._holding.next_due - loop.time()))):
                await self._changed.wait()

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Carry out the outcomes; see `Subscription.settle`."""
        answers = list(await asyncio.gather(*map(self._settle, deliveries)))
        self._look()
        return answers

    async def _settle(self, delivery: Delivery) -> Exception | None:
        held = self._holding.out(delivery)
        if held is None:
            return BrokerRefusedError(
                f"message {delivery.message_id} is not out with subscription {self._name!r}: it is settled or lost"
            )
        try:
            await self._carry_out(held, delivery)
        except Exception as error:  # noqa: BLE001  # what a client raises is no list that could be written down
            ours = self._consuming.explain(error, f"settle message {delivery.message_id}")
            if isinstance(ours, BrokerRefusedError) and (held.buried or not isinstance(delivery.outcome, Dead)):
                self._done(held)  # it is not ours any more
            return ours
        return None

    async def _carry_out(self, held: Held, delivery: Delivery) -> None:
        outcome = delivery.outcome
        if isinstance(outcome, Dead) and not held.buried:
            await self._consuming.bury(held, outcome.reason)
            held.buried = True
        if isinstance(outcome, Ack | Dead):
            self._holding.go_on(held)
            self._look()
            await self._consuming.ack(held)
        else:
            delay = outcome.delay if isinstance(outcome, Later) else 0.0
            if not await self._consuming.back(held, delay):
                self._postpone(held, delay, counts=outcome is not None)
                return
        self._done(held)

    def _postpone(self, held: Held, delay: float, *, counts: bool) -> None:
        again = replace(held.delivery, attempt=held.delivery.attempt + counts, outcome=None, on_lost=None)
        self._holding.postpone(held, again, asyncio.get_running_loop().time() + delay)

    def _done(self, held: Held) -> None:
        self._holding.finish(held)
        if held.done is not None:
            held.done.set()

    def _look(self) -> None:
        self._changed.set()
        self._room.set()

    async def _take(self, raw: Any, destination: str) -> None:
        """FastStream's handler: returns when there is room for more, or, where it has to, when this one is settled."""
        if not self._open:
            return
        held = self._consuming.read(raw, destination, asyncio.get_running_loop().time())
        if self._consuming.waits:
            held.done = asyncio.Event()
        self._holding.add(held)
        self._look()
        if held.done is not None:
            await held.done.wait()
        while self._open and len(self._holding) >= self._prefetch:
            self._room.clear()
            await self._room.wait()

    async def _keep(self, hold: float) -> None:
        """Keep the hold on everything that is here; what it cannot be kept on for as long as it lasts is lost."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(hold / 3)
            for held in self._holding:
                if self._consuming.connected:
                    with suppress(Exception):  # then its time runs out, and it is lost
                        await self._consuming.keep(held)
                        held.kept = loop.time()
                if loop.time() - held.kept >= hold:
                    self._holding.lose(held)
                    self._look()

    async def __aenter__(self) -> Self:
        await self._broker.__aenter__()
        try:
            self._open = True
            await self._consuming.open(self._take)
        except BaseException as error:
            self._open = False
            await self._broker.__aexit__(type(error), error, error.__traceback__)
            if not isinstance(error, Exception):
                raise
            raise self._consuming.explain(error, f"subscribe {self._name!r}") from error
        if self._consuming.hold is not None:
            self._keeping = asyncio.create_task(self._keep(self._consuming.hold))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._open = False
        self._look()
        with anyio.CancelScope(shield=True):
            try:
                with anyio.move_on_after(self._broker.timeout):
                    if self._keeping is not None:
                        self._keeping.cancel()
                        await asyncio.wait([self._keeping])
                    await self._close()
            finally:
                await self._broker.__aexit__(kind, error, trace)

    async def _close(self) -> None:
        left = sorted(self._holding, key=lambda held: held.position)
        self._holding = Holding()
        for held in left:
            if held.done is not None:
                held.done.set()
        with suppress(Exception):  # a connection that is gone; what it had is delivered again anyway
            await self._consuming.close()
        for held in left:
            with suppress(Exception):
                await self._consuming.release(held)
