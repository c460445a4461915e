"""A broker within the process: for one-process applications, examples and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio
from anyio.lowlevel import checkpoint

from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers.memory_dead_letters import DeadLetters, MemoryDeadLetterQueue
from pipeline_mediator.message_brokers.memory_queue import SYSTEM, Copy, Queue, closed_error
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Dead, Later

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.message_brokers.protocol import Delivery, Outgoing

__all__ = ["MemoryBroker", "MemorySubscription"]

_FEATURES: Final = BrokerFeatures(system=SYSTEM, durable=False, headers=True, ordered_by_key=True)


class MemoryBroker:
    """Hands messages to subscriptions of the same process, and answers when they were handled.

        broker = MemoryBroker()
        orders = broker.subscribe("orders", name="warehouse")

    `publish` puts a copy of each message into every subscription of its destination and returns when all of them
    settled it as done or dead; so an outbox in front of it keeps what a killed process had not handled. A destination
    without subscription accepts at once. What is not settled `timeout` seconds after `publish` began is a
    `BrokerUnavailableError` for that message; it stays in its subscription all the same, and publishing it again while
    it is there waits for that copy instead of adding one.

    A subscription holds at most `capacity` messages; a full one makes publishers wait. As many dead letters are kept,
    the latest. Usable at once; leaving the last `async with` closes it, and whoever waits gets an error. Runs on
    asyncio and trio, in one event loop.

    Raises `ConfigurationError` for a subscription without destination, or with a name that is taken.
    """

    def __init__(self, *, capacity: int = 1000, timeout: float = 10.0) -> None:
        if capacity < 1 or timeout <= 0:
            raise ConfigurationError(f"capacity={capacity}, timeout={timeout}: both must be above 0")
        self._capacity = capacity
        self._timeout = timeout
        self._queues: dict[str, Queue] = {}
        self._dead_letters = DeadLetters(capacity)
        self._users = 0
        self._closed = False

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises."""
        return _FEATURES

    @property
    def dead_letters(self) -> Sequence[Delivery]:
        """What all subscriptions gave up on, oldest first; `outcome` has the reason."""
        return tuple(self._dead_letters.deliveries())

    def subscribe(self, *destinations: str, name: str) -> MemorySubscription:
        """A subscription to what is published to `destinations` from now on, until it or the broker is closed."""
        if not destinations:
            raise ConfigurationError(f"subscription {name!r} has no destination: subscribe('orders', name={name!r})")
        if name in self._queues:
            raise ConfigurationError(
                f"this broker already has a subscription {name!r}: give each group a name of its own"
            )
        if self._closed:
            raise closed_error()
        queue = Queue(name, frozenset(destinations), self._capacity)
        self._queues[name] = queue
        return MemorySubscription(queue, self._queues, self._dead_letters)

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what every subscription settled; see `MessageBroker.publish`."""
        await checkpoint()
        if self._closed:
            return [closed_error() for _ in batch]
        targets = [
            [one for one in self._queues.values() if message.destination in one.destinations] for message in batch
        ]
        copies: list[list[Copy]] = [[] for _ in batch]
        last = ""
        with anyio.move_on_after(self._timeout):
            for message, queues, mine in zip(batch, targets, copies, strict=True):
                for queue in queues:
                    last = queue.name
                    mine.append(await queue.put(message))
            for mine in copies:
                for copy in mine:
                    await copy.wait()
        return [
            self._answer(mine) or (self._full(last) if len(mine) < len(queues) else None)
            for queues, mine in zip(targets, copies, strict=True)
        ]

    def _answer(self, copies: Sequence[Copy]) -> Exception | None:
        for copy in copies:
            if copy.lost:
                return closed_error()
            if not copy.settled:
                return BrokerUnavailableError(
                    f"subscription {copy.subscription!r} did not settle the message within {self._timeout:g} s: its "
                    "consumer is not running, or its handlers take longer. Start it, or give MemoryBroker a longer "
                    "timeout."
                )
        return None

    def _full(self, subscription: str) -> Exception:
        return BrokerUnavailableError(
            f"subscription {subscription!r} is full, and no place became free within {self._timeout:g} s. Start its "
            "consumer, or give MemoryBroker a larger capacity."
        )

    async def __aenter__(self) -> Self:
        self._users += 1
        self._closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._users -= 1
        if self._users == 0:
            self._closed = True
            while self._queues:
                self._queues.popitem()[1].close()


class MemorySubscription:
    """One consumer group's copy of what is published; see `Subscription`. Made by `MemoryBroker.subscribe`."""

    def __init__(self, queue: Queue, queues: dict[str, Queue], dead_letters: DeadLetters) -> None:
        self._queue = queue
        self._queues = queues
        self._letters = dead_letters
        self._dead_letters = MemoryDeadLetterQueue(queue, dead_letters)

    @property
    def name(self) -> str:
        """The consumer group."""
        return self._queue.name

    @property
    def dead_letters(self) -> MemoryDeadLetterQueue:
        """What it has given up; of all subscriptions of the broker together the latest `capacity` are kept."""
        return self._dead_letters

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery, and return at most `limit`. Raises `BrokerUnavailableError` once closed."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one delivery")
        await checkpoint()
        while True:
            if self._queue.closed:
                raise closed_error()
            if copies := list(self._queue.take(limit, anyio.current_time())):
                return [copy.hand_over() for copy in copies]
            with anyio.CancelScope(deadline=self._queue.next_due):
                await self._queue.filled.wait()

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Carry out the outcomes; see `Subscription.settle`."""
        await checkpoint()
        return [self._settle(delivery) for delivery in deliveries]

    def _settle(self, delivery: Delivery) -> Exception | None:
        copy = delivery.tag
        if not isinstance(copy, Copy) or not self._queue.holds(copy) or copy.delivery is not delivery:
            return BrokerRefusedError(f"message {delivery.message_id} is not out with subscription {self.name!r}")
        outcome = delivery.outcome
        if outcome is None:
            copy.attempts -= 1
            self._queue.postpone(copy, anyio.current_time())
        elif isinstance(outcome, Later):
            self._queue.postpone(copy, anyio.current_time() + outcome.delay)
        else:
            if isinstance(outcome, Dead):
                self._letters.add(delivery, copy.message, outcome.reason)
            self._queue.finish(copy)
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._queues.get(self.name) is self._queue:
            del self._queues[self.name]
        self._queue.close()
