"""Cancels a coroutine at each of its suspension points, those of the tasks that it starts included."""

from __future__ import annotations

import asyncio
import gc
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

__all__ = ["Manner", "Run", "run_and_cancel"]

Manner = Literal["native", "native at every step", "scope"]
"""How: `Task.cancel()` once, or again at every further step; or an anyio cancel scope, which never lets up."""

_SECONDS = 10.0

_NEVER_ENDING = "AsyncAdapt_aiosqlite_connection._terminate_graceful_close"
"""SQLAlchemy closes an aiosqlite connection in it; cancelled once more, it stops the thread that should answer."""

_OF_A_DROPPED_CONNECTION = "unexpected connection_lost() call"
"""What asyncpg says of a connection whose making was cancelled, in a future that it asks nobody to look at."""


@dataclass
class Run:
    """What became of one run."""

    result: Any = None
    error: BaseException | None = None
    steps: int = 0
    cancelled: bool = False
    """Whether it lived long enough to be cancelled."""
    complaints: list[str] = field(default_factory=list[str])
    """What the event loop had to say: exceptions that nobody took."""


async def run_and_cancel(step: int, manner: Manner, call: Callable[[], Coroutine[Any, Any, Any]]) -> Run:
    """Run `call()` and cancel it when it and its tasks have been suspended `step` times. Waits for all of its tasks."""
    loop = asyncio.get_running_loop()
    run = Run()
    scope = anyio.CancelScope()
    running: list[asyncio.Task[None]] = []
    before = asyncio.all_tasks()

    async def main() -> None:
        with scope:
            run.result = await call()

    def on_step() -> None:
        run.steps += 1
        # A task that never ends is still there when the run is over, and nothing is left to cancel.
        if running and (run.steps == step or (run.steps > step and manner == "native at every step")):
            # Soon, not now: then the task is really suspended.
            loop.call_soon(scope.cancel if manner == "scope" else running[0].cancel)
            run.cancelled = True

    def complain(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if _OF_A_DROPPED_CONNECTION not in str(context):
            run.complaints.append(str(context))

    loop.set_exception_handler(complain)
    loop.set_task_factory(_counting(on_step))
    try:
        running.append(loop.create_task(main()))
        done, _ = await asyncio.wait(running, timeout=_SECONDS)
        if not done:
            raise TimeoutError(f"cancelled at step {step}, it did not end: {running[0].get_stack()}")
        run.error = asyncio.CancelledError() if running[0].cancelled() else running[0].exception()
        left = asyncio.all_tasks() - before
        if ending := {one for one in left if not _is_never_ending(one)}:
            await asyncio.wait(ending, timeout=_SECONDS)
        run.complaints.extend(f"left behind: {one}" for one in left if not _ends(one))
        running.clear()
        del done, left, ending
        # What is collected now may have something to say.
        gc.collect(0)
    finally:
        loop.set_task_factory(None)
        loop.set_exception_handler(None)
    return run


def _ends(task: asyncio.Task[Any]) -> bool:
    return task.done() or (_is_never_ending(task) and task.cancel())


def _is_never_ending(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", None) == _NEVER_ENDING


def _counting(on_step: Callable[[], None]) -> Any:
    @types.coroutine
    def through(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        resume: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            try:
                yielded = resume(value)
            except StopIteration as stop:
                return stop.value
            on_step()
            try:
                value = yield yielded
                resume = coroutine.send
            except BaseException as error:  # noqa: BLE001 - all of it is the coroutine's
                value, resume = error, coroutine.throw

    async def counted(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await through(coroutine)

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> Any:
        wrapped: Any = counted(coroutine)
        wrapped.__qualname__ = getattr(coroutine, "__qualname__", "")
        return asyncio.Task(wrapped, loop=loop, **options)

    return factory
