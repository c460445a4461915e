"""The consumer: walks what brokers hand over through the pipeline, and tells them what became of it."""

from __future__ import annotations

import logging
import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import anyio

from pipeline_mediator.concurrency import is_cancelled
from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError
from pipeline_mediator.service import Service
from pipeline_mediator.trouble import Trouble, default_backoff, default_pauses, in_words, pause_after

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tenacity.wait import WaitBaseT

    from pipeline_mediator.inbox.protocol import InboxStore
    from pipeline_mediator.message_brokers.protocol import Delivery, Subscription

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

_CLEANED = 100_000
"""Messages that an inbox forgets at a time."""
_CLOSING = 10.0
"""Seconds for what was handled to be settled, and for a subscription to end, once nothing is handled any more."""


class Delivers(Protocol):
    """A mediator, as a consumer sees it."""

    @property
    def inboxes(self) -> Sequence[InboxStore]:
        """What remembers deliveries."""
        ...

    async def deliver(self, delivery: Delivery, /, *, skip_unknown: bool = False) -> None:
        """Walk a delivery, and decide its outcome."""
        ...


class Consumer(Service):
    """Walks what subscriptions hand over through a mediator's pipeline, at least once.

        consumer = Consumer(mediator, broker.subscribe("orders", name="warehouse"))
        async with mediator, consumer:      # beside the application, in its process
            ...
        await consumer.run()                # in a process of its own, until cancelled or stopped

    At most `concurrency` messages are handled at a time; those of one key one after the other, where the broker keeps
    their order. As many more, or `read_ahead`, are fetched meanwhile; a broker is asked for more only when one has been
    settled, so a slow handler slows the broker down and not the memory up. With an inbox on SQLite, one at a time.

    What becomes of a message is decided in the pipeline, by DeadLetterMiddleware and RedeliveryMiddleware, and carried
    out when its chain has ended, by one task per subscription and many at a time. An error that nobody there decided
    about makes the message come again, by `default_backoff`, for ever. What cannot be decoded is given up, body and
    headers as they came; so is a message of an unknown type, unless `unknown="skip"`. One whose type is known and that
    nobody here handles is passed over. One message never stops the others.

    A stop fetches nothing more, gives what was not begun back to the broker, and lets handlers work for `grace` seconds
    more; what is not done then is cancelled and given back, and counts as no attempt. `stop(grace=0)`, and a
    cancellation, do that at once.

    While a broker is away the subscription is left alone, by `pauses` (tenacity's wait strategies), with a line in the
    log for each; the others go on. Whatever else is wrong with a subscription when it begins (no such queue, no rights)
    ends the consumer and is raised. Every `clean_every` (None: never) it has the pipeline's inboxes forget what is
    older than their retention. `name` stands in the log. All times are in seconds.

    Give every group of handlers that shall succeed or fail by itself a subscription, and a mediator, of its own: a
    message comes again as a whole.

    Raises `ConfigurationError` for settings that cannot be.
    """

    def __init__(
        self,
        mediator: Delivers,
        *subscriptions: Subscription,
        concurrency: int = 16,
        read_ahead: int | None = None,
        grace: float = 30.0,
        clean_every: float | None = 600.0,
        unknown: Literal["dead letter", "skip"] = "dead letter",
        pauses: WaitBaseT | None = None,
        name: str = "consumer",
    ) -> None:
        ahead = concurrency if read_ahead is None else read_ahead
        if concurrency < 1 or ahead < 0 or grace < 0 or (clean_every is not None and clean_every <= 0):
            raise ConfigurationError(
                f"Consumer(concurrency={concurrency}, read_ahead={read_ahead}, grace={grace}, clean_every={clean_every}"
                "): the first must be at least 1, the next two at least 0, and the last above 0, or None"
            )
        if unknown not in {"dead letter", "skip"}:
            raise ConfigurationError(f'Consumer(unknown={unknown!r}): it is "dead letter" or "skip"')
        if not subscriptions:
            raise ConfigurationError('Consumer needs a subscription: broker.subscribe("orders", name="warehouse")')
        names = [subscription.name for subscription in subscriptions]
        if twice := sorted({one for one in names if names.count(one) > 1}):
            raise ConfigurationError(
                f"two subscriptions of this consumer are called {', '.join(map(repr, twice))}, and an inbox could not "
                "tell them apart. Give each a name of its own, or let one have several destinations."
            )
        super().__init__(name, "consumer", "nothing is consumed any more")
        self.mediator = mediator
        self.subscriptions = subscriptions
        self.concurrency = concurrency
        self.grace = grace
        self._ahead = ahead
        self._clean_every = clean_every
        self._deliver = partial(mediator.deliver, skip_unknown=unknown == "skip")
        self._pauses = default_pauses() if pauses is None else pauses
        self._shift: _Shift | None = None

    def stop(self, grace: float | None = None) -> None:
        """Let it end, after `grace` seconds at the latest; in the event loop's thread. A second call may shorten it."""
        super().stop()
        if self._shift is not None:
            self._shift.stop(self.grace if grace is None else grace)

    async def _serve(self) -> None:
        self._shift = shift = _Shift(self._deliver, self.concurrency, self.grace, self._name)
        intakes = [
            _Intake(shift, one, self.concurrency + self._ahead, self._pauses, self._name) for one in self.subscriptions
        ]
        try:
            if self._stopped:
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_on_cancellation, partial(shift.stop, 0))
                if self._clean_every is not None:
                    tasks.start_soon(self._clean, self._clean_every)
                # What is in hand is given back whatever happens; every step of that is bounded.
                with anyio.CancelScope(shield=True):
                    await shift.run(intakes)
                tasks.cancel_scope.cancel()
        finally:
            self._shift = None
        shift.raise_failure()

    async def _clean(self, every: float) -> None:
        """Let the inboxes forget; at other times than the other consumers, which began together with this one."""
        await anyio.sleep(every * random.random())  # noqa: S311 - no secret
        while True:
            for inbox in self.mediator.inboxes:
                try:
                    await inbox.clean(_CLEANED)
                except Exception as error:  # noqa: BLE001 - logged; the next time may be better
                    logger.warning("%s: an inbox cannot be cleaned (%s)", self._name, in_words(error))
            await anyio.sleep(every)


