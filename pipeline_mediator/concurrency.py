"""The only lines that know which event loop runs: whose task this is, and finishing what must not be cut off."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["current_task", "finish"]

T = TypeVar("T")

_GRACE = 1.0
"""Seconds that a step which ran out of time has to react to being cancelled, before it is left behind."""


def current_task() -> object:
    """The running task, by identity; asyncio's or trio's."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else _trio_task()


def _trio_task() -> object:
    trio: Any = sys.modules.get("trio")
    return None if trio is None else trio.lowlevel.current_task()


async def finish(step: Coroutine[Any, Any, T], *, seconds: float) -> T:
    """Await `step` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards.

    For commit, rollback and close: cut off half-way, their outcome would be unknown and a connection would leak. On
    asyncio two things are needed, and neither is enough alone: a task of its own keeps a plain `Task.cancel()` out of
    the step, and anyio's shield keeps anyio from delivering a cancel scope's cancellation again and again. On trio the
    shield does both.

    What the step learns must be kept by the step itself: when a cancellation is raised afterwards, its result is gone.
    Raises `TimeoutError` if the step takes longer than `seconds`; the step is cancelled then.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        import anyio

        with anyio.fail_after(seconds, shield=True):
            return await step
    return await _finish_in_task(step, seconds)


async def _finish_in_task(step: Coroutine[Any, Any, T], seconds: float) -> T:
    import anyio

    loop = asyncio.get_running_loop()
    task = loop.create_task(step)
    deadline = loop.time() + seconds
    cancelled = False
    with anyio.CancelScope(shield=True):
        while not task.done() and (left := deadline - loop.time()) > 0:
            try:
                await asyncio.wait((task,), timeout=left)
            except asyncio.CancelledError:
                cancelled = True
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=_GRACE)
    try:
        if cancelled:
            raise asyncio.CancelledError from (_error_of(task))
        if not task.done() or task.cancelled():
            raise TimeoutError(f"not finished within {seconds:g} s")
        return task.result()
    finally:
        # The task holds the error, the error its traceback, the traceback this frame: without this a cycle.
        del task


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
