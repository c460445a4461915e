"""The brokers over Redis keep the promises of brokers and subscriptions, on a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.message_brokers.redis import RedisMessageBroker, RedisStreamBroker
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures
from tests.redis_view import command

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import MessageBroker, Subscription
    from tests.servers import RedisServer

IDLE = 1.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class StreamTransport:
    def __init__(self, url: str, *, ordered: bool) -> None:
        self._url = url
        self._ordered = ordered

    def broker(self) -> RedisStreamBroker:
        return RedisStreamBroker(self._url)

    def subscribe(self, broker: MessageBroker, *destinations: str, name: str) -> Subscription:
        assert isinstance(broker, RedisStreamBroker)
        return broker.subscribe(*destinations, name=name, min_idle=IDLE, ordered=self._ordered)

    async def crash(self, subscription: Subscription) -> None:
        raise NotImplementedError


class TestStreams(BrokerSuite):
    features = TransportFeatures(hold=IDLE, ordered_behind_postponed=False)

    @pytest.fixture
    async def transport(self, own_redis: RedisServer) -> StreamTransport:
        await command(own_redis.url, "FLUSHALL")
        return StreamTransport(own_redis.url, ordered=False)


class TestOrderedStreams(BrokerSuite):
    # One consumer of a group at a time serves a stream; the others stand by.
    features = TransportFeatures(hold=IDLE, competes=False)

    @pytest.fixture
    async def transport(self, own_redis: RedisServer) -> StreamTransport:
        await command(own_redis.url, "FLUSHALL")
        return StreamTransport(own_redis.url, ordered=True)


class ChannelTransport:
    def __init__(self, url: str) -> None:
        self._url = url

    def broker(self) -> RedisMessageBroker:
        return RedisMessageBroker(self._url)

    def subscribe(self, broker: MessageBroker, *destinations: str, name: str) -> Subscription:
        assert isinstance(broker, RedisMessageBroker)
        return broker.subscribe(*destinations, name=name)

    async def crash(self, subscription: Subscription) -> None:
        raise NotImplementedError


class TestChannels(BrokerSuite):
    # At most once: what nobody listens for is gone, and only the body is carried.
    features = TransportFeatures(
        keeps_while_nobody_listens=False,
        competes=False,
        message_ids=False,
        keys=False,
        content_types=False,
        headers=False,
        outlives_subscription=False,
        keeps_postponed=False,
        ordered_by_key=False,
        dead_letters=False,
        keeps_dead_letters=False,
    )

    @pytest.fixture
    async def transport(self, own_redis: RedisServer) -> ChannelTransport:
        return ChannelTransport(own_redis.url)
