"""51. Hosts whose clocks are ten minutes off: nothing is early, nothing is parked, no relay spins."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from pipeline_mediator.outbox.protocol import Failure, Policy
from tests.faults.scene import Scene

MINUTES = 60.0
OFF = pytest.mark.parametrize("off", [10 * MINUTES, -10 * MINUTES], ids=["ahead", "behind"])
POLICY = Policy(lease=5.0)


@OFF
async def test_51_what_a_writer_with_a_wrong_clock_stored_is_due_at_once(scene: Scene, off: float) -> None:
    assert scene.program("send_one", off=off) == 0
    assert await scene.drain() == 1


@OFF
async def test_51_a_relay_with_a_wrong_clock_publishes_what_is_due_and_nothing_else(scene: Scene, off: float) -> None:
    await scene.send(scene.command("a"), scene.command("b"))
    async with scene.store().take(1, POLICY) as batch:
        assert batch is not None
        (row,) = batch.rows
        batch.failed([Failure(row.id, "refused", 5 * MINUTES)])
    assert scene.program("relay_once", off=off) == 0
    assert len(await scene.copies()) == await scene.waiting() == 1
    due = await scene.store().next_due()
    assert due is not None
    assert 4 * MINUTES < due <= 5 * MINUTES


@OFF
async def test_51_what_a_relay_with_a_wrong_clock_has_taken_is_its_own(scene: Scene, off: float) -> None:
    """Neither does it lose its lease at once, nor does it keep it for ten minutes when it is gone."""
    await scene.send(scene.command("a"))
    async with taken_elsewhere(scene, off):
        assert await scene.drain() == 0
    await scene.until_drained()


@asynccontextmanager
async def taken_elsewhere(scene: Scene, off: float) -> AsyncGenerator[None]:
    """A process that holds a batch, until it is killed."""
    with scene.start("take_and_stop", off=off) as process:
        try:
            await scene.stopped(process)
            yield
        finally:
            process.kill()
            process.wait()
