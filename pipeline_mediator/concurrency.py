"""The only lines that know which event loop runs: whose task this is, how to reach it, what must not be cut off."""

from __future__ import annotations

import asyncio
import math
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup

__all__ = ["Beside", "current_task", "finish", "from_any_thread", "is_cancelled"]

T = TypeVar("T")

_GRACE = 1.0
"""Seconds that a step which ran out of time has to react to being cancelled, before it is left behind."""


def current_task() -> object:
    """The running task, by identity, asyncio's or trio's; None outside of one."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        pass
    trio: Any = sys.modules.get("trio")
    try:
        return None if trio is None else trio.lowlevel.current_task()
    except RuntimeError:
        return None


def is_cancelled() -> bool:
    """Whether the running task was told to end; asked about a cancellation that it has just caught.

    On asyncio one may come from nobody: a client that cancels what it waits for lets the error escape.
    """
    if _asyncio_loop() is None:
        return True
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def from_any_thread(call: Callable[[], object]) -> Callable[[], None]:
    """A function for whatever thread that has `call` called soon in the event loop that runs now; not once it ended."""
    loop = _asyncio_loop()
    if loop is not None:
        soon: Callable[[Callable[[], object]], object] = loop.call_soon_threadsafe
    else:
        trio: Any = sys.modules["trio"]
        soon = trio.lowlevel.current_trio_token().run_sync_soon

    def hand_over() -> None:
        # Both loops raise one when they have ended.
        with suppress(RuntimeError):
            soon(call)

    return hand_over


async def finish(step: Coroutine[Any, Any, T], *, seconds: float) -> T:
    """Await `step` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards.

    For commit, rollback and close: cut off half-way, their outcome would be unknown and a connection would leak. On
    asyncio two things are needed, and neither is enough alone: a task of its own keeps a plain `Task.cancel()` out of
    the step, and anyio's shield keeps anyio from delivering a cancel scope's cancellation again and again. On trio the
    shield does both.

    What the step learns must be kept by the step itself: when a cancellation is raised afterwards, its result is gone.
    Raises `TimeoutError` if the step takes longer than `seconds`; the step is cancelled then.
    """
    import anyio

    loop = _asyncio_loop()
    if loop is not None:
        return await _finish_task(loop.create_task(step), seconds)
    with anyio.move_on_after(seconds, shield=True):
        return await step
    raise _late(seconds)


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _finish_task(task: asyncio.Task[T], seconds: float) -> T:
    import anyio

    cancellation, late = None, True
    try:
        with anyio.CancelScope(shield=True):
            cancellation = await _wait(task, seconds)
            late = not task.done()
            if late:
                task.cancel()
                cancellation = await _wait(task, _GRACE) or cancellation
        if cancellation is not None:
            raise asyncio.CancelledError(*cancellation) from _error_of(task)
        if late and (not task.done() or task.cancelled()):
            raise _late(seconds)
        return task.result()
    finally:
        # The task holds the error, the error its traceback, the traceback this frame: without this a cycle.
        del task


async def _wait(task: asyncio.Task[Any], seconds: float) -> tuple[object, ...] | None:
    """Wait for the task whatever happens to this one; what a cancellation that came meanwhile had to say, or None."""
    cancellation = None
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not task.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait((task,), timeout=None if left == math.inf else left)
        except asyncio.CancelledError as error:
            cancellation = error.args
    return cancellation


class Beside:
    """A coroutine function that runs beside its starter until it is cancelled and awaited, from whatever task.

    A task group would have to be left in the task that entered it. A stream cannot promise that: a generator that holds
    one may be closed by the garbage collector. trio has nothing but nurseries, so there it is one.
    """

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._function = function
        self._task: asyncio.Task[None] | None = None
        self._nursery: TaskGroup | None = None

    async def start(self) -> None:
        """Start it."""
        import anyio

        loop = _asyncio_loop()
        if loop is not None:
            self._task = loop.create_task(self._function())
        else:
            self._nursery = await anyio.create_task_group().__aenter__()
            self._nursery.start_soon(self._function)

    def cancel(self) -> None:
        """Cancel it if it still runs."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        if self._task is not None:
            self._task.cancel()

    async def end(self) -> None:
        """Await its end; a cancellation that comes meanwhile is raised afterwards."""
        import anyio

        if self._nursery is not None:
            await self._nursery.__aexit__(None, None, None)
        if self._task is not None:
            cancellation = None
            with anyio.CancelScope(shield=True):
                cancellation = await _wait(self._task, math.inf)
            if cancellation is not None:
                raise asyncio.CancelledError(*cancellation)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _late(seconds: float) -> TimeoutError:
    return TimeoutError(f"not finished within {seconds:g} s")
