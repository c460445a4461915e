"""MemoryBroker keeps the promises of brokers and subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.message_brokers.memory import MemoryBroker, MemorySubscription
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import MessageBroker, Subscription

FEATURES = TransportFeatures(
    several_clients=False,
    answers_when_settled=True,
    keeps_while_nobody_listens=False,
    competes=False,
    outlives_subscription=False,
    keeps_postponed=False,
    keeps_dead_letters=False,
    quiet=0.05,
)


class MemoryTransport:
    """One broker is all there is: a process is its world."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self._broker = broker or MemoryBroker()

    def broker(self) -> MemoryBroker:
        return self._broker

    def subscribe(self, broker: MessageBroker, *destinations: str, name: str) -> MemorySubscription:
        assert isinstance(broker, MemoryBroker)
        return broker.subscribe(*destinations, name=name)

    async def crash(self, subscription: Subscription) -> None:
        raise NotImplementedError


class TestMemoryBroker(BrokerSuite):
    features = FEATURES

    @pytest.fixture
    async def transport(self) -> MemoryTransport:
        return MemoryTransport()
