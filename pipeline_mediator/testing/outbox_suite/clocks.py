"""All times are the database's, whatever the hosts believe."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.outbox.protocol import Policy
from pipeline_mediator.testing.clocks import host_clock_off_by
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import DAY, add, drain, fail, message, names_of, rows_of, take

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Clocks"]


class Clocks(OutboxCases):
    """All times are the database's, whatever the hosts believe."""

    @pytest.mark.parametrize("minutes", [-600, 600])
    async def test_the_clock_is_the_databases(self, database: OutboxDatabase, store: OutboxStore, minutes: int) -> None:
        with host_clock_off_by(timedelta(minutes=minutes), store):
            await add(database, store, message("1", key="k"), message("2", key="k"))
            (row, _) = await rows_of(store)
            assert 0 <= row.age < 60
            assert (await store.health()).oldest < 60
            await fail(store, "1", delay=100.0)
            assert await take(store) == []
            due = await store.next_due()
            assert due is not None
            assert 40 < due <= 100
        assert await take(store) == []
        await database.pass_time(101)
        with host_clock_off_by(timedelta(minutes=minutes), store):
            assert await names_of(store) == ["1", "2"]

    async def test_lease_goes_by_the_databases_clock(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"))
        async with store.take(10, Policy(lease=30.0)) as batch:
            assert batch is not None
            with host_clock_off_by(timedelta(hours=1), other):
                assert await take(other, policy=Policy(lease=30.0)) == []
            batch.sent([row.id for row in batch.rows])
        assert await take(other) == []

    async def test_kept_rows_are_cleaned_by_the_databases_clock(self, database: OutboxDatabase) -> None:
        store = self.keeping(database)
        await add(database, store, message("1"))
        with host_clock_off_by(-timedelta(days=30), store):
            await drain(store)
        assert await store.clean(10) == 0
        with host_clock_off_by(timedelta(days=30), store):
            assert await store.clean(10) == 0
        await database.pass_time(2 * DAY)
        with host_clock_off_by(-timedelta(days=30), store):
            assert await store.clean(10) == 1
