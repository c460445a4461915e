"""A batch of rows, and what it was told about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator.outbox.protocol import Failure, StoredRow

__all__ = ["DIED", "Alone", "Found", "TakenBatch"]

DIED = "relay died while publishing it"
"""The last error of a row that was counted before it was published alone, should nothing else become of it."""


@dataclass(slots=True)
class Found:
    """What was read for a batch."""

    rows: list[StoredRow] = field(default_factory=list["StoredRow"])
    unreadable: dict[int, tuple[Failure, str | None, int]] = field(
        default_factory=dict[int, "tuple[Failure, str | None, int]"]
    )
    """With key and failures, by id."""
    followed: dict[int, str] = field(default_factory=dict[int, str])
    """The keys of rows that others wait behind, by id: settling these releases those."""
    last_error: str | None = None
    """Of the last row."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A row that is taken alone, because its lane killed relays; its failures were counted in advance."""

    failures: int
    last_error: str | None
    left: int
    """How many rows of the lane are still to be taken like this, this one included."""


class TakenBatch:
    """What a relay works on; see `Batch`."""

    __slots__ = ("_failed", "_sent", "alone", "deadline", "found", "lanes", "rows", "unreadable")

    def __init__(self, found: Found, lanes: Sequence[int], deadline: float, alone: Alone | None = None) -> None:
        self.found = found
        self.rows: Sequence[StoredRow] = found.rows
        self.unreadable: Sequence[Failure] = [failure for failure, _, _ in found.unreadable.values()]
        self.lanes = lanes
        self.deadline = deadline
        self.alone = alone
        self._sent: list[int] = []
        self._failed: dict[int, Failure] = {}

    def sent(self, ids: Sequence[int], /) -> None:
        """See `Batch.sent`."""
        self._sent.extend(ids)

    def failed(self, failures: Sequence[Failure], /) -> None:
        """See `Batch.failed`."""
        self._failed.update((failure.id, failure) for failure in failures)

    @property
    def told_sent(self) -> list[int]:
        """Of its own rows, in order of id."""
        own = {row.id for row in self.rows}
        return sorted(own.intersection(self._sent))

    @property
    def told_failed(self) -> list[tuple[Failure, str | None, int]]:
        """Rows that were refused and not also accepted, those that cannot be read too: with key and failures."""
        told = list(self.found.unreadable.values())
        if self._failed:
            accepted = set(self._sent)
            told += [
                (self._failed[row.id], row.message.key, row.failures if row.crashed else row.failures + 1)
                for row in self.rows
                if row.id in self._failed and row.id not in accepted
            ]
        return told
