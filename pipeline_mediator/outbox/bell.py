"""Wakes a task from whatever thread."""

from __future__ import annotations

from contextlib import suppress
from threading import get_ident

import anyio

from pipeline_mediator.concurrency import from_any_thread

__all__ = ["Bell"]


class Bell:
    """One task waits for it, anybody rings it; rung while nobody waits, it ends the next wait at once.

        bell.clear()
        if not await look_for_work():
            await bell.wait(1.0)

    Cleared before the look, it loses nothing: whoever rings after that ends the wait. Made in the event loop of the
    task that waits.
    """

    def __init__(self) -> None:
        self._thread = get_ident()
        self._event = anyio.Event()
        self._rung = False
        self._set_soon = from_any_thread(self._set)

    def ring(self) -> None:
        """End the wait, or the next one. From whatever thread, and when the event loop has ended."""
        if self._rung:
            return
        self._rung = True
        if get_ident() != self._thread:
            self._set_soon()
            return
        # Of a task whose event loop was closed over it: whoever commits now shall not hear of that.
        with suppress(RuntimeError):
            self._event.set()

    def clear(self) -> None:
        """Forget that it was rung."""
        if self._rung:
            self._event = anyio.Event()
            self._rung = False

    async def wait(self, seconds: float) -> bool:
        """Wait until it is rung, at most `seconds`; whether it was."""
        with anyio.move_on_after(seconds):
            await self._event.wait()
        return self._rung

    def _set(self) -> None:
        # Of an earlier ring, if it was cleared meanwhile; then the next look finds nothing, once.
        if self._rung:
            self._event.set()
