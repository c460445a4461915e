"""What the tests of an outbox ask of whoever runs them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from pipeline_mediator.outbox.protocol import OutboxStore

__all__ = ["OutboxCases", "OutboxDatabase", "OutboxFeatures"]


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


class OutboxCases:
    """What all of them have in common."""

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

    def keeping(self, database: OutboxDatabase) -> OutboxStore:
        """A store that keeps for a day what was sent."""
        if not self.features.keeps_sent:
            pytest.skip("sent rows are not kept")
        return database.store(keep=timedelta(days=1))
