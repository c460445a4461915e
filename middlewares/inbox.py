"""Lets a message that a broker delivers twice take effect once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_mediator.errors import ConfigurationError, name_of
from pipeline_mediator.pipeline import Inside, Once

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.inbox.protocol import InboxStore
    from pipeline_mediator.pipeline import Next

__all__ = ["InboxMiddleware"]


class InboxMiddleware:
    """Records what came from a broker in the transaction of its handlers, and skips what was recorded before.

        Pipeline(TransactionMiddleware(sessions.begin), InboxMiddleware(SQLAlchemyInbox(inbox_table(Base.metadata))))

    The record is by subscription, source and message id, so every subscription handles a message once. It is committed
    or rolled back together with what the handlers wrote: delivery is at least once, the effect in the database happens
    once. A copy that arrives while the first one is being handled waits for its transaction, and holds a connection
    meanwhile: keep the consumer's concurrency below the size of the pool.

    A duplicate returns None and is noted as "duplicate". Source of the idea: the inbox of NServiceBus and MassTransit.
    """

    role: ClassVar[str] = "inbox"
    rules: ClassVar = (
        Inside("transaction", "the record and what the handlers write are committed together", required=True),
        Once("a second record of the same message would take the first for a duplicate"),
    )

    def __init__(self, store: InboxStore) -> None:
        self.store = store

    @property
    def summary(self) -> str:
        """The store."""
        return name_of(self.store).removesuffix(" object")

    def for_route(self, route: Route) -> InboxMiddleware | None:
        """Stands in the chains of what came from a broker."""
        return self if route.origin == "broker" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain unless this subscription has handled the message before."""
        delivery = context.delivery
        if delivery is None:
            if context.route is not None and context.route.origin == "broker":
                raise ConfigurationError(
                    f"{context.route}: the inbox does not know which subscription it came by: context.delivery is None"
                )
            return await call_next(context)
        resource = context.unit.resource
        if await self.store.record(resource, delivery.subscription, delivery.source, context.message_id):
            return await call_next(context)
        context.note("duplicate", subscription=delivery.subscription)
        return None
