"""The loop of a relay: take a batch, publish it, write the outcome; wait while there is nothing."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import anyio

from pipeline_mediator.concurrency import is_cancelled
from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.bell import Bell
from pipeline_mediator.outbox.destinations import Destinations
from pipeline_mediator.outbox.publishing import Publishing
from pipeline_mediator.outbox.upkeep import Upkeep
from pipeline_mediator.trouble import Trouble

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.outbox.publishing import Publisher
    from pipeline_mediator.outbox.settings import Settings

__all__ = ["Loop"]

logger = logging.getLogger(__name__)

_FRUITLESS: Final = 4
"""Batches in a row of which nothing became anything: by then every lane had its turn, so the rest waits."""
_WRITING: Final = 5.0
"""Seconds to write what was published when a stop is waiting for that; else there is the lease."""
_SHORTEST: Final = 0.002
"""Seconds of the shortest wait: what is due in no time may be due a moment later by the database's clock."""
_HUSH: Final = 0.01
"""Seconds not to listen after a commit led to nothing, for each such commit in a row: another relay has its lanes."""
_LONGEST_HUSH: Final = 0.1
_PROGRESS: Final = 5.0
"""Seconds between two lines about what was drained."""


class Loop:
    """One run of a relay. Made in the event loop that it runs in.

    Whatever fails in it is logged, and it goes on after a pause; it ends when it is cancelled or stopped.
    """

    def __init__(self, mediator: Publisher, store: OutboxStore, settings: Settings) -> None:
        self._mediator = mediator
        self._store = store
        self._settings = settings
        self._bell = Bell()
        self._destinations = Destinations(settings.pauses)
        self._trouble = Trouble(
            f"{settings.name}: relaying fails", f"{settings.name}: relaying works again", settings.pauses, stack=True
        )
        self._upkeep = Upkeep(store, settings, self._bell, self._trouble)
        self._stopping = False
        self._stopped = anyio.Event()
        self._scope = anyio.CancelScope()
        self._round_scope: anyio.CancelScope | None = None
        self._publishing: Publishing | None = None
        self._published = 0
        self._fruitless = 0
        self._rung = False
        self._in_vain = 0
        self._due = math.inf
        self._ask_for_due_at = -math.inf

    def stop(self) -> None:
        """Publish no more than the batch at hand, and of that what is published within `stop_within`."""
        if self._stopping:
            return
        self._stopping = True
        self._stopped.set()
        self._bell.ring()
        if self._publishing is not None:
            self._publishing.finish_within(self._settings.stop_within)
        self._scope.deadline = anyio.current_time() + self._settings.stop_within + _WRITING
        if self._round_scope is not None:
            self._round_scope.deadline = min(self._round_scope.deadline, self._scope.deadline)

    async def run(self) -> None:
        """Relay until stopped."""
        unsubscribe = self._store.on_commit(self._bell.ring)
        try:
            with self._scope:
                async with anyio.create_task_group() as beside:
                    for duty in self._upkeep.duties():
                        beside.start_soon(duty)
                    await self._relay()
                    beside.cancel_scope.cancel()
        finally:
            unsubscribe()

    async def drain(self) -> int:
        """Publish what is due now; how much that was. What is taken by other relays is theirs."""
        told_at = anyio.current_time()
        with self._scope:
            while not self._stopping and self._fruitless < _FRUITLESS:
                settled = await self._round()
                if settled is None:
                    break
                self._fruitless = 0 if settled else self._fruitless + 1
                if anyio.current_time() >= told_at + _PROGRESS:
                    told_at = anyio.current_time()
                    logger.info("%s: %d messages published so far", self._settings.name, self._published)
        return self._published

    async def _relay(self) -> None:
        while not self._stopping:
            raised: BaseException
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 - logged; a relay goes on
                raised = error
            except anyio.get_cancelled_exc_class() as error:
                if is_cancelled():
                    raise
                raised = error
            else:
                continue
            await self._rest(self._trouble.again(raised))
            del raised  # its traceback holds this frame

    async def _turn(self) -> None:
        """One batch; or the wait for one, if there is nothing to do."""
        self._bell.clear()
        settled = await self._round()
        if settled:
            self._fruitless = self._in_vain = 0
            self._rung = False
        else:
            self._fruitless += 1
        if settled is not None and self._fruitless < _FRUITLESS:
            self._trouble.over()
            return
        self._fruitless = 0
        wait = min(self._settings.poll, self._destinations.next_probe(), await self._next_due())
        self._trouble.over()
        await self._wait(max(wait, _SHORTEST))

    async def _round(self) -> int | None:
        """Take a batch, publish it and write the outcome: of how many rows; None if there is nothing to take."""
        settings = self._settings
        without = self._destinations.left_out()
        publishing: Publishing | None = None
        with anyio.CancelScope() as scope:
            self._round_scope = scope
            try:
                async with self._store.take(settings.batch, settings.policy, without=without) as batch:
                    if batch is not None and not self._stopping:
                        publishing = self._publishing = Publishing(self._mediator, batch, settings, self._destinations)
                        try:
                            await publishing.run()
                        except BaseException:
                            self._write_whatever_happens(scope, _WRITING)
                            raise
                        longest = _WRITING if self._stopping else max(_WRITING, settings.lease)
                        self._write_whatever_happens(scope, longest)
            except LeaseLostError as error:
                known = 0 if publishing is None else publishing.accepted
                raise LeaseLostError(
                    f"{error} {known} messages that were published will be published again."
                ) from error
            finally:
                self._publishing = self._round_scope = None
        if scope.cancelled_caught:
            if not self._stopping:
                raise TimeoutError("the outcome of a batch could not be written before its lease ended")
            return None
        if publishing is None:
            return None
        self._published += publishing.accepted
        if publishing.next_due is not None:
            self._due = min(self._due, anyio.current_time() + publishing.next_due)
        return publishing.accepted + publishing.failed

    def _write_whatever_happens(self, scope: anyio.CancelScope, seconds: float) -> None:
        """From here on only time ends the round: what the broker has is to be written."""
        scope.deadline = anyio.current_time() + seconds
        scope.shield = True

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def _wait(self, seconds: float) -> None:
        if self._rung:
            # Once is nothing: a commit of this process rings twice where the database tells of it too.
            await self._rest(min(seconds, _LONGEST_HUSH, _HUSH * self._in_vain))
            self._in_vain += 1
        else:
            self._in_vain = 0
        self._rung = await self._bell.wait(seconds)

    async def _rest(self, seconds: float) -> None:
        """Wait, whatever is committed meanwhile; a stop ends it."""
        with anyio.move_on_after(seconds):
            await self._stopped.wait()

    async def _next_due(self) -> float:
        """Seconds until a row that backs off is due, as far as is known.

        The store is asked once a poll: what fails here is known, and other relays look after what fails there.
        """
        now = anyio.current_time()
        if now >= min(self._ask_for_due_at, self._due):
            seconds = await self._store.next_due()
            self._ask_for_due_at = now + self._settings.poll
            # Due, and yet not taken: another relay has it, or its destination is left alone.
            self._due = now + seconds if seconds is not None and seconds > 0 else math.inf
        return self._due - now
