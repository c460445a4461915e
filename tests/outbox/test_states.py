"""Whatever writers, relays and operators do in whatever order: nothing is lost, nothing overtakes its key.

Hypothesis plays two writers, two relays and an operator against a real database, and a model of a few lines that knows
what must be true. Time passes by moving the times in the tables.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import Failure, Policy, StoredMessage
from tests.outbox.databases import Database, mariadb, postgresql, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from pathlib import Path

    from pipeline_mediator.outbox.protocol import Batch, OutboxStore, StoredRow

T = TypeVar("T")
Outcome: TypeAlias = Literal["sent", "later", "soon", "dead", "untried"]
Ending: TypeAlias = Literal["well", "error", "cancelled"]

KEEP = 90.0
DELAYS = {"soon": 0.0, "later": 1050.0}
DESTINATIONS = ("orders", "stock")
KEYS = ("a", "b", "a", None)
MESSAGES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(DESTINATIONS)), min_size=3, max_size=8)
OUTCOMES = st.lists(st.sampled_from(["dead", "later", "sent", "sent", "untried", "soon"]), min_size=4, max_size=4)
ENDINGS = st.sampled_from(["well", "error", "cancelled"])
LIMITS = st.sampled_from([100, 3, 1])
WITHOUT = st.sampled_from([(), *((it,) for it in DESTINATIONS)])


@dataclass
class Row:
    """A message, as the model knows it."""

    number: int
    key: str | None
    destination: str
    state: Literal["unsent", "sent", "dead", "gone"] = "unsent"
    due: float = 0.0
    sent_at: float = 0.0
    published: bool = False


@dataclass
class Writer:
    """A transaction that may be open, and what it has written."""

    stack: AsyncExitStack | None = None
    resource: object = None
    written: list[Row] = field(default_factory=list[Row])


class Relay:
    """A relay of which one batch at a time is open, in a task of its own."""

    def __init__(self, store: OutboxStore) -> None:
        self.store = store
        self.rows: list[Row] = []
        self.batch: Batch | None = None
        self.told: dict[int, Outcome] = {}
        self.passed: set[int] = set()
        """Dead letters at the time of taking, which with `park` stop nobody."""
        self.frozen = False
        """Its lease is over, and it does not know."""
        self.robbed = False
        """Another relay has taken rows since."""
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[Ending] | None = None

    async def take(self, limit: int, policy: Policy, without: Sequence[str]) -> Sequence[StoredRow] | None:
        taken: asyncio.Future[Batch | None] = asyncio.get_running_loop().create_future()
        self._ending = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(limit, policy, without, taken, self._ending))
        either: list[asyncio.Future[Any]] = [self._task, taken]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not taken.done():
            await self._task
        self.batch = await taken
        self.told, self.frozen, self.robbed = {}, False, False
        if self.batch is None:
            await self._task
            return None
        return self.batch.rows

    async def leave(self, ending: Ending) -> None:
        """Raises what leaving the batch raises, an error of the relay's own excepted."""
        assert self._task is not None
        assert self._ending is not None
        if ending == "cancelled":
            self._task.cancel()
        else:
            self._ending.set_result(ending)
        self.batch = None
        with suppress(BrokenPipeError, asyncio.CancelledError):
            await self._task

    async def _hold(
        self,
        limit: int,
        policy: Policy,
        without: Sequence[str],
        taken: asyncio.Future[Batch | None],
        ending: asyncio.Future[Ending],
    ) -> None:
        async with self.store.take(limit, policy, without=without) as batch:
            taken.set_result(batch)
            if batch is not None and await ending == "error":
                raise BrokenPipeError


