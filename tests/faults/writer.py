"""A process that sends commands of all kinds and writes down what it is told of each."""

from __future__ import annotations

import asyncio
import os
import random
from itertools import count
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from pipeline_mediator.errors import CommitOutcomeUnknownError
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox
from tests.faults.application import OUTBOX, Move, RefusedError, accounts, engine_of, mediator_of, tokens_of
from tests.faults.ledger import Ledger
from tests.faults.life import run_until_told
from tests.faults.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline_mediator import Mediator

AT_ONCE = 3
"""Commands of one writer that are under way together."""

CANCELLED_BY_NOBODY = 3
"""The exit code if a send raises CancelledError though it was not cancelled."""

WAYS = ("plainly", "plainly", "plainly", "nested", "nested", "refused", "own commit", "caller", "caller refuses")


class Writer:
    """Sends, and tells the ledger before and after."""

    def __init__(self, mediator: Mediator, engine: AsyncEngine, ledger: Ledger) -> None:
        self._mediator = mediator
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)
        self._ledger = ledger

    async def send(self, command: Move, way: str) -> None:
        self._ledger.write(send=command.operation, tokens=tokens_of(command))
        try:
            if way.startswith("caller"):
                await self._in_own_transaction(command, refuses=way == "caller refuses")
            else:
                await self._mediator.send(command)
        except RefusedError:
            outcome = "rolled back"
        except CommitOutcomeUnknownError:
            outcome = "unknown"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                # A driver let it escape. Its task would end without a word; this is seen.
                os._exit(CANCELLED_BY_NOBODY)
            raise
        except Exception:  # noqa: BLE001 - whatever it was, what it means is written down
            # Where the middleware commits, any other error means that nothing was; who commits by himself must guess.
            outcome = "unknown" if way in {"own commit", "caller"} else "rolled back"
        else:
            outcome = "committed"
        self._ledger.write(send=command.operation, outcome=outcome)

    async def _in_own_transaction(self, command: Move, *, refuses: bool) -> None:
        async with self._sessions.begin() as session:
            await self._mediator.send(command, transaction=session)
            if refuses:
                raise RefusedError


def commands(name: str, chance: random.Random, numbers: Iterator[int]) -> Iterator[tuple[Move, str]]:
    """Without end."""
    for number in numbers:
        way = chance.choice(WAYS)
        yield (
            Move(
                f"{name}.{number}",
                tuple(chance.sample(accounts(), chance.choice((0, 1, 1, 2, 3)))),
                notes=chance.choice((0, 0, 1, 2)),
                nested=way == "nested",
                refuses=way == "refused",
                commits=way == "own commit",
            ),
            way,
        )


async def write(settings: Settings, name: str) -> None:
    engine = engine_of(settings.database)
    chance = random.Random(f"{settings.seed} {name}")  # noqa: S311 - no secret
    store = SQLAlchemyOutbox(engine, OUTBOX)
    numbers = count()

    async def some(writer: Writer) -> None:
        for command, way in commands(name, chance, numbers):
            await writer.send(command, way)
            await asyncio.sleep(chance.uniform(0, 2 * AT_ONCE / settings.rate))

    with Ledger(settings.ledger, name) as ledger:
        async with mediator_of(engine, store, RedisStreamBroker(settings.redis)) as mediator:
            writer = Writer(mediator, engine, ledger)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_ONCE):
                    tasks.create_task(some(writer))


if __name__ == "__main__":
    run_until_told(write)
