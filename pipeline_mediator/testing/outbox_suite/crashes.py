"""Relays that die or hang lose what they had to others, and a message that kills them is found."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools
# ruff: noqa: ASYNC110, PT012  # what another process does can only be polled; errors come where batches are left

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import Policy
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    SECONDS,
    TakenOver,
    add,
    crash,
    fail,
    ids_of,
    key_in,
    message,
    names_of,
    rows_of,
    take,
    tell,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Crashes"]


class Crashes(OutboxCases):
    """Relays that die or hang lose what they had to others, and a message that kills them is found."""

    async def test_crash_frees_what_was_taken_and_nothing_of_it_is_written(
        self, database: OutboxDatabase, other: OutboxStore
    ) -> None:
        await add(database, other, message("1", key="k"), message("2", key="k"))
        victim = database.store()
        with pytest.raises(LeaseLostError):
            async with victim.take(10, BLOCK) as batch:
                tell(batch, sent=0, failed=1)
                await database.kill(victim)
        assert await take(other) == ["1", "2"]

    async def test_crash_is_seen_while_the_relay_does_not_know_of_it(
        self, database: OutboxDatabase, other: OutboxStore
    ) -> None:
        await add(database, other, message("1", key="k"))
        victim = database.store()
        with pytest.raises(LeaseLostError):
            async with victim.take(10, BLOCK) as batch:
                tell(batch, sent=0)
                await database.kill(victim)
                with anyio.fail_after(SECONDS):
                    while await take(other) != ["1"]:
                        await anyio.sleep(0.01)
        assert (await other.health()).pending == 0

    async def test_after_two_crashes_one_row_at_a_time(self, database: OutboxDatabase, store: OutboxStore) -> None:
        names = [str(number) for number in range(20)]
        await add(database, store, *[message(it, key="k") for it in names])
        assert len(await crash(database, limit=4)) == 4
        assert len(await crash(database, limit=4)) == 4
        batches = [await take(store, limit=4)]
        while batches[-1]:
            batches.append(await take(store, limit=4))
        assert [name for batch in batches for name in batch] == names
        assert batches[0] == ["0"]
        # When enough of them are past that did no harm, it goes on as before.
        assert len(batches[-2]) > 1

    async def test_crashes_that_do_not_follow_each_other_are_none_of_a_row(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(3)])
        for _ in range(3):
            assert len(await crash(database)) == 3
            assert [(row.failures, row.crashed) for row in await rows_of(store)] == [(0, False)] * 3

    async def test_crashes_count_on_the_one_row_and_are_forgotten_when_it_is_settled(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(3)])
        for _ in range(2):
            await crash(database)
        crashes = [await crash(database) for _ in range(3)]
        assert [[row.message.message_id for row in rows] for rows in crashes] == [["0"]] * 3
        seen = [row for (row,) in crashes]
        assert [row.failures - seen[0].failures for row in seen] == [0, 1, 2]
        assert all(row.crashed for row in seen)
        # Given back: no failure, however often.
        for _ in range(3):
            row = (await rows_of(store))[0]
            assert (row.message.message_id, row.failures, row.crashed) == ("0", seen[0].failures + 3, True)
        # Refused: that, and not also the crash that was counted in advance.
        await fail(store, "0", delay=None)
        (dead,) = await store.dead_letters(10)
        assert dead.failures == seen[0].failures + 3

    async def test_lane_under_suspicion_is_taken_alone_and_keeps_no_other_waiting(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        poison = [f"poison {number}" for number in range(3)]
        await add(database, store, *[message(it, key=key_in(3)) for it in poison])
        for _ in range(2):
            await crash(database)
        fine = [f"fine {lane}" for lane in range(10, 20)]
        await add(database, store, *[message(f"fine {lane}", key=key_in(lane)) for lane in range(10, 20)])
        taken: list[list[str]] = []
        while names := await take(store):
            taken.append(names)
        assert ["poison 0"] in taken
        assert sorted(name for names in taken for name in names) == sorted(poison + fine)

    async def test_hung_relay_loses_its_rows_and_what_it_says_later_counts_for_nothing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(3)])
        policy = Policy(lease=self.features.lease)
        with pytest.raises(LeaseLostError):
            async with store.take(10, policy) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                async with TakenOver(other, policy) as theirs:
                    assert time.monotonic() >= batch.deadline
                    assert ids_of(theirs) == ["0", "1", "2"]
                    tell(theirs, sent=0, failed=1)
        assert (await other.health()).pending + (await other.health()).waiting == 2
        await database.pass_time(61)
        assert await names_of(other) == ["1", "2"]

    async def test_hung_relay_that_comes_back_while_another_publishes_writes_nothing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        policy = Policy(lease=self.features.lease)
        hung = store.take(10, policy)
        batch = await hung.__aenter__()
        tell(batch, sent=0, failed=1)
        async with TakenOver(other, policy) as theirs:
            assert ids_of(theirs) == ["1", "2"]
            with pytest.raises(LeaseLostError):
                await hung.__aexit__(None, None, None)
            assert (await other.health()).pending == 2
            tell(theirs, sent=0)
        assert await take(other) == ["2"]

    async def test_relay_that_lost_its_lease_can_go_on(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1", key="k"))
        with pytest.raises(LeaseLostError):
            async with store.take(10, BLOCK) as batch:
                assert batch is not None
                await database.kill(store)
        taken: list[str] = []
        with anyio.fail_after(SECONDS):
            while not taken:
                with suppress(Exception):  # it may take a while to see that a connection has ended
                    taken = await take(store)
                await anyio.sleep(0.01)
        assert taken == ["1"]
        await add(database, store, message("2", key="k"))
        assert await take(store) == ["2"]
