"""Two middlewares that count what the pipeline does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline_mediator.events import DomainEvent, IntegrationEvent
from pipeline_mediator.middlewares import RetryMiddleware, TransactionMiddleware
from pipeline_mediator.pipeline import only
from pipeline_mediator.requests import Command

if TYPE_CHECKING:
    from pipeline_mediator.context import Context
    from pipeline_mediator.pipeline import Next, Pipeline

__all__ = ["Tally"]


class Tally:
    """Counts attempts of commands, by their end; and what was published, by its type."""

    def __init__(self) -> None:
        self.committed = 0
        self.rolled_back = 0
        self.committed_later = 0
        """Commands that were committed in a second or third attempt."""
        self.published: Counter[str] = Counter()
        self.handled: Counter[str] = Counter()
        """Domain events that were handled, inside the transaction."""

    def put_into(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with these counters in it."""
        pipeline = pipeline.before(RetryMiddleware, only(IntegrationEvent, self.count_published))
        return pipeline.before(
            TransactionMiddleware, only(Command, self.count_attempt), only(DomainEvent, self.count_handled)
        )

    async def count_attempt(self, context: Context, call_next: Next) -> Any:
        """Stands around Transaction."""
        try:
            result = await call_next(context)
        except BaseException:
            self.rolled_back += 1
            raise
        self.committed += 1
        self.committed_later += context.attempt > 1
        return result

    async def count_published(self, context: Context, call_next: Next) -> Any:
        """Stands around Retry: what came through in any attempt counts once."""
        result = await call_next(context)
        self.published[type(context.message).__name__] += 1
        return result

    async def count_handled(self, context: Context, call_next: Next) -> Any:
        """Stands in the transaction of the command that emitted the event."""
        result = await call_next(context)
        self.handled[type(context.message).__name__] += 1
        return result
