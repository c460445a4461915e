"""The seam to a database that keeps messages until a broker has them: written in a transaction, taken lane by lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, overload
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

__all__ = [
    "LANES",
    "Batch",
    "DeadLetter",
    "Failure",
    "Health",
    "OutboxStore",
    "Policy",
    "Published",
    "Relayed",
    "StoredMessage",
    "StoredRow",
    "lane_of",
]

LANES: Final = 64
"""Units of ordered work. Fixed for ever: a key that changed its lane could overtake itself."""


def lane_of(key: str) -> int:
    """The lane of a key: all messages of one key are in one lane, which one relay owns at a time."""
    return crc32(key.encode()) & (LANES - 1)


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One encoded message as it waits in the outbox, in CloudEvents' binary form: nothing of it is decoded again."""

    message_id: str
    name: str
    """The wire name of its type."""
    version: int
    destination: str
    content_type: str
    body: bytes
    """The payload alone."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """The attributes of the CloudEvent under their bare names; the trace context of whoever emitted it among them."""
    key: str | None = None
    """Messages of one key are published in order; those without one in any order."""

    @property
    def lane(self) -> int:
        """Messages without a key are spread by their ids."""
        return lane_of(self.message_id if self.key is None else self.key)


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A stored message that is due, and what became of it so far."""

    id: int
    """Rises with every message; what one transaction stored stands together."""
    message: StoredMessage
    failures: int
    """How often it was refused, or its relay died over it."""
    age: float
    """Seconds since it was stored, by the database's clock."""
    crashed: bool = False
    """Relays died over its lane, so it was handed over alone; `failures` counts that already."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What travels with it."""
        return self.message.headers


class Relayed(Sequence[StoredRow]):
    """What a relay publishes at once: the message of the contexts in its chains. All rows have one destination."""

    __slots__ = ("_rows", "deadline")

    def __init__(self, rows: Sequence[StoredRow], deadline: float) -> None:
        self._rows = rows
        self.deadline = deadline
        """On `time.monotonic()`; checked before each call of the broker, because the process may have been stopped."""

    @overload
    def __getitem__(self, index: int) -> StoredRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[StoredRow]: ...
    def __getitem__(self, index: int | slice) -> StoredRow | Sequence[StoredRow]:
        return self._rows[index]

    def __iter__(self) -> Iterator[StoredRow]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a `Relayed`. A row that is in neither was not tried: its key had a refusal, or time was up."""

    accepted: Sequence[int]
    """Ids of rows that the broker has."""
    refused: Sequence[tuple[int, Exception]]
    """Ids of rows that it does not have, or may have: nobody knows what a dead connection delivered."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that could not be published."""

    id: int
    error: str
    """The type of the error and what it says, without payload or credentials; kept with the row."""
    delay: float | None
    """Seconds until it is due again; None gives it up: a dead letter, kept with the error."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a store needs to know of its relay's rules."""

    lease: float = 30.0
    """Seconds after which a relay that says nothing loses what it has taken. The database measures them."""
    park: bool = False
    """Behind a dead letter with a key: let the later messages of that key go on, instead of keeping them waiting."""


@dataclass(frozen=True, slots=True)
class Health:
    """What waits in an outbox."""

    pending: int
    """Due or backing off."""
    waiting: int
    """Behind an earlier message of the same key that could not be published."""
    dead: int
    """Given up, kept with the reason."""
    oldest: float
    """Seconds since the oldest message that is neither sent nor dead was stored; 0.0 without one."""


class Batch(Protocol):
    """Rows that nobody else publishes until this batch is left, at most one relay's `limit` of them, in order of id.

    Of the rows with one key they are the earliest that are not sent, without a gap. Left without an error, what `sent`
    and `failed` were told is written and the rows that were not named are given back. Left by an error or a
    cancellation, everything that was told is written if that is still possible, the rest given back; either way this
    is no crash. What was taken too long ago, because the process hung or the connection died, is somebody else's by
    now: then leaving raises `LeaseLostError` and nothing is written.
    """

    @property
    def rows(self) -> Sequence[StoredRow]:
        """What is to be published."""
        ...

    @property
    def unreadable(self) -> Sequence[Failure]:
        """Rows of this batch that cannot be read any more; they are not among `rows`, and end as dead letters."""
        ...

    @property
    def deadline(self) -> float:
        """On `time.monotonic()`: from then on nothing of it may be published, another relay may have it."""
        ...

    def sent(self, ids: Sequence[int], /) -> None:
        """The broker has accepted these."""
        ...

    def failed(self, failures: Sequence[Failure], /) -> None:
        """The broker has refused these. The later rows of their keys, in the batch or not, wait until they are due."""
        ...


class OutboxStore(Protocol):
    """Where messages wait.

    One implementation per database; `pipeline_mediator.testing.OutboxStoreSuite` holds it to what stands here.
    All times are of the database's clock: the hosts' clocks may differ by minutes.
    """

    async def add(self, resource: object, messages: Sequence[StoredMessage], /) -> None:
        """Write them in the open transaction of `resource` (a session, a connection) with one executemany.

        Their ids rise in the order given. Raises `OutboxFullError` if more than `max_pending` would wait, and a
        `SchemaError` where the table is not there or is not what it should be.
        """
        ...

    def take(
        self, limit: int, policy: Policy, /, *, without: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[Batch | None]:
        """Take what is due, of the lanes that were served longest ago; None if there is nothing.

        Not of the destinations `without`. At most a quarter of the lanes at a time, so that several relays find work.
        """
        ...

    async def clean(self, limit: int, /) -> int:
        """Delete at most `limit` rows that were sent and kept long enough; how many. Never one that is not sent.

        Two relays that clean at the same time do not wait for each other: one of them deletes nothing.
        """
        ...

    async def health(self) -> Health:
        """What waits."""
        ...

    async def next_due(self) -> float | None:
        """Seconds until a row is due that is backing off; None without one."""
        ...

    def on_commit(self, wake: Callable[[], None], /) -> Callable[[], None]:
        """Call `wake`, from whatever thread, when something may have been committed; returns how to stop that.

        At least for what this process commits through this object. A relay polls besides, so a call may be missed.
        """
        ...

    def committed(self) -> None:
        """Told by OutboxMiddleware after a commit that stored messages."""
        ...

    def listen(self) -> AbstractAsyncContextManager[None]:
        """While open, `on_commit` is also told of commits of other processes, where the database can tell."""
        ...

    async def validate_schema(self) -> None:
        """Raise `SchemaError`, which lists every difference between the table and what this version needs."""
        ...

    async def dead_letters(self, limit: int, /, *, after: int = 0) -> Sequence[DeadLetter]:
        """The messages that were given up, by id, beginning behind `after`."""
        ...

    async def retry(self, ids: Sequence[int], /) -> int:
        """Make dead letters due again; how many there were.

        Later messages of their keys wait for them again, but for those that a relay has taken already, with `park`.
        """
        ...

    async def purge(self, ids: Sequence[int], /) -> int:
        """Delete dead letters for good; how many there were. What waited behind them is released."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up."""

    id: int
    message: StoredMessage
    failures: int
    error: str
    created_at: datetime
    """Aware, UTC, of the database's clock."""