async def _on_cancellation(call: Callable[[], None]) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        call()


class _Shift:
    """One run of a consumer: the workers, and what waits for them."""

    def __init__(
        self, deliver: Callable[[Delivery], Awaitable[None]], concurrency: int, grace: float, name: str
    ) -> None:
        self.deliver = deliver
        self._grace = grace
        self._name = name
        self._workers = [_Worker(self) for _ in range(concurrency)]
        self._ready: deque[tuple[_Intake, Delivery]] = deque()
        self._idle: list[anyio.Event] = []
        self._backoff = default_backoff()
        self._stopping = anyio.Event()
        self._patience = anyio.CancelScope()
        self._quiet = anyio.Event()
        self._failure: Exception | None = None
        self.dismissed = False
        """No worker is to take up anything more."""

    def stop(self, grace: float) -> None:
        """Begin to end; called again, end sooner."""
        self._patience.deadline = min(self._patience.deadline, anyio.current_time() + grace)
        self._stopping.set()

    def fail(self, error: Exception) -> None:
        """Something is wrong that no waiting mends: end, and raise it."""
        self._failure = self._failure or error
        self.stop(self._grace)

    def raise_failure(self) -> None:
        """What ended it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def run(self, intakes: Sequence[_Intake]) -> None:
        """From the first subscription to the last settlement."""
        async with anyio.create_task_group() as tasks:
            for intake in intakes:
                tasks.start_soon(intake.run)
            async with anyio.create_task_group() as working:
                for worker in self._workers:
                    working.start_soon(worker.run)
                await self._stopping.wait()
                for intake in intakes:
                    intake.fetch_no_more()
                while self._ready:
                    intake, delivery = self._ready.popleft()
                    intake.settle(delivery)
                with self._patience:
                    await self._until_quiet()
                self._dismiss()
            for intake in intakes:
                intake.finish()

    async def _until_quiet(self) -> None:
        busy = sum(worker.busy for worker in self._workers)
        if busy:
            logger.info("%s: waits for %d messages that are being handled", self._name, busy)
            await self._quiet.wait()

    def _dismiss(self) -> None:
        """Cancel who still works; what they had is given back."""
        self.dismissed = True
        busy = sum(worker.busy for worker in self._workers)
        if busy:
            logger.warning("%s: %d messages were not done in time and are given back", self._name, busy)
        for worker in self._workers:
            worker.scope.cancel()

    # -- for intakes and workers ---------------------------------------------------------------------------------------

    def add(self, intake: _Intake, deliveries: Sequence[Delivery]) -> None:
        """Have them handled."""
        if self._stopping.is_set():
            for delivery in deliveries:
                intake.settle(delivery)
            return
        self._ready.extend((intake, delivery) for delivery in deliveries)
        for _ in range(min(len(deliveries), len(self._idle))):
            self._idle.pop().set()

    async def next(self) -> tuple[_Intake, Delivery]:
        """What is to be handled next."""
        while not self._ready:
            if self._stopping.is_set() and not any(worker.busy for worker in self._workers):
                self._quiet.set()
            woken = anyio.Event()
            self._idle.append(woken)
            await woken.wait()
        return self._ready.popleft()

    def postpone(self, delivery: Delivery, error: BaseException) -> None:
        """Nobody in the pipeline decided what becomes of it."""
        from pipeline_mediator.message_brokers.protocol import Later

        delay = pause_after(delivery.attempt, self._backoff)
        delivery.outcome = Later(delay)
        logger.warning(
            "%s: message %s from %s failed (%s), and nothing in the pipeline decides what becomes of it; it comes "
            "again in %.1f s. Put a DeadLetterMiddleware and a RedeliveryMiddleware in front of the others.",
            self._name,
            delivery.message_id,
            delivery.destination,
            in_words(error),
            delay,
        )


class _Worker:
    """Handles one delivery at a time."""

    def __init__(self, shift: _Shift) -> None:
        self._shift = shift
        self._delivery: Delivery | None = None
        # One for many deliveries: it is used up, and replaced, only when one is lost.
        self.scope = anyio.CancelScope()

    @property
    def busy(self) -> bool:
        """Whether a delivery is being handled."""
        return self._delivery is not None

    async def run(self) -> None:
        """Until dismissed."""
        shift = self._shift
        while not shift.dismissed:
            with self.scope:
                while True:
                    await self._handle(*(await shift.next()))
            if not shift.dismissed:
                self.scope = anyio.CancelScope()

    async def _handle(self, intake: _Intake, delivery: Delivery) -> None:
        if delivery.lost:
            intake.settle(delivery)
            return
        self._delivery = delivery
        delivery.on_lost = partial(self._lose, delivery)
        try:
            await self._shift.deliver(delivery)
        except Exception as error:  # noqa: BLE001 - whoever observes has seen it
            if delivery.outcome is None:
                self._shift.postpone(delivery, error)
        except anyio.get_cancelled_exc_class() as error:
            if is_cancelled():
                raise
            # A client let the cancellation of something else escape.
            self._shift.postpone(delivery, error)
        finally:
            self._delivery = delivery.on_lost = None
            intake.settle(delivery)

    def _lose(self, delivery: Delivery) -> None:
        if self._delivery is delivery:
            self.scope.cancel()


class _Intake:
    """One subscription: fetches from it, and settles what was handled."""

    def __init__(self, shift: _Shift, subscription: Subscription, limit: int, pauses: WaitBaseT, consumer: str) -> None:
        self._shift = shift
        self._subscription = subscription
        self._limit = limit
        place = f"{consumer}: subscription {subscription.name!r}"
        self._place = place
        self._receiving = Trouble(f"{place} receives nothing", f"{place} receives again", pauses, stack=True)
        self._settling = Trouble(
            f"{place} cannot tell the broker what was done", f"{place} tells the broker again", pauses, stack=True
        )
        self._in_hand = 0
        self._room = anyio.Event()
        self._done: list[Delivery] = []
        self._some_done = anyio.Event()
        self._fetching = anyio.CancelScope()
        self._no_more = False
        self._finished = anyio.Event()
        self._give_up_at: float | None = None

    def fetch_no_more(self) -> None:
        """Cancelling a receive loses nothing."""
        self._no_more = True
        self._fetching.cancel()

    def finish(self) -> None:
        """Everything that was handed over has been handled or given back."""
        self._finished.set()
        self._some_done.set()

    def settle(self, delivery: Delivery) -> None:
        """Its chain has ended, or never began."""
        if delivery.lost:
            self._forget(1)
            logger.warning("%s: the hold on message %s was lost; it comes again", self._place, delivery.message_id)
            return
        self._done.append(delivery)
        self._some_done.set()

    async def run(self) -> None:
        """From its beginning to its end."""
        try:
            if not await self._begin():
                return
        except Exception as error:  # noqa: BLE001 - raised by the consumer
            self._shift.fail(error)
            return
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._settle_all)
                self._fetching = anyio.CancelScope()
                with self._fetching:
                    if not self._no_more:
                        await self._fetch()
        finally:
            await self._end()

    # -- beginning and ending ------------------------------------------------------------------------------------------

    async def _begin(self) -> bool:
        """Whether it began, before the consumer was stopped."""
        with self._fetching:
            while True:
                try:
                    await self._subscription.__aenter__()
                except BrokerUnavailableError as error:
                    await anyio.sleep(self._receiving.again(error))
                else:
                    break
        if self._fetching.cancelled_caught:
            return False
        self._receiving.over()
        logger.info("%s receives", self._place)
        return True

    async def _end(self) -> None:
        with anyio.move_on_after(_CLOSING) as bound:
            try:
                await self._subscription.__aexit__(None, None, None)
            except Exception as error:  # noqa: BLE001 - everything else is done
                logger.warning("%s did not end well (%s)", self._place, in_words(error))
        if bound.cancelled_caught:
            logger.warning("%s did not end within %.0f s", self._place, _CLOSING)

    # -- fetching ------------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        receive = self._subscription.receive
        while True:
            while self._in_hand >= self._limit:
                self._room = anyio.Event()
                await self._room.wait()
            try:
                deliveries = await receive(self._limit - self._in_hand)
            except Exception as error:  # noqa: BLE001 - logged; a consumer goes on
                await anyio.sleep(self._receiving.again(error))
                continue
            self._receiving.over()
            self._in_hand += len(deliveries)
            self._shift.add(self, deliveries)

    def _forget(self, count: int) -> None:
        self._in_hand -= count
        self._room.set()

    # -- settling ------------------------------------------------------------------------------------------------------

    async def _settle_all(self) -> None:
        """By one task: brokers do not like two at a time."""
        while True:
            await self._some_done.wait()
            self._some_done = anyio.Event()
            batch, self._done = self._done, []
            while batch:
                batch = await self._settle(batch)
                if batch:
                    batch += self._done
                    self._done.clear()
            if self._finished.is_set() and not self._done:
                return

    async def _settle(self, batch: list[Delivery]) -> list[Delivery]:
        """What is to be tried again, after a while."""
        held = [delivery for delivery in batch if not delivery.lost]
        self._forget(len(batch) - len(held))
        error: Exception | None = None
        again: list[Delivery] = []
        for delivery, answer in zip(held, await self._answers(held), strict=True):
            if isinstance(answer, BrokerUnavailableError):
                error = answer
                again.append(delivery)
            elif answer is not None:
                logger.warning(
                    "%s: message %s was handled and could not be settled (%s); it comes again",
                    self._place,
                    delivery.message_id,
                    in_words(answer),
                )
        self._forget(len(held) - len(again))
        if error is None:
            self._settling.over()
            return []
        pause = self._settling.again(error)
        if not self._finished.is_set():
            with anyio.move_on_after(pause):
                await self._finished.wait()
            return again
        if self._give_up_at is None:
            self._give_up_at = anyio.current_time() + _CLOSING
        if anyio.current_time() + pause > self._give_up_at:
            logger.warning("%s: %d messages were handled and not settled; they come again", self._place, len(again))
            self._forget(len(again))
            return []
        await anyio.sleep(pause)
        return again

    async def _answers(self, held: list[Delivery]) -> Sequence[Exception | None]:
        try:
            return await self._subscription.settle(held) if held else ()
        except Exception as error:  # noqa: BLE001 - a subscription that raises where it should answer
            return [error for _ in held]
