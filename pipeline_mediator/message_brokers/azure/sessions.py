"""Receiving with sessions: several at a time, one message of each, in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from azure.servicebus import NEXT_AVAILABLE_SESSION
from azure.servicebus.exceptions import OperationTimeoutError, SessionCannotBeLockedError, SessionLockLostError

from pipeline_mediator.message_brokers.azure.errors import explain_receiving
from pipeline_mediator.message_brokers.azure.intake import Hold, Lease, carry_out, not_held
from pipeline_mediator.message_brokers.azure.messages import addressee, delivery_of
from pipeline_mediator.message_brokers.azure.receiver import LOST, ReceiverLink
from pipeline_mediator.message_brokers.azure.sender import within
from pipeline_mediator.message_brokers.protocol import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from azure.servicebus import ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusReceiver

    from pipeline_mediator.message_brokers.azure.intake import Intake
    from pipeline_mediator.message_brokers.azure.receiver import Access
    from pipeline_mediator.message_brokers.protocol import Delivery

__all__ = ["LockedSessions"]

_logger = logging.getLogger(__name__)

_ENTRY_SECONDS: Final = 0.5
_ACCEPT_SECONDS: Final = 30.0
_TRIES: Final = 5
"""Of a client with the SDK's own settings, and one to spare; each waits that long."""
_LOOK_SECONDS: Final = 1.0


class Session:
    """One session that this process has locked, and at most one message of it."""

    def __init__(self, link: ReceiverLink, receiver: ServiceBusReceiver, access: Access, name: str) -> None:
        self.link = link
        self.lease = Lease()
        self.lease.starts(receiver.session.locked_until_utc)
        self._connected = _connection_of(receiver)
        self.over = False
        self.paused = False
        self._access = access
        self._name = name
        self._hold: Hold | None = None
        self._settled = asyncio.Event()
        self._lost = asyncio.Event()
        self._delay = 0.0

    async def run(self, intake: Intake, idle: float) -> None:
        """Hand its messages over, one by one, until there are none for `idle` seconds or it is lost."""
        try:
            while not self.over:
                await intake.wait_for_room()
                messages = [] if self.over else await self.link.fetch(1, idle)
                if not messages:
                    break
                (message,) = messages
                if addressee(message) not in {None, self._access.subscription}:
                    await self.link.call(partial(_complete, message))
                    continue
                self._hand_over(message, intake)
                await self._settled.wait()
                if self._delay > 0:
                    self.paused = True
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._delay):
                            await self._lost.wait()
                    self.paused = False
        finally:
            self.lose()
            await self.link.close()

    def _hand_over(self, message: ServiceBusReceivedMessage, intake: Intake) -> None:
        delivery = delivery_of(message, self._access.entity, self._name)
        self._hold = delivery.tag = Hold(message, delivery, self)
        self._delay = 0.0
        self._settled.clear()
        intake.put([delivery])

    async def settle(self, hold: Hold) -> Exception | None:
        """Over its link. What is to come later is abandoned at once, which counts, and the session kept until then."""
        outcome = hold.delivery.outcome
        hold.settling = True
        try:
            if outcome is None:
                self.over = True  # the service gives back what was not settled when the session is given up
            else:
                await self.link.call(lambda receiver: within(self._access.timeout, carry_out(receiver, hold, outcome)))
        except LOST:
            self.over = True
            return not_held(hold.delivery, self._name, hold)
        except Exception as error:  # noqa: BLE001 - explained to who settles; with its link the session is gone
            self.over = True
            return explain_receiving(error, self._access.place, self._access.timeout)
        else:
            hold.settled = True
            self._delay = outcome.delay if isinstance(outcome, Later) else 0.0
            return None
        finally:
            self._settled.set()

    def lose(self) -> None:
        """Its lock is gone, or given up."""
        self.over = True
        self._lost.set()
        if self._hold is not None and not self._hold.settling:
            self._hold.lose()
        self._settled.set()

    async def renew(self) -> None:
        """Renew its lock, or find that it is lost."""
        try:
            until = await self.link.call(self._renew_over)
            self.lease.starts(until)
        except Exception as error:  # noqa: BLE001 - what a session's link fails with ends the session
            _logger.warning("the lock on a session of %s was lost: %s", self._access.place, type(error).__name__)
            self.lose()

    async def _renew_over(self, receiver: ServiceBusReceiver) -> Any:
        until = await within(self._access.timeout, receiver.session.renew_lock(timeout=self._access.timeout))
        if _connection_of(receiver) is not self._connected:
            raise SessionLockLostError
        return until


