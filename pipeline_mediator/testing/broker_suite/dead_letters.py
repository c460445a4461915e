"""What is given up: kept as it came, with the reason, until somebody looks at it."""

# ruff: noqa: S101, PLR2004, SIM117  # these are tests: assert and numbers are the tools, and blocks show what is open when

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pipeline_mediator.message_brokers.protocol import Dead, Later
from pipeline_mediator.testing.broker_suite.backing import BrokerCases
from pipeline_mediator.testing.broker_suite.steps import bodies_of, nothing_comes, outgoing, sending, subscribed, take

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator.message_brokers.protocol import DeadDelivery, Delivery, MessageBroker, Subscription
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["DeadLetters"]

_REASON = "OutOfStockError: für 'orders' — nothing left\nin any shelf"


class DeadLetters(BrokerCases):
    """What is given up: kept as it came, with the reason, until somebody looks at it."""

    async def test_dead_letter_keeps_reason_bytes_and_provenance(self, transport: Transport) -> None:
        """Whoever is to repair it could not see what it was, where it came from, or why nobody took it."""
        self.needs("dead_letters")
        body = bytes(range(256))
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, "a", body=body, headers={"subject": "x"})]):
                if self.features.redelivers:
                    await take(self.features, warehouse, 1, Later())
                (given_up,) = await take(self.features, warehouse, 1, Dead(_REASON))
            assert await self.letters(warehouse).count() == 1
            (letter,) = await self.letters(warehouse).list(10)
            kept = letter.delivery
            assert (letter.reason, kept.body, kept.message_id, kept.key) == (_REASON, body, "id-1", given_up.key)
            assert (kept.destination, kept.subscription) == ("orders", "warehouse")
            assert kept.content_type == given_up.content_type
            assert given_up.headers.items() <= kept.headers.items()
            assert kept.attempt == given_up.attempt
            if letter.died_at is not None:
                assert abs(datetime.now(UTC) - letter.died_at) < timedelta(minutes=5)

    async def test_what_is_given_up_does_not_come_again(self, transport: Transport) -> None:
        """A poison message would go round for ever."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                await take(self.features, warehouse, 1, Dead("no"))
            assert await nothing_comes(self.features, warehouse)
        async with subscribed(transport) as (_, warehouse):
            assert await nothing_comes(self.features, warehouse)

    async def test_dead_letters_are_listed_in_pages_oldest_first(self, transport: Transport) -> None:
        """An operator with a million of them would see none, or the same page again and again."""
        self.needs("dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            await self._give_up(broker, warehouse, 7)
            letters = self.letters(warehouse)
            assert await letters.count() == 7
            pages: list[list[bytes]] = []
            after: str | None = None
            for _ in range(4):
                page = await letters.list(3, after=after)
                pages.append(_bodies(page))
                after = page[-1].id if page else after
            assert pages == [[b"0", b"1", b"2"], [b"3", b"4", b"5"], [b"6"], []]

    async def test_a_retried_one_is_delivered_again_and_no_dead_letter_any_more(self, transport: Transport) -> None:
        """What was repaired would stay dead, or be there twice."""
        self.needs("dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            sent = await self._give_up(broker, warehouse, 3)
            letters = self.letters(warehouse)
            ids = {letter.delivery.body: letter.id for letter in await letters.list(10)}
            assert await letters.retry([ids[b"0"], ids[b"2"]]) == 2
            again = await take(self.features, warehouse, 2)
            assert sorted(bodies_of(again)) == [b"0", b"2"]
            assert {(one.attempt, one.destination, one.subscription) for one in again} == {(1, "orders", "warehouse")}
            assert {(one.message_id, one.key) for one in again} == {(sent[n].message_id, sent[n].key) for n in (0, 2)}
            assert _bodies(await letters.list(10)) == [b"1"]
            assert await nothing_comes(self.features, warehouse)

    async def test_a_retried_one_can_be_given_up_again(self, transport: Transport) -> None:
        """The second time it would be lost."""
        self.needs("dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            await self._give_up(broker, warehouse, 1)
            letters = self.letters(warehouse)
            assert await letters.retry([letter.id for letter in await letters.list(10)]) == 1
            await take(self.features, warehouse, 1, Dead("still no"))
            (letter,) = await letters.list(10)
            assert (letter.reason, letter.delivery.body) == ("still no", b"0")

    async def test_a_retried_one_goes_to_its_own_group_only(self, transport: Transport) -> None:
        """The mails would be sent again because the warehouse had failed."""
        self.needs("dead_letters", "several_groups")
        async with subscribed(transport) as (broker, warehouse):
            async with transport.subscribe(broker, "orders", name="mail") as mail:
                async with sending(self.features, broker, [outgoing(1)]):
                    await take(self.features, mail, 1)
                    await take(self.features, warehouse, 1, Dead("no"))
                assert await self.letters(mail).count() == 0
                assert list(await self.letters(mail).list(10)) == []
                letters = self.letters(warehouse)
                await letters.retry([letter.id for letter in await letters.list(10)])
                await take(self.features, warehouse, 1)
                assert await nothing_comes(self.features, mail)

    async def test_dropped_ones_are_gone_and_no_others(self, transport: Transport) -> None:
        """An operator would delete what nobody has looked at."""
        self.needs("dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            await self._give_up(broker, warehouse, 3)
            letters = self.letters(warehouse)
            ids = {letter.delivery.body: letter.id for letter in await letters.list(10)}
            assert await letters.drop([ids[b"1"]]) == 1
            assert _bodies(await letters.list(10)) == [b"0", b"2"]
            assert await nothing_comes(self.features, warehouse)

    async def test_ids_that_are_not_there_are_not_counted(self, transport: Transport) -> None:
        """Two operators at once would fail, or be told that they did what the other one did."""
        self.needs("dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            await self._give_up(broker, warehouse, 1)
            letters = self.letters(warehouse)
            (letter,) = await letters.list(10)
            assert await letters.drop([letter.id]) == 1
            assert await letters.drop([letter.id]) == 0
            assert await letters.retry([letter.id]) == 0
            assert await letters.count() == 0

    async def test_dead_letters_are_there_without_the_subscription(self, transport: Transport) -> None:
        """The command that lists them would have to consume."""
        self.needs("dead_letters", "keeps_dead_letters")
        async with subscribed(transport) as (broker, warehouse):
            await self._give_up(broker, warehouse, 1)
        async with transport.broker() as broker:
            letters = self.letters(transport.subscribe(broker, "orders", name="warehouse"))
            assert await letters.count() == 1
            (letter,) = await letters.list(10)
            assert (letter.delivery.body, letter.reason) == (b"0", "no 0")
            assert await letters.retry([letter.id]) == 1
        async with subscribed(transport) as (_, warehouse):
            assert bodies_of(await take(self.features, warehouse, 1)) == [b"0"]

    async def _give_up(self, broker: MessageBroker, subscription: Subscription, number: int) -> dict[int, Delivery]:
        """Make so many dead letters, in order; what was given up, by number."""
        given_up: dict[int, Delivery] = {}
        for one in range(number):
            async with sending(self.features, broker, [outgoing(one, f"key-{one}")]):
                (given_up[one],) = await take(self.features, subscription, 1, Dead(f"no {one}"))
        return given_up


def _bodies(letters: Sequence[DeadDelivery]) -> list[bytes]:
    return [letter.delivery.body for letter in letters]
