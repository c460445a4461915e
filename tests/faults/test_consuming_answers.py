"""Answers of the broker that get lost on their way to a consumer.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pipeline_mediator.errors import BrokerUnavailableError
from pipeline_mediator.message_brokers import Ack, Later, RedisStreamBroker
from tests.proxy import Proxy
from tests.redis_view import outgoing, through

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers import Delivery, Subscription
    from tests.servers import RedisServer


async def test_20_a_postponement_whose_answer_was_lost_keeps_the_order_of_its_key(own_redis: RedisServer) -> None:
    """It came again before the consumer tried a second time."""
    async with RedisStreamBroker(own_redis.url) as broker:
        await broker.publish([outgoing(1, key="a"), outgoing(2, key="a")])
    handled: list[str | None] = []
    with Proxy(own_redis.port) as proxy:
        broker = RedisStreamBroker(through(proxy), timeout=2.0)
        async with broker.subscribe("orders", name="warehouse", ordered=True, min_idle=1.5) as subscription:
            first = await next_of(subscription)
            first.outcome = Later(1.0)
            proxy.when(b"~later", "cut reply")
            (answer,) = await subscription.settle([first])
            assert isinstance(answer, BrokerUnavailableError)
            again = await next_of(subscription)
            assert again.message_id == first.message_id
            assert await subscription.settle([first]) == [None]
            # So long that it is seen whether what is out is still held.
            await asyncio.sleep(1.0)
            if not again.lost:
                handled.append(again.message_id)
                again.outcome = Ack()
                assert await subscription.settle([again]) == [None]
            while len(handled) < 2:
                delivery = await next_of(subscription)
                handled.append(delivery.message_id)
                delivery.outcome = Ack()
                assert await subscription.settle([delivery]) == [None]
    assert handled == ["id-1", "id-2"]


async def next_of(subscription: Subscription) -> Delivery:
    async with asyncio.timeout(20):
        while True:
            try:
                (delivery,) = await subscription.receive(1)
            except BrokerUnavailableError:
                await asyncio.sleep(0.02)
            else:
                return delivery
