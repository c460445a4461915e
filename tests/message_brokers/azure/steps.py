"""What the tests of receiving do again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from pipeline_mediator.errors import (
    BrokerUnavailableError,
)
from pipeline_mediator.message_brokers import Delivery
from pipeline_mediator.message_brokers.azure.subscription import AzureSubscription
from tests.amqp_peer import AmqpPeer, Queue

SECONDS = 15.0


def proton_message(number: int, key: str | None = None, **facts: Any) -> Any:
    proton: Any = import_module("proton")
    facts = {"inferred": True, "id": f"id-{number}", "group_id": key, **facts}
    return proton.Message(body=facts.pop("body", b"body %d" % number), **facts)


def put(peer: AmqpPeer, queue: Queue, *numbers: int, key: str | None = None) -> None:
    peer.put(queue, *[proton_message(number, key) for number in numbers])


async def receive(subscription: AzureSubscription, count: int) -> list[Delivery]:
    """So many, in the order in which they come."""
    deliveries: list[Delivery] = []
    async with asyncio.timeout(SECONDS):
        while len(deliveries) < count:
            deliveries += await subscription.receive(count - len(deliveries))
    return deliveries


async def settle(subscription: AzureSubscription, deliveries: Sequence[Delivery], outcome: Any) -> Any:
    for delivery in deliveries:
        delivery.outcome = outcome
    return await subscription.settle(deliveries)


async def until(happened: Callable[[], object]) -> None:
    """Wait for what the peer learns from the network, or does in time."""
    for _ in range(1_500):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def ids(deliveries: Sequence[Delivery]) -> list[str | None]:
    return [delivery.message_id for delivery in deliveries]


async def receive_in_spite(subscription: AzureSubscription) -> list[Delivery]:
    """As a consumer does: again, after a pause, while the service is away."""
    for _ in range(20):
        try:
            return await receive(subscription, 1)
        except BrokerUnavailableError:
            await asyncio.sleep(0.05)
    raise TimeoutError
