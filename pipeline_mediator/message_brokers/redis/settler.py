"""Outcomes carried out: what is done is acknowledged, what comes again postponed, what is dead kept with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import BrokerError, BrokerRefusedError
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Later
from pipeline_mediator.message_brokers.redis.client import lacks_group
from pipeline_mediator.message_brokers.redis.entries import buried
from pipeline_mediator.message_brokers.redis.lanes import Entry
from pipeline_mediator.message_brokers.redis.membership import RIGHTS, chunks, now
from pipeline_mediator.message_brokers.redis.scripts import BURY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.message_brokers.redis.lanes import Source
    from pipeline_mediator.message_brokers.redis.membership import Command, Membership

__all__ = ["Settler"]

_WIDEST: Final = 3000
"""Fields and values that a script can hand on as one command; Lua's stack ends at 8000."""
_LONGEST_DELAY: Final = 10 * 365 * 86400.0


class Settler:
    """Turns the outcomes of one call into one exchange with the server."""

    def __init__(self, membership: Membership) -> None:
        self._member = membership

    async def settle(self, deliveries: Sequence[Delivery]) -> list[Exception | None]:
        """See `Subscription.settle`."""
        answers: list[Exception | None] = [None] * len(deliveries)
        acks: dict[str, list[int]] = {}
        later: dict[str, list[int]] = {}
        dead: list[int] = []
        sources: dict[str, Source] = {}
        for index, delivery in enumerate(deliveries):
            entry = delivery.tag
            if not isinstance(entry, Entry) or entry.delivery is not delivery or delivery.lost:
                answers[index] = self._not_out(delivery)
                continue
            if entry.doubtful and entry.source.held.get(entry.id) is not None:
                # It was carried out, and only the answer lost: the entry has come again, and is another delivery's.
                entry.settled = True
            if entry.settled:
                continue
            outcome = delivery.outcome
            self._go_on_behind(entry, over=isinstance(outcome, (Ack, Dead)))
            if isinstance(outcome, Dead):
                dead.append(index)
                continue
            source = entry.source
            sources[source.key] = source
            (acks if isinstance(outcome, Ack) else later).setdefault(source.key, []).append(index)
        parts = [
            (indices, _done(self._member.group, sources[key], deliveries, indices)) for key, indices in acks.items()
        ]
        parts += [
            (chunk, [self._postponement(sources[key], deliveries, chunk)])
            for key, indices in later.items()
            for chunk in chunks(indices)
        ]
        parts += [([index], [self._burial(deliveries[index])]) for index in dead]
        if parts:
            await self._carry_out(deliveries, parts, answers)
        return answers

    def _not_out(self, delivery: Delivery) -> BrokerRefusedError:
        return BrokerRefusedError(
            f"message {delivery.message_id} is not out with subscription {self._member.group!r}, or was lost by it"
        )

    def _go_on_behind(self, entry: Entry, *, over: bool) -> None:
        if entry.doubtful:
            return  # its lane went on when it was first tried
        if entry.source.lease is not None and not over:
            self._member.lanes.block(Entry(entry.source, entry.id, None, entry.attempt, entry.key))
        else:
            self._member.lanes.done(entry)

    async def _carry_out(
        self,
        deliveries: Sequence[Delivery],
        parts: Sequence[tuple[list[int], list[Command]]],
        answers: list[Exception | None],
    ) -> None:
        commands = [command for _, some in parts for command in some]
        try:
            replies = iter(await self._member.line.execute(commands))
        except BrokerError as error:
            replies = iter([error for _ in commands])
        written: list[int] = []
        for indices, some in parts:
            mine = [next(replies) for _ in some]
            failure = next((one for one in mine if isinstance(one, Exception) and not lacks_group(one)), None)
            for index in indices:
                entry = _entry(deliveries[index])
                if entry.source.held.get(entry.id) is entry:
                    del entry.source.held[entry.id]
                entry.source.doubtful.discard(entry.id)
                if failure is not None:
                    entry.doubtful = True
                    entry.source.doubtful.add(entry.id)
                    answers[index] = self._member.client.explain(failure, entry.source.key, reading=RIGHTS)
                elif some[0][0] == "XADD":
                    written.append(index)
                else:
                    entry.settled = True
        if written:
            # Too wide for a script, so it takes two steps; a crash in between leaves the message where it was, too.
            group = self._member.group
            rest = [([index], _done(group, _entry(deliveries[index]).source, deliveries, [index])) for index in written]
            await self._carry_out(deliveries, rest, answers)

    def _postponement(self, source: Source, deliveries: Sequence[Delivery], indices: Iterable[int]) -> Command:
        words: list[Any] = []
        for index in indices:
            entry = _entry(deliveries[index])
            outcome = deliveries[index].outcome
            if isinstance(outcome, Later):
                delay = round(max(0.0, min(outcome.delay, _LONGEST_DELAY)) * 1000)
                self._member.take_at = min(self._member.take_at, now() + delay / 1000)
                words += (entry.id, entry.attempt, delay)
            else:
                # It may be what processes die of still: nobody has seen it through.
                words += (entry.id, entry.attempt - 1, -1 if entry.alone else 0)
        return self._member.postponing(source, words)

    def _burial(self, delivery: Delivery) -> Command:
        entry = _entry(delivery)
        source = entry.source
        reason = delivery.outcome.reason if isinstance(delivery.outcome, Dead) else ""
        words = buried(delivery, entry.fields or (), entry.id, source.stream, reason)
        if len(words) > _WIDEST:
            return ("XADD", source.dead, "*", *words)
        about = (self._member.group, self._member.consumer, entry.id, int(source.again), int(not entry.doubtful))
        return ("EVAL", BURY, 2, source.key, source.dead, *about, *words)


def _entry(delivery: Delivery) -> Entry:
    tag = delivery.tag
    if not isinstance(tag, Entry):
        raise TypeError("this delivery is another broker's")
    return tag


def _done(group: str, source: Source, deliveries: Sequence[Delivery], indices: Iterable[int]) -> list[Command]:
    """A second chance belongs to this group alone, so nothing of it stays."""
    ids = [_entry(deliveries[index]).id for index in indices]
    acknowledgement = ("XACK", source.key, group, *ids)
    return [acknowledgement, ("XDEL", source.key, *ids)] if source.again else [acknowledgement]
