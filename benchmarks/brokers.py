"""Publishing, and receiving, by this library beside the bare client: messages of 1 KiB, the two taking turns.

    python -m benchmarks.brokers [--rounds 15]

Redis is a server of its own, Service Bus the AMQP peer of the tests, in a process of its own; what is not installed is
left out. Receiving is receiving and completing what was stored before, up to 100 at a time. The figures say what this
library adds to the clients on this machine, not how fast a network or a cloud is.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any

import redis.asyncio
from azure.servicebus import ServiceBusMessage
from azure.servicebus.aio import ServiceBusClient

from pipeline_mediator.message_brokers import (
    Ack,
    AzureMessageBroker,
    MessageBroker,
    Outgoing,
    RedisMessageBroker,
    RedisStreamBroker,
)
from tests.amqp_peer import AmqpPeer
from tests.servers import MissingServerError, RedisServer

EACH_TURN = 1000
ATTRIBUTES = {
    "specversion": "1.0",
    "id": "0192f7a0-0000-7000-8000-000000000000",
    "source": "shop",
    "type": "orders.placed",
    "time": "2026-11-22T12:00:00+00:00",
    "correlationid": "0192f7a0-0000-7000-8000-000000000001",
}
Batch = list[Outgoing]
Publish = Callable[[Batch], Awaitable[object]]
Consume = Callable[[int], Awaitable[int]]
"""Receive so many at most, be done with them, and say how many there were."""


def batch_of(size: int) -> Batch:
    return [
        Outgoing("orders", b"x" * 1024, "application/json", f"id-{number}", "orders.placed", f"{number}", ATTRIBUTES)
        for number in range(size)
    ]


@dataclass
class Comparison:
    """Messages per second of each, round by round."""

    name: str
    bare: list[float] = field(default_factory=list[float])
    ours: list[float] = field(default_factory=list[float])

    @property
    def ratios(self) -> list[float]:
        return [ours / bare for bare, ours in zip(self.bare, self.ours, strict=True)]

    def __str__(self) -> str:
        return (
            f"{self.name:<24} bare client {median(self.bare):>9,.0f}/s   ours {median(self.ours):>9,.0f}/s   "
            f"{median(self.ratios):.2f}× ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        )


async def compare(name: str, bare: Publish, ours: Publish, rounds: int, size: int = 100) -> Comparison:
    comparison = Comparison(f"{name}, {size}")
    batch = batch_of(size)
    for _ in range(2):  # not counted: connections are opened
        await rate(bare, batch)
        await rate(ours, batch)
    for number in range(rounds):
        turns = [(bare, comparison.bare), (ours, comparison.ours)]
        for publish, rates in turns if number % 2 else reversed(turns):
            rates.append(await rate(publish, batch))
    return comparison


async def rate(publish: Publish, batch: Batch) -> float:
    loops = EACH_TURN // len(batch)
    began = perf_counter()
    for _ in range(loops):
        await publish(batch)
    return loops * len(batch) / (perf_counter() - began)


def by(broker: MessageBroker) -> Publish:
    async def publish(batch: Batch) -> None:
        answers = await broker.publish(batch)
        if any(answers):
            raise RuntimeError(f"not everything was published: {answers}")

    return publish


async def compare_redis(rounds: int) -> list[Comparison]:
    # Any: redis-py's annotations are partial, and not the same in any two versions.
    client_class: Any = redis.asyncio.Redis
    with RedisServer() as server:
        # As the brokers set it up: without a timer for every answer.
        fastest = client_class.from_url(server.url, protocol=2, socket_timeout=None)
        async with (
            fastest as client,
            RedisMessageBroker(server.url) as broker,
            RedisStreamBroker(server.url) as streams,
        ):

            async def publish(batch: Batch) -> None:
                pipeline = client.pipeline(transaction=False)
                for message in batch:
                    pipeline.publish(message.destination, message.body)
                await pipeline.execute()

            async def add(batch: Batch) -> None:
                pipeline = client.pipeline(transaction=False)
                for message in batch:
                    pipeline.xadd(message.destination, fields_of(message))
                await pipeline.execute()

            return [
                await compare("Redis, PUBLISH", publish, by(broker), rounds),
                await compare("Redis, XADD", add, by(streams), rounds),
                await compare("Redis, XADD", add, by(streams), rounds, size=1000),
            ]


def fields_of(message: Outgoing) -> dict[str, Any]:
    content = {"datacontenttype": message.content_type, "data": message.body}
    return {"id": message.message_id, "partitionkey": message.key, **message.headers, **content}


async def compare_service_bus(rounds: int) -> list[Comparison]:
    async with (
        service_bus() as address,
        ServiceBusClient.from_connection_string(address) as client,
        client.get_queue_sender("orders") as sender,
        client.get_queue_receiver("consumed") as receiver,
        AzureMessageBroker(address) as broker,
        broker.subscribe("consumed") as subscription,
    ):

        async def publish(batch: Batch) -> None:
            await sender.send_messages([bare_message(message) for message in batch], timeout=30)

        async def consume(limit: int) -> int:
            messages = await receiver.receive_messages(limit, max_wait_time=10)
            for message in messages:
                await receiver.complete_message(message)
            return len(messages)

        async def settle(limit: int) -> int:
            deliveries = await subscription.receive(limit)
            for delivery in deliveries:
                delivery.outcome = Ack()
            if any(await subscription.settle(deliveries)):
                raise RuntimeError("not everything was completed")
            return len(deliveries)

        return [
            await compare("Azure Service Bus", publish, by(broker), rounds),
            await compare_consuming("Service Bus, receiving", consume, settle, by(broker), rounds),
        ]


async def compare_consuming(name: str, bare: Consume, ours: Consume, publish: Publish, rounds: int) -> Comparison:
    comparison = Comparison(f"{name}, 100")
    batch = [replace(message, destination="consumed") for message in batch_of(100)]
    for number in range(-1, rounds):
        turns = [(bare, comparison.bare), (ours, comparison.ours)]
        for consume, rates in turns if number % 2 else reversed(turns):
            for _ in range(EACH_TURN // len(batch)):
                await publish(batch)
            took = await consuming(consume)
            if number >= 0:  # the first time connections are opened
                rates.append(EACH_TURN / took)
    return comparison


async def consuming(consume: Consume) -> float:
    left = EACH_TURN
    began = perf_counter()
    while left:
        left -= await consume(min(left, 100))
    return perf_counter() - began


def bare_message(message: Outgoing) -> ServiceBusMessage:
    properties: dict[str | bytes, Any] = {f"cloudEvents_{name}": value for name, value in message.headers.items()}
    return ServiceBusMessage(
        message.body,
        message_id=message.message_id,
        subject=message.name,
        correlation_id=message.headers["correlationid"],
        content_type=message.content_type,
        application_properties=properties,
    )


@asynccontextmanager
async def service_bus() -> AsyncGenerator[str]:
    AmqpPeer()  # raises here, not in the other process, if it cannot be made
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there,))
    process.start()
    try:
        yield await asyncio.to_thread(here.recv)
    finally:
        here.send("that was all")
        await asyncio.to_thread(process.join)


def serve(pipe: Connection[str, str]) -> None:
    with AmqpPeer() as peer:
        peer.entity("orders")
        peer.queue("consumed")
        pipe.send(peer.connection_string)
        pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds: int = parser.parse_args().rounds
    for running in (compare_redis, compare_service_bus):
        try:
            print(*asyncio.run(running(rounds)), sep="\n")
        except MissingServerError as error:
            print(f"left out: {error}")


if __name__ == "__main__":
    main()
