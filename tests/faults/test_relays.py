"""Several relays at one outbox: stopped, late, cut off, and each with its own idea of who owns what.

The numbers are those of the table in docs/guarantees.md; [tried] marks a trap that a design fell into.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta

import pytest
from sqlalchemy import text

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import Failure, Policy
from tests.faults.brokers import HookedBroker
from tests.faults.scene import Scene, scene_on
from tests.servers import PostgresServer, RedisServer

LEASE = 1.0
KEPT = timedelta(milliseconds=1)


@pytest.mark.parametrize("relays", [2, 8])
async def test_09_nobody_dies_and_each_message_is_published_once(scene: Scene, relays: int) -> None:
    commands = 150
    await scene.send(*(scene.command("a", "b", notes=2) for _ in range(commands)))
    processes = [scene.start("relay_until_empty") for _ in range(relays)]
    try:
        for process in processes:
            _, errors = await asyncio.to_thread(process.communicate, timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(await scene.tokens()) == await scene.facts()
    assert await scene.places("a") == await scene.places("b") == list(range(1, commands + 1))


async def test_10_what_a_late_relay_has_to_say_is_not_written(scene: Scene) -> None:
    """Its lease ended while it was publishing; another relay has had the rows since, and has given one up."""
    await scene.send(scene.command("a"), scene.command("a"))
    policy = Policy(lease=LEASE)
    async with scene_on(scene.database, scene.redis) as elsewhere:

        async def settled_elsewhere() -> bool:
            async with elsewhere.store().take(10, policy) as batch:
                if batch is not None:
                    batch.sent([first])
                    batch.failed([Failure(second, "refused", None)])
            return await scene.is_empty()

        taking = scene.store().take(10, policy)
        late = await taking.__aenter__()
        assert late is not None
        first, second = (row.id for row in late.rows)
        await scene.until(settled_elsewhere)
        late.failed([Failure(first, "too late", 0.0)])
        late.sent([second])
        with pytest.raises(LeaseLostError):
            await taking.__aexit__(None, None, None)
    (dead,) = await scene.store().dead_letters(10)
    assert (dead.id, dead.error) == (second, "refused")
    assert await scene.waiting() == 0


@pytest.mark.parametrize("when", ["before_the_broker_is_asked", "after_the_broker_accepted"])
async def test_11_a_relay_that_was_stopped_past_its_lease_repeats_and_loses_nothing(scene: Scene, when: str) -> None:
    """[tried] Its session is ended by the server, or its lease taken over; it goes on as if nothing had been."""
    await scene.send(*(scene.command("a", "b") for _ in range(5)))
    with scene.start(f"relay_and_stop_{when}") as process:
        try:
            await scene.stopped(process)
            await scene.until_drained()
            await scene.send(scene.command("a", "b"))
            await scene.until_drained()
            process.send_signal(signal.SIGCONT)
            _, errors = await asyncio.to_thread(process.communicate, timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    tokens = await scene.tokens()
    assert sorted(set(tokens)) == await scene.facts()
    assert len(tokens) <= len(set(tokens)) + 10
    for account in ("a", "b"):
        assert list(dict.fromkeys(await scene.places(account))) == [1, 2, 3, 4, 5, 6]


async def test_what_a_killed_relay_had_is_free_at_once_however_long_its_lease_was(scene: Scene) -> None:
    """[tried] On SQLite the lease is a row, which does not go with its owner: others look for the process."""
    await scene.send(scene.command("a"))
    with scene.start("take_for_an_hour_and_stop") as process:
        try:
            await scene.stopped(process)
            assert await scene.drain() == 0
        finally:
            process.kill()
    await scene.until_drained()
    assert await scene.places("a") == [1]


async def test_12_the_database_is_away_when_the_outcome_is_to_be_written(
    own_postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """The broker has accepted, and nobody can write that down: it is published once more, and no more than that."""
    url = own_postgres.url.replace("postgresql:", "postgresql+asyncpg:")
    gone = False

    async def database_dies() -> None:
        nonlocal gone
        if not gone:
            gone = True
            await asyncio.to_thread(own_postgres.kill)

    async with scene_on(url, own_redis.url) as relaying, scene_on(url, own_redis.url) as scene:
        await scene.create("a")
        await scene.send(scene.command("a"), scene.command("a"))
        async with relaying.relay(HookedBroker(relaying.redis, after=database_dies), lease=LEASE):
            await scene.until(lambda: scene.has_copies(2))
            await asyncio.to_thread(own_postgres.start)
            await scene.engine.dispose()
            await scene.until(scene.is_empty)
        assert await scene.places("a") == [1, 2, 1, 2]


async def test_13_settling_and_cleaning_at_once_touch_no_row_of_each_other(scene: Scene) -> None:
    """Two relays settle what they publish while two others clean what is settled."""
    commands = 60
    await scene.send(*(scene.command("a", "b", notes=2) for _ in range(commands)))
    cleaned = 0

    async def clean() -> None:
        nonlocal cleaned
        async with scene_on(scene.database, scene.redis) as elsewhere:
            store = elsewhere.store()
            while cleaned < 4 * commands:
                number = await store.clean(7)
                cleaned += number

    async def relay() -> None:
        async with scene_on(scene.database, scene.redis) as elsewhere:
            await elsewhere.until_drained(store=elsewhere.store(keep=KEPT), batch=20)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(relay())
            tasks.create_task(clean())
    assert cleaned == 4 * commands
    assert sorted(await scene.tokens()) == await scene.facts()


async def test_a_session_that_the_server_ends_is_replaced(own_postgres: PostgresServer, own_redis: RedisServer) -> None:
    """[tried] asyncpg may say so by an InternalClientError instead of an error of the connection."""
    url = own_postgres.url.replace("postgresql:", "postgresql+asyncpg:")
    named = {"server_settings": {"application_name": "relaying"}}
    armed = False

    async def end_session() -> None:
        nonlocal armed
        if armed:
            armed = False
            await end_sessions(scene, "relaying")

    async with scene_on(url, own_redis.url, connect_args=named) as relaying, scene_on(url, own_redis.url) as scene:
        await scene.create("a")
        async with relaying.relay(HookedBroker(relaying.redis, after=end_session)):
            for _ in range(5):
                armed = True
                await scene.send(scene.command("a"))
                await scene.until(scene.is_empty)
                assert not armed
    assert await scene.places("a") == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


async def end_sessions(scene: Scene, name: str) -> None:
    async with scene.engine.begin() as connection:
        ended = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")
        await connection.execute(ended, {"name": name})
