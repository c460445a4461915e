"""What an operator sees, and how a relay is woken."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator.errors import SchemaError
from pipeline_mediator.outbox.protocol import Health
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import OutOfStockError, add, drain, fail, message, take, until

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Operating"]


class Operating(OutboxCases):
    """What an operator sees, and how a relay is woken."""

    async def test_health_counts_what_is_not_sent(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await store.health() == Health(0, 0, 0, 0.0)
        await add(database, store, *[message(it, key=it[0]) for it in ("a1", "a2", "a3", "b1", "b2", "c1")])
        await fail(store, "a1", delay=600.0)
        await fail(store, "b1", delay=None)
        await drain(store)
        await add(database, store, message("d1", key="d"))
        found = await store.health()
        assert (found.pending, found.waiting, found.dead) == (2, 3, 1)
        await database.pass_time(100)
        await add(database, store, message("e1", key="e"))
        found = await store.health()
        assert (found.pending, found.waiting, found.dead) == (3, 3, 1)
        assert 100 <= found.oldest < 160

    async def test_oldest_is_neither_sent_nor_dead(self, database: OutboxDatabase) -> None:
        store = self.keeping(database) if self.features.keeps_sent else database.store()
        await add(database, store, message("sent"))
        await drain(store)
        await add(database, store, message("dead"))
        await fail(store, "dead", delay=None)
        await database.pass_time(1000)
        assert (await store.health()).oldest == 0.0
        await add(database, store, message("new"))
        assert (await store.health()).oldest < 60

    async def test_oldest_may_wait_behind_a_dead_letter(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("dead", key="k"))
        await database.pass_time(1000)
        await add(database, store, message("waits", key="k"))
        await fail(store, "dead", delay=None)
        await drain(store)
        await database.pass_time(100)
        await add(database, store, message("new"))
        assert 100 <= (await store.health()).oldest < 160

    async def test_commits_of_this_process_wake_who_asked(self, store: OutboxStore) -> None:
        calls: list[str] = []
        stop = store.on_commit(lambda: calls.append("one"))
        store.on_commit(lambda: calls.append("two"))
        store.committed()
        await until(lambda: len(calls) == 2)
        stop()
        store.committed()
        await until(lambda: len(calls) == 3)
        assert sorted(calls) == ["one", "two", "two"]

    async def test_listening_is_harmless_where_nobody_can_tell(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        async with store.listen():
            await add(database, store, message("1"))
            assert await take(store) == ["1"]

    async def test_commits_of_other_processes_wake_who_listens(self, database: OutboxDatabase) -> None:
        if not self.features.hears_others:
            pytest.skip("the database tells nobody of commits")
        store, other = database.store(notify=True), database.store(notify=True)
        calls: list[None] = []
        store.on_commit(lambda: calls.append(None))
        async with store.listen():
            with suppress(OutOfStockError):
                async with database.transaction() as resource:
                    await other.add(resource, [message("1")])
                    raise OutOfStockError
            async with database.transaction() as resource:
                await other.add(resource, [message("2")])
                await anyio.sleep(0.05)
                assert not calls
            await until(lambda: bool(calls))

    async def test_tables_as_they_should_be_are_valid(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await store.validate_schema()
        await add(database, store, message("1"))
        await take(store)
        await store.validate_schema()

    async def test_every_difference_is_listed_at_once(self, database: OutboxDatabase, store: OutboxStore) -> None:
        words = await database.alter()
        with pytest.raises(SchemaError) as failure:
            await store.validate_schema()
        assert len(words) == 2
        for word in words:
            assert any(word in difference for difference in failure.value.differences), failure.value.differences

    async def test_missing_table_is_a_schema_error_that_says_what_to_do(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await database.drop()
        with pytest.raises(SchemaError) as failure:
            await store.validate_schema()
        assert failure.value.table in str(failure.value)
        assert failure.value.fix
        with pytest.raises(SchemaError) as failure:
            await add(database, store, message("1"))
        assert failure.value.fix
