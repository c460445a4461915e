"""A consumer process, whose handler fails and dawdles now and then and tells the ledger so."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from zlib import crc32

from tenacity import wait_random_exponential

from pipeline_mediator import Consumer
from pipeline_mediator.message_brokers import RedisStreamBroker
from tests.faults.application import engine_of
from tests.faults.consuming import consuming_mediator, subscription_of
from tests.faults.ledger import Ledger
from tests.faults.life import end_with_parent, run_until_told
from tests.faults.settings import Settings

if TYPE_CHECKING:
    from pipeline_mediator import Context
    from tests.faults.application import Moved, Noted

ATTEMPTS = 40
"""A kill counts as an attempt of all that had been read ahead; nothing here fails for good."""
GRACE = 5.0


class FlakyError(Exception):
    """Raised by a handler on purpose; it passes."""


class Temper:
    """What a handler does beside its work, by lot; a message's lot is the same in each attempt and in each run."""

    def __init__(self, ledger: Ledger, longest: float) -> None:
        self._ledger = ledger
        self._longest = longest

    async def before(self, event: Moved | Noted, context: Context) -> None:
        delivery, lot = context.delivery.attempt, _lot(event)
        self._ledger.write(handling=event.token, delivery=delivery, attempt=context.attempt)
        if lot < 40 and delivery == 1:
            self._fail(event)
        if 40 <= lot < 45:
            await asyncio.sleep(self._longest)

    async def after(self, event: Moved | Noted, context: Context) -> None:
        """When the effect is written; with the error it goes away again."""
        lot = _lot(event)
        if (100 <= lot < 140 and context.delivery.attempt == 1) or (200 <= lot < 220 and context.attempt == 1):
            self._fail(event)

    def _fail(self, event: Moved | Noted) -> None:
        self._ledger.write(failed=event.token)
        raise FlakyError


def _lot(event: Moved | Noted) -> int:
    """Of a thousand."""
    return crc32(event.token.encode()) % 1000


def consumer() -> Consumer:
    """What `python -m pipeline_mediator consume` serves."""
    end_with_parent()
    return _consumer(*Settings.of_this_process())


def _consumer(settings: Settings, name: str) -> Consumer:
    engine = engine_of(settings.database)
    # There, whoever writes keeps everybody else from it.
    alone = engine.dialect.name == "sqlite"
    temper = Temper(Ledger(settings.ledger, name), 0.2 if alone else 1.5 * settings.lease)
    broker = RedisStreamBroker(settings.redis, timeout=settings.lease)
    mediator = consuming_mediator(engine, broker, before=temper.before, after=temper.after, attempts=ATTEMPTS)
    return Consumer(
        mediator,
        subscription_of(broker, settings.lease),
        concurrency=1 if alone else 8,
        grace=GRACE,
        pauses=wait_random_exponential(multiplier=0.2, max=2.0),
        name=name,
    )


async def consume(settings: Settings, name: str) -> None:
    """The same by the consumer's own interface; where it is cancelled, the command line tells it to stop."""
    await _consumer(settings, name).run()


if __name__ == "__main__":
    run_until_told(consume)
