"""What a consumer does beside reading: keep what it holds, take its turn, claim what is due or left by the dead."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import BrokerError
from pipeline_mediator.message_brokers.redis.client import lacks_group
from pipeline_mediator.message_brokers.redis.entries import as_text, key_of
from pipeline_mediator.message_brokers.redis.lanes import Entry
from pipeline_mediator.message_brokers.redis.membership import KEPT, chunks, now, wait
from pipeline_mediator.message_brokers.redis.scripts import FROM_THE_DEAD, LEASE, RENEW, WAITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.message_brokers.redis.lanes import Lease, Source
    from pipeline_mediator.message_brokers.redis.membership import Command, Membership

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

_POLL: Final = 1.0
"""Seconds after which what another consumer gave back or postponed is noticed."""


class Keeper:
    """One task for each subscription, from when it is entered until it is left."""

    def __init__(self, membership: Membership) -> None:
        self._member = membership
        self._poll = min(_POLL, membership.min_idle / 4)
        self._renew_at = 0.0
        self._scan_at = 0.0
        self.claiming = asyncio.Lock()
        """Held from when the server is asked to give us something until it is known what."""

    async def run(self) -> None:
        """Until it is cancelled. What goes wrong is for the next `receive` to raise; it is tried again."""
        member = self._member
        while True:
            try:
                await self._tend()
            except Exception as error:  # noqa: BLE001 - raised by `receive`
                member.error = error
                member.filled.set()
                member.take_at = max(member.take_at, now() + self._poll)
                await asyncio.sleep(max(0.0, min(self._poll, member.deadline() - now())))
            self.let_go_of_what_was_not_kept()
            member.poke.clear()
            if not member.lanes.absent:
                await wait(member.poke, self._next_step() - now())

    async def _tend(self) -> None:
        member = self._member
        if now() >= self._renew_at:
            await self._renew()
        await self._take_turns()
        await self._find_again()
        if now() >= member.take_at or self._recovering():
            await self._take()
        if member.lanes.absent:
            await self._fetch()

    def _next_step(self) -> float:
        member = self._member
        if self._recovering() and member.free() > 0:
            return 0.0
        soon = [source.unsure_until for source in member.sources if source.unsure_until is not None]
        standing_by = any(not lease.held for lease in member.leases)
        return min(*soon, self._renew_at, member.take_at, now() + self._poll if standing_by else member.take_at)

    # What is ours stays ours

    async def _renew(self) -> None:
        """Keep what is ours, and our turns; what turns out to be another's is lost."""
        member = self._member
        sent = now()
        turns = [lease for lease in member.leases if lease.held]
        kept = [(source, ids) for source in member.sources for ids in chunks(list(source.held))]
        commands = [self._leasing(lease) for lease in turns]
        commands += [("EVAL", RENEW, 1, source.key, member.group, member.consumer, *ids) for source, ids in kept]
        replies = await member.ask(commands) if commands else []
        failed: dict[str, Exception] = {}
        for lease, reply in zip(turns, replies, strict=False):
            if isinstance(reply, Exception):
                failed |= {source.key: reply for source in member.served_by(lease)}
            elif reply != 1:
                self._let_go(member.served_by(lease))
        for (source, _), reply in zip(kept, replies[len(turns) :], strict=True):
            if isinstance(reply, Exception):
                failed[source.key] = reply
            else:
                self._lose(source, reply)
        for source in member.sources:
            if source.key not in failed:
                source.kept_at = sent
        for key, error in failed.items():
            member.check(key, error)
        self._renew_at = sent + member.min_idle / 3

    def _lose(self, source: Source, entry_ids: Iterable[bytes]) -> None:
        ids = [one for one in entry_ids if one in source.held]
        if ids and source.lease is not None:
            # Nothing may go on behind it, wherever it is now: look at all that is pending again, in order.
            logger.warning("entry %s of %r is not ours any more; its order is found anew", as_text(ids[0]), source.key)
            self._let_go(self._member.served_by(source.lease))
            return
        for entry_id in ids:
            entry = source.held.pop(entry_id, None)
            # What is not out is passed over when it is its turn.
            if entry is not None and entry.delivery is not None:
                logger.warning("entry %s of %r is not ours any more", as_text(entry_id), source.key)
                self._member.lanes.done(entry)
                entry.delivery.lose()
                self._member.filled.set()

    def let_go_of_what_was_not_kept(self) -> None:
        """Others may have it by now, or soon."""
        bound = now() - KEPT * self._member.min_idle
        late = {source.destination for source in self._member.sources if source.kept_at < bound}
        if late:
            self._let_go([source for source in self._member.sources if source.destination in late])

    def _let_go(self, sources: Sequence[Source]) -> None:
        out: list[Delivery] = []
        for source in sources:
            lost = source.held
            had = source.had or bool(lost)
            source.forget()
            source.had = had
            source.kept_at = now()
            if source.lease is not None:
                source.lease.held = source.lease.ready = False
            handled = [one.delivery for one in lost.values() if one.delivery is not None]
            out += handled
            if lost:
                logger.warning(
                    "group %r could not keep %d entries of %r, %d of them with handlers: others have them by now",
                    self._member.group,
                    len(lost),
                    source.key,
                    len(handled),
                )
        self._member.lanes.forget(sources)
        for delivery in out:
            delivery.lose()
        if out:
            self._member.filled.set()  # one that is to be alone may have waited for them

    # Turns, where one consumer at a time serves a stream

    def _leasing(self, lease: Lease) -> Command:
        return ("EVAL", LEASE, 1, lease.key, self._member.consumer, round(self._member.min_idle * 1000))

    async def _take_turns(self) -> None:
        missing = [lease for lease in self._member.leases if not lease.held]
        if not missing:
            return
        sent = now()
        replies = await self._member.ask([self._leasing(lease) for lease in missing])
        for lease, reply in zip(missing, replies, strict=True):
            self._member.check(lease.key, reply)
            if reply:
                lease.held, lease.ready = True, False
                lease.epoch += 1
                for source in self._member.served_by(lease):
                    source.kept_at = sent
                    source.scan = "-"

    def _recovering(self) -> bool:
        return any(lease.held and not lease.ready for lease in self._member.leases)

    def _begin_turns(self) -> None:
        """All that others had left is in the lanes: now new entries may be read."""
        member = self._member
        for lease in member.leases:
            left = any(source.scan or source.unsure_until is not None for source in member.served_by(lease))
            if lease.held and not lease.ready and member.limit and not left:
                lease.ready = True
                member.room.set()

    # What comes again

    async def _take(self) -> None:
        """What is due, what the dead have left, and at the begin of a turn all that is there."""
        member = self._member
        begin = now()
        if begin >= self._scan_at:
            self._scan_at = begin + member.min_idle / 4
            for source in member.sources:
                if source.readable:  # else it waits for its turn, or has all looked through at the begin of it
                    source.scan = source.scan or "-"
            await member.ask([member.leaving(source, "") for source in member.sources])
        member.take_at = begin + self._poll
        for source in member.sources:
            lease = source.lease
            room = member.free_for_what_comes_again()
            if room <= 0 or source.unsure_until is not None or (lease is not None and not lease.held):
                continue
            async with self.claiming:
                if not await self._claim(source, room):
                    return
        self._begin_turns()

    async def _claim(self, source: Source, room: int) -> bool:
        """Whether the group is there."""
        member = self._member
        recovering = source.lease is not None and not source.lease.ready
        sent = now()
        try:
            (reply,) = await member.ask([member.taking(source, room, source.scan, all_of_it=recovering)])
        except (BrokerError, asyncio.CancelledError):
            source.unsure_until, source.had = now(), True
            raise
        if lacks_group(reply):
            await member.make_groups_again()
            return False
        member.check(source.key, reply)
        if now() - sent < KEPT * member.min_idle:
            self._receive_back(source, reply)
        else:
            source.unsure_until, source.had = now(), True
        return True

    async def _find_again(self) -> None:
        member = self._member
        if strays := list(member.strays):
            # What was sent on a connection that we gave up, and a network held back, must not be carried out after we
            # have looked. Who may not do this has only the time that has passed.
            await member.ask([("CLIENT", "KILL", "ID", one) for one in strays])
            del member.strays[: len(strays)]
        for source in member.sources:
            ours = source.lease is None or source.lease.held
            if ours and source.unsure_until is not None and source.unsure_until <= now():
                await member.find_again(source)
                source.unsure_until, source.had = None, False
                member.filled.set()
                member.room.set()

    def _receive_back(self, source: Source, reply: Any) -> None:
        member = self._member
        found, source.scan, after, gone, over = reply
        for entry_id, fields, attempt, kind in found:
            if kind == WAITS:
                member.lanes.expect(Entry(source, entry_id, None, attempt, key_of(fields)))
            else:
                member.add_again(source, entry_id, fields, attempt, left=kind == FROM_THE_DEAD)
        if found:
            member.filled.set()
        if after >= 0:
            member.take_at = min(member.take_at, now() + after / 1000)
        if source.scan:
            member.take_at = now()
        if gone or over:
            member.lanes.gone(source, {*gone, *over})
            member.filled.set()
        if gone:
            logger.warning(
                "%d entries of %r were deleted before group %r had handled them: trim behind what is pending only",
                len(gone),
                source.key,
                member.group,
            )

    async def _fetch(self) -> None:
        """The fields of those that waited without."""
        lanes = self._member.lanes
        absent = lanes.absent[: max(1, self._member.limit)]
        replies = await self._member.ask([("XRANGE", one.source.key, one.id, one.id) for one in absent])
        for entry, reply in zip(absent, replies, strict=True):
            self._member.check(entry.source.key, reply)
            if entry not in lanes.absent:
                continue  # let go meanwhile
            lanes.absent.remove(entry)
            if reply:
                entry.fields = reply[0][1]
                lanes.present(entry)
            else:
                entry.source.held.pop(entry.id, None)
                lanes.done(entry)
                logger.warning("entry %s of %r was deleted before it was handled", as_text(entry.id), entry.source.key)
        self._member.filled.set()
