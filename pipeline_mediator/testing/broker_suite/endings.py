"""What ends: brokers and subscriptions are left, entered again, and die."""

# ruff: noqa: S101, PLR2004, SIM117  # these are tests: assert and numbers are the tools, and blocks show what is open when

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator.errors import MediatorError
from pipeline_mediator.message_brokers.protocol import Later
from pipeline_mediator.testing.broker_suite.backing import BrokerCases
from pipeline_mediator.testing.broker_suite.steps import (
    attempts_of,
    bodies_of,
    by_key,
    outgoing,
    receive,
    sending,
    subscribed,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["Endings"]


class Endings(BrokerCases):
    """What ends: brokers and subscriptions are left, entered again, and die."""

    async def test_broker_is_open_until_its_last_user_leaves(self, transport: Transport) -> None:
        """A mediator and a consumer share a broker; the first to end would close it for the other."""
        async with subscribed(transport) as (broker, warehouse):
            async with broker:
                pass
            async with sending(self.features, broker, [outgoing(1)]):
                assert bodies_of(await take(self.features, warehouse, 1)) == [b"1"]

    async def test_subscription_holds_its_broker_open(self, transport: Transport) -> None:
        """A consumer without a broker of its own in `async with` could not work."""
        broker = transport.broker()
        async with transport.subscribe(broker, "orders", name="warehouse") as warehouse:
            async with sending(self.features, broker, [outgoing(1)]):
                assert bodies_of(await take(self.features, warehouse, 1)) == [b"1"]
        async with broker:
            pass

    async def test_what_was_not_settled_comes_again_when_the_subscription_has_ended(self, transport: Transport) -> None:
        """What a process had in hand when it was stopped would be lost."""
        self.needs("outlives_subscription")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(number, "a") for number in range(3)] + [outgoing(9)]):
                out = await receive(self.features, warehouse, 2)
        async with subscribed(transport) as (_, warehouse):
            again = await take(self.features, warehouse, 4)
        assert len(out) == 2
        assert sorted(bodies_of(again)) == [b"0", b"1", b"2", b"9"]
        if self.features.ordered_behind_postponed:
            assert [one for one in bodies_of(again) if one != b"9"] == [b"0", b"1", b"2"], by_key(again)

    async def test_what_was_read_ahead_and_not_handed_over_counts_as_no_attempt(self, transport: Transport) -> None:
        """Restarts would make dead letters of messages that no handler has ever seen."""
        self.needs("outlives_subscription", "gives_back_uncounted")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(number, "a") for number in range(3)]):
                await receive(self.features, warehouse, 1)
        async with subscribed(transport) as (_, warehouse):
            again = await take(self.features, warehouse, 3)
        assert attempts_of(again)[1:] == [1, 1]

    async def test_postponed_one_comes_after_the_subscription_has_ended(self, transport: Transport) -> None:
        """What waits for its time in the memory of a process is gone with it."""
        self.needs("outlives_subscription", "delays", "keeps_postponed")
        async with subscribed(transport) as (broker, warehouse), sending(self.features, broker, [outgoing(1)]):
            await take(self.features, warehouse, 1, Later(1.0))
            began = anyio.current_time()
        async with subscribed(transport) as (_, warehouse):
            (again,) = await take(self.features, warehouse, 1)
        assert anyio.current_time() - began > 0.95
        assert again.body == b"1"
        if self.features.counts_attempts:
            assert again.attempt == 2

    async def test_what_a_dead_process_had_comes_again(self, transport: Transport) -> None:
        """What a killed process had in hand would be out with nobody for ever."""
        self.needs("outlives_subscription", "survives_death")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1)]):
                await receive(self.features, warehouse, 1)
                await transport.crash(warehouse)
            async with subscribed(transport) as (_, other):
                with anyio.fail_after((self.features.survives_death or 0.0) + self.features.quiet):
                    assert bodies_of(await take(self.features, other, 1)) == [b"1"]

    async def test_subscription_that_has_ended_says_so(self, transport: Transport) -> None:
        """A consumer that goes on with it would wait for ever, or spin."""
        async with subscribed(transport) as (_, warehouse):
            pass
        with pytest.raises(MediatorError), anyio.fail_after(self.features.seconds):
            await warehouse.receive(1)