class Outbox(RuleBasedStateMachine):
    """The rules, and the model they are held against."""

    def __init__(
        self, run: Callable[[Coroutine[Any, Any, Any]], Any], database: Database, writers: int, policy: Policy
    ) -> None:
        super().__init__()
        self.run = run
        self.database = database
        self.now = 0.0
        self.rows: dict[int, Row] = {}
        """What was committed."""
        self.count = 0
        self.ids: dict[int, int] = {}
        """Of rows that were taken, by number."""
        self.writers = [Writer() for _ in range(writers)]
        self.relays: list[Relay] = []
        self.stores: list[OutboxStore] = []
        self.policy = policy

    @initialize(messages=MESSAGES)
    def begin(self, messages: list[tuple[str | None, str]]) -> None:
        self.run(self.database.clear())
        self._new_store()  # the operator's
        self.relays = [Relay(self._new_store()) for _ in range(2)]
        for relay in self.relays:  # the first time it may write, which on SQLite nobody else may meanwhile
            assert self.run(relay.take(1, self.policy, ())) is None
        self.write(0, messages, "commit")
        self.write(1, messages, "commit")

    # -- writers -------------------------------------------------------------------------------------------------------

    @rule(
        writer=st.integers(0, 1),
        messages=MESSAGES,
        ending=st.sampled_from(["commit", "stay open", "roll back", "commit", "commit"]),
    )
    def write(self, writer: int, messages: list[tuple[str | None, str]], ending: str) -> None:
        writing = self.writers[writer % len(self.writers)]
        # Each writer has keys of its own: of two that write one key without a common row, nobody promises an order.
        own = [
            Row(self.count + n, key and f"{key}{writer % len(self.writers)}", destination)
            for n, (key, destination) in enumerate(messages)
        ]
        self.count += len(own)
        self.run(self._write(writing, own))
        if ending == "roll back":
            self.run(self._end(writing, commit=False))
        elif ending == "commit" or len(self.writers) == 1:
            self.run(self._end(writing, commit=True))

    @rule(writer=st.integers(0, 1), commit=st.booleans())
    def end(self, *, writer: int, commit: bool) -> None:
        self.run(self._end(self.writers[writer % len(self.writers)], commit=commit))

    async def _write(self, writing: Writer, own: list[Row]) -> None:
        if writing.stack is None:
            writing.stack = AsyncExitStack()
            writing.resource = await writing.stack.enter_async_context(self.database.transaction())
        await self.stores[0].add(writing.resource, [_message(row) for row in own])
        writing.written += own

    async def _end(self, writing: Writer, *, commit: bool) -> None:
        if writing.stack is None:
            return
        if commit:
            await writing.stack.aclose()
            self.rows |= {row.number: row for row in writing.written}
        else:
            error = BrokenPipeError()
            await writing.stack.__aexit__(BrokenPipeError, error, None)
        writing.stack, writing.written = None, []

    # -- relays --------------------------------------------------------------------------------------------------------

    # No preconditions: which rows a store takes first is its own business, and Hypothesis wants to see the same again.

    @rule(relay=st.integers(0, 1), limit=LIMITS, without=WITHOUT)
    def take(self, relay: int, limit: int, without: tuple[str, ...]) -> None:
        if self.relays[relay].batch is None:
            self._take(self.relays[relay], limit, without)

    @rule(relay=st.integers(0, 1), limit=LIMITS, without=WITHOUT, outcomes=OUTCOMES, ending=ENDINGS)
    def take_publish_and_leave(
        self, relay: int, limit: int, without: tuple[str, ...], outcomes: list[Outcome], ending: Ending
    ) -> None:
        self.take(relay, limit, without)
        self.publish(relay, outcomes)
        self.leave(relay, ending)

    @rule(relay=st.integers(0, 1), outcomes=OUTCOMES)
    def publish(self, relay: int, outcomes: list[Outcome]) -> None:
        if self.relays[relay].batch is not None:
            self._publish(self.relays[relay], outcomes)

    @rule(relay=st.integers(0, 1), ending=ENDINGS)
    def leave(self, relay: int, ending: Ending) -> None:
        if self.relays[relay].batch is not None:
            self._leave(self.relays[relay], ending)

    @rule(relay=st.integers(0, 1))
    def crash(self, relay: int) -> None:
        died = self.relays[relay]
        if died.batch is None:
            return
        if not died.robbed:  # or it would be another's lease that ends
            self.run(self.database.kill(died.store))
        with suppress(LeaseLostError):  # nobody is there to see it
            self.run(died.leave("well"))
        died.rows = []
        died.store = self._new_store()

    @rule(relay=st.integers(0, 1))
    def freeze(self, relay: int) -> None:
        """It is stopped until its lease is over; the other rules go on with it."""
        frozen = self.relays[relay]
        if frozen.batch is not None and not frozen.frozen:
            frozen.frozen = True
            self.run(self.database.end_lease(frozen.store))

    def _take(self, relay: Relay, limit: int, without: tuple[str, ...]) -> bool:
        found = self.run(relay.take(limit, self.policy, without))
        others = [it for it in self._busy() if it is not relay and not it.frozen]
        if found is None:
            if not others:
                assert list(self._due(without)) == []
            return False
        relay.rows = []
        relay.passed = {row.number for row in self.rows.values() if row.state == "dead"}
        for row in found:
            number = int(row.message.message_id)
            assert number in self.rows, "taken before its commit"
            assert row.message == _message(self.rows[number])
            relay.rows.append(self.rows[number])
            self.ids[number] = row.id
        assert len(found) <= limit
        assert [row.id for row in found] == sorted(row.id for row in found)
        for other in others:
            assert not {row.number for row in relay.rows} & {row.number for row in other.rows}, "taken twice"
            assert not {row.key for row in relay.rows if row.key} & {row.key for row in other.rows}, "key taken twice"
        due = list(self._due(without))
        for key in {row.key for row in relay.rows}:
            taken = [row.number for row in relay.rows if row.key == key]
            allowed = [row.number for row in due if row.key == key]
            if key is None:
                assert set(taken) <= set(allowed)
            else:
                assert taken == allowed[: len(taken)], "not the earliest of its key"
        for other in self.relays:
            if other is not relay and other.frozen:
                other.robbed = True
        return bool(found)

    def _publish(self, relay: Relay, outcomes: list[Outcome]) -> None:
        """As the relay does: in order, nothing of a key behind one that was not accepted, nothing past the deadline."""
        assert relay.batch is not None
        if relay.frozen:
            return
        ids = {int(row.message.message_id): row.id for row in relay.batch.rows}
        stopped = {row.key for row in relay.rows if row.key and relay.told.get(row.number, "sent") != "sent"}
        for position, row in enumerate(relay.rows):
            if row.number in relay.told or row.key in stopped:
                continue
            outcome = outcomes[position % len(outcomes)]
            if outcome != "sent" and row.key:
                stopped.add(row.key)
            if outcome == "untried":
                continue
            relay.told[row.number] = outcome
            if outcome == "sent":
                self._accept(row, relay.passed)
                relay.batch.sent([ids[row.number]])
            else:
                relay.batch.failed([Failure(ids[row.number], "Refused: no", DELAYS.get(outcome))])

    def _accept(self, row: Row, passed: set[int]) -> None:
        """The broker has it."""
        if not row.published and row.key:
            earlier = [it for it in self._of_key(row.key) if it.number < row.number and not it.published]
            overtaken = [it for it in earlier if it.state not in {"dead", "gone"} and it.number not in passed]
            assert overtaken == [], "overtook an earlier one of its key"
        row.published = True

    def _leave(self, relay: Relay, ending: Ending) -> None:
        lost = False
        try:
            self.run(relay.leave(ending))
        except LeaseLostError:
            assert relay.frozen
            lost = True
        if relay.robbed and ending == "well":
            assert lost
        # A lease that is over and that nobody wanted may still do.
        if relay.frozen and not lost and not self._was_written(relay):
            lost = True
        if not lost:
            for number, outcome in relay.told.items():
                self._settle(self.rows[number], outcome)
        relay.rows, relay.frozen, relay.robbed = [], False, False

    def _was_written(self, relay: Relay) -> bool:
        return not relay.robbed and self.database.lease_outlives_its_end

    def _settle(self, row: Row, outcome: Outcome) -> None:
        if outcome == "sent":
            row.state, row.sent_at = "sent", self.now
        elif outcome == "dead":
            row.state = "dead"
        else:
            row.due = self.now + DELAYS[outcome]

    # -- time, and the operator ----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1100.0, 100.0, 2100.0]))
    def pass_time(self, seconds: float) -> None:
        # What is open goes by times that it has read.
        if not any(relay.rows for relay in self.relays) and not any(writer.stack for writer in self.writers):
            self.now += seconds
            self.run(self.database.pass_time(seconds))

    @rule(limit=st.sampled_from([100, 1, 0]))
    def clean(self, limit: int) -> None:
        old = [row for row in self.rows.values() if row.state == "sent" and row.sent_at + KEEP < self.now]
        cleaned = self.run(self.stores[0].clean(limit))
        assert cleaned == min(limit, len(old))
        # Of which nobody can say which; from here on it is enough that there are so many less.
        for row in sorted(old, key=lambda row: row.sent_at)[:cleaned]:
            row.state = "gone"

    @rule(chosen=st.sets(st.integers(0, 3), min_size=1), purge=st.booleans())
    def retry_or_purge(self, *, chosen: set[int], purge: bool) -> None:
        letters = self.run(self.stores[0].dead_letters(1000))
        dead = {int(it.message.message_id): it.id for it in letters}
        assert sorted(dead) == sorted(row.number for row in self.rows.values() if row.state == "dead")
        numbers = [number for position, number in enumerate(sorted(dead)) if position % 4 in chosen]
        purge = purge and not self._busy()  # it waits for relays that have such lanes
        action = self.stores[0].purge if purge else self.stores[0].retry
        # Of others too, which are none of its business.
        alive = [it for number, it in self.ids.items() if number not in dead]
        assert self.run(action([*(dead[number] for number in numbers), *alive])) == len(numbers)
        for number in numbers:
            self.rows[number].state = "gone" if purge else "unsent"
            self.rows[number].due = self.now

    # -- what is always true -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        if not self.relays:
            return
        health = self.run(self.stores[0].health())
        unsent = [row for row in self.rows.values() if row.state == "unsent"]
        assert health.pending + health.waiting == len(unsent)
        assert health.dead == sum(row.state == "dead" for row in self.rows.values())

    def teardown(self) -> None:
        try:
            self._come_to_an_end()
        finally:
            for store in self.stores:
                self.run(self.database.forget(store))

    def _come_to_an_end(self) -> None:
        for relay in self._busy():
            self._leave(relay, "well")
        for writer in self.writers:
            self.run(self._end(writer, commit=True))
        if not self.relays:
            return
        self.retry_or_purge(chosen={0, 2}, purge=True)
        self.retry_or_purge(chosen={0, 1, 2, 3}, purge=False)
        self.pass_time(2100.0)
        for _ in range(1000):
            if self.run(self.relays[0].take(100, self.policy, ())) is None:
                break
            self._check_and_send(self.relays[0])
        missing = [row.number for row in self.rows.values() if not row.published and row.state != "gone"]
        assert missing == [], "lost"

    def _check_and_send(self, relay: Relay) -> None:
        assert relay.batch is not None
        relay.rows = [self.rows[int(row.message.message_id)] for row in relay.batch.rows]
        relay.passed = set()
        self._publish(relay, ["sent"])
        self._leave(relay, "well")

    # -- the model -----------------------------------------------------------------------------------------------------

    def _due(self, without: Iterable[str]) -> Iterable[Row]:
        """What may be taken, in order: of each key what is due, up to the first that is not."""
        held: set[str] = set()
        for row in sorted(self.rows.values(), key=lambda row: row.number):
            if row.state in {"sent", "gone"} or (row.state == "dead" and self.policy.park):
                continue
            due = row.state == "unsent" and row.due <= self.now and row.destination not in without
            if due and row.key not in held:
                yield row
            elif row.key:
                held.add(row.key)

    def _of_key(self, key: str) -> list[Row]:
        return [row for row in self.rows.values() if row.key == key]

    def _busy(self) -> list[Relay]:
        return [relay for relay in self.relays if relay.batch is not None]

    def _new_store(self) -> OutboxStore:
        self.stores.append(self.database.store(keep=timedelta(seconds=KEEP)))
        return self.stores[-1]


