"""AzureMessageBroker keeps the promises of brokers and subscriptions, with the real client over an AMQP peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.message_brokers.azure import AzureMessageBroker
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures
from tests.amqp_peer import AmqpPeer

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import MessageBroker, Subscription


class TopicTransport:
    """Two topics, each with a subscription for each group."""

    def __init__(self, peer: AmqpPeer, *, sessions: bool) -> None:
        self._peer = peer
        self._sessions = sessions
        for name in ("orders", "returns"):
            topic = peer.topic(name)
            for group in ("warehouse", "mail"):
                peer.subscription(topic, group, sessions=sessions)

    def broker(self) -> AzureMessageBroker:
        return AzureMessageBroker(self._peer.connection_string, timeout=15.0)

    def subscribe(self, broker: MessageBroker, *destinations: str, name: str) -> Subscription:
        assert isinstance(broker, AzureMessageBroker)
        (topic,) = destinations
        return broker.subscribe(topic, name, name=name, sessions=self._sessions, max_sessions=16, session_idle=0.1)

    async def crash(self, subscription: Subscription) -> None:
        raise NotImplementedError


class TestTopics(BrokerSuite):
    features = TransportFeatures(
        several_destinations=False,
        ordered_by_key=False,
        ordered_behind_postponed=False,
        large=100_000,
        many=100,
        seconds=5.0,
    )

    @pytest.fixture
    async def transport(self, peer: AmqpPeer) -> TopicTransport:
        return TopicTransport(peer, sessions=False)


class TestSessions(BrokerSuite):
    # The service refuses a message without a session, where an entity has sessions. What is postponed waits in the
    # process, which keeps its session locked; if that ends, it comes at once.
    features = TransportFeatures(
        several_destinations=False, keyless=False, keeps_postponed=False, large=100_000, many=30
    )

    @pytest.fixture
    async def transport(self, peer: AmqpPeer) -> TopicTransport:
        return TopicTransport(peer, sessions=True)
