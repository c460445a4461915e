"""Receiving without sessions: messages in no order, each with a lock of its own."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

from pipeline_mediator.message_brokers.azure.errors import explain_receiving
from pipeline_mediator.message_brokers.azure.intake import Hold, carry_out, not_held
from pipeline_mediator.message_brokers.azure.messages import addressee, copy_of, delivery_of, outgoing_of
from pipeline_mediator.message_brokers.azure.receiver import LOST, ReceiverLink, give_back
from pipeline_mediator.message_brokers.azure.sender import CLOSE_SECONDS, within
from pipeline_mediator.message_brokers.protocol import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from azure.servicebus import ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusReceiver

    from pipeline_mediator.errors import BrokerError
    from pipeline_mediator.message_brokers.azure.intake import Intake
    from pipeline_mediator.message_brokers.azure.receiver import Access
    from pipeline_mediator.message_brokers.protocol import Delivery

__all__ = ["LockedMessages"]

_logger = logging.getLogger(__name__)

_WAIT_SECONDS: Final = 60.0
_AT_ONCE: Final = 50
"""Settled, or renewed, before others get to use the link."""


class LockedMessages:
    """The messages of one queue or subscription that this process has locked."""

    def __init__(self, access: Access, name: str, intake: Intake, held: asyncio.Event) -> None:
        self._access = access
        self._name = name
        self._intake = intake
        self._held = held
        self._link = ReceiverLink(access.receiver, access.timeout)
        self._holds: dict[Hold, None] = {}
        """In the order in which they came, in which they are renewed and given back."""
        self._renewing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See whether there is such an entity, and whether we may receive from it."""
        await self._link.open()

    async def run(self) -> None:
        """Receive what there is room for."""
        while True:
            room = await self._intake.wait_for_room()
            try:
                messages = await self._link.fetch(room, _WAIT_SECONDS)
                await self._admit(messages)
            except Exception as error:  # noqa: BLE001 - whatever it is, who receives is told, and asks again
                self._intake.fail(self._explain(error))

    async def _admit(self, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        others: list[ServiceBusReceivedMessage] = []
        deliveries: list[Delivery] = []
        for message in messages:
            if addressee(message) not in {None, self._access.subscription}:
                others.append(message)
                continue
            delivery = delivery_of(message, self._access.entity, self._name)
            hold = Hold(message, delivery, self)
            hold.lease.starts(message.locked_until_utc)
            self._intake.patience = hold.lease.renew_at - asyncio.get_running_loop().time()
            delivery.tag = hold
            self._holds[hold] = None
            deliveries.append(delivery)
        if deliveries:
            self._intake.put(deliveries)
            self._held.set()
        if others:
            await self._link.call(partial(self._complete, others))

    async def _complete(self, messages: Sequence[ServiceBusReceivedMessage], receiver: ServiceBusReceiver) -> None:
        for message in messages:
            await within(self._access.timeout, receiver.complete_message(message))

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        """Copies first, then everything over the link, one after the other."""
        answers: dict[int, Exception | None] = {}
        open_ones: list[tuple[int, Hold]] = []
        for index, delivery in enumerate(deliveries):
            hold = delivery.tag
            if not isinstance(hold, Hold) or hold.owner is not self or hold.lost:
                answers[index] = not_held(delivery, self._name, hold)
            elif hold.settled:
                answers[index] = None
            else:
                open_ones.append((index, hold))
        await self._copy(open_ones, answers)
        todo = [(index, hold) for index, hold in open_ones if index not in answers]
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            try:
                await self._link.call(partial(self._carry_out_in_time, part, answers))
            except Exception as error:  # noqa: BLE001 - explained to who settles
                for index, _ in todo[start:]:
                    answers.setdefault(index, self._explain(error))
                break
        for index, hold in open_ones:
            hold.settling = answers[index] is not None
        return [answers[index] for index in range(len(deliveries))]

    async def _copy(self, holds: Sequence[tuple[int, Hold]], answers: dict[int, Exception | None]) -> None:
        """What is to come later is sent again, for then; it is stored before the message itself is completed."""
        now = datetime.now(UTC)
        laters: list[tuple[int, Hold, timedelta]] = []
        for index, hold in holds:
            outcome = hold.delivery.outcome
            if isinstance(outcome, Later) and outcome.delay > 0 and not hold.copied:
                laters.append((index, hold, timedelta(seconds=outcome.delay)))
        if not laters:
            return
        copies = [
            (
                outgoing_of(hold.delivery),
                copy_of(
                    hold.message,
                    attempts=hold.delivery.attempt,
                    only=self._access.subscription,
                    not_before=now + delay,
                ),
            )
            for _, hold, delay in laters
        ]
        for (index, hold, _), error in zip(laters, await self._access.send(copies), strict=True):
            if error is None:
                hold.copied = True
            else:
                answers[index] = error

    async def _carry_out_in_time(
        self, holds: Sequence[tuple[int, Hold]], answers: dict[int, Exception | None], receiver: ServiceBusReceiver
    ) -> None:
        await within(self._access.timeout, self._carry_out(holds, answers, receiver))

    async def _carry_out(
        self, holds: Sequence[tuple[int, Hold]], answers: dict[int, Exception | None], receiver: ServiceBusReceiver
    ) -> None:
        for index, hold in holds:
            outcome = hold.delivery.outcome
            try:
                if outcome is None:
                    await give_back(receiver, hold.message, self._access.timeout)
                else:
                    await carry_out(receiver, hold, outcome)
            except LOST:
                answers[index] = not_held(hold.delivery, self._name, hold)
            else:
                hold.settled = True
                answers[index] = None
            self._holds.pop(hold, None)

    async def renew_due(self) -> float:
        """Renew the locks whose time it is; when to look again."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for hold in list(self._holds):
            if hold.lease.until <= now:
                self._holds.pop(hold, None)
                if not hold.settling:
                    _logger.warning("the lock on message %s was lost: %s", hold.delivery.message_id, self._access.place)
                    hold.lose()
        kept = [hold for hold in self._holds if not hold.settling]
        due = [hold for hold in kept if hold.lease.renew_at <= now][:_AT_ONCE]
        if due and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.ensure_future(self._renew(due))
        if self._renewing is not None and not self._renewing.done():
            first = min((hold.lease.until for hold in kept), default=inf)
            await asyncio.wait((self._renewing,), timeout=None if first == inf else max(first - loop.time(), 0))
        return min(
            (min(hold.lease.renew_at, hold.lease.until) for hold in self._holds if not hold.settling), default=inf
        )

    async def _renew(self, holds: Sequence[Hold]) -> None:
        try:
            await self._link.call(lambda receiver: self._renew_over(receiver, holds))
        except Exception as error:  # noqa: BLE001 - tried again until the lock runs out
            _logger.info("locks of %s could not be renewed: %s", self._access.place, type(error).__name__)
            for hold in holds:
                hold.lease.failed(asyncio.get_running_loop().time())

    async def _renew_over(self, receiver: ServiceBusReceiver, holds: Sequence[Hold]) -> None:
        for hold in holds:
            if hold.settled:
                continue
            try:
                renewing = receiver.renew_message_lock(hold.message, timeout=self._access.timeout)
                hold.lease.starts(await within(self._access.timeout, renewing))
            except LOST:
                hold.lease.until = 0.0

    async def close(self) -> None:
        """Give back what is here, in time."""
        if self._renewing is not None:
            self._renewing.cancel()
        holds = [hold for hold in self._holds if not hold.settling]
        self._holds.clear()
        if holds:
            try:
                await within(CLOSE_SECONDS, self._link.call(lambda receiver: self._give_back(receiver, holds)))
            except Exception as error:  # noqa: BLE001 - their locks run out
                _logger.info("messages of %s were not given back: %s", self._access.place, type(error).__name__)
        await self._link.close()

    async def _give_back(self, receiver: ServiceBusReceiver, holds: Sequence[Hold]) -> None:
        for hold in holds:
            await give_back(receiver, hold.message, CLOSE_SECONDS)
            hold.settled = True

    def _explain(self, error: Exception) -> BrokerError:
        return explain_receiving(error, self._access.place, self._access.timeout)
