"""A message that a broker hands over twice takes effect once."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline_mediator.context import Context
from pipeline_mediator.errors import ConfigurationError, OrderError
from pipeline_mediator.message_brokers.protocol import Delivery
from pipeline_mediator.middlewares.inbox import InboxMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.middlewares.shop import Memory, MemorySession, Placed, mediator_of


class Store:
    """Records in the session, so that what is rolled back is forgotten."""

    def __init__(self) -> None:
        self.handled: set[tuple[str, str, str]] = set()

    async def record(self, resource: Any, subscription: str, source: str, message_id: str, /) -> bool:
        assert isinstance(resource, MemorySession)
        key = (subscription, source, message_id)
        if key in self.handled:
            return False
        self.handled.add(key)
        return True


def delivered(mediator: Any, *, subscription: str = "warehouse", source: str = "shop", message_id: str = "1") -> Any:
    """Walk an event as a consumer does."""
    (chain,) = [one for one in mediator.routes.all_of(Placed) if one.route.origin == "broker"]
    context = Context(Placed(), chain.route, mediator)
    context.identify(message_id=message_id)
    context.delivery = Delivery("orders", b"", None, {}, message_id, None, 1, subscription, source=source)
    return mediator._walker(chain)(context.message, context)


def mediator_with(store: Store, handler: Any) -> Any:
    return mediator_of({Placed: handler}, TransactionMiddleware(Memory().begin), InboxMiddleware(store))  # type: ignore[arg-type]


async def test_a_duplicate_is_skipped_and_noted() -> None:
    handled: list[Placed] = []

    async def handle(event: Placed) -> None:
        handled.append(event)

    notes: list[Any] = []

    async def listen(context: Context, call_next: Any) -> Any:
        context.on_note(lambda name, facts: notes.append((name, dict(facts))))
        return await call_next(context)

    mediator = mediator_of(
        {Placed: handle},
        listen,
        TransactionMiddleware(Memory().begin),
        InboxMiddleware(Store()),  # type: ignore[arg-type]
    )
    await delivered(mediator)
    assert notes == []
    await delivered(mediator)
    assert len(handled) == 1
    assert notes == [("duplicate", {"subscription": "warehouse"})]


@pytest.mark.parametrize("other", [{"subscription": "mail"}, {"source": "other shop"}, {"message_id": "2"}])
async def test_another_subscription_source_or_id_is_another_message(other: dict[str, str]) -> None:
    """Ids are unique within one source: two producers that count from one must not hide each other's events."""
    handled: list[Placed] = []

    async def handle(event: Placed) -> None:
        handled.append(event)

    mediator = mediator_with(Store(), handle)
    await delivered(mediator)
    await delivered(mediator, **other)
    assert len(handled) == 2


async def test_what_was_not_delivered_passes() -> None:
    handled: list[Placed] = []

    async def handle(event: Placed) -> None:
        handled.append(event)

    mediator = mediator_with(Store(), handle)
    await mediator.emit(Placed())
    await mediator.emit(Placed())
    assert len(handled) == 2


def test_it_needs_a_transaction_around_it() -> None:
    async def handle(event: Placed) -> None: ...

    with pytest.raises(OrderError, match=r"InboxMiddleware .* needs a transaction middleware around it"):
        mediator_of({Placed: handle}, InboxMiddleware(Store()))  # type: ignore[arg-type]


async def test_a_delivery_without_its_subscription_is_refused() -> None:
    async def handle(event: Placed) -> None: ...

    mediator = mediator_with(Store(), handle)
    (chain,) = [one for one in mediator.routes.all_of(Placed) if one.route.origin == "broker"]
    with pytest.raises(ConfigurationError, match="which subscription"):
        await mediator._walker(chain)(Placed(), Context(Placed(), chain.route, mediator))
