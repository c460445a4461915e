"""The consuming side: what came from a broker walks the recommended pipeline to a handler that writes one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from tenacity import wait_random_exponential

from pipeline_mediator import Context, EventMap, Mediator, Pipeline
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox
from pipeline_mediator.middlewares import PublishMiddleware, RedeliveryMiddleware, TracingMiddleware
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.faults.application import EFFECTS, INBOX, OUTBOX, STREAMS, Moved, Noted, codec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.message_brokers import RedisStreamBroker
    from pipeline_mediator.message_brokers.protocol import DeadLetterQueue, Delivery, MessageBroker, Subscription

__all__ = ["GROUP", "SOON", "Hook", "HookedSubscription", "consuming_mediator", "nothing", "subscription_of"]

GROUP = "faults"
SOON = wait_random_exponential(multiplier=0.1, max=2.0)
"""Until what failed comes again."""

Hook: TypeAlias = "Callable[[Moved | Noted, Context], Awaitable[None]]"


async def nothing(_event: Moved | Noted, _context: Context) -> None:
    """Where a scenario has no accident."""


def consuming_mediator(
    engine: AsyncEngine,
    broker: MessageBroker,
    *,
    before: Hook = nothing,
    after: Hook = nothing,
    attempts: int = 10,
    tracing: TracingMiddleware | None = None,
) -> Mediator:
    """Its handler calls `before`, writes the effect, and calls `after`, all in one transaction."""

    async def take_effect(event: Moved | Noted, session: AsyncSession, context: Context) -> None:
        await before(event, context)
        account = event.account if isinstance(event, Moved) else None
        row = {"message_id": context.message_id, "token": event.token, "account": account, "place": event.place}
        await session.execute(insert(EFFECTS).values(row))
        await after(event, context)

    pipeline = Pipeline.recommended(
        async_sessionmaker(engine, expire_on_commit=False).begin,
        SQLAlchemyOutbox(engine, OUTBOX),
        PublishMiddleware(broker),
        inbox=SQLAlchemyInbox(INBOX, engine),
    ).replace(RedeliveryMiddleware, RedeliveryMiddleware(attempts, wait=SOON))
    if tracing is not None:
        pipeline = pipeline.replace(TracingMiddleware, tracing)
    events = EventMap().bind(Moved, take_effect).bind(Noted, take_effect)
    return Mediator(event_map=events, middlewares=pipeline, codec=codec())


def subscription_of(
    broker: RedisStreamBroker, min_idle: float, *, ordered: bool = True, name: str = GROUP
) -> Subscription:
    return broker.subscribe(*STREAMS, name=name, ordered=ordered, min_idle=min_idle)


class HookedSubscription:
    """Calls `before_settling` when chains have ended, and nothing of it was told to the broker."""

    def __init__(self, subscription: Subscription, before_settling: Callable[[], None]) -> None:
        self._subscription = subscription
        self._before_settling = before_settling

    @property
    def name(self) -> str:
        return self._subscription.name

    @property
    def dead_letters(self) -> DeadLetterQueue | None:
        return self._subscription.dead_letters

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        return await self._subscription.receive(limit)

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        self._before_settling()
        return await self._subscription.settle(deliveries)

    async def __aenter__(self) -> Self:
        await self._subscription.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        return await self._subscription.__aexit__(kind, error, trace)
