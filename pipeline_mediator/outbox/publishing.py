"""One batch of an outbox: published by destination, side by side, and the outcome told to the store walk by walk."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from pipeline_mediator.concurrency import is_cancelled
from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, MessageTooLargeError, PermanentError
from pipeline_mediator.outbox.protocol import Failure, Published, Relayed
from pipeline_mediator.outbox.waves import cut, in_waves, probe_of, sorted_out
from pipeline_mediator.trouble import in_words, pause_after

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator.outbox.destinations import Destinations
    from pipeline_mediator.outbox.protocol import Batch, StoredRow
    from pipeline_mediator.outbox.settings import Settings
    from pipeline_mediator.outbox.waves import Group, Place

__all__ = ["Publisher", "Publishing"]

logger = logging.getLogger(__name__)

_SHOWN: Final = 10
"""Ids in one log line."""


class Publisher(Protocol):
    """What a relay needs of the mediator."""

    def relay_chain(self, name: str, version: int, destination: str) -> Any:
        """The chain of such rows; one object for all that go to one place. Raises a `MediatorError` without one."""
        ...

    async def walk_relayed(self, chain: Any, batch: Relayed) -> Published:
        """Publish them."""
        ...


class Publishing:
    """Publishes the rows of a batch, and decides what becomes of those that were refused.

    A row may be refused for what it is, or because its destination takes nothing at all. The one backs off, and is
    given up after some attempts; the other is left alone for a while, and its rows are given back as they were. To
    blame is

    * the row, for good, if it is too large for the broker;
    * the row, if the destination took another one in the same walk, or has just taken a message that was published
      alone; if it was refused, instead of unavailable, also if it took any of this batch. A `PermanentError` is final
      then, but for `BrokerRefusedError`, which may be about credentials;
    * the row, if there is no chain for it: its type has no destination here, or not yet;
    * otherwise the destination.

    What has backed off once is published alone from then on, behind the others. So a message that makes the broker
    drop the connection is found, and the others get through. No row is given up because a broker is unavailable.

    Destinations are served side by side. Of the rows of one key none is published before an earlier one was accepted,
    even if they go to different destinations: those stand in different waves.
    """

    def __init__(self, mediator: Publisher, batch: Batch, settings: Settings, destinations: Destinations) -> None:
        self._mediator = mediator
        self._batch = batch
        self._settings = settings
        self._destinations = destinations
        self._scope = anyio.CancelScope()
        self._told_to_stop = False
        self._taken: set[int] = set()
        self._stopped: set[str] = set()
        """Keys with a row that was not taken."""
        self._failures: dict[str, list[Failure]] = {}
        self.accepted = 0
        """Rows that a broker has taken."""
        self.failed = 0
        """Rows that back off, or were given up."""
        self.next_due: float | None = None
        """Seconds until the first row that backs off is due again."""

    async def run(self) -> None:
        """Publish; returns in time for the outcome to be written."""
        if self._batch.unreadable:
            # Given up by the store itself.
            self.failed += len(self._batch.unreadable)
            _log("that cannot be read", self._batch.unreadable)
        waves, places = in_waves(self._batch.rows, self._mediator.relay_chain)
        left = self._batch.deadline - monotonic()
        self._scope.deadline = min(self._scope.deadline, anyio.current_time() + left)
        try:
            with self._scope:
                for wave in waves:
                    await self._publish_side_by_side(wave)
                    if wave is not waves[-1]:
                        self._stop_behind(wave)
        finally:
            for destination, failures in self._failures.items():
                _log(f"for {destination!r}", failures)
        if self._scope.cancelled_caught and not self._told_to_stop:
            late = BrokerUnavailableError(f"no answer within {left:.1f} s, which is all that the relay's lease allows")
            for place in places:
                if place.began is not None:
                    self._destinations.refused(place.destination, late, monotonic() - place.began)

    def finish_within(self, seconds: float) -> None:
        """Give back what is not published by then."""
        self._told_to_stop = True
        self._scope.deadline = min(self._scope.deadline, anyio.current_time() + seconds)

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def _publish_side_by_side(self, wave: Sequence[Group]) -> None:
        if len(wave) == 1:
            await self._publish(wave[0])
            return
        async with anyio.create_task_group() as beside:
            for group in wave:
                beside.start_soon(self._publish, group)

    async def _publish(self, group: Group) -> None:
        """Publish the rows of one place, as far as it takes them."""
        place = group.place
        rows = self._without_stopped(group.rows)
        if place.error is not None:
            self._fail([self._counted(row, place.error) for row in rows], place.destination)
            return
        if group.has_failed:
            rows = self._without_killers(rows, place)
        if place.closed or not rows:
            return
        if failures := self._destinations.failures_of(place.destination):
            probe = probe_of(rows, failures)
            if not await self._walk(place, [probe]) or not place.accepted:
                return
            rows = [row for row in rows if row is not probe]
        first, alone, behind = sorted_out(rows) if group.has_failed else (rows, (), ())
        if not await self._walk_all(place, first):
            return
        place.trusted = place.trusted or place.accepted
        for row in alone:
            if not await self._walk(place, [row]):
                return
        await self._walk_all(place, behind)

    def _without_stopped(self, rows: Sequence[StoredRow]) -> Sequence[StoredRow]:
        return [row for row in rows if row.message.key not in self._stopped] if self._stopped else rows

    def _without_killers(self, rows: Sequence[StoredRow], place: Place) -> Sequence[StoredRow]:
        """Without rows that too many relays died over; those are given up unpublished."""
        attempts = self._settings.attempts
        killers = {row.id: row for row in rows if row.crashed and row.failures >= attempts}
        if not killers:
            return rows
        reason = f"{attempts} failures, the last of them because relays died while publishing it"
        self._fail([Failure(number, reason, None) for number in killers], place.destination)
        self._stopped.update(row.message.key for row in killers.values() if row.message.key is not None)
        return self._without_stopped([row for row in rows if row.id not in killers])

    def _stop_behind(self, wave: Sequence[Group]) -> None:
        """What was not taken keeps back the rows of its key that go elsewhere."""
        for group in wave:
            self._stopped.update(
                row.message.key for row in group.rows if row.message.key is not None and row.id not in self._taken
            )

    async def _walk_all(self, place: Place, rows: Sequence[StoredRow]) -> bool:
        for some in cut(rows):
            if not await self._walk(place, some):
                return False
        return True

    async def _walk(self, place: Place, rows: Sequence[StoredRow]) -> bool:
        """Publish some rows; whether the place may get more of this batch."""
        rows = self._without_stopped(rows)
        if not rows:
            return True
        place.began = began = monotonic()
        published = await self._published(place, rows)
        place.began = None
        accepted = published.accepted
        if accepted:
            self._batch.sent(accepted)
            self._taken.update(accepted)
            self.accepted += len(accepted)
            place.accepted = True
            self._destinations.accepted(place.destination)
            if len(accepted) == len(rows):
                place.trusted = place.trusted or len(rows) == 1
                return True
        blamed = self._judge(place, rows, published)
        if blamed is not None:
            place.closed = True
            self._destinations.refused(place.destination, blamed, monotonic() - began)
        # Neither accepted nor refused: time is up.
        return blamed is None and bool(published.refused)

    async def _published(self, place: Place, rows: Sequence[StoredRow]) -> Published:
        """What became of them; an error that the chain raised is one for all of them."""
        try:
            return await self._mediator.walk_relayed(place.chain, Relayed(rows, self._batch.deadline))
        except Exception as error:  # noqa: BLE001 - the store and the log are told
            raised = error
        except anyio.get_cancelled_exc_class():
            if is_cancelled():
                raise
            raised = BrokerUnavailableError("a client let the cancellation of something else escape")
        return Published((), [(row.id, raised) for row in rows])

    # -- who is to blame -----------------------------------------------------------------------------------------------

    def _judge(self, place: Place, rows: Sequence[StoredRow], published: Published) -> Exception | None:
        """Fail the rows that are to blame for their refusal; the error that is the place's, None without one."""
        left = {row.id: row for row in rows}
        for number in published.accepted:
            del left[number]
        self._stopped.update(row.message.key for row in left.values() if row.message.key is not None)
        # One error for several rows is no verdict on each of them.
        each = len({id(error) for _, error in published.refused}) == len(published.refused)
        works = bool(published.accepted) or place.trusted
        failures: list[Failure] = []
        blamed: Exception | None = None
        for number, error in published.refused:
            answered = isinstance(error, PermanentError)
            if each and isinstance(error, MessageTooLargeError):
                failures.append(Failure(number, in_words(error), None))
            elif works or (answered and place.accepted):
                final = each and answered and not isinstance(error, BrokerRefusedError)
                failures.append(self._counted(left[number], error, final=final))
                # To be unavailable once may be one message's fault; twice in a row it is not.
                place.trusted = place.trusted and (answered or bool(published.accepted))
            else:
                blamed = error
        if failures:
            self._fail(failures, place.destination)
        return blamed

    def _counted(self, row: StoredRow, error: Exception, *, final: bool = False) -> Failure:
        failures = row.failures if row.crashed else row.failures + 1
        # Messages that a broker could not take are not lost for it, however long that lasts.
        used_up = failures >= self._settings.attempts and not isinstance(error, (BrokerUnavailableError, OSError))
        delay = None if final or used_up else pause_after(failures, self._settings.backoff)
        return Failure(row.id, in_words(error), delay)

    def _fail(self, failures: Sequence[Failure], destination: str) -> None:
        self._batch.failed(failures)
        self.failed += len(failures)
        self._failures.setdefault(destination, []).extend(failures)
        delays = [failure.delay for failure in failures if failure.delay is not None]
        if delays:
            self.next_due = min(delays) if self.next_due is None else min(self.next_due, *delays)


def _log(which: str, failures: Sequence[Failure]) -> None:
    """One line for what is tried again, one for what was given up."""
    for level, outcome, concerned in (
        (logging.WARNING, "refused, to be tried again", [one for one in failures if one.delay is not None]),
        (logging.ERROR, "given up", [one for one in failures if one.delay is None]),
    ):
        if concerned:
            shown = ", ".join(str(one.id) for one in concerned[:_SHOWN])
            more = f" and {len(concerned) - _SHOWN} more" if len(concerned) > _SHOWN else ""
            # The reason of the first: those of one batch mostly have the same.
            logger.log(level, "%s: message %s%s %s (%s)", outcome, shown, more, which, concerned[0].error)
