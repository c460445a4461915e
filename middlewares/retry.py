"""Another attempt after an error that may pass, each in a scope and a transaction of its own."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pipeline_mediator.context import AMBIENT
from pipeline_mediator.errors import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    HandlerNotFoundError,
    PermanentError,
    TransactionFinishedError,
)
from pipeline_mediator.pipeline import Outside

if TYPE_CHECKING:
    from collections.abc import Generator

    from tenacity import RetryCallState
    from tenacity.retry import RetryBaseT
    from tenacity.stop import StopBaseT
    from tenacity.wait import WaitBaseT

    from pipeline_mediator.context import Context, Route, Snapshot
    from pipeline_mediator.pipeline import Next

__all__ = ["RetryMiddleware"]

_NEVER = (PermanentError, ConfigurationError, HandlerNotFoundError, TransactionFinishedError)
"""Errors that another attempt cannot help; not even a policy that names Exception repeats them."""


class RetryMiddleware:
    """Tries a root message again when it failed with an error that may pass.

        RetryMiddleware(attempts=3)
        RetryMiddleware(attempts=5, on=(OperationalError, ConnectionError), wait=wait_random_exponential(max=5))
        RetryMiddleware(stop=stop_after_delay(10), retry=retry_if_exception_message(match="deadlock"))

    `stop`, `wait` and `retry` are tenacity's strategies; without `wait` it waits a random time up to 0.05 s, the limit
    doubled each time, at most 2 s. `on` names the errors to retry; without it and `retry` every `Exception` is.

    Never repeated, whatever the policy: work that has been committed, a stream whose items have reached the caller, a
    message that joined another, one in a transaction of the caller's, cancellation, and `PermanentError`.
    `CommitOutcomeUnknownError` only if `on` names it. An ExceptionGroup only if every error in it may be retried.

    Each attempt has a context of its own (headers and items as they were before the first) and a unit of its own. After
    the last one its error is raised as it is, with a note that says how many attempts there were.
    """

    role: ClassVar[str] = "retry"
    rules: ClassVar = (
        Outside("transaction", "a transaction that failed cannot be used again; each attempt needs its own"),
    )

    def __init__(
        self,
        attempts: int | None = None,
        *,
        on: type[Exception] | tuple[type[Exception], ...] | None = None,
        retry: RetryBaseT | None = None,
        stop: StopBaseT | None = None,
        wait: WaitBaseT | None = None,
    ) -> None:
        if attempts is not None and stop is not None:
            raise ConfigurationError("RetryMiddleware: pass attempts= or stop=, not both; stop strategies join with |")
        if on is not None and retry is not None:
            raise ConfigurationError("RetryMiddleware: pass on= or retry=, not both; retry strategies join with |")
        if attempts is not None and attempts < 1:
            raise ConfigurationError(f"RetryMiddleware(attempts={attempts}): the first try counts, so it is at least 1")
        self._attempts = 3 if attempts is None and stop is None else attempts
        self._on = on if isinstance(on, tuple) or on is None else (on,)
        self._retry = retry
        self._stop = stop
        self._wait = wait

    @property
    def summary(self) -> str:
        """How often it tries."""
        return "until its stop strategy says so" if self._attempts is None else f"{self._attempts} attempts"

    def for_route(self, route: Route) -> RetryMiddleware | None:
        """Stands where there is more than one attempt; the relay has a back-off of its own."""
        return None if route.origin == "relay" or self._attempts == 1 else self

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain, again if need be."""
        if context.parent is not None or (context.begun_unit is not None and context.begun_unit.external):
            return await call_next(context)
        before = context.snapshot()
        # tenacity's own loop is entered for no happy path (6 to 17 us), and it keeps exceptions, which keep contexts.
        started = time.monotonic() if self._stop is not None else 0.0
        try:
            return await call_next(context)
        except Exception as error:
            tries = _Tries(self, started)
            wait = tries.wait_after(error, context)
            if wait is None:
                raise
        return await self._again(context, before, call_next, tries, wait)

    async def _again(self, first: Context, before: Snapshot, call_next: Next, tries: _Tries, wait: float) -> Any:
        import anyio

        while True:
            await anyio.sleep(wait)
            context = first.further_attempt(tries.number, before)
            # What the handler sends in this attempt joins this attempt, not the one that has failed.
            token = AMBIENT.set(context)
            try:
                return await call_next(context)
            except Exception as error:
                next_wait = tries.wait_after(error, context)
                if next_wait is None:
                    raise
                wait = next_wait
            finally:
                AMBIENT.reset(token)

    def may_retry(self, error: BaseException, state: RetryCallState) -> bool:
        """Whether another attempt may help against this error, and is safe."""
        inside = _inside(error)
        if inside:
            return all(self.may_retry(one, state) for one in inside)
        if not isinstance(error, Exception) or isinstance(error, _NEVER):
            return False
        if isinstance(error, CommitOutcomeUnknownError):
            return any(issubclass(one, CommitOutcomeUnknownError) for one in self._on or ())
        if self._on is not None:
            return isinstance(error, self._on)
        if self._retry is None:
            return True
        with _outcome(state, error):
            return bool(self._retry(state))

    def must_stop(self, state: RetryCallState) -> bool:
        """Whether this was the last attempt."""
        if self._stop is not None:
            return bool(self._stop(state))
        return self._attempts is not None and state.attempt_number >= self._attempts

    def wait_before_next(self, state: RetryCallState) -> float:
        """Seconds to wait before the next attempt."""
        if self._wait is None:
            from tenacity import wait_random_exponential

            self._wait = wait_random_exponential(multiplier=0.05, max=2)
        return float(self._wait(state))


