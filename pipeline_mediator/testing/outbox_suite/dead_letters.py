"""What was given up is kept, and may be tried again or deleted."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.outbox.protocol import Health, Policy
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    DAY,
    PARK,
    add,
    drain,
    everything_due,
    fail,
    keyless_in,
    message,
    names_of,
    rows_of,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["DeadLetters"]


class DeadLetters(OutboxCases):
    """What was given up is kept, and may be tried again or deleted."""

    async def test_given_up_is_kept_with_the_reason(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1", key="k"), message("2"))
        one = (await everything_due(store))["1"]
        await fail(store, "1", delay=60.0)
        await database.pass_time(61)
        error = "BrokerRefusedError: größer als erlaubt, '\\%s' " + "x" * 200
        await fail(store, "1", delay=None, error=error)
        await database.pass_time(10 * DAY)
        assert await take(store) == ["2"]
        (dead,) = await store.dead_letters(10)
        assert dead.id == one.id
        assert dead.message == one.message
        assert dead.failures == 2
        assert dead.error == error

    async def test_dead_letter_says_when_it_was_stored(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1"))
        await fail(store, "1", delay=None)
        (dead,) = await store.dead_letters(10)
        assert dead.created_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - dead.created_at) < timedelta(minutes=14)

    async def test_dead_letters_are_read_page_by_page(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, *[message(str(number)) for number in range(5)], message("alive"))
        for number in range(5):
            await fail(store, str(number), delay=None)
        assert await store.dead_letters(0) == []
        first = await store.dead_letters(2)
        second = await store.dead_letters(2, after=first[-1].id)
        third = await store.dead_letters(2, after=second[-1].id)
        assert [dead.message.message_id for page in (first, second, third) for dead in page] == list("01234")
        assert len(third) == 1
        assert await store.dead_letters(2, after=third[-1].id) == []

    async def test_dead_letter_blocks_its_key(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"), message("other", key="l"))
        await fail(store, "1", delay=None)
        await add(database, store, message("3", key="k"))
        await database.pass_time(10 * DAY)
        assert await names_of(store) == ["other"]

    async def test_dead_letter_is_parked_and_its_key_goes_on(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        await fail(store, "1", delay=60.0, policy=PARK)
        await add(database, store, message("3", key="k"))
        assert await take(store, policy=PARK) == []
        await database.pass_time(61)
        await fail(store, "1", delay=None, policy=PARK)
        await add(database, store, message("4", key="k"))
        assert await names_of(store, PARK) == ["2", "3", "4"]
        assert [dead.message.message_id for dead in await store.dead_letters(10)] == ["1"]

    async def test_dead_letter_without_a_key_blocks_nobody(self, database: OutboxDatabase, store: OutboxStore) -> None:
        first, second = keyless_in(7, 2)
        await add(database, store, first, second)
        await fail(store, first.message_id, delay=None)
        assert await take(store) == [second.message_id]

    async def test_retried_dead_letter_is_due_and_goes_first(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        await fail(store, "1", delay=None)
        assert await take(store) == []
        (dead,) = await store.dead_letters(10)
        assert await store.retry([dead.id]) == 1
        assert await store.dead_letters(10) == []
        await add(database, store, message("3", key="k"))
        assert await names_of(store) == ["1", "2", "3"]

    async def test_retried_dead_letter_that_was_parked_is_waited_for_again(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"))
        await fail(store, "1", delay=None, policy=PARK)
        await add(database, store, message("2", key="k"), message("3", key="k"))
        assert await take(store, limit=1, policy=PARK) == ["2"]
        (dead,) = await store.dead_letters(10)
        assert await store.retry([dead.id]) == 1
        await fail(store, "1", delay=60.0, policy=PARK)
        assert await take(store, policy=PARK) == []
        await database.pass_time(61)
        assert await names_of(store, PARK) == ["1", "3"]

    async def test_retried_dead_letter_that_fails_again_blocks_again(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        await fail(store, "1", delay=None)
        (dead,) = await store.dead_letters(10)
        await store.retry([dead.id])
        await fail(store, "1", delay=None, error="again")
        assert await take(store) == []
        (dead,) = await store.dead_letters(10)
        assert dead.error == "again"

    async def test_purged_dead_letter_is_gone_and_its_key_goes_on(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        await fail(store, "1", delay=None)
        await add(database, store, message("3", key="k"))
        assert await take(store) == []
        (dead,) = await store.dead_letters(10)
        assert await store.purge([dead.id]) == 1
        assert await store.dead_letters(10) == []
        assert await names_of(store) == ["2", "3"]
        assert await store.health() == Health(0, 0, 0, 0.0)

    async def test_only_dead_letters_are_retried_or_purged(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, *[message(str(number)) for number in range(4)])
        ids = {name: row.id for name, row in (await everything_due(store)).items()}
        await fail(store, "1", delay=60.0)
        await fail(store, "2", delay=None)
        everything = [*ids.values(), max(ids.values()) + 100]
        assert await store.purge([]) == 0
        assert await store.retry([]) == 0
        assert await store.retry(everything) == 1
        assert sorted(await everything_due(store)) == ["0", "2", "3"]
        await fail(store, "2", delay=None)
        assert await store.purge(everything) == 1
        await database.pass_time(61)
        assert sorted(await names_of(store)) == ["0", "1", "3"]

    async def test_unreadable_row_ends_as_a_dead_letter(self, database: OutboxDatabase, store: OutboxStore) -> None:
        broken, fine = keyless_in(7, 2)
        await add(database, store, broken, fine)
        ids = {row.message.message_id: row.id for row in await rows_of(store)}
        await database.damage(ids[broken.message_id])
        async with store.take(10, BLOCK) as batch:
            assert batch is not None
            assert [row.message.message_id for row in batch.rows] == [fine.message_id]
            (failure,) = batch.unreadable
            assert failure.id == ids[broken.message_id]
            assert failure.delay is None
            assert failure.error
        (dead,) = await store.dead_letters(10)
        assert dead.id == ids[broken.message_id]
        assert dead.error == failure.error
        assert dead.message.body == broken.body
        assert await take(store) == [fine.message_id]
        assert await store.purge([dead.id]) == 1

    @pytest.mark.parametrize("policy", [Policy(), PARK], ids=["block", "park"])
    async def test_unreadable_row_is_the_dead_letter_of_its_key(
        self, database: OutboxDatabase, store: OutboxStore, policy: Policy
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"), message("3", key="k"))
        await database.damage((await rows_of(store))[1].id)
        taken = await names_of(store, policy)
        assert taken == (["1", "3"] if policy.park else ["1"])
        assert len(await store.dead_letters(10)) == 1

    async def test_nothing_but_unreadable_rows_comes_to_an_end(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number)) for number in range(3)])
        for row in (await everything_due(store)).values():
            await database.damage(row.id)
        assert await drain(store) == []
        assert (await store.health()).dead == 3
