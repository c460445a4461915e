"""How long to wait after so many failures, by tenacity's wait strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tenacity import RetryCallState, wait_random_exponential

if TYPE_CHECKING:
    from tenacity.wait import WaitBaseT

__all__ = ["default_backoff", "default_pauses", "pause_after"]


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
