"""What is received: a copy for each group, shared within a group, and nothing lost on the way."""

# ruff: noqa: S101, PLR2004, SIM117  # these are tests: assert and numbers are the tools, and blocks show what is open when

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from pipeline_mediator.message_brokers.protocol import Ack
from pipeline_mediator.testing.broker_suite.backing import BrokerCases
from pipeline_mediator.testing.broker_suite.steps import (
    attempts_of,
    bodies_of,
    nothing_comes,
    outgoing,
    receive,
    sending,
    settle,
    subscribed,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import Delivery, MessageBroker, Subscription
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["Receiving"]


class Receiving(BrokerCases):
    """What is received: a copy for each group, shared within a group, and nothing lost on the way."""

    async def test_delivery_says_where_it_comes_from_and_that_it_is_the_first_attempt(
        self, transport: Transport
    ) -> None:
        """The inbox keys by the subscription's name, dead-lettering counts attempts, spans name the system."""
        async with subscribed(transport) as (broker, warehouse):
            assert warehouse.name == "warehouse"
            async with sending(self.features, broker, [outgoing(1)]):
                (delivery,) = await take(self.features, warehouse, 1)
            assert (delivery.destination, delivery.subscription, delivery.attempt) == ("orders", "warehouse", 1)
            assert delivery.system == broker.features.system
            assert not delivery.lost

    async def test_several_destinations_can_be_subscribed_to(self, transport: Transport) -> None:
        """Only the first, or only the last, would be read."""
        self.needs("several_destinations")
        async with subscribed(transport, "orders", "returns") as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1), outgoing(2, to="returns")]):
                deliveries = await take(self.features, warehouse, 2)
            found = {(delivery.destination, delivery.body) for delivery in deliveries}
            assert found == {("orders", b"1"), ("returns", b"2")}

    async def test_each_group_gets_a_copy(self, transport: Transport) -> None:
        """The mails would take the warehouse's orders away."""
        self.needs("several_groups")
        async with subscribed(transport) as (broker, warehouse):
            async with transport.subscribe(broker, "orders", name="mail") as mail:
                async with sending(self.features, broker, [outgoing(number) for number in range(5)]):
                    found = [await take(self.features, group, 5) for group in (warehouse, mail)]
            assert [sorted(bodies_of(copies)) for copies in found] == [[b"0", b"1", b"2", b"3", b"4"]] * 2
            assert [{copy.subscription for copy in copies} for copies in found] == [{"warehouse"}, {"mail"}]

    async def test_subscriptions_of_one_group_share_its_messages(self, transport: Transport) -> None:
        """Two processes of a group would do everything twice."""
        self.needs("competes", "several_clients")
        found: list[Delivery] = []
        done = anyio.Event()

        async def work(subscription: Subscription) -> None:
            while len(found) < 40:
                deliveries = await subscription.receive(1)
                await settle(subscription, deliveries, Ack())
                found.extend(deliveries)
            done.set()

        async with subscribed(transport) as (broker, one), subscribed(transport) as (_, other):
            async with sending(self.features, broker, [outgoing(number) for number in range(40)]):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(work, one)
                    tasks.start_soon(work, other)
                    with anyio.move_on_after(self.features.seconds):
                        await done.wait()
                    tasks.cancel_scope.cancel()
        assert sorted(map(int, bodies_of(found))) == list(range(40))

    async def test_no_more_is_handed_over_than_asked_for(self, transport: Transport) -> None:
        """A consumer with 16 places would have to put the rest somewhere."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(number) for number in range(10)]):
                with anyio.fail_after(self.features.seconds):
                    first = await warehouse.receive(3)
                assert 1 <= len(first) <= 3
                await settle(warehouse, first, Ack())
                rest = await take(self.features, warehouse, 10 - len(first))
            assert sorted(bodies_of([*first, *rest])) == [b"%d" % number for number in range(10)]

    async def test_receive_waits_for_the_first(self, transport: Transport) -> None:
        """A consumer would spin, or see what was published only when it asks the next time."""
        async with subscribed(transport) as (broker, warehouse):
            assert await nothing_comes(self.features, warehouse)
            found: list[Delivery] = []

            async def wait() -> None:
                found.extend(await take(self.features, warehouse, 1))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.sleep(0.02)
                async with sending(self.features, broker, [outgoing(1)]):
                    pass
            assert bodies_of(found) == [b"1"]

    async def test_cancelling_receive_loses_none(self, transport: Transport) -> None:
        """What a client had read when it was cancelled would be out with nobody, until a lock ends or for ever."""
        number = 60
        found: list[Delivery] = []
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(one) for one in range(number)]):
                with anyio.move_on_after(self.features.seconds):
                    tried = 0
                    while len(found) < number:
                        tried += 1
                        with anyio.move_on_after((tried % 20) * 0.0005):
                            deliveries = await warehouse.receive(3)
                            with anyio.CancelScope(shield=True):
                                await settle(warehouse, deliveries, Ack())
                                found += deliveries
            assert sorted(map(int, bodies_of(found))) == list(range(number))
            assert set(attempts_of(found)) == {1}

    async def test_what_is_out_is_kept_from_others_however_long_it_takes(self, transport: Transport) -> None:
        """A slow handler's message would be handled a second time beside it."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                deliveries = await receive(self.features, warehouse, 1)
                seconds = 2.5 * (self.features.hold or 0.0)
                if self.features.competes and self.features.several_clients:
                    async with subscribed(transport) as (_, other):
                        assert await nothing_comes(self.features, other, seconds)
                else:
                    assert await nothing_comes(self.features, warehouse, seconds)
                assert not deliveries[0].lost
                await settle(warehouse, deliveries, Ack())
            assert await nothing_comes(self.features, warehouse)

    async def test_group_gets_what_was_published_while_it_was_away(self, transport: Transport) -> None:
        """A consumer that is deployed anew would miss what happened meanwhile."""
        self.needs("keeps_while_nobody_listens")
        async with subscribed(transport):
            pass
        broker: MessageBroker
        async with transport.broker() as broker, sending(self.features, broker, [outgoing(1), outgoing(2)]):
            pass
        async with subscribed(transport) as (_, warehouse):
            deliveries = await take(self.features, warehouse, 2)
        assert sorted(bodies_of(deliveries)) == [b"1", b"2"]
        assert attempts_of(deliveries) == [1, 1]

    async def test_receiving_and_settling_work_beside_each_other(self, transport: Transport) -> None:
        """A receive that waits would keep finished work from being settled, so its messages would come again."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                deliveries = await receive(self.features, warehouse, 1)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(warehouse.receive, 1)
                    await anyio.sleep(0.02)
                    with anyio.fail_after(self.features.seconds):
                        await settle(warehouse, deliveries, Ack())
                    tasks.cancel_scope.cancel()
            assert await nothing_comes(self.features, warehouse)
