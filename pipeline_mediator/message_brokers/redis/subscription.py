"""A consumer group's reading of Redis Streams: entries become deliveries, and their outcomes are carried out."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import BrokerError, ConfigurationError
from pipeline_mediator.message_brokers.redis.client import lacks_group
from pipeline_mediator.message_brokers.redis.dead_letters import RedisDeadLetters, Shelf
from pipeline_mediator.message_brokers.redis.entries import delivery_of
from pipeline_mediator.message_brokers.redis.keeper import Keeper
from pipeline_mediator.message_brokers.redis.membership import KEPT, RIGHTS, Membership, now, wait
from pipeline_mediator.message_brokers.redis.scripts import RELEASE, WAITING
from pipeline_mediator.message_brokers.redis.settler import Settler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Literal, Self

    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.message_brokers.redis.client import RedisClient
    from pipeline_mediator.message_brokers.redis.lanes import Entry, Source
    from pipeline_mediator.message_brokers.redis.membership import Command

__all__ = ["RedisStreamSubscription"]

logger = logging.getLogger(__name__)

_BLOCK: Final = 0.5
"""Seconds that one read waits at the server; leaving takes as long."""
_LARGEST_READ: Final = 64
"""Entries of one stream; answers of more than some hundred kilobytes cost asyncio's reader twice as much for each."""
_SHORTEST_IDLE: Final = 0.1


