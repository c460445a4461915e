"""What is ordered: the messages of one key, whatever becomes of each."""

# ruff: noqa: S101, PLR2004  # these are tests: assert and numbers are the tools

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_mediator.message_brokers.protocol import Ack, Dead, Later
from pipeline_mediator.testing.broker_suite.backing import BrokerCases
from pipeline_mediator.testing.broker_suite.steps import (
    bodies_of,
    by_key,
    nothing_comes,
    outgoing,
    receive,
    sending,
    settle,
    subscribed,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["Order"]


class Order(BrokerCases):
    """What is ordered: the messages of one key, whatever becomes of each."""

    async def test_each_key_comes_in_the_order_it_was_published_in(self, transport: Transport) -> None:
        """An order would be shipped before it is paid."""
        self.needs("ordered_by_key", "keys")
        batch = [outgoing(number, "abc"[number % 3]) for number in range(60)]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, batch):
                deliveries = await take(self.features, warehouse, 60)
            assert by_key(deliveries) == by_key(batch)

    async def test_of_one_key_one_is_out_at_a_time(self, transport: Transport) -> None:
        """A consumer with 16 workers would handle two events of one order beside each other."""
        self.needs("ordered_by_key", "keys")
        batch = [outgoing(1, "a"), outgoing(2, "a"), outgoing(3, "a")]
        async with subscribed(transport) as (broker, warehouse), sending(self.features, broker, batch):
            for expected in (b"1", b"2", b"3"):
                deliveries = await receive(self.features, warehouse, 1, limit=10)
                assert bodies_of(deliveries) == [expected]
                assert await nothing_comes(self.features, warehouse)
                await settle(warehouse, deliveries, Ack())

    async def test_other_keys_go_on_while_one_is_out(self, transport: Transport) -> None:
        """One slow order would stop all the others."""
        self.needs("ordered_by_key", "keys")
        batch = [outgoing(1, "a"), outgoing(2, "a"), outgoing(3, "b"), outgoing(4), outgoing(5)]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, batch):
                out = await receive(self.features, warehouse, 4)
                assert sorted(bodies_of(out)) == [b"1", b"3", b"4", b"5"]
                await settle(warehouse, out, Ack())
                (second,) = await take(self.features, warehouse, 1)
            assert second.body == b"2"

    async def test_a_postponed_one_is_not_overtaken_by_its_key(self, transport: Transport) -> None:
        """A payment that has to wait a minute would be overtaken by its refund."""
        self.needs("ordered_by_key", "keys", "ordered_behind_postponed")
        batch = [outgoing(1, "a"), outgoing(2, "a"), outgoing(3, "b")]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, batch):
                seen: list[Delivery] = []
                tried = False
                while len(seen) < 4:
                    (delivery,) = await receive(self.features, warehouse, 1)
                    postponed = delivery.body == b"1" and not tried
                    tried = tried or postponed
                    await settle(warehouse, [delivery], Later(0.3) if postponed else Ack())
                    seen.append(delivery)
            assert by_key(seen) == {"a": [b"1", b"1", b"2"], "b": [b"3"]}

    async def test_one_that_is_given_back_is_not_overtaken_by_its_key(self, transport: Transport) -> None:
        """A process that is stopped would turn the order of what it gives back around."""
        self.needs("ordered_by_key", "keys", "ordered_behind_postponed")
        batch = [outgoing(1, "a"), outgoing(2, "a")]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, batch):
                first = await take(self.features, warehouse, 1, outcome=None)
                rest = await take(self.features, warehouse, 2)
            assert bodies_of([*first, *rest]) == [b"1", b"1", b"2"]

    async def test_a_key_goes_on_behind_a_dead_letter(self, transport: Transport) -> None:
        """One poison message would stop its customer for ever."""
        self.needs("ordered_by_key", "keys")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, "a"), outgoing(2, "a")]):
                await take(self.features, warehouse, 1, Dead("no"))
                (second,) = await take(self.features, warehouse, 1)
            assert second.body == b"2"
