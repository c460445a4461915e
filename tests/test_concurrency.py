"""What must not be cut off is finished, whoever cancels and however often."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from typing import TYPE_CHECKING

import anyio
import pytest

from pipeline_mediator import concurrency
from pipeline_mediator.concurrency import current_task, finish

if TYPE_CHECKING:
    from collections.abc import Generator

LONG = 60.0


@pytest.fixture
def no_collection() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Step:
    """Something that must not be cut off; the test lets it begin, and end."""

    def __init__(self, result: object = "done", error: BaseException | None = None) -> None:
        self.began = anyio.Event()
        self.may_end = anyio.Event()
        self.ended = False
        self._result = result
        self._error = error

    async def run(self) -> object:
        self.began.set()
        await self.may_end.wait()
        await anyio.lowlevel.checkpoint()
        self.ended = True
        if self._error is not None:
            raise self._error
        return self._result


async def test_it_gives_what_the_step_gives() -> None:
    step = Step("committed")
    step.may_end.set()
    assert await finish(step.run(), seconds=LONG) == "committed"


async def test_it_raises_what_the_step_raises() -> None:
    step = Step(error=ValueError("no"))
    step.may_end.set()
    with pytest.raises(ValueError, match="no") as caught:
        await finish(step.run(), seconds=LONG)
    assert caught.value.__context__ is None


async def test_a_cancelled_scope_waits_for_the_step() -> None:
    step = Step()
    went_on = False
    async with anyio.create_task_group() as tasks:

        async def caller() -> None:
            nonlocal went_on
            await finish(step.run(), seconds=LONG)
            await anyio.lowlevel.checkpoint()
            went_on = True

        tasks.start_soon(caller)
        await step.began.wait()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert not step.ended
            step.may_end.set()
    assert step.ended
    assert not went_on


async def test_a_step_that_takes_too_long_is_cancelled() -> None:
    step = Step()
    with pytest.raises(TimeoutError, match=r"not finished within 0\.01 s"):
        await finish(step.run(), seconds=0.01)
    assert step.began.is_set()
    assert not step.ended


async def test_a_step_that_ends_when_it_is_cancelled_for_its_time_has_a_result() -> None:
    async def last_moment() -> str:
        try:
            await anyio.sleep_forever()
        finally:
            return "just in time"  # noqa: B012 - on purpose

    assert await finish(last_moment(), seconds=0.01) == "just in time"


async def test_it_does_not_mistake_its_caller_for_another_task() -> None:
    here = current_task()
    assert here is not None
    others: list[object] = []

    async def look() -> None:
        others.append(current_task())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
    assert others[0] is not here
    assert current_task() is here


def test_outside_of_every_loop_there_is_no_task() -> None:
    import trio

    assert trio.__name__ in sys.modules
    assert current_task() is None


class TestAsyncio:
    """What only asyncio has: a cancellation that comes once, by `Task.cancel()`."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize("times", [1, 3])
    async def test_a_cancelled_task_waits_for_the_step(self, times: int) -> None:
        step = Step()
        task = asyncio.ensure_future(finish(step.run(), seconds=LONG))
        await step.began.wait()
        for _ in range(times):
            task.cancel("the caller hung up")
            await anyio.wait_all_tasks_blocked()
            assert not task.done()
        step.may_end.set()
        with pytest.raises(asyncio.CancelledError, match="the caller hung up"):
            await task
        assert step.ended

    async def test_the_error_of_the_step_is_the_cause_of_the_cancellation(self) -> None:
        step = Step(error=ValueError("the rollback failed"))
        task = asyncio.ensure_future(finish(step.run(), seconds=LONG))
        await step.began.wait()
        task.cancel()
        await anyio.wait_all_tasks_blocked()
        step.may_end.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert str(caught.value.__cause__) == "the rollback failed"

    async def test_a_timeout_around_it_is_a_timeout_after_it(self) -> None:
        step = Step()
        asyncio.get_running_loop().call_later(0.05, step.may_end.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await finish(step.run(), seconds=LONG)
        assert step.ended

    async def test_a_step_that_cancels_itself_is_no_timeout(self) -> None:
        step = Step(error=asyncio.CancelledError("of its own"))
        step.may_end.set()
        with pytest.raises(asyncio.CancelledError, match="of its own"):
            await finish(step.run(), seconds=LONG)

    async def test_a_cancelled_scope_does_not_keep_the_loop_busy(self) -> None:
        """Without the shield anyio would cancel the waiting task again in every round of the event loop."""
        caller = asyncio.current_task()
        assert caller is not None

        async def count_cancellations() -> int:
            for _ in range(20):
                await asyncio.sleep(0)
            return caller.cancelling()

        before = caller.cancelling()
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            assert await finish(count_cancellations(), seconds=LONG) == before

    async def test_a_step_that_ignores_being_cancelled_is_left_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(concurrency, "_GRACE", 0.01)
        may_end = asyncio.Event()
        ended = asyncio.Event()

        async def deaf() -> None:
            while not may_end.is_set():
                try:
                    await may_end.wait()
                except asyncio.CancelledError:
                    continue
            ended.set()

        with pytest.raises(TimeoutError):
            await finish(deaf(), seconds=0.01)
        assert not ended.is_set()
        may_end.set()
        await ended.wait()

    @pytest.mark.parametrize("cancel", [False, True])
    @pytest.mark.usefixtures("no_collection")
    async def test_it_leaves_no_cycle(self, *, cancel: bool) -> None:
        class Kept:
            pass

        kept = Kept()
        gone = weakref.ref(kept)

        async def fail(_kept: Kept) -> None:
            await asyncio.sleep(0.001)
            raise ValueError

        task = asyncio.ensure_future(finish(fail(kept), seconds=LONG))
        del kept
        await asyncio.sleep(0)
        if cancel:
            task.cancel()
        with pytest.raises((ValueError, asyncio.CancelledError)) as caught:
            await task
        assert gone() is not None
        del task, caught
        await asyncio.sleep(0)
        assert gone() is None
