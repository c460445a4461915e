"""What a broker refuses is tried later, and nothing of its key before that."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.outbox.protocol import Failure, lane_of
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    add,
    drain,
    fail,
    ids_of,
    key_in,
    keyless_in,
    message,
    names_of,
    rows_of,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Refusals"]


class Refusals(OutboxCases):
    """What a broker refuses is tried later, and nothing of its key before that."""

    async def test_failed_row_waits_its_time_and_counts(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1"))
        for failures in range(3):
            (row,) = await rows_of(store)
            assert row.failures == failures
            await fail(store, "1", delay=60.0)
            assert await take(store) == []
            await database.pass_time(50)
            assert await take(store) == []
            await database.pass_time(11)
        (row,) = await rows_of(store)
        assert row.failures == 3
        assert row.age >= 180

    async def test_failed_row_without_delay_is_due_at_once(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        await fail(store, "1", delay=0.0)
        assert await names_of(store) == ["1", "2"]

    async def test_failed_row_keeps_the_later_ones_of_its_key_waiting_and_no_others(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        lane = lane_of("k")
        messages = [message(str(number), key="k") for number in range(3)]
        await add(database, store, *messages, message("keyless"), message("same lane", key=key_in(lane)))
        await fail(store, "0", delay=60.0)
        await add(database, store, message("3", key="k", destination="elsewhere"))
        assert set(await names_of(store)) == {"keyless", "same lane"}
        await database.pass_time(61)
        assert await names_of(store) == ["0", "1", "2", "3"]

    async def test_what_was_not_tried_behind_a_failed_row_waits_in_the_same_batch(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(4)])
        async with store.take(10, BLOCK) as batch:
            assert ids_of(batch) == ["0", "1", "2", "3"]
            assert batch is not None
            batch.sent([batch.rows[0].id])
            batch.failed([Failure(batch.rows[1].id, "Refused: no", 60.0)])
        assert await take(store) == []
        await database.pass_time(61)
        assert await names_of(store) == ["1", "2", "3"]

    async def test_failed_row_without_a_key_keeps_nobody_waiting(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        # In one lane all the same.
        first, second, third = keyless_in(7, 3)
        await add(database, store, first, second, third)
        await fail(store, first.message_id, delay=60.0)
        assert await take(store) == [second.message_id, third.message_id]

    @pytest.mark.parametrize(
        ("failed", "free"), [("k", "K"), ("k", "k "), ("e", "é"), ("straße", "strasse"), ("", " "), ("1", "01")]
    )
    async def test_keys_that_differ_at_all_are_two(
        self, database: OutboxDatabase, store: OutboxStore, failed: str, free: str
    ) -> None:
        await add(database, store, message("1", key=failed), message("2", key=free), message("3", key=failed))
        await fail(store, "1", delay=60.0)
        await add(database, store, message("4", key=free), message("5", key=failed))
        assert sorted(await names_of(store)) == ["2", "4"]
        await database.pass_time(61)
        assert await names_of(store) == ["1", "3", "5"]

    async def test_what_waits_hides_nothing_behind_it(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("head", key="k"))
        await fail(store, "head", delay=60.0)
        waiting = [message(str(number), key="k") for number in range(300)]
        await add(database, store, *waiting, message("other", key=key_in(lane_of("k"))))
        assert await take(store, limit=10) == ["other"]

    async def test_next_due_is_when_the_first_of_them_is(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await store.next_due() is None
        later = [message(it, key="k", destination="elsewhere") for it in ("3", "4")]
        await add(database, store, message("1"), message("2"), *later)
        assert await store.next_due() is None
        await fail(store, "1", delay=300.0)
        await fail(store, "3", delay=100.0)
        due = await store.next_due()
        assert due is not None
        assert 70 < due <= 100
        await database.pass_time(90)
        due = await store.next_due()
        assert due is not None
        assert due <= 10
        await database.pass_time(20)
        await drain(store)
        due = await store.next_due()
        assert due is not None
        assert 160 < due <= 190

    async def test_next_due_is_not_what_is_due_already(self, database: OutboxDatabase, store: OutboxStore) -> None:
        """A relay that leaves it out would be told to come back at once, for ever."""
        await add(database, store, message("1", destination="down"))
        await fail(store, "1", delay=100.0)
        await database.pass_time(200)
        assert await take(store, without=["down"]) == []
        assert await store.next_due() is None
        await add(database, store, message("2", destination="down"))
        await fail(store, "2", delay=100.0)
        due = await store.next_due()
        assert due is not None
        assert 70 < due <= 100
