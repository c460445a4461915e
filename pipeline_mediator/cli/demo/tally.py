"""Three middlewares that count what the pipeline does."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from pipeline_mediator.events import DomainEvent
from pipeline_mediator.middlewares import PublishMiddleware, TransactionMiddleware
from pipeline_mediator.pipeline import only
from pipeline_mediator.requests import Command

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.outbox.protocol import Published, Relayed
    from pipeline_mediator.pipeline import Next, Pipeline

__all__ = ["Tally"]


class Tally:
    """Counts attempts of commands, by their end; and what a relay published, by its type."""

    def __init__(self) -> None:
        self.committed = 0
        self.rolled_back = 0
        self.committed_later = 0
        """Commands that were committed in a second or third attempt."""
        self.published: defaultdict[str, set[str]] = defaultdict(set)
        """Ids of the messages that the broker has accepted, by the wire name of their type."""
        self.handled: Counter[str] = Counter()
        """Domain events that were handled, inside the transaction."""

    def put_into(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with these counters in it."""
        pipeline = pipeline.before(PublishMiddleware, _CountPublished(self.published))
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

    async def count_handled(self, context: Context, call_next: Next) -> Any:
        """Stands in the transaction of the command that emitted the event."""
        result = await call_next(context)
        self.handled[type(context.message).__name__] += 1
        return result


class _CountPublished:
    """Stands around the publishing of what comes from the outbox: a message that the broker accepted counts once."""

    def __init__(self, published: defaultdict[str, set[str]]) -> None:
        self._published = published

    def for_route(self, route: Route) -> _CountPublished | None:
        return self if route.origin == "relay" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        batch: Relayed = context.message
        outcome: Published = await call_next(context)
        accepted = set(outcome.accepted)
        for row in batch:
            if row.id in accepted:
                self._published[row.message.name].add(row.message.message_id)
        return outcome
