"""A process is killed at one certain point; what it had promised is kept, and nothing else happens.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import signal
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from pipeline_mediator.outbox.protocol import Failure, Policy
from tests.faults.application import OUTBOX
from tests.faults.scene import Scene

KILLED = -signal.SIGKILL
POLICY = Policy(lease=5.0)


async def test_01_killed_before_the_commit_there_is_neither_row_nor_event(scene: Scene) -> None:
    assert scene.program("die_before_the_commit") == KILLED
    assert await scene.drain() == 0
    assert (await scene.facts(), await scene.tokens()) == ([], [])


async def test_02_killed_after_the_commit_the_event_is_delivered_and_takes_effect_once(scene: Scene) -> None:
    assert scene.program("die_after_the_commit") == KILLED
    assert await scene.tokens() == []
    await scene.drain()
    await scene.consume()
    copies = await scene.copies()
    assert sorted(copy.token for copy in copies) == await scene.facts() == ["scene.0/0", "scene.0/1"]
    assert await scene.effects() == sorted(copy.message_id for copy in copies)


async def test_03_killed_after_the_broker_accepted_a_copy_follows_under_the_same_id(scene: Scene) -> None:
    await scene.send(scene.command("a"))
    assert scene.program("relay_and_die_after_the_broker_accepted") == KILLED
    await scene.consume()
    await scene.drain()
    await scene.consume()
    first, second = await scene.copies()
    assert first == second
    assert await scene.effects() == [first.message_id]


async def test_04_killed_in_the_middle_of_a_batch_none_is_lost_and_keys_stay_in_order(scene: Scene) -> None:
    await scene.send(*(scene.command("a", "b") for _ in range(5)))
    assert scene.program("relay_and_die_with_a_part_accepted") == KILLED
    part = await scene.tokens()
    assert len(part) == 3
    await scene.drain()
    copies = await scene.copies()
    assert sorted({copy.token for copy in copies}) == await scene.facts()
    for account in ("a", "b"):
        first_copies = list(dict.fromkeys(copy.place for copy in copies if copy.account == account))
        assert first_copies == [1, 2, 3, 4, 5]
    assert {token for token, times in Counter(await scene.tokens()).items() if times > 1} == set(part)


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "to its end"])
async def test_07_cleaning_never_deletes_what_was_not_sent(scene: Scene, *, dies: bool) -> None:
    keeping = scene.store(keep=timedelta(seconds=0.001))
    await scene.send(*(scene.command("a") for _ in range(3)))
    await scene.drain(store=keeping)
    await scene.send(*(scene.command("b") for _ in range(2)))
    assert await rows(scene) == 5
    if dies:
        assert scene.program("clean_and_die_before_the_commit") == KILLED
        assert await rows(scene) == 5
    assert await keeping.clean(1000) == 3
    assert await scene.waiting() == await rows(scene) == 2
    await scene.drain()
    assert sorted(await scene.tokens()) == await scene.facts()


async def test_08_killed_when_a_retry_was_published_one_copy_follows_and_the_count_is_right(scene: Scene) -> None:
    await scene.send(scene.command("a"))
    async with scene.store().take(10, POLICY) as batch:
        assert batch is not None
        batch.failed([Failure(batch.rows[0].id, "refused", 0.0)])
    assert scene.program("relay_and_die_after_the_broker_accepted") == KILLED
    failures: list[int] = []

    async def taken_again() -> bool:
        async with scene.store().take(10, POLICY) as batch:
            if batch is not None:
                failures.extend(row.failures for row in batch.rows)
        return bool(failures)

    await scene.until(taken_again)
    assert failures == [1]
    await scene.until_drained()
    first, second = await scene.copies()
    assert first == second


async def rows(scene: Scene) -> int:
    async with scene.engine.begin() as connection:
        return (await connection.execute(select(func.count()).select_from(OUTBOX.rows))).scalar_one()
