"""An outbox that tells the ledger what a relay has taken, and what it saw settled."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from pipeline_mediator.outbox.protocol import Batch, Failure, Policy, StoredRow
    from tests.faults.ledger import Ledger

__all__ = ["WatchedOutbox"]


class WatchedOutbox(SQLAlchemyOutbox):
    """What was taken and is not known to be settled may be published again; nothing else may."""

    def __init__(self, ledger: Ledger, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ledger = ledger
        self._numbers = count()

    @asynccontextmanager
    async def take(self, limit: int, policy: Policy, /, *, without: Sequence[str] = ()) -> AsyncGenerator[Batch | None]:
        number = next(self._numbers)
        watched: _Watched | None = None
        async with super().take(limit, policy, without=without) as batch:
            if batch is not None:
                watched = _Watched(batch)
                self._ledger.write(batch=number, rows=[row.id for row in batch.rows])
            yield watched
        if watched is not None:
            self._ledger.write(batch=number, settled=watched.accepted)


class _Watched:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.accepted: list[int] = []

    @property
    def rows(self) -> Sequence[StoredRow]:
        return self._batch.rows

    @property
    def unreadable(self) -> Sequence[Failure]:
        return self._batch.unreadable

    @property
    def deadline(self) -> float:
        return self._batch.deadline

    def sent(self, ids: Sequence[int], /) -> None:
        self.accepted.extend(ids)
        self._batch.sent(ids)

    def failed(self, failures: Sequence[Failure], /) -> None:
        self._batch.failed(failures)
