"""What is settled: each delivery as its outcome says, and no other."""

# ruff: noqa: S101  # these are tests: assert and numbers are the tools

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from pipeline_mediator.errors import BrokerError
from pipeline_mediator.message_brokers.protocol import Ack, Later
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
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["Settling"]

_DELAY = 0.5


class Settling(BrokerCases):
    """What is settled: each delivery as its outcome says, and no other."""

    async def test_nothing_to_settle_has_no_answers(self, transport: Transport) -> None:
        """A consumer whose batch is empty would fail."""
        async with subscribed(transport) as (_, warehouse):
            assert list(await warehouse.settle([])) == []

    async def test_what_is_done_does_not_come_again(self, transport: Transport) -> None:
        """Every restart would handle everything again."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1), outgoing(2)]):
                await take(self.features, warehouse, 2)
            assert await nothing_comes(self.features, warehouse)
        async with subscribed(transport) as (_, warehouse):
            assert await nothing_comes(self.features, warehouse)

    async def test_each_of_a_batch_is_settled_by_its_own_outcome(self, transport: Transport) -> None:
        """One failure would bring back what succeeded beside it, or one success hide the failure."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(number) for number in range(6)]):
                deliveries = await receive(self.features, warehouse, 6)
                for delivery in deliveries:
                    delivery.outcome = Ack() if int(delivery.body) % 2 else Later()
                assert list(await warehouse.settle(deliveries)) == [None] * 6
                again = await take(self.features, warehouse, 3)
            assert sorted(bodies_of(again)) == [b"0", b"2", b"4"]
            assert await nothing_comes(self.features, warehouse)

    async def test_what_is_given_back_comes_again_at_once_and_counts_as_no_attempt(self, transport: Transport) -> None:
        """A few restarts in a row would make a dead letter of a message that nothing is wrong with."""
        self.needs("redelivers")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                given_back = await take(self.features, warehouse, 3, outcome=None)
                again = await take(self.features, warehouse, 1)
            assert bodies_of([*given_back, *again]) == [b"1"] * 4
            if self.features.gives_back_uncounted:
                assert attempts_of(again) == [1]

    async def test_what_is_given_back_is_there_for_others(self, transport: Transport) -> None:
        """What a process gives back when it is stopped would wait for the same process."""
        self.needs("redelivers", "competes", "several_clients")
        async with subscribed(transport) as (_, other):
            async with subscribed(transport) as (broker, warehouse):
                async with sending(self.features, broker, [outgoing(1), outgoing(2)]):
                    pass
                with anyio.move_on_after(self.features.quiet):
                    await settle(warehouse, await receive(self.features, warehouse, 1), None)
            found = await take(self.features, other, 2)
            assert sorted(bodies_of(found)) == [b"1", b"2"]

    async def test_later_is_not_before_its_time(self, transport: Transport) -> None:
        """A receiver that needs a minute would be asked again at once, until the message is a dead letter."""
        self.needs("redelivers", "delays")
        async with subscribed(transport) as (broker, warehouse), sending(self.features, broker, [outgoing(1)]):
            await take(self.features, warehouse, 1, outcome=Later(_DELAY))
            began = anyio.current_time()
            await take(self.features, warehouse, 1)
            # A server may count in milliseconds of its own clock.
            assert anyio.current_time() - began > _DELAY - 0.05

    async def test_others_are_delivered_while_one_waits_for_its_time(self, transport: Transport) -> None:
        """One message that has to wait would stop all."""
        self.needs("redelivers", "delays")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1), outgoing(2), outgoing(3)]):
                first = await receive(self.features, warehouse, 1)
                await settle(warehouse, first, Later(_DELAY))
                others = await take(self.features, warehouse, 2)
                (again,) = await take(self.features, warehouse, 1)
            assert again.body == first[0].body
            assert sorted(bodies_of([*first, *others])) == [b"1", b"2", b"3"]

    async def test_later_counts_attempts(self, transport: Transport) -> None:
        """Nothing would ever be given up, or everything too early."""
        self.needs("redelivers", "counts_attempts")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                found = [*await take(self.features, warehouse, 3, outcome=Later(0.01))]
                found += await take(self.features, warehouse, 1)
            assert attempts_of(found) == [1, 2, 3, 4]

    async def test_what_comes_again_is_what_it_was(self, transport: Transport) -> None:
        """A copy that is put back would lose its id, key or headers, and the inbox and the order with them."""
        self.needs("redelivers")
        body = bytes(range(256))
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, "a", body=body, headers={"subject": "x"})]):
                first, again = [
                    (await take(self.features, warehouse, 1, outcome))[0] for outcome in (Later(0.01), Ack())
                ]
            assert (again.body, again.message_id, again.key) == (body, first.message_id, first.key)
            assert (again.destination, again.content_type) == (first.destination, first.content_type)
            assert dict(again.headers) == dict(first.headers)

    async def test_settling_twice_does_no_harm(self, transport: Transport) -> None:
        """A settlement repeated after a lost answer would settle the next attempt, or bring back what is done."""
        self.needs("redelivers")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                first = await take(self.features, warehouse, 1, outcome=Later())
                again = await receive(self.features, warehouse, 1)
                first[0].outcome = Ack()
                answers = list(await warehouse.settle(first))
                assert len(answers) == 1
                assert answers[0] is None or isinstance(answers[0], BrokerError)
                await settle(warehouse, again, Later())
                done = await take(self.features, warehouse, 1)
                for outcome in (Ack(), Later(), None):
                    done[0].outcome = outcome
                    (answer,) = await warehouse.settle(done)
                    assert answer is None or isinstance(answer, BrokerError)
            assert await nothing_comes(self.features, warehouse)
