"""The order of first copies within a key, whatever stands in its way."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from sqlalchemy import select
from tenacity import wait_fixed

from pipeline_mediator.errors import MessageTooLargeError
from pipeline_mediator.outbox.protocol import StoredMessage
from tests.faults.application import ACCOUNTS
from tests.faults.brokers import RefusingBroker
from tests.faults.scene import Scene

SECONDS = 20.0
QUICK = wait_fixed(0.05)
SERVERS = pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)


def stored(token: str, key: str | None) -> StoredMessage:
    """As OutboxMiddleware would hand it over."""
    body = f'{{"token":"{token}","account":"{key}","place":1}}'.encode()
    headers = {"specversion": "1.0", "id": token, "source": "faults", "type": "faults.moved", "dataversion": "1"}
    return StoredMessage(token, "faults.moved", 1, "faults.moved", "application/json", body, headers, key)


@SERVERS
async def test_14_what_was_stored_earlier_and_committed_later_is_published_all_the_same(scene: Scene) -> None:
    """Nothing reads behind the greatest id that was seen. Two transactions that share no row have no other order."""
    store = scene.store()
    async with scene.engine.connect() as slow, scene.engine.connect() as quick:
        await store.add(slow, [stored("A", "k")])
        await store.add(quick, [stored("B", "k")])
        await quick.commit()
        await scene.drain()
        await slow.commit()
    await scene.drain()
    copies = await scene.copies()
    assert [copy.token for copy in copies] == ["B", "A"]
    assert copies[0].sequence > copies[1].sequence


async def test_14_transactions_that_wait_for_a_row_are_published_as_they_committed(scene: Scene) -> None:
    mediator = scene.mediator()
    async with asyncio.TaskGroup() as tasks:
        for n in range(12):
            tasks.create_task(mediator.send(scene.command("a", notes=n % 2)))
    await scene.drain()
    assert await scene.places("a") == list(range(1, 13))


async def test_15_a_transaction_that_lasts_holds_nobody_up(scene: Scene) -> None:
    async with scene.engine.execution_options(sqlite_begin="DEFERRED").connect() as lasting:
        if scene.engine.dialect.name == "sqlite":
            # There is one writer at a time, so only what reads may last.
            await lasting.execute(select(ACCOUNTS))
        else:
            await scene.store().add(lasting, [stored("late", "b")])
        await scene.send(scene.command("a"))
        with anyio.fail_after(SECONDS):
            await scene.drain()
        assert len(await scene.tokens()) == 1
        await lasting.commit()
    await scene.drain()
    assert await scene.waiting() == 0


async def refused_head(scene: Scene, broker: RefusingBroker, **options: Any) -> list[str]:
    """Three messages of key a, the first of which is refused, and two others. Returns the tokens of a."""
    commands = [scene.command("a"), scene.command("a"), scene.command("b"), scene.command("a"), scene.command(notes=1)]
    await scene.send(*commands)
    first = f"{commands[0].operation}/0"
    broker.refuses = lambda outgoing: first.encode() in outgoing.body
    await scene.drain(broker, **options)
    return [f"{commands[n].operation}/0" for n in (0, 1, 3)]


@pytest.mark.parametrize("ordered", [True, False], ids=["broker with order", "broker without"])
async def test_16_behind_a_refused_message_its_key_waits_and_others_go_on(scene: Scene, *, ordered: bool) -> None:
    broker = RefusingBroker(scene.redis, ordered=ordered)
    mine = await refused_head(scene, broker, backoff=QUICK)
    assert await scene.places("a") == []
    assert len(await scene.tokens()) == 2
    assert await scene.waiting() == 3
    broker.refuses = lambda _outgoing: False
    await scene.until_drained(broker)
    assert [token for token in await scene.tokens() if token in mine] == mine


async def test_17_of_a_batch_nothing_is_accepted_behind_a_refusal_of_its_key(scene: Scene) -> None:
    """Though this broker would take it: it is not asked for the second and the third of the key."""
    broker = RefusingBroker(scene.redis, ordered=False)
    first, *later = await refused_head(scene, broker)
    assert first in broker.asked
    assert not set(later) & set(broker.asked)


def too_large() -> Exception:
    return MessageTooLargeError("faults.moved", 2, 1)


async def test_18_behind_a_dead_letter_its_key_waits_until_somebody_decides(scene: Scene) -> None:
    broker = RefusingBroker(scene.redis, error=too_large)
    mine = await refused_head(scene, broker, backoff=QUICK)
    (dead,) = await scene.store().dead_letters(10)
    assert "2 bytes" in dead.error
    broker.refuses = lambda _outgoing: False
    await scene.send(scene.command("a"), scene.command("b"))
    await anyio.sleep(2 * QUICK.wait_fixed)
    await scene.drain(broker)
    assert (await scene.places("a"), await scene.places("b")) == ([], [1, 2])
    assert await scene.waiting() == 3
    assert await scene.store().retry([dead.id]) == 1
    await scene.until_drained(broker)
    assert [token for token in await scene.tokens() if token in mine] == mine


async def test_18_behind_a_dead_letter_that_is_purged_its_key_goes_on(scene: Scene) -> None:
    broker = RefusingBroker(scene.redis, error=too_large)
    _, *later = await refused_head(scene, broker)
    (dead,) = await scene.store().dead_letters(10)
    assert await scene.store().purge([dead.id]) == 1
    await scene.until_drained(broker)
    assert [token for token in await scene.tokens() if token in later] == later


async def test_18_behind_a_dead_letter_its_key_goes_on_where_that_is_wanted(scene: Scene) -> None:
    broker = RefusingBroker(scene.redis, error=too_large)
    first, *later = await refused_head(scene, broker, on_dead="park")
    await scene.until_drained(broker, on_dead="park")
    tokens = await scene.tokens()
    assert [token for token in tokens if token in later] == later
    assert first not in tokens
    assert len(await scene.store().dead_letters(10)) == 1
