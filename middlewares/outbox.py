"""Stores what goes to a broker in the transaction that caused it, instead of publishing it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_mediator.errors import name_of
from pipeline_mediator.outbox.protocol import StoredMessage
from pipeline_mediator.pipeline import Inside, Once

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.pipeline import Next

__all__ = ["OutboxMiddleware"]


class OutboxMiddleware:
    """Ends the chain of what an inner PublishMiddleware has a destination for: it becomes a row of the transaction.

        outbox = SQLAlchemyOutbox(engine, outbox_tables(Base.metadata))
        Pipeline(
            TransactionMiddleware(sessions.begin),
            OutboxMiddleware(outbox),
            PublishMiddleware(broker, {OrderPlaced: "orders"}),
        )
        async with mediator, OutboxRelay(mediator): ...

    The message leaves if, and only if, the transaction commits: an OutboxRelay, in this process or another, publishes
    it then, at least once; messages of one key in the order in which they were emitted. It is encoded when it is
    emitted, and all messages of a transaction are written by one statement just before the commit, whoever asks for
    that commit. The trace and the baggage at that moment travel with it.

    `send` of a command with a destination returns when it is stored. Source of the idea: the transactional outbox, as
    in NServiceBus and MassTransit.

    Raises, where the message is emitted, a `CodecError` for what has no form on the wire; before the commit
    `OutboxFullError`, and `SchemaError` for a database without the table.
    """

    role: ClassVar[str] = "outbox"
    rules: ClassVar = (
        Inside("transaction", "a message is stored in the transaction that it belongs to", required=True),
        Once("a message is stored once; keep two outboxes apart by type with only()"),
    )

    def __init__(self, store: OutboxStore) -> None:
        self.store = store

    @property
    def summary(self) -> str:
        """The store."""
        return name_of(self.store).removesuffix(" object")

    def for_route(self, route: Route) -> _Store | None:
        """Stands where a message would leave the process; what came back from a broker is not stored again."""
        if route.origin != "local" or route.destination is None:
            return None
        return _Store(self.store, route.destination)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Store the message if it has a destination; a mediator compiles `for_route` instead."""
        storing = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if storing is None else storing(context, call_next))


class _Store:
    """The end of one route: its message waits in the outbox for a relay."""

    ends_chain: ClassVar[bool] = True

    def __init__(self, store: OutboxStore, destination: str) -> None:
        self._store = store
        self._destination = destination
        self.summary = f"{name_of(store).removesuffix(' object')}, for {destination}"

    async def __call__(self, context: Context, call_next: Next) -> None:
        facts, encoded = context.mediator.encode(context, binary=True)
        context.unit.stage(
            self._store,
            StoredMessage(
                message_id=facts.message_id,
                name=encoded.name,
                version=encoded.version,
                destination=self._destination,
                content_type=encoded.content_type,
                body=encoded.body,
                headers=encoded.headers,
                key=facts.key,
            ),
        )
        context.note("stored", destination=self._destination)