def _message(row: Row) -> StoredMessage:
    name = str(row.number)
    return StoredMessage(name, "OrderPlaced", 1, row.destination, "application/json", b"{}", {"id": name}, row.key)


MORE = int(os.environ.get("STATES_MORE", "1"))
"""How many times as many examples are played: 1 is for every day."""


def play(opened: Any, *, park: bool, writers: int, examples: int) -> None:
    with asyncio.Runner() as runner:
        database = runner.run(opened.__aenter__())

        class Opened(Outbox):
            def __init__(self) -> None:
                super().__init__(runner.run, database, writers, Policy(lease=600.0, park=park))

        try:
            run_state_machine_as_test(
                Opened,
                settings=settings(
                    max_examples=examples * MORE,
                    stateful_step_count=50,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )
        finally:
            runner.run(opened.__aexit__(None, None, None))


behind_dead_letters = pytest.mark.parametrize("park", [False, True], ids=["block", "park"])


@behind_dead_letters
def test_on_sqlite(tmp_path: Path, park: bool) -> None:  # noqa: FBT001 - a parameter
    play(sqlite(tmp_path / "outbox.db"), park=park, writers=1, examples=20)


@behind_dead_letters
def test_on_postgresql(postgres_database: str, park: bool) -> None:  # noqa: FBT001 - a parameter
    play(postgresql(postgres_database), park=park, writers=2, examples=8)


@behind_dead_letters
def test_on_mariadb(mariadb_database: str, park: bool) -> None:  # noqa: FBT001 - a parameter
    play(mariadb(mariadb_database), park=park, writers=2, examples=4)
