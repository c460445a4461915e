"""What runs until it is stopped: awaited, in a process of its own, or beside an application."""

from __future__ import annotations

import logging
from contextvars import Context
from typing import TYPE_CHECKING, Self, TypeVar

import anyio

from pipeline_mediator.concurrency import Beside, is_cancelled
from pipeline_mediator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

__all__ = ["Service", "apart"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """A relay or a consumer, as its owner sees it: `run`, `stop`, `async with`.

    `name` and `kind` stand in the log; `when_ended` says there what its end means.
    """

    def __init__(self, name: str, kind: str, when_ended: str) -> None:
        self._name = name
        self._kind = kind
        self._when_ended = when_ended
        self._running = False
        self._stopped = False
        self._beside: Beside | None = None

    async def run(self) -> None:
        """Run until cancelled or stopped. Raises `ConfigurationError` if it runs already."""
        self._begin()
        try:
            await apart(self._serve_and_tell)
        finally:
            self._running = self._stopped = False

    def stop(self) -> None:
        """Let it end; in the event loop's thread. Called before `run`, that ends at once."""
        self._stopped = True

    async def __aenter__(self) -> Self:
        self._begin()
        # No task group, which could only be left in the task that entered it: who leaves may be another one.
        beside = Beside(self._serve_beside)
        try:
            await beside.start()
        except BaseException:
            self._running = False
            raise
        self._beside = beside
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        beside, self._beside = self._beside, None
        if beside is not None:
            self.stop()
            try:
                await beside.end()
            finally:
                self._running = self._stopped = False

    async def _serve(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        if self._running:
            raise ConfigurationError(f"{self._name}: this {self._kind} already runs; for a second one make another")
        self._running = True

    async def _serve_and_tell(self) -> None:
        logger.info("%s: %s started", self._name, self._kind)
        try:
            await self._serve()
        finally:
            logger.info("%s: %s %s", self._name, self._kind, "stopped" if self._stopped else "ended")

    async def _serve_beside(self) -> None:
        """Where nobody awaits it, an end that nobody asked for must at least be seen."""
        try:
            await apart(self._serve_and_tell)
        except Exception:
            logger.exception("%s: the %s has ended; %s", self._name, self._kind, self._when_ended)
        except BaseException:
            if self._beside is not None:
                logger.warning("%s: the %s was cancelled; %s", self._name, self._kind, self._when_ended)
            raise


async def apart(function: Callable[[], Awaitable[T]]) -> T:
    """Await it in an empty context: who starts it is not what its spans and messages belong to."""
    results: list[T] = []
    errors: list[Exception] = []

    async def call() -> None:
        try:
            results.append(await function())
        except Exception as error:  # noqa: BLE001 - raised below, not in a group
            errors.append(error)
        except anyio.get_cancelled_exc_class():
            if is_cancelled():
                raise
            errors.append(RuntimeError("a client let the cancellation of something else escape"))

    async with anyio.create_task_group() as group:
        _ = Context().run(group.start_soon, call)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # its traceback holds this frame
    return results[0]
