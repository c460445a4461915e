"""Messages are written in the transaction of whoever has them, or not at all."""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.errors import OutboxFullError
from pipeline_mediator.outbox.protocol import Health, StoredMessage
from pipeline_mediator.testing.outbox_suite.backing import OutboxCases
from pipeline_mediator.testing.outbox_suite.steps import OutOfStockError, add, drain, message, take

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase

__all__ = ["Writing"]


class Writing(OutboxCases):
    """Messages are written in the transaction of whoever has them, or not at all."""

    async def test_what_is_committed_is_taken(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await take(store) == []
        async with database.transaction() as resource:
            await store.add(resource, [message("1")])
            assert await take(store) == []
        assert await take(store) == ["1"]

    async def test_what_is_rolled_back_never_was(self, database: OutboxDatabase, store: OutboxStore) -> None:
        with suppress(OutOfStockError):
            async with database.transaction() as resource:
                await store.add(resource, [message("1"), message("2")])
                raise OutOfStockError
        assert await take(store) == []
        assert await store.health() == Health(0, 0, 0, 0.0)

    async def test_nothing_to_write_is_fine(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store)
        assert await take(store) == []

    async def test_message_comes_back_as_it_was(self, database: OutboxDatabase, store: OutboxStore) -> None:
        messages = [
            StoredMessage(
                "1", "OrderPlaced", 3, "orders", "application/json", b'{"total": 1}', {"source": "/shop"}, "7"
            ),
            StoredMessage("2", "Plain", 1, "orders", "text/plain", b"", {}, None),
            StoredMessage("3", "Bytes", 1, "orders", "application/octet-stream", bytes(range(256)), {}, ""),
            StoredMessage(
                "4", "Größe", 1, "größe", "text/plain", b"'\\\n%s:x$1?", {"Ü": "\N{PILE OF POO}\n\"'\\"}, "Ü\\'%s"
            ),
            StoredMessage("5", "Large", 1, "orders", "application/json", b"x" * 300_000, {"note": "y" * 100_000}, "7"),
        ]
        async with database.transaction() as resource:
            await store.add(resource, messages)
        found = sorted(await drain(store), key=lambda row: row.id)
        assert [row.message for row in found] == messages
        assert found[0].headers == {"source": "/shop"}
        assert [row.failures for row in found] == [0] * 5
        assert all(0 <= row.age < 60 for row in found)

    async def test_names_of_255_characters_are_kept_whole(self, database: OutboxDatabase, store: OutboxStore) -> None:
        messages = [
            StoredMessage(it, it, 1, it, "text/plain", b"", {}, it)
            for letter in ("x", "é", "\N{PILE OF POO}")
            for it in (letter * 254 + "a", letter * 254 + "b")
        ]
        async with database.transaction() as resource:
            await store.add(resource, messages)
        found = sorted(await drain(store), key=lambda row: row.id)
        assert [row.message for row in found] == messages

    async def test_ids_rise_in_the_order_given(self, database: OutboxDatabase, store: OutboxStore) -> None:
        names = [str(number) for number in range(300)]
        async with database.transaction() as resource:
            await store.add(resource, [message(it) for it in names[:250]])
            await store.add(resource, [message(it) for it in names[250:]])
        found = await drain(store, limit=7)
        assert [row.message.message_id for row in sorted(found, key=lambda row: row.id)] == names

    async def test_ids_are_not_given_again(self, database: OutboxDatabase, store: OutboxStore) -> None:
        ids: list[int] = []
        for number in range(3):
            await add(database, store, message(str(number)))
            ids += [row.id for row in await drain(store)]
        assert ids == sorted(set(ids))

    async def test_same_message_may_be_stored_twice(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await add(database, store, message("1"), message("1"))
        assert await take(store) == ["1", "1"]

    async def test_what_commits_late_is_not_passed_over(self, database: OutboxDatabase, store: OutboxStore) -> None:
        """Ids are given when rows are written, and rows are seen when they are committed."""
        if not self.features.several_writers:
            pytest.skip("only one transaction writes at a time")
        async with database.transaction() as resource:
            await store.add(resource, [message("early")])
            await add(database, store, message("late"))
            assert await take(store) == ["late"]
        assert await take(store) == ["early"]

    async def test_full_outbox_refuses_and_rolls_back(self, database: OutboxDatabase) -> None:
        store = database.store(max_pending=10)
        await add(database, store, *[message(str(number)) for number in range(10)])
        store = database.store(max_pending=10)
        with pytest.raises(OutboxFullError) as failure:
            await add(database, store, message("one"), message("too many"))
        assert failure.value.pending == 10
        assert failure.value.added == 2
        assert failure.value.max_pending == 10
        assert (await store.health()).pending == 10

    async def test_more_at_once_than_may_wait_is_refused(self, database: OutboxDatabase) -> None:
        with pytest.raises(OutboxFullError):
            await add(database, database.store(max_pending=10), *[message(str(number)) for number in range(11)])
        await add(database, database.store(max_pending=10), *[message(str(number)) for number in range(10)])

    async def test_there_is_room_again_when_messages_were_sent(self, database: OutboxDatabase) -> None:
        await add(database, database.store(max_pending=10), *[message(str(number)) for number in range(10)])
        await drain(database.store())
        await add(database, database.store(max_pending=10), *[message(str(number)) for number in range(10)])
