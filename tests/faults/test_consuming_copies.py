"""Many copies and many messages: each takes effect once, whoever restarts meanwhile.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, text

from pipeline_mediator import Context
from pipeline_mediator.codec import Facts
from pipeline_mediator.message_brokers import Outgoing, RedisStreamBroker
from tests.faults.application import EFFECTS, Moved, Noted, codec
from tests.faults.consuming import GROUP
from tests.faults.databases import durable_redis
from tests.faults.scene import Scene
from tests.faults.test_consuming_deaths import Seen, publish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import RedisServer

STREAM = "faults.moved"


WAITS_FOR_A_LOCK = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND info LIKE 'INSERT IGN%'",
}


class FirstError(Exception):
    """Raised by the handler that was first, when the others wait for it."""


@pytest.mark.parametrize("first", ["commits", "rolls back"])
async def test_30_three_copies_at_once_take_effect_once(scene: Scene, first: str) -> None:
    """Of three consumers. The inbox lets one pass; the others wait for its transaction."""
    begun: list[str] = []
    waiting = asyncio.Event()

    async def wait_for_the_others(event: Moved | Noted, _context: Context) -> None:
        begun.append(event.token)
        if len(begun) == 1:
            await waiting.wait()
            if first == "rolls back":
                raise FirstError

    await publish(scene, "a")
    ((_, fields),) = await scene.client.xrange(STREAM)
    # No key, or one would be handed over after the other.
    copy = {name: value for name, value in fields.items() if name != b"partitionkey"}
    await scene.client.delete(STREAM)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(scene.consumer(ordered=False, before=wait_for_the_others, min_idle=30.0))
        await scene.until(lambda: all_read(scene))
        for _ in range(3):
            await scene.client.xadd(STREAM, copy)
        await scene.until(lambda: others_wait(scene))
        waiting.set()
        await scene.until(scene.settled)
    assert len(await scene.effects()) == 1
    # In another attempt if the first one was rolled back.
    assert len(begun) == (1 if first == "commits" else 2)


async def all_read(scene: Scene) -> bool:
    """Whether three consumers wait for what comes; the server gives it to who has waited longest."""
    waiting: int = (await scene.client.info("clients"))["blocked_clients"]
    return waiting == 3


async def others_wait(scene: Scene) -> bool:
    """Whether all three are with consumers, and two wait for the transaction of one."""
    pending: int = (await scene.client.xpending(STREAM, GROUP))["pending"]
    statement = WAITS_FOR_A_LOCK.get(scene.engine.dialect.name)
    if pending < 3 or statement is None:
        return pending == 3
    async with scene.engine.connect() as connection:
        number: int = (await connection.execute(text(statement))).scalar_one()
        return number == 2


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_30_two_groups_of_handlers_both_handle_an_event(scene: Scene) -> None:
    warehouse, billing = Seen(), Seen()
    await publish(scene, "a", "b")
    await scene.consume(name="warehouse", before=warehouse)
    await scene.consume(name="billing", before=billing)
    assert sorted(warehouse.attempts) == sorted(billing.attempts)
    assert Counter(Counter(await scene.effects()).values()) == {2: 2}


MESSAGES = 10_000
PUBLISHERS = 100
SHARE = MESSAGES // PUBLISHERS
RESTARTS = (MESSAGES // 3, MESSAGES // 2)
CODEC = codec()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Here it keeps what it has accepted."""
    with durable_redis() as server:
        yield server


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_19_a_broker_restarted_twice_among_ten_thousand_messages_loses_none(
    scene: Scene, own_redis: RedisServer
) -> None:
    """At a third and at a half; killed, not stopped. Each publisher tries again what was not accepted."""
    accepted: set[str] = set()
    consumer = scene.consumer(min_idle=2.0)
    async with RedisStreamBroker(scene.redis, timeout=2.0) as broker, consumer, asyncio.TaskGroup() as tasks:
        for publisher in range(PUBLISHERS):
            tasks.create_task(publish_all(broker, publisher, accepted))
        for when in RESTARTS:
            await scene.until(partial(reached, accepted, when))
            await asyncio.to_thread(own_redis.kill)
            assert len(accepted) < MESSAGES
            await asyncio.to_thread(own_redis.start)
        await scene.until(lambda: has_effects(scene, MESSAGES))
        await scene.until(scene.settled)
    assert len(set(await scene.effects())) == len(accepted) == MESSAGES
    assert await scene.dead_letters() == []
    for publisher in range(PUBLISHERS):
        assert await scene.effects_of(account_of(publisher)) == list(range(1, SHARE + 1))


async def publish_all(broker: RedisStreamBroker, publisher: int, accepted: set[str]) -> None:
    """In order, a few at a time, as long as it takes."""
    for place in range(1, SHARE + 1, 5):
        batch = [outgoing(publisher, one) for one in range(place, place + 5)]
        while batch:
            answers = await broker.publish(batch)
            accepted.update(one.message_id for one, answer in zip(batch, answers, strict=True) if answer is None)
            batch = [one for one, answer in zip(batch, answers, strict=True) if answer is not None]
            # Others have their turn, or a server that is away has the time to come back.
            await asyncio.sleep(0.05)


def outgoing(publisher: int, place: int) -> Outgoing:
    account = account_of(publisher)
    token = f"{account}/{place}"
    whole = CODEC.encode(Moved(token, account, place), Facts(token, key=account), binary=True)
    return Outgoing(STREAM, whole.body, whole.content_type, token, whole.name, account, whole.headers)


def account_of(publisher: int) -> str:
    return f"account-{publisher}"


async def reached(accepted: set[str], number: int) -> bool:
    return len(accepted) >= number


async def has_effects(scene: Scene, number: int) -> bool:
    async with scene.engine.connect() as connection:
        there: int = (await connection.execute(select(func.count()).select_from(EFFECTS))).scalar_one()
    return there >= number
