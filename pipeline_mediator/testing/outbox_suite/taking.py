"""What is taken: what is due, in order, and nothing twice."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.outbox.protocol import LANES, Policy
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    add,
    drain,
    key_in,
    message,
    names_of,
    rows_of,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Taking"]


class Taking(OutboxCases):
    """What is taken: what is due, in order, and nothing twice."""

    async def test_nothing_to_take_is_none(self, store: OutboxStore) -> None:
        async with store.take(10, BLOCK) as batch:
            assert batch is None

    async def test_no_more_is_taken_than_asked_for_and_the_rest_later(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(10)])
        taken = [await take(store, limit=4) for _ in range(4)]
        assert taken == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"], []]

    async def test_rows_are_in_order_of_id(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, *[message(str(number), key=str(number % 7)) for number in range(50)])
        for _ in range(10):
            found = await rows_of(store)
            assert found
            assert [row.id for row in found] == sorted(row.id for row in found)

    async def test_what_was_sent_is_not_taken_again(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"), message("3", key="k"))
        async with store.take(10, BLOCK) as batch:
            assert batch is not None
            batch.sent([batch.rows[0].id])
            batch.sent([batch.rows[1].id])
        assert await take(store) == ["3"]
        assert await take(store) == []
        assert (await store.health()).pending == 0

    async def test_what_is_not_named_is_given_back(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, message("1"), message("2", key="k"))
        for _ in range(5):
            async with store.take(10, BLOCK) as batch:
                assert batch is not None
        found = await drain(other)
        assert sorted((row.message.message_id, row.failures) for row in found) == [("1", 0), ("2", 0)]

    async def test_work_in_the_lane_served_last_is_found_at_once(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        for number in range(3):
            await add(database, store, message(str(number), key="k"))
            assert await take(store) == [str(number)]

    async def test_small_limit_starves_no_lane(self, database: OutboxDatabase, store: OutboxStore) -> None:
        """A lane with a thousand rows in front of all others does not keep these waiting until it is empty."""
        if not self.features.several_relays:
            pytest.skip("rows are taken in order of id alone")
        await add(database, store, *[message(f"busy {number}", key=key_in(0)) for number in range(1000)])
        await add(database, store, *[message(f"quiet {lane}", key=key_in(lane)) for lane in range(1, LANES)])
        taken: list[str] = []
        for _ in range(40):
            taken += await take(store, limit=20)
        assert sum(name.startswith("quiet") for name in taken) == LANES - 1

    async def test_destinations_can_be_left_out(self, database: OutboxDatabase, store: OutboxStore) -> None:
        messages = [message(str(number), destination="down") for number in range(30)]
        await add(database, store, *messages, message("up", destination="up"), message("Down", destination="Down"))
        assert sorted(await names_of(store, without=["down", "gone"])) == ["Down", "up"]
        assert await take(store, limit=10, without=["down"]) == []
        assert len(await drain(store)) == 30

    async def test_key_does_not_overtake_itself_by_way_of_another_destination(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await add(
            database,
            store,
            message("1", key="k", destination="up"),
            message("2", key="k", destination="down"),
            message("3", key="k", destination="up"),
            message("4", key="l", destination="up"),
        )
        assert sorted(await names_of(store, without=["down"])) == ["1", "4"]
        assert await names_of(store) == ["2", "3"]

    async def test_deadline_is_within_the_lease(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1"))
        before = time.monotonic()
        async with store.take(10, Policy(lease=20.0)) as batch:
            assert batch is not None
            assert time.monotonic() < batch.deadline < before + 20.0
