"""Several relays, and the application's own transactions, at the same time."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator.outbox.protocol import LANES
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    SECONDS,
    add,
    assert_in_order,
    ids_of,
    key_in,
    lanes_of,
    message,
    names_of,
    take,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore, StoredRow
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Sharing"]


class Sharing(OutboxCases):
    """Several relays, and the application's own transactions, at the same time."""

    async def test_what_is_taken_is_not_anothers(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(5)])
        async with store.take(2, BLOCK) as batch:
            assert ids_of(batch) == ["0", "1"]
            # Not the later rows of the key either, though nobody has taken them.
            assert await take(other) == []
        assert await take(other) == ["0", "1", "2", "3", "4"]

    async def test_taking_is_no_obstacle_to_writing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2"))
        with anyio.fail_after(SECONDS):
            async with store.take(10, BLOCK) as batch:
                assert batch is not None
                await add(database, store, message("3", key="k"), message("4"), message("5", key="l"))
                await add(database, other, message("6", key="k"))
                assert (await other.health()).pending == 6
                batch.sent([row.id for row in batch.rows])
        left = {"1", "2", "3", "4", "5", "6"} - set(ids_of(batch))
        assert set(await names_of(store)) == left

    async def test_writing_is_no_obstacle_to_taking(self, database: OutboxDatabase, store: OutboxStore) -> None:
        if not self.features.several_writers:
            pytest.skip("only one transaction writes at a time")
        await add(database, store, message("1", key="k"))
        with anyio.fail_after(SECONDS):
            async with database.transaction() as resource:
                await store.add(resource, [message("2", key="k"), message("3")])
                assert await take(store) == ["1"]
        assert sorted(await names_of(store)) == ["2", "3"]

    async def test_relays_take_at_most_a_quarter_of_the_lanes_each(self, database: OutboxDatabase) -> None:
        if not self.features.several_relays:
            pytest.skip("one relay at a time")
        await add(database, database.store(), *[message(str(lane), key=key_in(lane)) for lane in range(LANES)])
        one, two, three, four = (database.store() for _ in range(4))
        async with (
            one.take(1000, BLOCK) as first,
            two.take(1000, BLOCK) as second,
            three.take(1000, BLOCK) as third,
            four.take(1000, BLOCK) as fourth,
        ):
            taken = [lanes_of(batch) for batch in (first, second, third, fourth)]
            assert await take(database.store()) == []
        assert all(len(lanes) == len(set(lanes)) == LANES // 4 for lanes in taken)
        assert sorted(lane for lanes in taken for lane in lanes) == list(range(LANES))

    async def test_longest_unserved_lanes_come_first(self, database: OutboxDatabase, store: OutboxStore) -> None:
        if not self.features.several_relays:
            pytest.skip("one relay at a time")
        await add(database, store, *[message(str(lane), key=key_in(lane)) for lane in range(LANES)])
        served: list[int] = []
        for _ in range(4):  # nothing is sent, so each time every lane has something to send
            async with store.take(1000, BLOCK) as batch:
                served += lanes_of(batch)
        assert sorted(served) == list(range(LANES))
        async with store.take(1000, BLOCK) as batch:
            assert sorted(lanes_of(batch)) == sorted(served[: LANES // 4])

    @pytest.mark.parametrize("relays", [2, 8])
    async def test_several_relays_take_each_row_once_and_in_order(self, database: OutboxDatabase, relays: int) -> None:
        total, keys = 10_000, 500
        writer = database.store()
        for start in range(0, total, 1000):
            numbers = range(start, start + 1000)
            # A tenth without a key.
            await add(database, writer, *[message(str(n), key=f"k{n % keys}" if n % 10 else None) for n in numbers])
        taken: list[StoredRow] = []

        async def relay(store: OutboxStore) -> None:
            while len(taken) < total:
                async with store.take(250, BLOCK) as batch:
                    if batch is not None:
                        taken.extend(batch.rows)
                        await anyio.sleep(0.001)  # the broker; the others run meanwhile
                        batch.sent([row.id for row in batch.rows])
                if batch is None:
                    await anyio.sleep(0.005)

        with anyio.fail_after(4 * SECONDS):
            async with anyio.create_task_group() as tasks:
                for _ in range(relays):
                    tasks.start_soon(relay, database.store())
        assert len(taken) == total
        assert len({row.id for row in taken}) == total
        assert_in_order(taken)
        assert await take(writer) == []

    async def test_writers_and_relays_at_the_same_time_lose_nothing(self, database: OutboxDatabase) -> None:
        taken: list[StoredRow] = []

        async def write(writer: str) -> None:
            store = database.store()
            for number in range(25):
                await add(database, store, *[message(f"{writer}.{number}.{n}", key=f"{writer}{n}") for n in range(4)])

        async def relay(store: OutboxStore) -> None:
            while len(taken) < 400:
                async with store.take(50, BLOCK) as batch:
                    if batch is not None:
                        taken.extend(batch.rows)
                        batch.sent([row.id for row in batch.rows])
                if batch is None:
                    await anyio.sleep(0.002)

        with anyio.fail_after(2 * SECONDS):
            async with anyio.create_task_group() as tasks:
                for writer in "abcd":
                    tasks.start_soon(write, writer)
                for _ in range(2):
                    tasks.start_soon(relay, database.store())
        assert len({row.message.message_id for row in taken}) == len(taken) == 400
        assert_in_order(taken)
