"""Messages, a broker that records, and a unit of work in memory, for the tests of the middlewares."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from anyio.lowlevel import checkpoint
from tenacity import wait_none

from pipeline_mediator.events import DomainEvent, Event, EventMap, IntegrationEvent
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Outgoing
from pipeline_mediator.requests import Command, RequestMap

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "AT_ONCE",
    "Memory",
    "MemorySession",
    "Place",
    "Placed",
    "RecordingBroker",
    "Reserve",
    "Reserved",
    "Shipped",
    "mediator_of",
]


AT_ONCE = wait_none()
"""Retry's wait for tests."""


@dataclass(frozen=True)
class Place(Command[int]):
    """What the tests send."""

    n: int = 1


@dataclass(frozen=True)
class Reserve(Command[int]):
    """What the handler of the first one sends."""

    n: int = 2


@dataclass(frozen=True)
class Placed(IntegrationEvent):
    n: int = 1


@dataclass(frozen=True)
class Shipped(IntegrationEvent):
    n: int = 1


@dataclass(frozen=True)
class Reserved(DomainEvent):
    n: int = 3


def mediator_of(handlers: Mapping[type[Any], Any], *middlewares: Any, **options: Any) -> Mediator:
    """A mediator with these handlers, of requests and of events."""
    requests, events = RequestMap(), EventMap()
    for message_type, handler in handlers.items():
        bind: Any = events.bind if Event in message_type.__mro__ else requests.bind
        bind(message_type, handler)
    return Mediator(requests, event_map=events, middlewares=middlewares, **options)


class RecordingBroker:
    """Keeps what was published; fails with `failures` first, and calls `on_publish` before it answers."""

    def __init__(self, *failures: Exception) -> None:
        self.published: list[Outgoing] = []
        self.failures = deque(failures)
        self.attempts = 0
        self.on_publish: Callable[[], Awaitable[None]] | None = None

    @property
    def features(self) -> BrokerFeatures:
        return BrokerFeatures(system="recording", durable=True, headers=True, ordered_by_key=True)

    @property
    def names(self) -> list[str]:
        return [message.name for message in self.published]

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        self.attempts += 1
        await checkpoint()
        if self.on_publish is not None:
            await self.on_publish()
        if self.failures:
            return [self.failures.popleft() for _ in batch]
        self.published.extend(batch)
        return [None for _ in batch]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None


class MemorySession:
    """Rows that are not yet committed."""

    def __init__(self) -> None:
        self.rows: list[int] = []


class Memory:
    """A unit of work that needs no database, so that it runs on trio too."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.log: list[str] = []
        self.refusal: Exception | None = None
        """What the next commit raises."""

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[MemorySession]:
        await checkpoint()
        session = MemorySession()
        self.log.append("begin")
        try:
            yield session
        except BaseException:
            self.log.append("rollback")
            raise
        await checkpoint()
        if self.refusal is not None:
            raise self.refusal
        self.rows.extend(session.rows)
        self.log.append("commit")