class RedisStreamSubscription:
    """One group's consumer of Redis Streams: at least once; see `Subscription`. Made by `RedisStreamBroker.subscribe`.

        async with broker.subscribe("orders", name="warehouse") as subscription:
            deliveries = await subscription.receive(16)
            ...                                    # each has its outcome now
            await subscription.settle(deliveries)

    Several processes may use one `name`: each entry goes to one of them. What one holds it keeps claimed, every third
    of `min_idle` seconds, however long the handler takes; once it is dead or cut off, others take it over after
    `min_idle`. A delivery that could not be kept for so long is lost, and its handler is told.

    Of one key one delivery is out at a time, and first deliveries come in order, within one consumer. With
    `ordered=True` one consumer at a time serves a stream for the group, by a lease of `min_idle` seconds, and others
    stand by: then a key's order holds over redelivery too, and over the death of a consumer. 10,000 entries may wait
    in memory behind others of their key, without their bodies; more stop the reading of new ones until some are done.

    `Later` and giving back leave the entry with the group, in the name of a consumer called `~later`, and write its
    time beside it: one step at the server, by the server's clock, so that a crash anywhere leaves the entry as it was
    or postponed. Dead letters are entries of `{stream}:name:dead`, written and acknowledged in one step.

    `attempt` is the server's count, and rises when an entry is handed over; of what was only read, 1 is all that the
    death of its process counts. What the dead leave with a count of 2 or more is handed over alone: when everything
    else is settled, and with nothing beside it until it is, too. So a message that processes die of takes no others
    along, if at least three attempts are allowed.

    A group or stream that vanishes is made again, from its oldest entry on, with a warning: what was handled may come
    again, nothing is left out.
    """

    def __init__(
        self,
        client: RedisClient,
        destinations: Sequence[str],
        *,
        prefix: str,
        name: str,
        consumer: str | None,
        min_idle: float,
        ordered: bool,
        start: Literal["0", "$"],
    ) -> None:
        if not destinations or not name or len(set(destinations)) < len(destinations):
            raise ConfigurationError(
                f"subscription {name!r} to {destinations!r}: give it a name and each stream once, "
                "subscribe('orders', name='warehouse')"
            )
        if min_idle < _SHORTEST_IDLE or start not in {"0", "$"} or consumer in {"", WAITING}:
            raise ConfigurationError(
                f"subscription {name!r}: min_idle={min_idle} must be {_SHORTEST_IDLE} s or more, start={start!r} '0' "
                f"or '$', and consumer={consumer!r} neither empty nor {WAITING!r}"
            )
        self._client = client
        self._start = start
        self._named = consumer is not None
        self._block = min(_BLOCK, min_idle / 4)
        self._member = Membership(
            client,
            destinations,
            prefix=prefix,
            group=name,
            consumer=consumer,
            min_idle=min_idle,
            ordered=ordered,
        )
        sources = self._member.sources
        shelves = [Shelf(one.destination, one.dead, one.key) for one in sources if one.again]
        self._by_key = {source.key.encode(): source for source in sources}
        self._dead_letters = RedisDeadLetters(client, name, shelves, RIGHTS)
        self._settler = Settler(self._member)
        self._keeper = Keeper(self._member)
        self._reader = client.line()
        self._tasks: list[asyncio.Task[None]] = []
        self._alone: Entry | None = None
        self._begun = self._stopping = False
        self._calls = self._failed_call = 0
        self._reader_id: object = None
        """What the server calls the reader's connection: None while it was not asked, an error where it may not say."""

    @property
    def name(self) -> str:
        """The consumer group."""
        return self._member.group

    @property
    def consumer(self) -> str:
        """What the server calls this consumer of the group."""
        return self._member.consumer

    @property
    def dead_letters(self) -> RedisDeadLetters:
        """What it has given up."""
        return self._dead_letters

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for at least one delivery; see `Subscription.receive`."""
        if limit < 1:
            raise ValueError(f"limit is {limit}: ask for at least one delivery")
        if not self._begun:
            raise ConfigurationError(f"subscription {self.name!r} was not entered: async with subscription: ...")
        member = self._member
        if limit > member.limit:
            member.limit = limit
            member.poke.set()
        self._calls += 1
        member.room.set()
        while True:
            self._keeper.let_go_of_what_was_not_kept()
            if deliveries := self._ready(limit):
                member.room.set()
                if any(source.scan for source in member.sources):
                    member.poke.set()
                return deliveries
            if uncounted := self._uncounted(limit):
                await member.count(uncounted)
                continue
            if (error := member.error) is not None:
                member.error = None
                self._failed_call = self._calls
                raise error
            member.filled.clear()
            await wait(member.filled, member.min_idle)

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        """Carry out the outcomes, all in one go; see `Subscription.settle`."""
        member = self._member
        planned = member.take_at
        try:
            return await self._settler.settle(deliveries)
        finally:
            if member.lanes:
                member.filled.set()
            if member.lanes.absent or member.take_at < planned:
                member.poke.set()
            member.room.set()

    def _ready(self, limit: int) -> list[Delivery]:
        lanes = self._member.lanes
        deliveries: list[Delivery] = []
        if self._is_one_out_alone():
            return deliveries
        while len(deliveries) < limit and (head := lanes.head) is not None and head.counted:
            if head.alone:
                limit, self._alone = 1, head
            for entry in lanes.take(limit - len(deliveries)):
                if entry.source.held.get(entry.id) is entry:
                    deliveries.append(self._hand_over(entry))
                else:
                    lanes.done(entry)
        return deliveries

    def _uncounted(self, limit: int) -> list[Entry]:
        """What the server is to count before it is handed over; nothing while it has to wait for others."""
        member = self._member
        if self._is_one_out_alone():
            return []
        entries = member.lanes.uncounted(limit)
        return [] if entries and entries[0].alone and member.is_anything_out() else entries

    def _is_one_out_alone(self) -> bool:
        if self._alone is not None and not self._member.holds(self._alone):
            self._alone = None
        return self._alone is not None

    def _hand_over(self, entry: Entry) -> Delivery:
        delivery = delivery_of(entry.fields or (), entry.source.destination, self.name, entry.attempt, entry)
        entry.delivery = delivery
        return delivery

    # Begin and end

    async def __aenter__(self) -> Self:
        if self._begun:
            raise ConfigurationError(f"subscription {self.name!r} is entered already; make one for each consumer")
        await self._client.enter()
        try:
            self._member.begin()
            self._keeper = Keeper(self._member)
            self._reader, self._reader_id = self._client.line(), None
            await self._prepare()
        except BaseException:
            await self._hang_up()
            raise
        self._begun, self._stopping = True, False
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._keeper.run())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await finish(self._end(), seconds=4 * self._client.timeout + self._block)

    async def _prepare(self) -> None:
        member = self._member
        await member.make_groups(self._start)
        probes: list[Command] = []
        places: list[str] = []
        for source in member.sources:
            source.kept_at = now()
            probes += [("XLEN", source.dead), member.taking(source, 0, "", all_of_it=False)]
            places += [source.dead, source.times]
        for place, reply in zip(places, await member.line.execute(probes), strict=True):
            member.check(place, reply)
        if self._named:
            # Whoever had this name before us is gone.
            for source in member.sources:
                await member.give_back(source, died=True)

    async def _end(self) -> None:
        self._begun = False
        self._stopping = True
        self._member.room.set()
        reader, keeper = self._tasks
        # What it claims at this moment is known for what it is then, and nothing more is claimed.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._client.timeout / 2):
                await self._keeper.claiming.acquire()
        keeper.cancel()
        # Cut off, a read might still be given entries, in the name of nobody.
        await asyncio.wait((reader,), timeout=self._block + self._client.timeout / 2)
        reader.cancel()
        await asyncio.wait((reader, keeper))
        try:
            await self._leave()
        except BrokerError as error:
            logger.warning(
                "subscription %r left without giving back what it had (%s); others take it over after %g s",
                self.name,
                type(error).__name__,
                self._member.min_idle,
            )
        finally:
            await self._hang_up()

    async def _leave(self) -> None:
        member = self._member
        for source in member.sources:
            await member.give_back(source)
        releases: list[Command] = [("EVAL", RELEASE, 1, lease.key, member.consumer) for lease in member.leases]
        await member.line.execute([*releases, *[member.leaving(source, member.consumer) for source in member.sources]])

    async def _hang_up(self) -> None:
        await self._reader.close()
        await self._member.line.close()
        await self._client.leave()

    # The reader: new entries

    async def _read(self) -> None:
        while not self._stopping:
            try:
                await self._read_some()
            except Exception as error:  # noqa: BLE001 - raised by `receive`
                await self._report(error)

    async def _report(self, error: Exception) -> None:
        """The next `receive` raises it, and the one behind that has us go on."""
        member = self._member
        member.error = error
        self._failed_call = self._calls
        member.filled.set()
        while not self._stopping and (self._is_unheard() or self._calls == self._failed_call):
            member.room.clear()
            await member.room.wait()

    def _is_unheard(self) -> bool:
        return self._member.error is not None

    async def _read_some(self) -> None:
        member = self._member
        sources = [source for source in member.sources if source.readable]
        room = member.free()
        # Not for every place that becomes free: a read costs as much for one entry as for many.
        if room <= 0 or not sources or (member.lanes and room < _LARGEST_READ):
            member.room.clear()
            await wait(member.room, self._block)
            return
        if self._reader_id is None:
            (self._reader_id,) = await self._reader.execute([("CLIENT", "ID")])
        count = max(1, 2 * room // len(sources))
        turns = {source.key: source.lease.epoch if source.lease else 0 for source in sources}
        sent = now()
        command = (
            *("XREADGROUP", "GROUP", member.group, member.consumer, "COUNT", min(count, _LARGEST_READ)),
            *("BLOCK", max(1, round(self._block * 1000)), "STREAMS"),
            *turns,
            *(">" for _ in sources),
        )
        try:
            (reply,) = await self._reader.execute([command], seconds=self._client.timeout + self._block)
        except BrokerError:
            # The server may go on answering it until it has waited long enough, to nobody.
            self._give_up_the_connection()
            self._be_unsure(sources, max(now(), sent + self._block) + self._block / 10)
            raise
        if lacks_group(reply):
            await member.make_groups_again()
            return
        try:
            member.check(sources[0].key, reply)
        except BrokerError:
            self._reader_id = None  # some errors cost the connection
            raise
        if now() - sent >= KEPT * member.min_idle:
            self._be_unsure(sources, now())  # too late to be ours, unless it is found to be
        else:
            for key, entries in reply or ():
                source = self._by_key[key]
                if self._is_our_turn(source, turns[source.key]):
                    for entry_id, fields in entries:
                        member.add(source, entry_id, fields)
            member.filled.set()

    def _give_up_the_connection(self) -> None:
        """Where we may, the server is told to hang up before we look what it gave us."""
        if isinstance(self._reader_id, int):
            self._member.strays.append(self._reader_id)
        self._reader_id = None

    def _be_unsure(self, sources: Sequence[Source], until: float) -> None:
        for source in sources:
            source.unsure_until = until
        self._member.poke.set()

    def _is_our_turn(self, source: Source, turn: int) -> bool:
        return source.lease is None or (source.lease.ready and source.lease.epoch == turn)
