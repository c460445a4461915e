"""A broker that does what the test says, and an outbox with messages for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import anyio
from anyio.lowlevel import checkpoint
from tenacity import wait_fixed

from pipeline_mediator import IntegrationEvent, Mediator, message
from pipeline_mediator.message_brokers.protocol import BrokerFeatures
from pipeline_mediator.middlewares import PublishMiddleware
from pipeline_mediator.outbox import OutboxRelay
from pipeline_mediator.outbox.protocol import StoredMessage
from tests.outbox.memory_store import MemoryStore

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.protocol import Outgoing

LONG = 30.0
"""Seconds that no test waits."""


@message("orders.placed")
class OrderPlaced(IntegrationEvent):
    pass


@message("payments.taken")
class PaymentTaken(IntegrationEvent):
    pass


DESTINATIONS = {OrderPlaced: "orders", PaymentTaken: "payments"}
NAMES = {"orders": "orders.placed", "payments": "payments.taken"}


class Broker:
    """Accepts, unless `refuse` has an error for a message; hangs at a destination as long as `hangs` has an event."""

    def __init__(self) -> None:
        self.features = BrokerFeatures(system="fake", durable=True, headers=True, ordered_by_key=True)
        self.accepted: list[Outgoing] = []
        self.calls: list[list[str]] = []
        """The message ids of each call."""
        self.refuse: Callable[[Outgoing], Exception | None] = lambda _: None
        self.hangs: dict[str, anyio.Event] = {}
        self.called = anyio.Event()
        """Set by the next call."""
        self._waiting: list[tuple[int, anyio.Event]] = []

    @property
    def ids(self) -> list[str]:
        return [outgoing.message_id for outgoing in self.accepted]

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        await checkpoint()
        self.calls.append([outgoing.message_id for outgoing in batch])
        self.called.set()
        self.called = anyio.Event()
        if (hang := self.hangs.get(batch[0].destination)) is not None:
            await hang.wait()
        answers: list[Exception | None] = []
        refused: set[str | None] = set()
        for outgoing in batch:
            error = self.refuse(outgoing)
            if error is None and outgoing.key in refused:
                error = RuntimeError("behind a refused one")
            if error is None:
                self.accepted.append(outgoing)
            elif outgoing.key is not None:
                refused.add(outgoing.key)
            answers.append(error)
        for number, event in self._waiting:
            if len(self.accepted) >= number:
                event.set()
        return answers

    async def has(self, number: int) -> None:
        """Wait until it has accepted so many."""
        event = anyio.Event()
        if len(self.accepted) >= number:
            return
        self._waiting.append((number, event))
        with anyio.fail_after(5):
            await event.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class Shop:
    """A mediator with that broker, and an outbox to put messages into."""

    def __init__(self, broker: Broker | None = None, store: MemoryStore | None = None) -> None:
        self.broker = broker or Broker()
        self.store = store or MemoryStore()
        self.mediator = Mediator(middlewares=[PublishMiddleware(self.broker, DESTINATIONS)])

    def relay(self, **settings: Any) -> OutboxRelay:
        """Whose pauses are short, and which does not clean up."""
        given: dict[str, Any] = {
            "backoff": wait_fixed(0.001),
            "pauses": wait_fixed(0.001),
            "poll": 0.01,
            "clean_every": None,
        }
        return OutboxRelay(self.mediator, self.store, **{**given, **settings})

    async def put(self, *names: str, to: str = "orders", key: str | None = None, kind: str | None = None) -> None:
        """Store messages with these ids in one transaction, and tell of the commit."""
        await self.store.add(
            None,
            [
                StoredMessage(name, kind or NAMES[to], 1, to, "application/json", b"{}", {"id": name}, key)
                for name in names
            ],
        )
        self.store.committed()

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds, looking after every step of the event loop."""
        with anyio.fail_after(5):
            while not holds():  # noqa: ASYNC110 - what a test looks at has no event
                await anyio.sleep(0.001)

    def copies(self) -> dict[str, int]:
        return dict(Counter(self.broker.ids))