class _Tries:
    """The attempts at one message, from the first failure on."""

    def __init__(self, policy: RetryMiddleware, started: float) -> None:
        from tenacity import RetryCallState

        self._policy = policy
        self._state = RetryCallState(retry_object=cast("Any", None), fn=None, args=(), kwargs={})
        if started:
            self._state.start_time = started

    @property
    def number(self) -> int:
        """The number of the attempt that comes next, or is under way."""
        return self._state.attempt_number

    def wait_after(self, error: Exception, context: Context) -> float | None:
        """Seconds to wait before the next attempt; None if there is none, and the error is to be raised."""
        policy, state, unit = self._policy, self._state, context.begun_unit
        if unit is not None and (unit.committed or unit.handed_over):
            return None
        if not policy.may_retry(error, state):
            return None
        # Wait before stop, as tenacity does: stop_before_delay looks at the wait.
        with _outcome(state, _only_leaf(error)):
            state.upcoming_sleep = policy.wait_before_next(state)
            stop = policy.must_stop(state)
        if stop:
            if state.attempt_number > 1:
                error.add_note(f"{type(context.message).__name__} failed in each of {state.attempt_number} attempts")
            return None
        wait = state.upcoming_sleep
        state.idle_for += wait
        state.prepare_for_next_attempt()
        context.note("retry", attempt=state.attempt_number, error=type(error).__name__, wait=wait)
        return wait


@contextmanager
def _outcome(state: RetryCallState, error: BaseException) -> Generator[None]:
    """Let tenacity's strategies see the error; no longer, because what keeps an exception keeps its contexts."""
    state.set_exception((type(error), error, error.__traceback__))
    try:
        yield
    finally:
        state.outcome = None


def _only_leaf(error: BaseException) -> BaseException:
    """What a group of one holds, for strategies that look at the error."""
    while len(inside := _inside(error)) == 1:
        error = inside[0]
    return error


def _inside(error: BaseException) -> tuple[BaseException, ...]:
    """The errors of a group, none for any other error."""
    group: Any = error
    inside: tuple[BaseException, ...] = group.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return inside
