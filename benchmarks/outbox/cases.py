"""The rows: what is measured, for whom, and what this library wants to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Final

from benchmarks.outbox import measuring
from benchmarks.outbox.databases import Servers, address_of
from benchmarks.outbox.measuring import BY_HAND, CQRS, OURS
from benchmarks.rounds import BenchmarkError

__all__ = ["GOALS", "GROUPS", "Figure", "Goal", "Group", "Job", "Size", "jobs"]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    rounds: int
    backlog: int
    many: int
    """Rows that a table holds besides: finished and kept, or pending."""
    taken: int
    """Of so many pending rows, how many are relayed."""
    behind: int
    """Rows behind a failed head."""
    latencies: int
    loops: int


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are shown together."""

    name: str
    title: str
    unit: str
    scale: str
    """Of the chart."""
    more: bool = False
    """More is better."""


GROUPS: Final = (
    Group("relay", "From a table into a stream", "events/s", "events per second; longer is better", more=True),
    Group("kept", "The same beside finished rows", "events/s", "events per second; longer is better", more=True),
    Group("latency", "From a commit to the stream, idle", "ms", "milliseconds; shorter is better"),
    Group("cpu", "Processor time of a relay for an event", "µs", "microseconds; shorter is better"),
    Group("memory", "The most memory that a relay takes", "MiB", "MiB; shorter is better"),
    Group("poll", "A look for work behind a failed head", "ms", "milliseconds; shorter is better"),
    Group("transaction", "A transaction that stores events", "µs", "microseconds; shorter is better"),
    Group("statements", "Statements that store ten events", "", "statements; shorter is better"),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for the quotient of two figures, each (group, row, side); without `over` for the figure itself."""

    title: str
    figure: tuple[str, str, str]
    over: tuple[str, str, str] | None
    limit: float
    at_least: bool = False


def _goals() -> Iterator[Goal]:
    for name, limit in (("PostgreSQL", 0.8), ("SQLite", 0.7)):
        for batch in (100, 1000):
            row = f"{name}, batches of {batch}"
            figures = ("relay", row, OURS), ("relay", row, BY_HAND)
            yield Goal(f"relay, {row}: of by hand", *figures, limit, at_least=True)
        row = f"{name}, batches of 1000"
        kept, empty = ("kept", f"{name}, rows kept", OURS), ("kept", f"{name}, none kept", OURS)
        yield Goal(f"relay beside finished rows, {name}: of none", kept, empty, 0.75, at_least=True)
        for wake in ("in the process", "by NOTIFY"):
            for part, times in (("p50", 2.0), ("p99", 3.0)):
                row = f"{name}, woken {wake}, {part}"
                yield Goal(
                    f"commit to stream, {row}: times by hand", ("latency", row, OURS), ("latency", row, BY_HAND), times
                )
        many, few = ("memory", f"{name}, many pending", OURS), ("memory", f"{name}, few pending", OURS)
        yield Goal(f"memory with many rows pending, {name}: times few", many, few, 1.15)
        yield Goal(f"look behind a failed head, {name}, p50, ms", ("poll", f"{name}, p50", OURS), None, 5.0)
        yield Goal(f"statements for ten events, {name}", ("statements", name, OURS), None, 1.0)
    two, one = "PostgreSQL, batches of 1000, two relays", "PostgreSQL, batches of 1000"
    yield Goal("two relays: times one", ("relay", two, OURS), ("relay", one, OURS), 1.3, at_least=True)


GOALS: Final = tuple(_goals())


@dataclass(frozen=True, slots=True)
class Figure:
    """One value of one row."""

    group: str
    row: str
    side: str
    value: float


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement, done in each round, or once."""

    name: str
    measure: Callable[[], list[Figure]]
    once: bool = False


def jobs(servers: Servers, size: Size) -> Iterator[Job]:
    """All of them, database by database."""
    for database in servers.databases:
        yield from _OfDatabase(servers, size, database).jobs()


class _OfDatabase:
    """The measurements with one database."""

    def __init__(self, servers: Servers, size: Size, database: str) -> None:
        self._servers = servers
        self._size = size
        self._database = database
        self._name = address_of(database).name
        self._postgresql = address_of(database).postgresql
        self._further: dict[str, str] = {}

    def jobs(self) -> Iterator[Job]:
        for side in (OURS, BY_HAND):
            for batch, relays in ((100, 1), (1000, 1), *([(1000, 2)] if self._postgresql else [])):
                yield self._job(f"{side}: relay, {batch}, {relays}", self._relay, side, batch, relays)
            for keeps in (False, True):
                yield self._job(f"{side}: relay, kept {keeps}", self._relay_kept, side, keeps)
            for notify in (False, True) if self._postgresql else (False,):
                yield self._job(f"{side}: latency", self._latency, side, notify)
            yield self._job(f"{side}: memory", self._memory, side, once=True)
        if self._postgresql and find_spec("cqrs") is not None:  # its table is not for SQLite as it is
            yield self._job(f"{CQRS}: relay", self._relay, CQRS, 100, 1)
        yield self._job("ours: poll", self._poll, once=True)
        yield self._job("transactions", self._transactions, once=True)

    def _job(self, name: str, measure: Callable[..., list[Figure]], *arguments: object, once: bool = False) -> Job:
        return Job(f"{self._name}, {name}", partial(measure, *arguments), once)

    def _relay(self, side: str, batch: int, relays: int) -> list[Figure]:
        row = f"{self._name}, batches of {batch}" + (", two relays" if relays == 2 else "")  # noqa: PLR2004
        backlog = self._size.backlog // (20 if side == CQRS else 1)
        measuring.fill(side, self._database, self._servers, backlog)
        done = measuring.relay(side, self._database, self._servers, backlog, batch=batch, relays=relays)
        return [Figure("relay", row, side, done.rate), Figure("cpu", row, side, done.cpu)]

    def _relay_kept(self, side: str, keeps: bool) -> list[Figure]:  # noqa: FBT001 - of a partial
        database = self._with_many(side, sent=True) if keeps else self._database
        measuring.fill(side, database, self._servers, self._size.backlog, afresh=not keeps)
        done = measuring.relay(side, database, self._servers, self._size.backlog, batch=1000, keep=True)
        return [Figure("kept", f"{self._name}, {'rows' if keeps else 'none'} kept", side, done.rate)]

    def _latency(self, side: str, notify: bool) -> list[Figure]:  # noqa: FBT001
        measuring.fill(side, self._database, self._servers, 0)
        took = measuring.latencies(side, self._database, self._servers, self._size.latencies, notify=notify)
        row = f"{self._name}, woken {'by NOTIFY' if notify else 'in the process'}"
        p50, p99 = measuring.percentiles(took)
        return [Figure("latency", f"{row}, p50", side, p50), Figure("latency", f"{row}, p99", side, p99)]

    def _memory(self, side: str) -> list[Figure]:
        few = max(self._size.many // 50, 1)
        measuring.fill(side, self._database, self._servers, few)
        little = measuring.relay(side, self._database, self._servers, few, batch=1000)
        database = self._with_many(side, sent=False)
        much = measuring.relay(side, database, self._servers, self._size.taken, batch=1000)
        return [
            Figure("memory", f"{self._name}, few pending", side, little.peak),
            Figure("memory", f"{self._name}, many pending", side, much.peak),
        ]

    def _poll(self) -> list[Figure]:
        database = self._further_database("behind")
        found = measuring.ask("behind_a_head", database, self._servers.redis, "--count", str(self._size.behind))
        if found["waiting"] != self._size.behind - 1:
            raise BenchmarkError(f"{found['waiting']} rows wait behind the head, of {self._size.behind - 1}")
        return [
            Figure("poll", f"{self._name}, p50", OURS, found["p50"]),
            Figure("poll", f"{self._name}, p99", OURS, found["p99"]),
            Figure("poll", f"{self._name}, setting aside all that waits, once", OURS, found["aside_s"] * 1000),
            Figure("poll", f"{self._name}, p50", BY_HAND, found["by_hand"]),
        ]

    def _transactions(self) -> list[Figure]:
        loops = ("--loops", str(self._size.loops), "--rounds", str(self._size.rounds))
        found = measuring.ask("transactions", self._database, self._servers.redis, *loops)
        figures = [Figure("statements", self._name, OURS, found["statements"])]
        for variant, values in found["took"].items():
            side, _, events = variant.partition(", ")
            row = f"{self._name}, {f'{events} events' if events.isdecimal() else events}"
            figures += [Figure("transaction", row, side, value) for value in values]
        return figures

    def _with_many(self, side: str, *, sent: bool) -> str:
        """A database that has many rows of this side in its table, filled when first asked for."""
        name = f"{'kept' if sent else 'pending'}_{side.replace(' ', '_')}"
        known = name in self._further
        database = self._further_database(name)
        if not known:
            measuring.fill(side, database, self._servers, self._size.many, sent=sent)
        return database

    def _further_database(self, name: str) -> str:
        if name not in self._further:
            self._further[name] = self._servers.further(self._database, name)
        return self._further[name]
