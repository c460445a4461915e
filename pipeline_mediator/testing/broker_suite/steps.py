"""The steps that the tests of a broker are made of."""

# ruff: noqa: ASYNC110, S101  # these are tests: assert is the tool, and who waits may be cancelled

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import anyio

from pipeline_mediator.message_brokers.protocol import Ack, Outgoing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

    from pipeline_mediator.message_brokers.protocol import Delivery, MessageBroker, Outcome, Subscription
    from pipeline_mediator.testing.broker_suite.backing import Transport, TransportFeatures

__all__ = [
    "Sent",
    "attempts_of",
    "bodies_of",
    "by_key",
    "headers_of",
    "nothing_comes",
    "outgoing",
    "receive",
    "sending",
    "settle",
    "subscribed",
    "take",
]


def outgoing(
    number: int,
    key: str | None = None,
    *,
    to: str = "orders",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    message_id: str | None = None,
) -> Outgoing:
    """An encoded message, as a codec makes them in binary mode."""
    message_id = message_id or f"id-{number}"
    attributes = {"specversion": "1.0", "id": message_id, "source": "/shop", "type": "orders.placed"}
    return Outgoing(
        destination=to,
        body=b"%d" % number if body is None else body,
        content_type="text/plain",
        message_id=message_id,
        name="orders.placed",
        key=key,
        headers={**attributes, **(headers or {})},
    )


_DONE: Final = Ack()
_PREFIX: Final = re.compile("^(cloudEvents[:_]|ce[-_])")


class Sent:
    """What `publish` answered, as soon as it did."""

    def __init__(self) -> None:
        self.answers: Sequence[Exception | None] | None = None


@asynccontextmanager
async def sending(
    features: TransportFeatures, broker: MessageBroker, batch: Iterable[Outgoing], *, settled: bool = True
) -> AsyncGenerator[Sent]:
    """Publish a batch, all of which has to be accepted: at once, or until the end of the block.

    `settled=False` if the block does not settle what was sent; a broker that waits for that is not asked further.
    """
    messages = [
        message if message.key is not None or features.keyless else replace(message, key=message.message_id)
        for message in batch
    ]
    sent = Sent()

    async def publish() -> None:
        sent.answers = await broker.publish(messages)

    if not features.answers_when_settled:
        with anyio.fail_after(features.seconds):
            await publish()
        assert sent.answers == [None] * len(messages)
        yield sent
        return
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            yield sent
            if settled:
                with anyio.fail_after(features.seconds):
                    while sent.answers is None:
                        await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
    if settled:
        assert sent.answers == [None] * len(messages)


@asynccontextmanager
async def subscribed(
    transport: Transport, *destinations: str, name: str = "warehouse"
) -> AsyncGenerator[tuple[MessageBroker, Subscription]]:
    """A broker and a subscription of it, both entered."""
    broker = transport.broker()
    async with broker, transport.subscribe(broker, *(destinations or ("orders",)), name=name) as subscription:
        yield broker, subscription


async def receive(
    features: TransportFeatures, subscription: Subscription, number: int, limit: int = 1000
) -> list[Delivery]:
    """So many deliveries, in as many calls as it takes; nothing is settled."""
    deliveries: list[Delivery] = []
    with anyio.move_on_after(features.seconds):
        while len(deliveries) < number:
            deliveries += await subscription.receive(min(limit, number - len(deliveries)))
    assert len(deliveries) == number, f"{len(deliveries)} of {number} deliveries came in {features.seconds} s"
    return deliveries


async def settle(subscription: Subscription, deliveries: Sequence[Delivery], outcome: Outcome | None) -> None:
    """Settle them in one call, all with this outcome; each has to be settled."""
    for delivery in deliveries:
        delivery.outcome = outcome
    assert list(await subscription.settle(deliveries)) == [None] * len(deliveries)


async def take(
    features: TransportFeatures, subscription: Subscription, number: int, outcome: Outcome | None = _DONE
) -> list[Delivery]:
    """So many deliveries, each batch of them settled before the next is asked for."""
    deliveries: list[Delivery] = []
    with anyio.move_on_after(features.seconds):
        while len(deliveries) < number:
            further = await subscription.receive(number - len(deliveries))
            await settle(subscription, further, outcome)
            deliveries += further
    assert len(deliveries) == number, f"{len(deliveries)} of {number} deliveries came in {features.seconds} s"
    return deliveries


async def nothing_comes(features: TransportFeatures, subscription: Subscription, seconds: float = 0.0) -> bool:
    """Whether `receive` waits in vain."""
    with anyio.move_on_after(seconds or features.quiet) as scope:
        await subscription.receive(1)
    return scope.cancelled_caught


def bodies_of(deliveries: Iterable[Delivery]) -> list[bytes]:
    """Their bodies, in their order."""
    return [delivery.body for delivery in deliveries]


def headers_of(delivery: Delivery) -> dict[str, str]:
    """Its headers, without the prefix that some transports give a CloudEvent's attributes."""
    return {_PREFIX.sub("", name): value for name, value in delivery.headers.items()}


def attempts_of(deliveries: Iterable[Delivery]) -> list[int]:
    """Their attempts, in their order."""
    return [delivery.attempt for delivery in deliveries]


def by_key(messages: Iterable[Delivery | Outgoing]) -> dict[str | None, list[bytes]]:
    """The bodies of each key, in their order."""
    found: defaultdict[str | None, list[bytes]] = defaultdict(list)
    for message in messages:
        found[message.key].append(message.body)
    return dict(found)
