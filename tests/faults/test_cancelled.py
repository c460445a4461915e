"""36 to 38 with an outbox: a send that is cancelled anywhere has stored both its rows and its events, or neither.

What concerns transactions alone is in tests/middlewares/test_transaction_cancelled.py and
test_transaction_committed.py.
"""

from __future__ import annotations

import asyncio
import gc
from functools import partial

import pytest
from sqlalchemy import delete, select

from tests.faults.application import FACTS, OPERATIONS, OUTBOX
from tests.faults.scene import Scene
from tests.middlewares.cancelling import Manner, run_and_cancel

MOST_STEPS = 300


# When a connect is cut off, SQLAlchemy closes what there is in a task of its own, which this test has to cut off too;
# from 3.13 on, sqlite3 says so.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.parametrize("database", ["postgresql", "sqlite"], indirect=True)
@pytest.mark.parametrize("manner", ["native", "native at every step", "scope"])
async def test_a_cancelled_send_has_stored_its_rows_and_its_events_or_neither(scene: Scene, manner: Manner) -> None:
    mediator = scene.mediator()
    for step in range(1, MOST_STEPS):
        sending = partial(mediator.send, scene.command("a", notes=2))
        run = await run_and_cancel(step, manner, sending)
        facts, events = await stored(scene)
        where = f"cancelled at step {step} of {run.steps}"
        assert (facts, events) in {(0, 0), (3, 3)}, where
        assert run.error is None or isinstance(run.error, asyncio.CancelledError), where
        assert run.complaints == [], where
        if not run.cancelled:
            assert (facts, events) == (3, 3)
            assert step > 5
            gc.collect()
            return
        await clear(scene)
    pytest.fail(f"it was suspended more than {MOST_STEPS} times")


async def stored(scene: Scene) -> tuple[int, int]:
    async with scene.engine.begin() as connection:
        facts = (await connection.execute(select(FACTS.c.token))).all()
        events = (await connection.execute(select(OUTBOX.rows.c.id))).all()
    return len(facts), len(events)


async def clear(scene: Scene) -> None:
    async with scene.engine.begin() as connection:
        for table in (FACTS, OPERATIONS, OUTBOX.rows):
            await connection.execute(delete(table))
