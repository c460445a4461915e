"""What every outbox has to do, as tests to derive from.

    class TestMyOutbox(OutboxStoreSuite):
        @pytest.fixture
        async def database(self) -> AsyncIterator[OutboxDatabase]:
            ...  # yield an object with the methods of OutboxDatabase, over empty tables

Runs under pytest with anyio's plugin. For readable failures say
`pytest.register_assert_rewrite("pipeline_mediator.testing.outbox_suite")` in a conftest.py.

What it cannot show: that a killed process, or a killed server, loses nothing. A connection that ends is all it has of a
crash, and no test of one process can do better; kill real ones.
"""

# ruff: noqa: D102, S101, PLR2004  # these are tests: a name says what holds, and assert and numbers are the tools
# ruff: noqa: ASYNC110, PT012  # what another process does can only be polled; errors are raised where batches are left

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anyio
import pytest

from pipeline_mediator.errors import LeaseLostError, OutboxFullError, SchemaError
from pipeline_mediator.outbox.protocol import LANES, Failure, Health, Policy, StoredMessage, lane_of
from pipeline_mediator.testing.clocks import host_clock_off_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from pipeline_mediator.outbox.protocol import Batch, OutboxStore, StoredRow

__all__ = ["OutboxDatabase", "OutboxFeatures", "OutboxStoreSuite"]

_SECONDS = 30.0
"""What takes longer hangs."""
_DAY = 86400.0
_BLOCK = Policy()
_PARK = Policy(park=True)


class OutboxDatabase(Protocol):
    """What the tests need besides the store: its database, as the application and its operator see it."""

    def store(
        self, *, max_pending: int | None = None, keep: timedelta = timedelta(0), notify: bool = False
    ) -> OutboxStore:
        """A store over the one pair of tables; each on connections of its own, as another process has it."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """A transaction on a connection of its own: committed at the end, rolled back by an error."""
        ...

    async def kill(self, store: OutboxStore, /) -> None:
        """Let the database see the process of this store die: its connections end, and so does what it holds."""
        ...

    async def pass_time(self, seconds: float, /) -> None:
        """Let that much time pass for what is stored: move the times in the tables into the past; not the lease's."""
        ...

    async def damage(self, row_id: int, /) -> None:
        """Make the headers of a row something that nobody can read."""
        ...

    async def alter(self) -> Sequence[str]:
        """Spoil the tables in two ways; what the error has to name, a word for each."""
        ...

    async def drop(self) -> None:
        """Remove the tables."""
        ...


@dataclass(frozen=True, slots=True)
class OutboxFeatures:
    """In what databases differ."""

    several_relays: bool = True
    """Several relays hold batches at the same time, each of other lanes; without it, one after the other."""
    several_writers: bool = True
    """A transaction that has written keeps neither other writers nor relays waiting."""
    keeps_sent: bool = True
    """Rows that were sent can be kept for a time."""
    hears_others: bool = False
    """With `notify`, a store that listens hears of the commits of other processes."""
    lease: float = 1.0
    """The shortest lease, in seconds. The tests that let one end wait that long."""


