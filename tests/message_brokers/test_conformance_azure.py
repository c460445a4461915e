"""AzureMessageBroker keeps the promises of brokers and subscriptions, with the real client over an AMQP peer."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from pipeline_mediator.message_brokers.azure import AzureMessageBroker
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures
from tests.amqp_peer import AmqpPeer
from tests.servers import MissingServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline_mediator.message_brokers.protocol import MessageBroker, Subscription

# See test_azure.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hurried:
    """asyncio, with pauses that take a twentieth of their time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[AmqpPeer]:
    modules = (
        "_pyamqp.aio._client_async",
        "aio._base_handler_async",
        "aio._servicebus_sender_async",
        "aio._servicebus_receiver_async",
    )
    for module in modules:
        monkeypatch.setattr(f"azure.servicebus.{module}.asyncio", Hurried())
    try:
        peer = AmqpPeer()
    except MissingServerError as error:
        if os.environ.get("REQUIRE_AZURE") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    with peer:
        yield peer
    gc.collect()


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
