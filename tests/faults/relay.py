"""A relay process, whose store tells the ledger what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenacity import wait_random_exponential

from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.outbox.relay import OutboxRelay
from tests.faults.application import OUTBOX, engine_of, mediator_of
from tests.faults.ledger import Ledger
from tests.faults.life import end_with_parent, run_until_told
from tests.faults.settings import Settings
from tests.faults.watching import WatchedOutbox

if TYPE_CHECKING:
    from pipeline_mediator import Mediator


def mediator() -> Mediator:
    """What `python -m pipeline_mediator relay` serves."""
    end_with_parent()
    return _mediator(*Settings.of_this_process())


def _mediator(settings: Settings, name: str) -> Mediator:
    engine = engine_of(settings.database)
    store = WatchedOutbox(Ledger(settings.ledger, name), engine, OUTBOX)
    # Shorter than half of the lease, which is all that a batch has.
    return mediator_of(engine, store, RedisStreamBroker(settings.broker, timeout=settings.lease / 4))


async def relay(settings: Settings, name: str) -> None:
    """The same by the relay's own interface; where it is cancelled, the command line tells it to stop."""
    running = OutboxRelay(
        _mediator(settings, name),
        name=name,
        batch=settings.batch,
        lease=settings.lease,
        poll=0.2,
        # Not away for long after a fault: the next one comes soon.
        pauses=wait_random_exponential(multiplier=0.2, max=2.0),
        backoff=wait_random_exponential(multiplier=0.2, max=2.0),
    )
    await running.run()


if __name__ == "__main__":
    run_until_told(relay)
