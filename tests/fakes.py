"""Stand-ins for what stands around the core: a unit of work, a broker, and a middleware that writes down its calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from pipeline_mediator.message_brokers.protocol import BrokerFeatures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_mediator import Context, Next
    from pipeline_mediator.message_brokers.protocol import Outgoing


class Session:
    """What `Database.begin` yields."""

    def __init__(self) -> None:
        self.rows: list[object] = []


class Database:
    """A unit of work without a database: `rows` are what was committed, `log` says how each transaction ended."""

    def __init__(self) -> None:
        self.rows: list[object] = []
        self.log: list[str] = []

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[Session]:
        session = Session()
        self.log.append("begin")
        try:
            yield session
        except BaseException:
            self.log.append("rollback")
            raise
        self.log.append("commit")
        self.rows += session.rows


class Broker:
    """Keeps what is published; `fails_with` makes it refuse, `log` says when it was opened and closed."""

    features = BrokerFeatures(system="fake", durable=True, headers=False, ordered_by_key=True)

    def __init__(self, name: str = "broker", log: list[str] | None = None) -> None:
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.published: list[Outgoing] = []
        self.fails_with: Exception | None = None

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        if self.fails_with is None:
            self.published += batch
        return [self.fails_with] * len(batch)

    async def __aenter__(self) -> Self:
        self.log.append(f"open {self.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.log.append(f"close {self.name}")


class Recorder:
    """A middleware that writes down when a message comes in and when it goes out."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def __call__(self, context: Context, call_next: Next) -> Any:
        self.log.append(f"> {self.name}")
        try:
            return await call_next(context)
        finally:
            self.log.append(f"< {self.name}")
