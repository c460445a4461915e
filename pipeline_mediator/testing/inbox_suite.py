"""What every inbox has to do, as tests to derive from.

    class TestMyInbox(InboxStoreSuite):
        @pytest.fixture
        async def database(self) -> AsyncIterator[InboxDatabase]:
            ...  # yield an object with the methods of InboxDatabase, over an empty table

Runs under pytest with anyio's plugin. For readable failures say
`pytest.register_assert_rewrite("pipeline_mediator.testing.inbox_suite")` in a conftest.py.
"""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anyio
import pytest

from pipeline_mediator.errors import SchemaError
from pipeline_mediator.testing.clocks import host_clock_off_by

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from pipeline_mediator.inbox.protocol import InboxStore

__all__ = ["InboxDatabase", "InboxFeatures", "InboxStoreSuite"]

_SECONDS = 30.0
"""What takes longer hangs."""


class InboxDatabase(Protocol):
    """What the tests need besides the store: its database, as the application and its operator see it."""

    def store(self, retention: timedelta, /) -> InboxStore:
        """A store over the one table; each on connections of its own, as another process has it."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """A transaction on a connection of its own: committed at the end, rolled back by an error."""
        ...

    async def pass_time(self, seconds: float, /) -> None:
        """Let that much time pass for what is stored: move the times in the table into the past."""
        ...

    async def alter(self) -> Sequence[str]:
        """Spoil the table in two ways; what the error has to name, a word for each."""
        ...

    async def drop(self) -> None:
        """Remove the table."""
        ...


@dataclass(frozen=True, slots=True)
class InboxFeatures:
    """In what databases differ."""

    one_writer: bool = False
    """Only one transaction writes at a time, as on SQLite: another one cannot even begin meanwhile."""
    deadlocks: bool = False
    """Of several copies that wait for one that is rolled back, some may fail, if at least one goes on."""


class InboxStoreSuite:
    """The promises of `InboxStore`, one test each; derive, and say what your database is."""

    features: ClassVar[InboxFeatures] = InboxFeatures()
    pytestmark: ClassVar[Any] = pytest.mark.anyio

    @pytest.fixture
    async def database(self) -> InboxDatabase:
        """The database, with an empty table; override it."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, database: InboxDatabase) -> InboxStore:
        """A store that remembers for a week."""
        return database.store(timedelta(days=7))

    # -- recording -----------------------------------------------------------------------------------------------------

    async def test_message_is_new_once(self, database: InboxDatabase, store: InboxStore) -> None:
        assert await _record(database, store)
        assert not await _record(database, store)
        assert not await _record(database, store)

    async def test_message_is_known_within_its_own_transaction(
        self, database: InboxDatabase, store: InboxStore
    ) -> None:
        async with database.transaction() as resource:
            assert await store.record(resource, "billing", "/shop", "1")
            assert not await store.record(resource, "billing", "/shop", "1")
        assert not await _record(database, store, "billing", "/shop", "1")

    async def test_duplicate_does_not_spoil_the_transaction(self, database: InboxDatabase, store: InboxStore) -> None:
        await _record(database, store, message_id="known")
        async with database.transaction() as resource:
            assert not await store.record(resource, "billing", "/shop", "known")
            assert await store.record(resource, "billing", "/shop", "new")
        assert not await _record(database, store, message_id="new")

    async def test_what_was_rolled_back_was_not_handled(self, database: InboxDatabase, store: InboxStore) -> None:
        with suppress(_OutOfStockError):
            async with database.transaction() as resource:
                assert await store.record(resource, "billing", "/shop", "1")
                raise _OutOfStockError
        assert await _record(database, store, "billing", "/shop", "1")

    async def test_other_stores_know_it_too(self, database: InboxDatabase, store: InboxStore) -> None:
        assert await _record(database, store)
        assert not await _record(database, database.store(timedelta(days=7)))

    @pytest.mark.parametrize(
        ("first", "other"),
        [
            (("billing", "/shop", "1"), ("shipping", "/shop", "1")),
            (("billing", "/shop", "1"), ("billing", "/warehouse", "1")),
            (("billing", "/shop", "1"), ("billing", "/shop", "2")),
            (("a", "bc", "1"), ("ab", "c", "1")),
            (("a", "b", "c1"), ("a", "bc", "1")),
            (("a", "", "b"), ("a", "b", "")),
            (("a", "1:b", "c"), ("a:1", "b", "c")),
            (("billing", "/shop", "abc"), ("billing", "/shop", "ABC")),
            (("billing", "/shop", "abc"), ("billing", "/shop", "abc ")),
            (("billing", "/shop", "resume"), ("billing", "/shop", "resumé")),
            (("billing", "/shop", "é"), ("billing", "/shop", "e\N{COMBINING ACUTE ACCENT}")),
            (("billing", "/shop", "straße"), ("billing", "/shop", "strasse")),
            (("billing", "/shop", "10"), ("billing", "/shop", "010")),
        ],
    )
    async def test_messages_that_differ_at_all_are_two(
        self, database: InboxDatabase, store: InboxStore, first: tuple[str, str, str], other: tuple[str, str, str]
    ) -> None:
        assert await _record(database, store, *first)
        assert await _record(database, store, *other)
        assert not await _record(database, store, *first)
        assert not await _record(database, store, *other)

    @pytest.mark.parametrize("letter", ["x", "é", "\N{SNOWMAN}", "\N{PILE OF POO}"])
    async def test_names_of_255_characters_are_told_apart_by_the_last_one(
        self, database: InboxDatabase, store: InboxStore, letter: str
    ) -> None:
        name = letter * 254
        for subscription, source, message_id in ("aaa", "baa", "aba", "aab"):
            assert await _record(database, store, name + subscription, name + source, name + message_id)
        for subscription, source, message_id in ("aaa", "baa", "aba", "aab"):
            assert not await _record(database, store, name + subscription, name + source, name + message_id)

    async def test_hostile_names_are_but_names(self, database: InboxDatabase, store: InboxStore) -> None:
        names = ["'", '"', "\\", "%s", ":id", "$1", "?", "1'; DROP TABLE inbox; --", "{}", "\n"]
        for name in names:
            assert await _record(database, store, name, name, name)
        for name in names:
            assert not await _record(database, store, name, name, name)

    # -- several at once -----------------------------------------------------------------------------------------------

    async def test_of_copies_at_the_same_time_one_is_handled(self, database: InboxDatabase, store: InboxStore) -> None:
        handled: list[bool] = []

        async def handle() -> None:
            async with database.transaction() as resource:
                new = await store.record(resource, "billing", "/shop", "1")
                await anyio.sleep(0.01)  # the handler; the others arrive meanwhile
            handled.append(new)

        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(handle)
        assert sorted(handled) == [False, False, True]

    async def test_copy_waits_for_the_first_one_and_is_a_duplicate(
        self, database: InboxDatabase, store: InboxStore
    ) -> None:
        copy = _Copy(database, store)
        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks, database.transaction() as resource:
                assert await store.record(resource, "billing", "/shop", "1")
                tasks.start_soon(copy.handle, "billing", "/shop", "1")
                assert await copy.waits()
        assert copy.new is False

    async def test_copy_waits_for_the_first_one_and_takes_over_if_that_is_rolled_back(
        self, database: InboxDatabase, store: InboxStore
    ) -> None:
        copy = _Copy(database, store)
        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                with suppress(_OutOfStockError):
                    async with database.transaction() as resource:
                        assert await store.record(resource, "billing", "/shop", "1")
                        tasks.start_soon(copy.handle, "billing", "/shop", "1")
                        assert await copy.waits()
                        raise _OutOfStockError
        assert copy.new is True
        assert not await _record(database, store, "billing", "/shop", "1")

    async def test_of_copies_that_wait_for_one_that_is_rolled_back_one_is_handled(
        self, database: InboxDatabase, store: InboxStore
    ) -> None:
        copies = [_Copy(database, store, may_fail=self.features.deadlocks) for _ in range(3)]
        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                with suppress(_OutOfStockError):
                    async with database.transaction() as resource:
                        assert await store.record(resource, "billing", "/shop", "1")
                        for copy in copies:
                            tasks.start_soon(copy.handle, "billing", "/shop", "1")
                            assert await copy.waits()
                        raise _OutOfStockError
        assert [copy.new for copy in copies].count(True) == 1

    async def test_other_messages_do_not_wait(self, database: InboxDatabase, store: InboxStore) -> None:
        if self.features.one_writer:
            pytest.skip("only one transaction writes at a time")
        with anyio.fail_after(_SECONDS):
            async with database.transaction() as resource:
                assert await store.record(resource, "billing", "/shop", "1")
                assert await _record(database, store, "billing", "/shop", "2")
                assert await _record(database, store, "shipping", "/shop", "1")

    # -- forgetting ----------------------------------------------------------------------------------------------------

    async def test_retention_is_as_told(self, database: InboxDatabase) -> None:
        assert database.store(timedelta(hours=36)).retention == timedelta(hours=36)

    async def test_message_is_remembered_for_the_retention(self, database: InboxDatabase, store: InboxStore) -> None:
        await _record(database, store)
        await database.pass_time(timedelta(days=6, hours=23).total_seconds())
        assert await store.clean(100) == 0
        assert not await _record(database, store)

    async def test_message_is_forgotten_after_the_retention(self, database: InboxDatabase, store: InboxStore) -> None:
        await _record(database, store, message_id="old")
        await database.pass_time(timedelta(days=6).total_seconds())
        await _record(database, store, message_id="newer")
        await database.pass_time(timedelta(days=1, hours=1).total_seconds())
        await _record(database, store, message_id="newest")
        assert await store.clean(100) == 1
        assert await store.clean(100) == 0
        assert not await _record(database, store, message_id="newer")
        assert not await _record(database, store, message_id="newest")
        assert await _record(database, store, message_id="old")

    async def test_duplicate_does_not_make_it_younger(self, database: InboxDatabase, store: InboxStore) -> None:
        await _record(database, store)
        await database.pass_time(timedelta(days=6).total_seconds())
        assert not await _record(database, store)
        await database.pass_time(timedelta(days=1, hours=1).total_seconds())
        assert await store.clean(100) == 1

    async def test_cleaning_deletes_no_more_than_it_may(self, database: InboxDatabase, store: InboxStore) -> None:
        async with database.transaction() as resource:
            for number in range(10):
                await store.record(resource, "billing", "/shop", str(number))
        await database.pass_time(timedelta(days=8).total_seconds())
        assert await store.clean(0) == 0
        assert [await store.clean(4) for _ in range(4)] == [4, 4, 2, 0]

    async def test_oldest_are_forgotten_first(self, database: InboxDatabase, store: InboxStore) -> None:
        for message_id in ("1", "2", "3"):
            await _record(database, store, message_id=message_id)
            await database.pass_time(60)
        await database.pass_time(timedelta(days=8).total_seconds())
        assert await store.clean(1) == 1
        assert await _record(database, store, message_id="1")
        assert not await _record(database, store, message_id="3")

    async def test_a_limit_above_a_batch_is_reached(self, database: InboxDatabase, store: InboxStore) -> None:
        async with database.transaction() as resource:
            for number in range(2100):
                await store.record(resource, "billing", "/shop", str(number))
        await database.pass_time(timedelta(days=8).total_seconds())
        assert [await store.clean(2050) for _ in range(3)] == [2050, 50, 0]

    async def test_cleaners_at_the_same_time_delete_each_row_once(self, database: InboxDatabase) -> None:
        stores = [database.store(timedelta(days=7)) for _ in range(4)]
        async with database.transaction() as resource:
            for number in range(100):
                await stores[0].record(resource, "billing", "/shop", str(number))
        await database.pass_time(timedelta(days=8).total_seconds())
        deleted: list[int] = []

        async def clean(store: InboxStore) -> None:
            for _ in range(20):
                deleted.append(await store.clean(10))  # noqa: PERF401 - an asynchronous call each

        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                for store in stores:
                    tasks.start_soon(clean, store)
        assert sum(deleted) == 100
        assert max(deleted) <= 10

    async def test_the_clock_is_the_databases(self, database: InboxDatabase, store: InboxStore) -> None:
        with host_clock_off_by(-timedelta(days=30), store):
            await _record(database, store, message_id="from a host that is late")
        with host_clock_off_by(timedelta(days=30), store):
            await _record(database, store, message_id="from a host that is early")
            assert await store.clean(10) == 0
        await database.pass_time(timedelta(days=8).total_seconds())
        with host_clock_off_by(-timedelta(days=30), store):
            assert await store.clean(10) == 2

    # -- the table -----------------------------------------------------------------------------------------------------

    async def test_table_as_it_should_be_is_valid(self, database: InboxDatabase, store: InboxStore) -> None:
        await store.validate_schema()
        await _record(database, store)
        await store.validate_schema()

    async def test_every_difference_is_listed_at_once(self, database: InboxDatabase, store: InboxStore) -> None:
        words = await database.alter()
        with pytest.raises(SchemaError) as failure:
            await store.validate_schema()
        assert len(words) == 2
        assert len(failure.value.differences) >= 2
        for word in words:
            assert any(word in difference for difference in failure.value.differences), failure.value.differences

    async def test_missing_table_is_a_schema_error_that_says_what_to_do(
        self, database: InboxDatabase, store: InboxStore
    ) -> None:
        await database.drop()
        with pytest.raises(SchemaError) as failure:
            await store.validate_schema()
        assert failure.value.table in str(failure.value)
        assert failure.value.fix
        with pytest.raises(SchemaError) as failure:
            await _record(database, store)
        assert failure.value.fix


class _OutOfStockError(Exception):
    pass


class _Copy:
    """Another delivery of a message, in a task of its own."""

    def __init__(self, database: InboxDatabase, store: InboxStore, *, may_fail: bool = False) -> None:
        self.new: bool | None = None
        self._database = database
        self._store = store
        self._may_fail = may_fail

    async def handle(self, subscription: str, source: str, message_id: str) -> None:
        try:
            self.new = await _record(self._database, self._store, subscription, source, message_id)
        except Exception:
            if not self._may_fail:
                raise

    async def waits(self) -> bool:
        # Nobody can ask every database who waits; one that does not wait is done long before.
        await anyio.sleep(0.1)
        return self.new is None


async def _record(
    database: InboxDatabase,
    store: InboxStore,
    subscription: str = "billing",
    source: str = "/shop",
    message_id: str = "1",
) -> bool:
    async with database.transaction() as resource:
        return await store.record(resource, subscription, source, message_id)
