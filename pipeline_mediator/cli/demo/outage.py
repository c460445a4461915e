"""Runs the order service in a process of its own, kills it twice while it is sent orders, and counts what is left."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx

from pipeline_mediator.cli.demo.count_outage import outage_table
from pipeline_mediator.cli.demo.database import open_engine, own_tables, read_contents, unpublished, until_published
from pipeline_mediator.cli.demo.listener import Received, listen_to_stream
from pipeline_mediator.cli.demo.process import ServiceProcess
from pipeline_mediator.cli.demo.receipts import listen_to_receipts
from pipeline_mediator.cli.demo.retrying import RetryingLedger
from pipeline_mediator.cli.demo.service import Settings
from pipeline_mediator.cli.demo.visits import plan_visits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.cli.demo.table import Table
    from pipeline_mediator.cli.demo.visits import Visit

__all__ = ["Kill", "Outage", "open_outage", "plan_kills"]

CLIENTS = 8
"""How many send at the same time."""

SECONDS = 30.0
"""How long a client waits for an answer."""


@dataclass(frozen=True, slots=True)
class Kill:
    """When the service is killed."""

    after: int
    """Orders that are done with."""
    delay: float
    """Seconds, so that it may hit anything: a handler, a commit, a batch of the relay."""


def plan_kills(orders: int, seed: int) -> list[Kill]:
    """One in the first half, one in the second."""
    random = Random(seed)  # noqa: S311 - nothing is kept secret by it
    middle = (orders + 1) // 2
    halves = ((orders // 10, middle), (middle, orders * 9 // 10))
    return [Kill(random.randint(first, max(first, last)), random.uniform(0, 0.02)) for first, last in halves]


class Outage:
    """The service, the clients who do not give up, and a subscriber to what it publishes."""

    def __init__(
        self,
        engine: AsyncEngine,
        service: ServiceProcess,
        listening: AbstractAsyncContextManager[None],
        received: Received,
        *,
        visits: Sequence[Visit],
        kills: Sequence[Kill],
    ) -> None:
        self.engine = engine
        self.ledger = RetryingLedger(service.address)
        self.received = received
        self.told: list[str] = []
        """What happened, line by line."""
        self._service = service
        self._listening = listening
        self._visits = visits
        self._kills = kills
        self._done = 0
        self._reached = {kill.after: asyncio.Event() for kill in kills}

    async def send(self, advance: Callable[[], None] = lambda: None) -> None:
        """Send every order, kill the service meanwhile, and wait until its relay has emptied the outbox."""
        async with self._listening, httpx.AsyncClient(timeout=SECONDS, trust_env=False) as client:
            with self._service:
                await self._service.start()
                waiting = iter(self._visits)
                clients = [self._send(client, waiting, advance) for _ in range(CLIENTS)]
                await _together(self._kill(), *clients)
                await until_published(self.engine)
        self.told.append(f"Requests that got no answer, and were sent again: {self.ledger.cut_off}.")

    async def count(self) -> list[Table]:
        """Hold everything against everything else."""
        return [outage_table(self.ledger, await read_contents(self.engine), self.received)]

    async def _send(self, client: httpx.AsyncClient, waiting: Iterator[Visit], advance: Callable[[], None]) -> None:
        for visit in waiting:
            await self.ledger.record(client, visit)
            self._done += 1
            if self._done in self._reached:
                self._reached[self._done].set()
            advance()

    async def _kill(self) -> None:
        for kill in self._kills:
            if kill.after > 0:
                await self._reached[kill.after].wait()
            await asyncio.sleep(kill.delay)
            self._service.kill()
            left = await unpublished(self.engine)
            self.told.append(f"Killed after {kill.after} orders. Messages left in the outbox: {left}.")
            await self._service.start()


async def _together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run them side by side; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@asynccontextmanager
async def open_outage(
    database_url: str | None = None,
    redis_url: str | None = None,
    orders: int = 300,
    seed: int = 1,
    *,
    log: str | None = None,
) -> AsyncGenerator[Outage]:
    """The service on these servers, or without any; its tables are there as long as the block lasts.

    Raises `CommandError` for a database that cannot be used, and a service that does not come up or is not answered.
    """
    with TemporaryDirectory(prefix="pipeline-mediator-demo-") as name:
        folder = Path(name)
        # A prefix of this run's own: others may have a stream "orders" on that server.
        prefix = f"pipeline-mediator-demo.{uuid4().hex}."
        database_url = database_url or f"sqlite+aiosqlite:///{folder}/orders.db"
        engine = open_engine(database_url)
        try:
            async with own_tables(engine, orders):
                settings = Settings(database=database_url, redis=redis_url, stream_prefix=prefix, receipts="", log=log)
                service = ServiceProcess(settings, folder)
                listen = (
                    partial(listen_to_receipts, service.receipts)
                    if redis_url is None
                    else partial(listen_to_stream, redis_url, f"{prefix}orders")
                )
                received = Received()
                yield Outage(
                    engine,
                    service,
                    listen(received),
                    received,
                    visits=plan_visits(orders, seed),
                    kills=plan_kills(orders, seed),
                )
        finally:
            await engine.dispose()