class OutboxStoreSuite:
    """The promises of `OutboxStore`, one test each; derive, and say what your database is."""

    features: ClassVar[OutboxFeatures] = OutboxFeatures()
    pytestmark: ClassVar[Any] = pytest.mark.anyio

    @pytest.fixture
    async def database(self) -> OutboxDatabase:
        """The database, with empty tables; override it."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, database: OutboxDatabase) -> OutboxStore:
        """The store of the relay that most tests are about."""
        return database.store()

    @pytest.fixture
    def other(self, database: OutboxDatabase) -> OutboxStore:
        """Another relay's."""
        return database.store()

    # -- writing -------------------------------------------------------------------------------------------------------

    async def test_what_is_committed_is_taken(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await _take(store) == []
        async with database.transaction() as resource:
            await store.add(resource, [_message("1")])
            assert await _take(store) == []
        assert await _take(store) == ["1"]

    async def test_what_is_rolled_back_never_was(self, database: OutboxDatabase, store: OutboxStore) -> None:
        with suppress(_OutOfStockError):
            async with database.transaction() as resource:
                await store.add(resource, [_message("1"), _message("2")])
                raise _OutOfStockError
        assert await _take(store) == []
        assert await store.health() == Health(0, 0, 0, 0.0)

    async def test_nothing_to_write_is_fine(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store)
        assert await _take(store) == []

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
        found = sorted(await _drain(store), key=lambda row: row.id)
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
        found = sorted(await _drain(store), key=lambda row: row.id)
        assert [row.message for row in found] == messages

    async def test_ids_rise_in_the_order_given(self, database: OutboxDatabase, store: OutboxStore) -> None:
        names = [str(number) for number in range(300)]
        async with database.transaction() as resource:
            await store.add(resource, [_message(it) for it in names[:250]])
            await store.add(resource, [_message(it) for it in names[250:]])
        found = await _drain(store, limit=7)
        assert [row.message.message_id for row in sorted(found, key=lambda row: row.id)] == names

    async def test_ids_are_not_given_again(self, database: OutboxDatabase, store: OutboxStore) -> None:
        ids: list[int] = []
        for number in range(3):
            await _add(database, store, _message(str(number)))
            ids += [row.id for row in await _drain(store)]
        assert ids == sorted(set(ids))

    async def test_same_message_may_be_stored_twice(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1"), _message("1"))
        assert await _take(store) == ["1", "1"]

    async def test_what_commits_late_is_not_passed_over(self, database: OutboxDatabase, store: OutboxStore) -> None:
        """Ids are given when rows are written, and rows are seen when they are committed."""
        if not self.features.several_writers:
            pytest.skip("only one transaction writes at a time")
        async with database.transaction() as resource:
            await store.add(resource, [_message("early")])
            await _add(database, store, _message("late"))
            assert await _take(store) == ["late"]
        assert await _take(store) == ["early"]

    async def test_full_outbox_refuses_and_rolls_back(self, database: OutboxDatabase) -> None:
        store = database.store(max_pending=10)
        await _add(database, store, *[_message(str(number)) for number in range(10)])
        store = database.store(max_pending=10)
        with pytest.raises(OutboxFullError) as failure:
            await _add(database, store, _message("one"), _message("too many"))
        assert failure.value.pending == 10
        assert failure.value.added == 2
        assert failure.value.max_pending == 10
        assert (await store.health()).pending == 10

    async def test_more_at_once_than_may_wait_is_refused(self, database: OutboxDatabase) -> None:
        with pytest.raises(OutboxFullError):
            await _add(database, database.store(max_pending=10), *[_message(str(number)) for number in range(11)])
        await _add(database, database.store(max_pending=10), *[_message(str(number)) for number in range(10)])

    async def test_there_is_room_again_when_messages_were_sent(self, database: OutboxDatabase) -> None:
        await _add(database, database.store(max_pending=10), *[_message(str(number)) for number in range(10)])
        await _drain(database.store())
        await _add(database, database.store(max_pending=10), *[_message(str(number)) for number in range(10)])

    # -- taking --------------------------------------------------------------------------------------------------------

    async def test_nothing_to_take_is_none(self, store: OutboxStore) -> None:
        async with store.take(10, _BLOCK) as batch:
            assert batch is None

    async def test_no_more_is_taken_than_asked_for_and_the_rest_later(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(10)])
        taken = [await _take(store, limit=4) for _ in range(4)]
        assert taken == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"], []]

    async def test_rows_are_in_order_of_id(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, *[_message(str(number), key=str(number % 7)) for number in range(50)])
        for _ in range(10):
            found = await _rows(store)
            assert found
            assert [row.id for row in found] == sorted(row.id for row in found)

    async def test_what_was_sent_is_not_taken_again(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"), _message("3", key="k"))
        async with store.take(10, _BLOCK) as batch:
            assert batch is not None
            batch.sent([batch.rows[0].id])
            batch.sent([batch.rows[1].id])
        assert await _take(store) == ["3"]
        assert await _take(store) == []
        assert (await store.health()).pending == 0

    async def test_what_is_not_named_is_given_back(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, _message("1"), _message("2", key="k"))
        for _ in range(5):
            async with store.take(10, _BLOCK) as batch:
                assert batch is not None
        found = await _drain(other)
        assert sorted((row.message.message_id, row.failures) for row in found) == [("1", 0), ("2", 0)]

    async def test_what_is_taken_is_not_anothers(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(5)])
        async with store.take(2, _BLOCK) as batch:
            assert _ids_of(batch) == ["0", "1"]
            # Not the later rows of the key either, though nobody has taken them.
            assert await _take(other) == []
        assert await _take(other) == ["0", "1", "2", "3", "4"]

    async def test_taking_is_no_obstacle_to_writing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2"))
        with anyio.fail_after(_SECONDS):
            async with store.take(10, _BLOCK) as batch:
                assert batch is not None
                await _add(database, store, _message("3", key="k"), _message("4"), _message("5", key="l"))
                await _add(database, other, _message("6", key="k"))
                assert (await other.health()).pending == 6
                batch.sent([row.id for row in batch.rows])
        left = {"1", "2", "3", "4", "5", "6"} - set(_ids_of(batch))
        assert set(await _names(store)) == left

    async def test_writing_is_no_obstacle_to_taking(self, database: OutboxDatabase, store: OutboxStore) -> None:
        if not self.features.several_writers:
            pytest.skip("only one transaction writes at a time")
        await _add(database, store, _message("1", key="k"))
        with anyio.fail_after(_SECONDS):
            async with database.transaction() as resource:
                await store.add(resource, [_message("2", key="k"), _message("3")])
                assert await _take(store) == ["1"]
        assert sorted(await _names(store)) == ["2", "3"]

    async def test_relays_take_at_most_a_quarter_of_the_lanes_each(self, database: OutboxDatabase) -> None:
        if not self.features.several_relays:
            pytest.skip("one relay at a time")
        await _add(database, database.store(), *[_message(str(lane), key=_key_in(lane)) for lane in range(LANES)])
        one, two, three, four = (database.store() for _ in range(4))
        async with (
            one.take(1000, _BLOCK) as first,
            two.take(1000, _BLOCK) as second,
            three.take(1000, _BLOCK) as third,
            four.take(1000, _BLOCK) as fourth,
        ):
            taken = [_lanes_of(batch) for batch in (first, second, third, fourth)]
            assert await _take(database.store()) == []
        assert all(len(lanes) == len(set(lanes)) == LANES // 4 for lanes in taken)
        assert sorted(lane for lanes in taken for lane in lanes) == list(range(LANES))

    async def test_longest_unserved_lanes_come_first(self, database: OutboxDatabase, store: OutboxStore) -> None:
        if not self.features.several_relays:
            pytest.skip("one relay at a time")
        await _add(database, store, *[_message(str(lane), key=_key_in(lane)) for lane in range(LANES)])
        served: list[int] = []
        for _ in range(4):  # nothing is sent, so each time every lane has something to send
            async with store.take(1000, _BLOCK) as batch:
                served += _lanes_of(batch)
        assert sorted(served) == list(range(LANES))
        async with store.take(1000, _BLOCK) as batch:
            assert sorted(_lanes_of(batch)) == sorted(served[: LANES // 4])

    async def test_work_in_the_lane_served_last_is_found_at_once(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        for number in range(3):
            await _add(database, store, _message(str(number), key="k"))
            assert await _take(store) == [str(number)]

    async def test_small_limit_starves_no_lane(self, database: OutboxDatabase, store: OutboxStore) -> None:
        """A lane with a thousand rows in front of all others does not keep these waiting until it is empty."""
        if not self.features.several_relays:
            pytest.skip("rows are taken in order of id alone")
        await _add(database, store, *[_message(f"busy {number}", key=_key_in(0)) for number in range(1000)])
        await _add(database, store, *[_message(f"quiet {lane}", key=_key_in(lane)) for lane in range(1, LANES)])
        taken: list[str] = []
        for _ in range(40):
            taken += await _take(store, limit=20)
        assert sum(name.startswith("quiet") for name in taken) == LANES - 1

    async def test_destinations_can_be_left_out(self, database: OutboxDatabase, store: OutboxStore) -> None:
        messages = [_message(str(number), destination="down") for number in range(30)]
        await _add(database, store, *messages, _message("up", destination="up"), _message("Down", destination="Down"))
        assert sorted(await _names(store, without=["down", "gone"])) == ["Down", "up"]
        assert await _take(store, limit=10, without=["down"]) == []
        assert len(await _drain(store)) == 30

    async def test_key_does_not_overtake_itself_by_way_of_another_destination(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(
            database,
            store,
            _message("1", key="k", destination="up"),
            _message("2", key="k", destination="down"),
            _message("3", key="k", destination="up"),
            _message("4", key="l", destination="up"),
        )
        assert sorted(await _names(store, without=["down"])) == ["1", "4"]
        assert await _names(store) == ["2", "3"]

    async def test_deadline_is_within_the_lease(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1"))
        before = time.monotonic()
        async with store.take(10, Policy(lease=20.0)) as batch:
            assert batch is not None
            assert time.monotonic() < batch.deadline < before + 20.0

    @pytest.mark.parametrize("relays", [2, 8])
    async def test_several_relays_take_each_row_once_and_in_order(self, database: OutboxDatabase, relays: int) -> None:
        total, keys = 10_000, 500
        writer = database.store()
        for start in range(0, total, 1000):
            numbers = range(start, start + 1000)
            # A tenth without a key.
            await _add(database, writer, *[_message(str(n), key=f"k{n % keys}" if n % 10 else None) for n in numbers])
        taken: list[StoredRow] = []

        async def relay(store: OutboxStore) -> None:
            while len(taken) < total:
                async with store.take(250, _BLOCK) as batch:
                    if batch is not None:
                        taken.extend(batch.rows)
                        await anyio.sleep(0.001)  # the broker; the others run meanwhile
                        batch.sent([row.id for row in batch.rows])
                if batch is None:
                    await anyio.sleep(0.005)

        with anyio.fail_after(4 * _SECONDS):
            async with anyio.create_task_group() as tasks:
                for _ in range(relays):
                    tasks.start_soon(relay, database.store())
        assert len(taken) == total
        assert len({row.id for row in taken}) == total
        _assert_in_order(taken)
        assert await _take(writer) == []

    async def test_writers_and_relays_at_the_same_time_lose_nothing(self, database: OutboxDatabase) -> None:
        taken: list[StoredRow] = []

        async def write(writer: str) -> None:
            store = database.store()
            for number in range(25):
                await _add(database, store, *[_message(f"{writer}.{number}.{n}", key=f"{writer}{n}") for n in range(4)])

        async def relay(store: OutboxStore) -> None:
            while len(taken) < 400:
                async with store.take(50, _BLOCK) as batch:
                    if batch is not None:
                        taken.extend(batch.rows)
                        batch.sent([row.id for row in batch.rows])
                if batch is None:
                    await anyio.sleep(0.002)

        with anyio.fail_after(2 * _SECONDS):
            async with anyio.create_task_group() as tasks:
                for writer in "abcd":
                    tasks.start_soon(write, writer)
                for _ in range(2):
                    tasks.start_soon(relay, database.store())
        assert len({row.message.message_id for row in taken}) == len(taken) == 400
        _assert_in_order(taken)

    # -- refused by the broker -----------------------------------------------------------------------------------------

    async def test_failed_row_waits_its_time_and_counts(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1"))
        for failures in range(3):
            (row,) = await _rows(store)
            assert row.failures == failures
            await _fail(store, "1", delay=60.0)
            assert await _take(store) == []
            await database.pass_time(50)
            assert await _take(store) == []
            await database.pass_time(11)
        (row,) = await _rows(store)
        assert row.failures == 3
        assert row.age >= 180

    async def test_failed_row_without_delay_is_due_at_once(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        await _fail(store, "1", delay=0.0)
        assert await _names(store) == ["1", "2"]

    async def test_failed_row_keeps_the_later_ones_of_its_key_waiting_and_no_others(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        lane = lane_of("k")
        messages = [_message(str(number), key="k") for number in range(3)]
        await _add(database, store, *messages, _message("keyless"), _message("same lane", key=_key_in(lane)))
        await _fail(store, "0", delay=60.0)
        await _add(database, store, _message("3", key="k", destination="elsewhere"))
        assert set(await _names(store)) == {"keyless", "same lane"}
        await database.pass_time(61)
        assert await _names(store) == ["0", "1", "2", "3"]

    async def test_what_was_not_tried_behind_a_failed_row_waits_in_the_same_batch(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(4)])
        async with store.take(10, _BLOCK) as batch:
            assert _ids_of(batch) == ["0", "1", "2", "3"]
            assert batch is not None
            batch.sent([batch.rows[0].id])
            batch.failed([Failure(batch.rows[1].id, "Refused: no", 60.0)])
        assert await _take(store) == []
        await database.pass_time(61)
        assert await _names(store) == ["1", "2", "3"]

    async def test_failed_row_without_a_key_keeps_nobody_waiting(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        # In one lane all the same.
        first, second, third = _keyless_in(7, 3)
        await _add(database, store, first, second, third)
        await _fail(store, first.message_id, delay=60.0)
        assert await _take(store) == [second.message_id, third.message_id]

    @pytest.mark.parametrize(
        ("failed", "free"), [("k", "K"), ("k", "k "), ("e", "é"), ("straße", "strasse"), ("", " "), ("1", "01")]
    )
    async def test_keys_that_differ_at_all_are_two(
        self, database: OutboxDatabase, store: OutboxStore, failed: str, free: str
    ) -> None:
        await _add(database, store, _message("1", key=failed), _message("2", key=free), _message("3", key=failed))
        await _fail(store, "1", delay=60.0)
        await _add(database, store, _message("4", key=free), _message("5", key=failed))
        assert sorted(await _names(store)) == ["2", "4"]
        await database.pass_time(61)
        assert await _names(store) == ["1", "3", "5"]

    async def test_what_waits_hides_nothing_behind_it(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("head", key="k"))
        await _fail(store, "head", delay=60.0)
        waiting = [_message(str(number), key="k") for number in range(300)]
        await _add(database, store, *waiting, _message("other", key=_key_in(lane_of("k"))))
        assert await _take(store, limit=10) == ["other"]

    async def test_next_due_is_when_the_first_of_them_is(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await store.next_due() is None
        await _add(database, store, _message("1"), _message("2"), _message("3", key="k"), _message("4", key="k"))
        assert await store.next_due() is None
        await _fail(store, "1", delay=300.0)
        await _fail(store, "3", delay=100.0)
        due = await store.next_due()
        assert due is not None
        assert 70 < due <= 100
        await database.pass_time(90)
        due = await store.next_due()
        assert due is not None
        assert due <= 10
        await database.pass_time(20)
        await _drain(store)
        due = await store.next_due()
        assert due is not None
        assert 160 < due <= 190

    # -- dead letters --------------------------------------------------------------------------------------------------

    async def test_given_up_is_kept_with_the_reason(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1", key="k"), _message("2"))
        one = (await _everything_due(store))["1"]
        await _fail(store, "1", delay=60.0)
        await database.pass_time(61)
        error = "BrokerRefusedError: größer als erlaubt, '\\%s' " + "x" * 200
        await _fail(store, "1", delay=None, error=error)
        await database.pass_time(10 * _DAY)
        assert await _take(store) == ["2"]
        (dead,) = await store.dead_letters(10)
        assert dead.id == one.id
        assert dead.message == one.message
        assert dead.failures == 2
        assert dead.error == error

    async def test_dead_letter_says_when_it_was_stored(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1"))
        await _fail(store, "1", delay=None)
        (dead,) = await store.dead_letters(10)
        assert dead.created_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - dead.created_at) < timedelta(minutes=14)

    async def test_dead_letters_are_read_page_by_page(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, *[_message(str(number)) for number in range(5)], _message("alive"))
        for number in range(5):
            await _fail(store, str(number), delay=None)
        assert await store.dead_letters(0) == []
        first = await store.dead_letters(2)
        second = await store.dead_letters(2, after=first[-1].id)
        third = await store.dead_letters(2, after=second[-1].id)
        assert [dead.message.message_id for page in (first, second, third) for dead in page] == list("01234")
        assert len(third) == 1
        assert await store.dead_letters(2, after=third[-1].id) == []

    async def test_dead_letter_blocks_its_key(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"), _message("other", key="l"))
        await _fail(store, "1", delay=None)
        await _add(database, store, _message("3", key="k"))
        await database.pass_time(10 * _DAY)
        assert await _names(store) == ["other"]

    async def test_dead_letter_is_parked_and_its_key_goes_on(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        await _fail(store, "1", delay=60.0, policy=_PARK)
        await _add(database, store, _message("3", key="k"))
        assert await _take(store, policy=_PARK) == []
        await database.pass_time(61)
        await _fail(store, "1", delay=None, policy=_PARK)
        await _add(database, store, _message("4", key="k"))
        assert await _names(store, _PARK) == ["2", "3", "4"]
        assert [dead.message.message_id for dead in await store.dead_letters(10)] == ["1"]

    async def test_dead_letter_without_a_key_blocks_nobody(self, database: OutboxDatabase, store: OutboxStore) -> None:
        first, second = _keyless_in(7, 2)
        await _add(database, store, first, second)
        await _fail(store, first.message_id, delay=None)
        assert await _take(store) == [second.message_id]

    async def test_retried_dead_letter_is_due_and_goes_first(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        await _fail(store, "1", delay=None)
        assert await _take(store) == []
        (dead,) = await store.dead_letters(10)
        assert await store.retry([dead.id]) == 1
        assert await store.dead_letters(10) == []
        await _add(database, store, _message("3", key="k"))
        assert await _names(store) == ["1", "2", "3"]

    async def test_retried_dead_letter_that_was_parked_is_waited_for_again(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"))
        await _fail(store, "1", delay=None, policy=_PARK)
        await _add(database, store, _message("2", key="k"), _message("3", key="k"))
        assert await _take(store, limit=1, policy=_PARK) == ["2"]
        (dead,) = await store.dead_letters(10)
        assert await store.retry([dead.id]) == 1
        await _fail(store, "1", delay=60.0, policy=_PARK)
        assert await _take(store, policy=_PARK) == []
        await database.pass_time(61)
        assert await _names(store, _PARK) == ["1", "3"]

    async def test_retried_dead_letter_that_fails_again_blocks_again(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        await _fail(store, "1", delay=None)
        (dead,) = await store.dead_letters(10)
        await store.retry([dead.id])
        await _fail(store, "1", delay=None, error="again")
        assert await _take(store) == []
        (dead,) = await store.dead_letters(10)
        assert dead.error == "again"

    async def test_purged_dead_letter_is_gone_and_its_key_goes_on(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        await _fail(store, "1", delay=None)
        await _add(database, store, _message("3", key="k"))
        assert await _take(store) == []
        (dead,) = await store.dead_letters(10)
        assert await store.purge([dead.id]) == 1
        assert await store.dead_letters(10) == []
        assert await _names(store) == ["2", "3"]
        assert await store.health() == Health(0, 0, 0, 0.0)

    async def test_only_dead_letters_are_retried_or_purged(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, *[_message(str(number)) for number in range(4)])
        ids = {name: row.id for name, row in (await _everything_due(store)).items()}
        await _fail(store, "1", delay=60.0)
        await _fail(store, "2", delay=None)
        everything = [*ids.values(), max(ids.values()) + 100]
        assert await store.purge([]) == 0
        assert await store.retry([]) == 0
        assert await store.retry(everything) == 1
        assert sorted(await _everything_due(store)) == ["0", "2", "3"]
        await _fail(store, "2", delay=None)
        assert await store.purge(everything) == 1
        await database.pass_time(61)
        assert sorted(await _names(store)) == ["0", "1", "3"]

    async def test_unreadable_row_ends_as_a_dead_letter(self, database: OutboxDatabase, store: OutboxStore) -> None:
        broken, fine = _keyless_in(7, 2)
        await _add(database, store, broken, fine)
        ids = {row.message.message_id: row.id for row in await _rows(store)}
        await database.damage(ids[broken.message_id])
        async with store.take(10, _BLOCK) as batch:
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
        assert await _take(store) == [fine.message_id]
        assert await store.purge([dead.id]) == 1

    @pytest.mark.parametrize("policy", [Policy(), _PARK], ids=["block", "park"])
    async def test_unreadable_row_is_the_dead_letter_of_its_key(
        self, database: OutboxDatabase, store: OutboxStore, policy: Policy
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"), _message("3", key="k"))
        await database.damage((await _rows(store))[1].id)
        taken = await _names(store, policy)
        assert taken == (["1", "3"] if policy.park else ["1"])
        assert len(await store.dead_letters(10)) == 1

    async def test_nothing_but_unreadable_rows_comes_to_an_end(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number)) for number in range(3)])
        for row in (await _everything_due(store)).values():
            await database.damage(row.id)
        assert await _drain(store) == []
        assert (await store.health()).dead == 3

    # -- batches that end badly ----------------------------------------------------------------------------------------

    async def test_batch_left_by_an_error_writes_what_it_was_told(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        messages = _keyless_in(7, 4)
        await _add(database, store, *messages)
        with suppress(_OutOfStockError):
            async with store.take(10, _BLOCK) as batch:
                _tell(batch, sent=0, failed=1)
                raise _OutOfStockError
        assert await _take(other) == [it.message_id for it in messages[2:]]
        await database.pass_time(61)
        (row,) = await _rows(other)
        assert (row.message, row.failures) == (messages[1], 1)

    async def test_batch_left_by_a_cancellation_writes_what_it_was_told(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        messages = _keyless_in(7, 4)
        await _add(database, store, *messages)
        with anyio.CancelScope() as scope:
            async with store.take(10, _BLOCK) as batch:
                _tell(batch, sent=0, failed=1)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await _take(other) == [it.message_id for it in messages[2:]]
        await database.pass_time(61)
        (row,) = await _rows(other)
        assert (row.message, row.failures) == (messages[1], 1)

    async def test_cancellation_while_a_batch_is_left_comes_too_late(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        with anyio.CancelScope() as scope:
            async with store.take(10, _BLOCK) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                scope.cancel()
        assert await _take(other) == []
        assert (await other.health()).pending == 0

    async def test_taking_that_is_cancelled_holds_nothing_and_is_no_crash(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(3)])
        await _rows(store)  # connected
        for milliseconds in range(0, 30, 2):
            with anyio.move_on_after(milliseconds / 1000):
                async with store.take(10, Policy()):
                    await anyio.sleep_forever()
        assert await _take(other) == ["0", "1", "2"]

    @pytest.mark.parametrize("ending", ["well", "by an error", "by a cancellation"])
    async def test_batch_that_is_left_is_no_crash(
        self, database: OutboxDatabase, store: OutboxStore, ending: str
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(3)])
        for _ in range(4):
            with anyio.CancelScope() as scope, suppress(_OutOfStockError):
                async with store.take(10, _BLOCK) as batch:
                    assert _ids_of(batch) == ["0", "1", "2"]
                    if ending == "by an error":
                        raise _OutOfStockError
                    if ending == "by a cancellation":
                        scope.cancel()
                        await anyio.sleep_forever()
        found = await _rows(store)
        assert [(row.message.message_id, row.failures) for row in found] == [("0", 0), ("1", 0), ("2", 0)]

    async def test_crash_frees_what_was_taken_and_nothing_of_it_is_written(
        self, database: OutboxDatabase, other: OutboxStore
    ) -> None:
        await _add(database, other, _message("1", key="k"), _message("2", key="k"))
        victim = database.store()
        with pytest.raises(LeaseLostError):
            async with victim.take(10, _BLOCK) as batch:
                _tell(batch, sent=0, failed=1)
                await database.kill(victim)
        assert await _take(other) == ["1", "2"]

    async def test_crash_is_seen_while_the_relay_does_not_know_of_it(
        self, database: OutboxDatabase, other: OutboxStore
    ) -> None:
        await _add(database, other, _message("1", key="k"))
        victim = database.store()
        with pytest.raises(LeaseLostError):
            async with victim.take(10, _BLOCK) as batch:
                _tell(batch, sent=0)
                await database.kill(victim)
                with anyio.fail_after(_SECONDS):
                    while await _take(other) != ["1"]:
                        await anyio.sleep(0.01)
        assert (await other.health()).pending == 0

    async def test_after_two_crashes_one_row_at_a_time(self, database: OutboxDatabase, store: OutboxStore) -> None:
        names = [str(number) for number in range(20)]
        await _add(database, store, *[_message(it, key="k") for it in names])
        assert len(await _crash(database, limit=4)) == 4
        assert len(await _crash(database, limit=4)) == 4
        batches = [await _take(store, limit=4)]
        while batches[-1]:
            batches.append(await _take(store, limit=4))
        assert [name for batch in batches for name in batch] == names
        assert batches[0] == ["0"]
        # When enough of them are past that did no harm, it goes on as before.
        assert len(batches[-2]) > 1

    async def test_crashes_that_do_not_follow_each_other_are_none_of_a_row(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(3)])
        for _ in range(3):
            assert len(await _crash(database)) == 3
            assert [(row.failures, row.crashed) for row in await _rows(store)] == [(0, False)] * 3

    async def test_crashes_count_on_the_one_row_and_are_forgotten_when_it_is_settled(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(3)])
        for _ in range(2):
            await _crash(database)
        crashes = [await _crash(database) for _ in range(3)]
        assert [[row.message.message_id for row in rows] for rows in crashes] == [["0"]] * 3
        seen = [row for (row,) in crashes]
        assert [row.failures - seen[0].failures for row in seen] == [0, 1, 2]
        assert all(row.crashed for row in seen)
        # Given back: no failure, however often.
        for _ in range(3):
            row = (await _rows(store))[0]
            assert (row.message.message_id, row.failures, row.crashed) == ("0", seen[0].failures + 3, True)
        # Refused: that, and not also the crash that was counted in advance.
        await _fail(store, "0", delay=None)
        (dead,) = await store.dead_letters(10)
        assert dead.failures == row.failures

    async def test_lane_under_suspicion_is_taken_alone_and_keeps_no_other_waiting(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        poison = [f"poison {number}" for number in range(3)]
        await _add(database, store, *[_message(it, key=_key_in(3)) for it in poison])
        for _ in range(2):
            await _crash(database)
        fine = [f"fine {lane}" for lane in range(10, 20)]
        await _add(database, store, *[_message(f"fine {lane}", key=_key_in(lane)) for lane in range(10, 20)])
        taken: list[list[str]] = []
        while names := await _take(store):
            taken.append(names)
        assert ["poison 0"] in taken
        assert sorted(name for names in taken for name in names) == sorted(poison + fine)

    async def test_hung_relay_loses_its_rows_and_what_it_says_later_counts_for_nothing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, *[_message(str(number), key="k") for number in range(3)])
        policy = Policy(lease=self.features.lease)
        with pytest.raises(LeaseLostError):
            async with store.take(10, policy) as batch:
                assert batch is not None
                batch.sent([row.id for row in batch.rows])
                async with _TakenOver(other, policy) as theirs:
                    assert time.monotonic() >= batch.deadline
                    assert _ids_of(theirs) == ["0", "1", "2"]
                    _tell(theirs, sent=0, failed=1)
        assert (await other.health()).pending + (await other.health()).waiting == 2
        await database.pass_time(61)
        assert await _names(other) == ["1", "2"]

    async def test_hung_relay_that_comes_back_while_another_publishes_writes_nothing(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"), _message("2", key="k"))
        policy = Policy(lease=self.features.lease)
        hung = store.take(10, policy)
        batch = await hung.__aenter__()
        _tell(batch, sent=0, failed=1)
        async with _TakenOver(other, policy) as theirs:
            assert _ids_of(theirs) == ["1", "2"]
            with pytest.raises(LeaseLostError):
                await hung.__aexit__(None, None, None)
            assert (await other.health()).pending == 2
            _tell(theirs, sent=0)
        assert await _take(other) == ["2"]

    async def test_relay_that_lost_its_lease_can_go_on(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await _add(database, store, _message("1", key="k"))
        with pytest.raises(LeaseLostError):
            async with store.take(10, _BLOCK) as batch:
                assert batch is not None
                await database.kill(store)
        taken: list[str] = []
        with anyio.fail_after(_SECONDS):
            while not taken:
                with suppress(Exception):  # it may take a while to see that a connection has ended
                    taken = await _take(store)
                await anyio.sleep(0.01)
        assert taken == ["1"]
        await _add(database, store, _message("2", key="k"))
        assert await _take(store) == ["2"]

    # -- cleaning ------------------------------------------------------------------------------------------------------

    async def test_sent_rows_are_deleted_at_once_unless_they_are_kept(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        await _add(database, store, _message("1"))
        await _drain(store)
        await database.pass_time(1000 * _DAY)
        assert await store.clean(10) == 0

    async def test_kept_rows_are_cleaned_after_their_time_a_few_at_once(self, database: OutboxDatabase) -> None:
        store = self._keeping(database)
        await _add(database, store, *[_message(str(number)) for number in range(10)])
        await database.pass_time(5 * _DAY)  # it is the time since they were sent that counts
        await _drain(store)
        assert await _take(store) == []
        assert await store.clean(100) == 0
        await database.pass_time(0.9 * _DAY)
        assert await store.clean(100) == 0
        await database.pass_time(0.2 * _DAY)
        assert await store.clean(0) == 0
        assert [await store.clean(4) for _ in range(4)] == [4, 4, 2, 0]

    async def test_kept_rows_are_neither_taken_nor_counted(self, database: OutboxDatabase) -> None:
        store = self._keeping(database)
        await _add(database, store, _message("1", key="k"), _message("2"))
        await _drain(store)
        assert await store.health() == Health(0, 0, 0, 0.0)
        assert await store.next_due() is None
        assert await store.dead_letters(10) == []
        await _add(database, database.store(max_pending=1), _message("3", key="k"))
        assert await _take(store) == ["3"]

    async def test_unsent_rows_are_never_cleaned(self, database: OutboxDatabase) -> None:
        store = self._keeping(database)
        await _add(database, store, *[_message(it, key=it[0]) for it in ("a1", "a2", "b1", "b2", "c1", "d1")])
        await _fail(store, "a1", delay=60.0)  # backs off; a2 waits
        await _fail(store, "b1", delay=None)  # dead; b2 waits
        await _drain(store)  # c1, d1
        await _add(database, store, _message("e1"), _message("a3", key="a"))
        assert [row.message.message_id for row in await _rows(store)] == ["e1"]
        await database.pass_time(1000 * _DAY)
        assert await store.clean(1000) == 2
        (dead,) = await store.dead_letters(10)
        await store.retry([dead.id])
        names = await _names(store)
        assert sorted(names) == ["a1", "a2", "a3", "b1", "b2", "e1"]

    async def test_cleaners_at_the_same_time_delete_each_row_once(self, database: OutboxDatabase) -> None:
        stores = [self._keeping(database) for _ in range(4)]
        await _add(database, stores[0], *[_message(str(number)) for number in range(100)])
        await _drain(stores[0])
        await _add(database, stores[0], *[_message(f"new {number}") for number in range(50)])
        await database.pass_time(2 * _DAY)
        cleaned: list[int] = []

        async def clean(store: OutboxStore) -> None:
            while sum(cleaned) < 100:
                cleaned.append(await store.clean(10))
                await anyio.sleep(0.001)

        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                for store in stores:
                    tasks.start_soon(clean, store)
        assert sum(cleaned) == 100
        assert max(cleaned) <= 10
        assert len(await _drain(stores[0])) == 50

    # -- what an operator sees -----------------------------------------------------------------------------------------

    async def test_health_counts_what_is_not_sent(self, database: OutboxDatabase, store: OutboxStore) -> None:
        assert await store.health() == Health(0, 0, 0, 0.0)
        await _add(database, store, *[_message(it, key=it[0]) for it in ("a1", "a2", "a3", "b1", "b2", "c1")])
        await _fail(store, "a1", delay=600.0)
        await _fail(store, "b1", delay=None)
        await _drain(store)
        await _add(database, store, _message("d1", key="d"))
        found = await store.health()
        assert (found.pending, found.waiting, found.dead) == (2, 3, 1)
        await database.pass_time(100)
        await _add(database, store, _message("e1", key="e"))
        found = await store.health()
        assert (found.pending, found.waiting, found.dead) == (3, 3, 1)
        assert 100 <= found.oldest < 160

    async def test_oldest_is_neither_sent_nor_dead(self, database: OutboxDatabase) -> None:
        store = self._keeping(database) if self.features.keeps_sent else database.store()
        await _add(database, store, _message("sent"))
        await _drain(store)
        await _add(database, store, _message("dead"))
        await _fail(store, "dead", delay=None)
        await database.pass_time(1000)
        assert (await store.health()).oldest == 0.0
        await _add(database, store, _message("new"))
        assert (await store.health()).oldest < 60

    async def test_commits_of_this_process_wake_who_asked(self, store: OutboxStore) -> None:
        calls: list[str] = []
        stop = store.on_commit(lambda: calls.append("one"))
        store.on_commit(lambda: calls.append("two"))
        store.committed()
        await _until(lambda: len(calls) == 2)
        stop()
        store.committed()
        await _until(lambda: len(calls) == 3)
        assert sorted(calls) == ["one", "two", "two"]

    async def test_listening_is_harmless_where_nobody_can_tell(
        self, database: OutboxDatabase, store: OutboxStore
    ) -> None:
        async with store.listen():
            await _add(database, store, _message("1"))
            assert await _take(store) == ["1"]

    async def test_commits_of_other_processes_wake_who_listens(self, database: OutboxDatabase) -> None:
        if not self.features.hears_others:
            pytest.skip("the database tells nobody of commits")
        store, other = database.store(notify=True), database.store(notify=True)
        calls: list[None] = []
        store.on_commit(lambda: calls.append(None))
        async with store.listen():
            with suppress(_OutOfStockError):
                async with database.transaction() as resource:
                    await other.add(resource, [_message("1")])
                    raise _OutOfStockError
            async with database.transaction() as resource:
                await other.add(resource, [_message("2")])
                await anyio.sleep(0.05)
                assert not calls
            await _until(lambda: bool(calls))

    # -- clocks --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("minutes", [-600, 600])
    async def test_the_clock_is_the_databases(self, database: OutboxDatabase, store: OutboxStore, minutes: int) -> None:
        with host_clock_off_by(timedelta(minutes=minutes), store):
            await _add(database, store, _message("1", key="k"), _message("2", key="k"))
            (row, _) = await _rows(store)
            assert 0 <= row.age < 60
            assert (await store.health()).oldest < 60
            await _fail(store, "1", delay=100.0)
            assert await _take(store) == []
            due = await store.next_due()
            assert due is not None
            assert 40 < due <= 100
        assert await _take(store) == []
        await database.pass_time(101)
        with host_clock_off_by(timedelta(minutes=minutes), store):
            assert await _names(store) == ["1", "2"]

    async def test_lease_goes_by_the_databases_clock(
        self, database: OutboxDatabase, store: OutboxStore, other: OutboxStore
    ) -> None:
        await _add(database, store, _message("1", key="k"))
        async with store.take(10, Policy(lease=30.0)) as batch:
            assert batch is not None
            with host_clock_off_by(timedelta(hours=1), other):
                assert await _take(other, policy=Policy(lease=30.0)) == []
            batch.sent([row.id for row in batch.rows])
        assert await _take(other) == []

    async def test_kept_rows_are_cleaned_by_the_databases_clock(self, database: OutboxDatabase) -> None:
        store = self._keeping(database)
        await _add(database, store, _message("1"))
        with host_clock_off_by(-timedelta(days=30), store):
            await _drain(store)
        assert await store.clean(10) == 0
        with host_clock_off_by(timedelta(days=30), store):
            assert await store.clean(10) == 0
        await database.pass_time(2 * _DAY)
        with host_clock_off_by(-timedelta(days=30), store):
            assert await store.clean(10) == 1

    # -- the tables ----------------------------------------------------------------------------------------------------

    async def test_tables_as_they_should_be_are_valid(self, database: OutboxDatabase, store: OutboxStore) -> None:
        await store.validate_schema()
        await _add(database, store, _message("1"))
        await _take(store)
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
            await _add(database, store, _message("1"))
        assert failure.value.fix

    # -- how the tests are written -------------------------------------------------------------------------------------

    def _keeping(self, database: OutboxDatabase) -> OutboxStore:
        if not self.features.keeps_sent:
            pytest.skip("sent rows are not kept")
        return database.store(keep=timedelta(days=1))


class _OutOfStockError(Exception):
    pass


def _message(message_id: str, key: str | None = None, destination: str = "orders") -> StoredMessage:
    headers = {"id": message_id, "source": "/shop", "type": "OrderPlaced"}
    return StoredMessage(message_id, "OrderPlaced", 1, destination, "application/json", b"{}", headers, key)


def _key_in(lane: int) -> str:
    """A key of that lane, not `k`."""
    return next(key for number in count() if lane_of(key := f"key {number}") == lane)


def _keyless_in(lane: int, number: int) -> list[StoredMessage]:
    """Messages without a key that are in one lane."""
    ids = (name for it in count() if lane_of(name := f"keyless {it}") == lane)
    return [_message(next(ids)) for _ in range(number)]


async def _add(database: OutboxDatabase, store: OutboxStore, *messages: StoredMessage) -> None:
    async with database.transaction() as resource:
        await store.add(resource, messages)


def _ids_of(batch: Batch | None) -> list[str]:
    return [] if batch is None else [row.message.message_id for row in batch.rows]


def _lanes_of(batch: Batch | None) -> list[int]:
    return [] if batch is None else [row.message.lane for row in batch.rows]


def _tell(batch: Batch | None, *, sent: int | None = None, failed: int | None = None) -> None:
    """What became of the rows with these positions."""
    assert batch is not None
    if sent is not None:
        batch.sent([batch.rows[sent].id])
    if failed is not None:
        batch.failed([Failure(batch.rows[failed].id, "Refused: no", 60.0)])


async def _rows(store: OutboxStore, limit: int = 1000, policy: Policy = _BLOCK) -> list[StoredRow]:
    """What one batch has; it is given back."""
    async with store.take(limit, policy) as batch:
        return [] if batch is None else list(batch.rows)


async def _take(
    store: OutboxStore, limit: int = 1000, policy: Policy = _BLOCK, without: Sequence[str] = ()
) -> list[str]:
    """Send what one batch has."""
    async with store.take(limit, policy, without=without) as batch:
        if batch is not None:
            batch.sent([row.id for row in batch.rows])
        return _ids_of(batch)


async def _drain(
    store: OutboxStore, limit: int = 1000, policy: Policy = _BLOCK, without: Sequence[str] = ()
) -> list[StoredRow]:
    """Send everything that is due, batch by batch."""
    taken: list[StoredRow] = []
    for _ in range(10_000):
        async with store.take(limit, policy, without=without) as batch:
            if batch is None:
                return taken
            taken += batch.rows
            batch.sent([row.id for row in batch.rows])
    raise AssertionError("there is no end to what is due")


async def _names(store: OutboxStore, policy: Policy = _BLOCK, without: Sequence[str] = ()) -> list[str]:
    """The message ids of what `_drain` sends."""
    return [row.message.message_id for row in await _drain(store, policy=policy, without=without)]


async def _everything_due(store: OutboxStore) -> dict[str, StoredRow]:
    """All that is due, by message id; given back. Each batch has other lanes than the ones before it."""
    found: dict[str, StoredRow] = {}
    for _ in range(LANES):
        found |= {row.message.message_id: row for row in await _rows(store)}
    return found


async def _fail(
    store: OutboxStore,
    message_id: str,
    *,
    delay: float | None,
    error: str = "Refused: no",
    policy: Policy = _BLOCK,
) -> None:
    """Take batches until one has this message, and say that the broker refused it; the rest is given back."""
    for _ in range(LANES):
        async with store.take(1000, policy) as batch:
            assert batch is not None
            for row in batch.rows:
                if row.message.message_id == message_id:
                    batch.failed([Failure(row.id, error, delay)])
                    return
    raise AssertionError(f"{message_id} is not due")


async def _crash(database: OutboxDatabase, limit: int = 1000) -> list[StoredRow]:
    """A relay that dies over a batch; what it had."""
    victim = database.store()
    rows: list[StoredRow] = []
    with pytest.raises(LeaseLostError):
        async with victim.take(limit, _BLOCK) as batch:
            assert batch is not None
            rows = list(batch.rows)
            await database.kill(victim)
    return rows


class _TakenOver:
    """A batch of another relay, as soon as it gets one."""

    def __init__(self, store: OutboxStore, policy: Policy) -> None:
        self._store = store
        self._policy = policy
        self._taking = store.take(1000, policy)

    async def __aenter__(self) -> Batch:
        with anyio.fail_after(_SECONDS):
            while (batch := await self._taking.__aenter__()) is None:
                await self._taking.__aexit__(None, None, None)
                await anyio.sleep(0.02)
                self._taking = self._store.take(1000, self._policy)
        return batch

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._taking.__aexit__(kind, error, trace)


async def _until(happened: Callable[[], bool]) -> None:
    with anyio.fail_after(_SECONDS):
        while not happened():
            await anyio.sleep(0.005)


def _assert_in_order(taken: Sequence[StoredRow]) -> None:
    by_key: defaultdict[str, list[int]] = defaultdict(list)
    for row in taken:
        if row.message.key is not None:
            by_key[row.message.key].append(row.id)
    assert [key for key, ids in by_key.items() if ids != sorted(ids)] == []
