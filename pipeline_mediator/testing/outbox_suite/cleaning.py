"""What was sent is deleted, after a time and a few at once; nothing else ever is."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from pipeline_mediator.outbox.protocol import Health
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    DAY,
    SECONDS,
    add,
    drain,
    fail,
    message,
    names_of,
    rows_of,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Cleaning"]


class Cleaning(OutboxCases):
    """What was sent is deleted, after a time and a few at once; nothing else ever is."""

    async def test_sent_rows_are_deleted_at_once_unless_they_are_kept(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, message("1"))
        await drain(store)
        await database.pass_time(1000 * DAY)
        assert await store.clean(10) == 0

    async def test_kept_rows_are_cleaned_after_their_time_a_few_at_once(self, database: OutboxDatabase) -> None:
        store = self.keeping(database)
        await add(database, store, *[message(str(number)) for number in range(10)])
        await database.pass_time(5 * DAY)  # it is the time since they were sent that counts
        await drain(store)
        assert await take(store) == []
        assert await store.clean(100) == 0
        await database.pass_time(0.9 * DAY)
        assert await store.clean(100) == 0
        await database.pass_time(0.2 * DAY)
        assert await store.clean(0) == 0
        assert [await store.clean(4) for _ in range(4)] == [4, 4, 2, 0]

    async def test_kept_rows_are_neither_taken_nor_counted(self, database: OutboxDatabase) -> None:
        store = self.keeping(database)
        await add(database, store, message("1", key="k"), message("2"))
        await drain(store)
        assert await store.health() == Health(0, 0, 0, 0.0)
        assert await store.next_due() is None
        assert await store.dead_letters(10) == []
        await add(database, database.store(max_pending=1), message("3", key="k"))
        assert await take(store) == ["3"]

    async def test_unsent_rows_are_never_cleaned(self, database: OutboxDatabase) -> None:
        store = self.keeping(database)
        await add(database, store, *[message(it, key=it[0]) for it in ("a1", "a2", "b1", "b2", "c1", "d1")])
        await fail(store, "a1", delay=60.0)  # backs off; a2 waits
        await fail(store, "b1", delay=None)  # dead; b2 waits
        await drain(store)  # c1, d1
        await add(database, store, message("e1"), message("a3", key="a"))
        assert [row.message.message_id for row in await rows_of(store)] == ["e1"]
        await database.pass_time(1000 * DAY)
        assert await store.clean(1000) == 2
        (dead,) = await store.dead_letters(10)
        await store.retry([dead.id])
        names = await names_of(store)
        assert sorted(names) == ["a1", "a2", "a3", "b1", "b2", "e1"]

    async def test_cleaners_at_the_same_time_delete_each_row_once(self, database: OutboxDatabase) -> None:
        stores = [self.keeping(database) for _ in range(4)]
        await add(database, stores[0], *[message(str(number)) for number in range(100)])
        await drain(stores[0])
        await add(database, stores[0], *[message(f"new {number}") for number in range(50)])
        await database.pass_time(2 * DAY)
        cleaned: list[int] = []

        async def clean(store: OutboxStore) -> None:
            while sum(cleaned) < 100:
                cleaned.append(await store.clean(10))
                await anyio.sleep(0.001)

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                for store in stores:
                    tasks.start_soon(clean, store)
        assert sum(cleaned) == 100
        assert max(cleaned) <= 10
        assert len(await drain(stores[0])) == 50
