"""Something that does not work for a while: how long to leave it alone, by tenacity's wait strategies, and what to log.

One line for each pause, and one when it is over.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import anyio
from tenacity import RetryCallState, wait_random_exponential

from pipeline_mediator.errors import MediatorError
from pipeline_mediator.telemetry import error_type

if TYPE_CHECKING:
    from tenacity.wait import WaitBaseT

__all__ = ["Trouble", "default_backoff", "default_pauses", "in_words", "pause_after"]

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


def default_backoff() -> WaitBaseT:
    """For one message: up to 4 s after its first failure, the limit doubled each time, at most 15 minutes.

    Ten attempts take a quarter of an hour on average. The jitter is full, or messages that failed together would come
    back together.
    """
    return wait_random_exponential(multiplier=4, min=1, max=900)


def default_pauses() -> WaitBaseT:
    """For a destination or a database that is away: up to 1 s first, the limit doubled each time, at most 30 s."""
    return wait_random_exponential(multiplier=1, min=0.5, max=30)


def pause_after(failures: int, wait: WaitBaseT) -> float:
    """Seconds to wait after that many failures, the first being 1."""
    state = RetryCallState(retry_object=cast("Any", None), fn=None, args=(), kwargs={})
    state.attempt_number = failures
    return float(wait(state))
