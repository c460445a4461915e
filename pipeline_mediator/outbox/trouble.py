"""Something that does not work for a while: told in one line for each pause, and in one when it is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio

from pipeline_mediator.errors import MediatorError
from pipeline_mediator.outbox.pauses import pause_after
from pipeline_mediator.telemetry import error_type

if TYPE_CHECKING:
    from tenacity.wait import WaitBaseT

__all__ = ["Trouble", "in_words"]

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 500


class Trouble:
    """Counts the failures in a row, says how long to wait, and logs.

    `fails` and `works` say what that is: "destination 'orders' takes no messages", "... takes messages again". With
    `stack=True` an error that is not this library's is logged with its traceback, once.
    """

    def __init__(self, fails: str, works: str, pauses: WaitBaseT, *, stack: bool = False) -> None:
        self._fails = fails
        self._works = works
        self._pauses = pauses
        self._stack = stack
        self._since = 0.0
        self._last: type[BaseException] | None = None
        self.failures = 0
        """In a row."""

    def again(self, error: BaseException, *, at_least: float = 0.0) -> float:
        """It failed, once more; seconds to leave it alone now."""
        now = anyio.current_time()
        if not self.failures:
            self._since = now
        self.failures += 1
        pause = max(pause_after(self.failures, self._pauses), at_least)
        known = isinstance(error, MediatorError) or type(error) is self._last
        stack = error if self._stack and not known else None
        self._last = type(error)
        since = f", for {now - self._since:.0f} s now" if self.failures > 1 else ""
        logger.warning("%s%s (%s); next try in %.1f s", self._fails, since, in_words(error), pause, exc_info=stack)
        return pause

    def over(self) -> None:
        """It works."""
        if not self.failures:
            return
        logger.warning("%s, after %.1f s", self._works, anyio.current_time() - self._since)
        self.failures = 0
        self._last = None


def in_words(error: BaseException) -> str:
    """The type of an error, and what it says if it is this library's: another's text may quote the message."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, MediatorError) else error_type(error)
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
