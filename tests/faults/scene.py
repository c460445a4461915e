"""What the named scenarios play on: the application on a fresh database, an own Redis, and eyes on both."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from tenacity import wait_fixed

from pipeline_mediator import Consumer
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.outbox.relay import OutboxRelay
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.faults.application import (
    ACCOUNTS,
    EFFECTS,
    FACTS,
    METADATA,
    OUTBOX,
    Move,
    engine_of,
    mediator_of,
)
from tests.faults.consuming import GROUP, HookedSubscription, consuming_mediator, subscription_of
from tests.faults.evidence import copies_in, left_in_streams
from tests.redis_view import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from pipeline_mediator import Mediator
    from pipeline_mediator.message_brokers.protocol import DeadDelivery, MessageBroker
    from tests.faults.verdict import Copy

__all__ = ["MIN_IDLE", "ROOT", "Scene", "scene_on"]

ROOT = Path(__file__).parents[2]
_SECONDS = 60.0
_LOOK_EVERY = 0.02
MIN_IDLE = 1.0
"""Seconds: so long a scenario waits for what a dead consumer had."""


@dataclass
class Scene:
    """One database and one Redis; what is done here is done in this process, `program` runs another one."""

    database: str
    redis: str
    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncSession]
    client: Any

    def __post_init__(self) -> None:
        self._numbers = count()
        self._open: list[int] = []

    def close(self) -> None:
        """Let the processes end that were started and still run."""
        while self._open:
            os.close(self._open.pop())

    async def create(self, *names: str) -> None:
        """The tables, and an account of each name."""
        async with self.engine.begin() as connection:
            await connection.run_sync(METADATA.create_all)
            await connection.execute(ACCOUNTS.insert(), [{"name": name, "moves": 0} for name in names])

    # -- writing -------------------------------------------------------------------------------------------------------

    def store(self, **options: Any) -> SQLAlchemyOutbox:
        return SQLAlchemyOutbox(self.engine, OUTBOX, **options)

    def mediator(self, broker: MessageBroker | None = None, *, attempts: int = 2) -> Mediator:
        return mediator_of(self.engine, self.store(), broker or RedisStreamBroker(self.redis), attempts)

    def number(self) -> int:
        """One that nobody had before."""
        return next(self._numbers)

    def command(self, *moved: str, notes: int = 0, **how: bool) -> Move:
        """A command that nobody sent before."""
        return Move(f"scene.{self.number()}", moved, notes=notes, **how)

    async def send(self, *commands: Move) -> None:
        mediator = self.mediator()
        for command in commands:
            await mediator.send(command)

    # -- relaying and consuming ----------------------------------------------------------------------------------------

    async def drain(self, broker: MessageBroker | None = None, **options: Any) -> int:
        """Publish what is due, as a relay in this process."""
        mediator = self.mediator(broker)
        async with mediator:
            return await OutboxRelay(mediator, **options).drain()

    async def until_drained(self, broker: MessageBroker | None = None, **options: Any) -> None:
        """Publish until nothing waits any more, as it becomes due."""

        async def drained() -> bool:
            await self.drain(broker, **options)
            return await self.is_empty()

        await self.until(drained)

    @asynccontextmanager
    async def relay(self, broker: MessageBroker | None = None, **options: Any) -> AsyncGenerator[None]:
        """A relay that runs beside."""
        mediator = self.mediator(broker)
        async with mediator, OutboxRelay(mediator, **options):
            yield

    def consumer(
        self,
        *,
        ordered: bool = True,
        min_idle: float = MIN_IDLE,
        grace: float = 5.0,
        name: str = GROUP,
        before_settling: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> Consumer:
        """Not begun; `how` is what `consuming_mediator` takes."""
        broker = RedisStreamBroker(self.redis)
        mediator = consuming_mediator(self.engine, broker, **how)
        # On SQLite one transaction writes at a time.
        concurrency = 1 if self.engine.dialect.name == "sqlite" else 8
        subscription = HookedSubscription(
            subscription_of(broker, min_idle, ordered=ordered, name=name), before_settling
        )
        return Consumer(
            mediator, subscription, concurrency=concurrency, grace=grace, clean_every=None, pauses=wait_fixed(0.05)
        )

    async def consume(self, *, name: str = GROUP, **how: Any) -> None:
        """Handle what nobody has handled, until all is settled; what a dead consumer had is taken over."""
        async with self.consumer(name=name, **how):
            await self.until(lambda: self.settled(name))

    # -- another process -----------------------------------------------------------------------------------------------

    def start(self, program: str, *, off: float | None = None) -> subprocess.Popen[str]:
        """One of `tests.faults.programs`, as a process of its own; its host's clock is `off` by so many seconds."""
        module = ["tests.faults.programs"] if off is None else ["tests.faults.clock", str(off)]
        return self._start([*module, program, self.database, self.redis])

    def serve(self, *options: str) -> subprocess.Popen[str]:
        """The consumer of `tests.faults.served`, by the command line."""
        return self._start(["pipeline_mediator", "consume", "tests.faults.served:consumer", *options])

    def _start(self, arguments: list[str]) -> subprocess.Popen[str]:
        # The end of its input would tell it that we have ended.
        reading, writing = os.pipe()
        self._open.append(writing)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, "FAULTS_DATABASE": self.database, "FAULTS_REDIS": self.redis},
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            os.close(reading)

    def program(self, program: str, *, off: float | None = None) -> int:
        """Run it to its end, and return its exit code: the number of the signal that killed it, negative."""
        with self.start(program, off=off) as process:
            try:
                _, errors = process.communicate(timeout=_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        code: int = process.returncode
        assert code <= 0, errors
        return code

    @staticmethod
    async def stopped(process: subprocess.Popen[str]) -> None:
        """Wait until it has stopped itself. Raises `TimeoutError`."""

        def wait() -> None:
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

        with anyio.fail_after(_SECONDS):
            await to_thread.run_sync(wait, abandon_on_cancel=True)
        assert process.poll() is None

    # -- looking -------------------------------------------------------------------------------------------------------

    @staticmethod
    async def until(holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait until it holds. Raises `TimeoutError`."""
        with anyio.fail_after(_SECONDS):
            while not await holds():  # noqa: ASYNC110 - it is a server that changes, and it tells nobody
                await anyio.sleep(_LOOK_EVERY)

    async def is_marked(self, mark: str) -> bool:
        """Whether a process has come to that point; see `mark`."""
        return bool(await self.client.exists(f"mark:{mark}"))

    async def mark(self, mark: str) -> None:
        """For others to see."""
        await self.client.set(f"mark:{mark}", 1)

    async def dead_letters(self) -> Sequence[DeadDelivery]:
        """What consumers gave up."""
        async with RedisStreamBroker(self.redis) as broker:
            letters = subscription_of(broker, MIN_IDLE).dead_letters
            assert letters is not None
            return await letters.list(1000)

    async def has_copies(self, number: int) -> bool:
        """Of so many different messages."""
        return len(set(await self.tokens())) == number

    async def facts(self) -> list[str]:
        """Tokens of the committed facts."""
        async with self.engine.begin() as connection:
            return list((await connection.execute(select(FACTS.c.token).order_by(FACTS.c.token))).scalars())

    async def waiting(self) -> int:
        """Messages in the outbox that are neither sent nor dead."""
        health = await self.store().health()
        return health.pending + health.waiting

    async def is_empty(self) -> bool:
        """Whether nothing waits in the outbox."""
        return await self.waiting() == 0

    async def copies(self) -> list[Copy]:
        return [copy async for copy in copies_in(self.client)]

    async def tokens(self) -> list[str]:
        return [copy.token for copy in await self.copies()]

    async def places(self, account: str) -> list[int]:
        """Of the copies of this key's messages, in the order of the stream."""
        return [copy.place for copy in await self.copies() if copy.account == account]

    async def effects(self) -> list[str]:
        """A message id for each effect."""
        async with self.engine.begin() as connection:
            return sorted((await connection.execute(select(EFFECTS.c.message_id))).scalars())

    async def effects_of(self, account: str) -> list[int]:
        """Places of this key's messages, in the order in which they took effect."""
        async with self.engine.begin() as connection:
            wanted = select(EFFECTS.c.place).where(EFFECTS.c.account == account).order_by(EFFECTS.c.id)
            return list((await connection.execute(wanted)).scalars())

    def names(self) -> tuple[str, str]:
        """Of the outbox's tables, rows and lanes."""
        return OUTBOX.rows.name, OUTBOX.lanes.name

    async def settled(self, name: str = GROUP) -> bool:
        """Whether the group has nothing left to do."""
        return not await left_in_streams(self.client, name)


@asynccontextmanager
async def scene_on(database: str, redis: str, **options: Any) -> AsyncGenerator[Scene]:
    """On tables that are there; `options` are the engine's."""
    engine = engine_of(database, **options)
    client: Any = Client.from_url(redis)
    try:
        scene = Scene(database, redis, engine, async_sessionmaker(engine, expire_on_commit=False), client)
        try:
            yield scene
        finally:
            scene.close()
    finally:
        await client.aclose()
        await engine.dispose()
