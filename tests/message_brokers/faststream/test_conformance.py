"""FastStreamBroker keeps the promises of brokers and subscriptions, over a real NATS server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faststream.nats import NatsBroker

from pipeline_mediator.message_brokers.faststream import FastStreamBroker, FastStreamSubscription
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures
from tests.nats_view import emptied, new_broker

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import MessageBroker, Subscription
    from tests.servers import Running

HOLD = 1.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class NatsTransport:
    def __init__(self, url: str) -> None:
        self._url = url
        self._brokers: list[tuple[FastStreamBroker, NatsBroker]] = []
        self._subscribed: dict[Subscription, FastStreamBroker] = {}

    def broker(self) -> FastStreamBroker:
        nats = new_broker(self._url)
        broker = FastStreamBroker(nats)
        self._brokers.append((broker, nats))
        return broker

    def subscribe(self, broker: MessageBroker, *destinations: str, name: str) -> FastStreamSubscription:
        assert isinstance(broker, FastStreamBroker)
        subscription = broker.subscribe(*destinations, name=name, hold=HOLD)
        self._subscribed[subscription] = broker
        return subscription

    async def crash(self, subscription: Subscription) -> None:
        dead = self._subscribed[subscription]
        for broker, nats in self._brokers:
            if broker is dead:
                await nats.connection.close()


class TestNats(BrokerSuite):
    # The server counts each time it hands a message out, also what is given back; and it delivers the next ones of a
    # key while it keeps one back.
    features = TransportFeatures(
        hold=HOLD, survives_death=2 * HOLD, gives_back_uncounted=False, ordered_behind_postponed=False
    )

    @pytest.fixture
    async def transport(self, nats_server: Running) -> NatsTransport:
        await emptied(nats_server.url)
        return NatsTransport(nats_server.url)