class LockedSessions:
    """The sessions of one queue or subscription that this process has locked."""

    def __init__(
        self, access: Access, name: str, intake: Intake, held: asyncio.Event, *, max_sessions: int, idle: float
    ) -> None:
        self._access = access
        self._name = name
        self._intake = intake
        self._held = held
        self._max_sessions = max_sessions
        self._idle = idle
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._renewals: dict[Session, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()

    async def open(self) -> None:
        """See whether there is such an entity, with sessions, and whether we may receive from it."""
        await self._accept(_ENTRY_SECONDS)

    async def run(self) -> None:
        """Have as many sessions as are wanted."""
        while True:
            await self._intake.wait_for_room()
            self._ended.clear()
            waiting = sum(session.paused for session in self._sessions)
            # Those that wait out a delay take nobody's place; only so many, for each is a connection.
            if len(self._sessions) >= self._max_sessions + min(waiting, self._max_sessions):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):  # for one that begins to wait, or waits no longer
                        await self._ended.wait()
                continue
            try:
                await self._accept(_ACCEPT_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever it is, who receives is told, and asks again
                self._intake.fail(explain_receiving(error, self._access.place, self._access.timeout))

    async def _accept(self, seconds: float) -> None:
        """Lock the next session that has messages, if there is one within so many seconds."""
        make = partial(self._access.receiver, session_id=NEXT_AVAILABLE_SESSION, max_wait_time=seconds)
        link = ReceiverLink(make, self._access.timeout, reopens=False)
        try:
            receiver = await link.open(seconds * _TRIES + self._access.timeout)
        except (OperationTimeoutError, SessionCannotBeLockedError):
            return
        session = Session(link, receiver, self._access, self._name)
        self._sessions[session] = asyncio.ensure_future(self._serve(session))
        self._held.set()

    async def _serve(self, session: Session) -> None:
        try:
            await session.run(self._intake, self._idle)
        except Exception as error:  # noqa: BLE001 - the next session tells whether it was more than this one
            _logger.info("a session of %s ended with %s", self._access.place, type(error).__name__)
        finally:
            self._sessions.pop(session, None)
            self._ended.set()

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        """Each session over its own link."""
        return await asyncio.gather(*[self._settle(delivery) for delivery in deliveries])

    async def _settle(self, delivery: Delivery) -> Exception | None:
        hold = delivery.tag
        if isinstance(hold, Hold) and hold.settled:
            return None
        if not isinstance(hold, Hold) or not isinstance(hold.owner, Session) or hold.lost or hold.owner.over:
            return not_held(delivery, self._name, hold)
        return await hold.owner.settle(hold)

    async def renew_due(self) -> float:
        """Renew the locks whose time it is; when to look again."""
        now = asyncio.get_running_loop().time()
        for session in list(self._sessions):
            renewal = self._renewals.get(session)
            if renewal is not None and not renewal.done():
                if session.lease.until <= now:
                    session.lose()
            elif not session.over and session.lease.renew_at <= now:
                self._renewals[session] = asyncio.ensure_future(self._renew(session))
        leases = [
            session.lease.until if session in self._renewals else session.lease.renew_at
            for session in self._sessions
            if not session.over
        ]
        return min(leases, default=inf)

    async def _renew(self, session: Session) -> None:
        try:
            await session.renew()
        finally:
            self._renewals.pop(session, None)
            self._held.set()

    async def close(self) -> None:
        """Give the sessions up, and what is not settled with them."""
        tasks = [*self._sessions.values(), *self._renewals.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _connection_of(receiver: ServiceBusReceiver) -> object:
    """Another one than before, if the client lost the session, and locked it again without a word."""
    return getattr(receiver, "_handler", None)


async def _complete(message: ServiceBusReceivedMessage, receiver: ServiceBusReceiver) -> None:
    await receiver.complete_message(message)
