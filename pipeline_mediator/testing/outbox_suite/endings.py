"""A batch that is left, however that happens, is no crash, and what it was told is written."""

# ruff: noqa: D102, S101  # these are tests: a name says what holds, and assert is the tool

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator.outbox.protocol import Policy
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import (
    BLOCK,
    OutOfStockError,
    add,
    ids_of,
    keyless_in,
    message,
    rows_of,
    take,
    tell,
)

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Endings"]


class Endings(OutboxCases):
    """A batch that is left, however that happens, is no crash, and what it was told is written."""

    async def test_batch_left_by_an_error_writes_what_it_was_told(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        messages = keyless_in(7, 4)
        await add(database, store, *messages)
        with suppress(OutOfStockError):
            async with store.take(10, BLOCK) as batch:
                tell(batch, sent=0, failed=1)
                raise OutOfStockError
        assert await take(other) == [it.message_id for it in messages[2:]]
        await database.pass_time(61)
        (row,) = await rows_of(other)
        assert (row.message, row.failures) == (messages[1], 1)

    async def test_batch_left_by_a_cancellation_writes_what_it_was_told(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        messages = keyless_in(7, 4)
        await add(database, store, *messages)
        with anyio.CancelScope() as scope:
            async with store.take(10, BLOCK) as batch:
                tell(batch, sent=0, failed=1)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await take(other) == [it.message_id for it in messages[2:]]
        await database.pass_time(61)
        (row,) = await rows_of(other)
        assert (row.message, row.failures) == (messages[1], 1)

    async def test_cancellation_while_a_batch_is_left_comes_too_late(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, message("1", key="k"), message("2", key="k"))
        with anyio.CancelScope() as scope:
            async with store.take(10, BLOCK) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                scope.cancel()
        assert await take(other) == []
        assert (await other.health()).pending == 0

    async def test_taking_that_is_cancelled_holds_nothing_and_is_no_crash(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(3)])
        await rows_of(store)  # connected
        for milliseconds in range(0, 30, 2):
            with anyio.move_on_after(milliseconds / 1000):
                async with store.take(10, Policy()):
                    await anyio.sleep_forever()
        assert await take(other) == ["0", "1", "2"]

    @pytest.mark.parametrize("ending", ["well", "by an error", "by a cancellation"])
    async def test_batch_that_is_left_is_no_crash(
        self, database: OutboxDatabase, store: OutboxStore, ending: str
    ) -> None:
        await add(database, store, *[message(str(number), key="k") for number in range(3)])
        for _ in range(4):
            with anyio.CancelScope() as scope, suppress(OutOfStockError):
                async with store.take(10, BLOCK) as batch:
                    assert ids_of(batch) == ["0", "1", "2"]
                    if ending == "by an error":
                        raise OutOfStockError
                    if ending == "by a cancellation":
                        scope.cancel()
                        await anyio.sleep_forever()
        found = await rows_of(store)
        assert [(row.message.message_id, row.failures) for row in found] == [("0", 0), ("1", 0), ("2", 0)]
