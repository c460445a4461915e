"""A log line when a message begins, when it ends and how, and for what is noted on the way."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_mediator.errors import ConfigurationError, PermanentError
from pipeline_mediator.telemetry import error_type, plain_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next, Rule

__all__ = ["LoggingMiddleware"]

module_logger = logging.getLogger(__name__)


class LoggingMiddleware:
    """Logs what happens to each message.

        LoggingMiddleware()
        LoggingMiddleware(logging.getLogger("shop"), level=logging.DEBUG, slow=0.5)

    DEBUG: it begins. `level`: it has ended, was cancelled, or something was noted (another attempt, a duplicate).
    WARNING: it took longer than `slow` seconds (not for streams, whose pace the caller sets), or failed with a
    `PermanentError`, which is the sender's fault. ERROR: it failed with anything else.

    A failure is logged by the type of its error: the error goes on to the caller, who has its text and its stack, and
    both may quote the message. `stack=True` logs them, `payload=True` appends the message to every line.

    Each record has, as `extra`: message_type, message_id, correlation_id, outcome ("started", "noted", "done", "failed"
    or "cancelled"), duration (seconds), attempt and error_type. What does not apply is None. So is `attempt` where
    `level` is not enabled for the logger: then nobody counts, and a message that ends well costs next to nothing.

    Raises `ConfigurationError` for a `slow` that is not above 0.
    """

    role: ClassVar[str] = "logging"
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        level: int = logging.INFO,
        slow: float | None = None,
        payload: bool = False,
        stack: bool = False,
    ) -> None:
        if slow is not None and not slow > 0:
            raise ConfigurationError(f"LoggingMiddleware(slow={slow!r}): it must be above 0 s, or None for no limit")
        self.logger = module_logger if logger is None else logger
        self.level = level
        self.slow = slow
        self.payload = payload
        self.stack = stack

    @property
    def summary(self) -> str:
        """Level and limit."""
        name = logging.getLevelName(self.level)
        return name if self.slow is None else f"{name}, slow from {self.slow:g} s"

    def for_route(self, route: Route) -> _Logged:
        """The lines of this route."""
        return _Logged(self, route)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Log around the rest of the chain; a mediator compiles `for_route` instead."""
        logged = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if logged is None else logged(context, call_next))


class _Logged:
    """The lines of one route."""

    def __init__(self, settings: LoggingMiddleware, route: Route) -> None:
        self._settings = settings
        self._logger = settings.logger
        # A relay publishes many batches a second.
        self._level = min(settings.level, logging.DEBUG) if route.origin == "relay" else settings.level
        self._slow = None if route.kind == "stream" else settings.slow
        self._type = route.message_type.__name__
        self._name = self._type
        if route.destination is not None:
            self._name += f" to {route.destination}"
        elif route.origin != "local":
            self._name += f" from {route.origin}"

    async def __call__(self, context: Context, call_next: Next) -> Any:
        if self._logger.isEnabledFor(self._level):
            return await self._walk(context, call_next)
        started = perf_counter()
        try:
            result = await call_next(context)
        except BaseException as error:
            self._log_failure(error, context, perf_counter() - started, None)
            raise
        if self._slow is not None and (duration := perf_counter() - started) > self._slow:
            self._log_end(context, duration, None)
        return result

    async def _walk(self, context: Context, call_next: Next) -> Any:
        notes = _Notes(self, context)
        context.on_note(notes)
        self.log(logging.DEBUG, "%s started", (), context, "started", attempt=context.attempt)
        started = perf_counter()
        try:
            result = await call_next(context)
        except BaseException as error:
            self._log_failure(error, context, perf_counter() - started, notes.attempt)
            raise
        finally:
            notes.close()
        self._log_end(context, perf_counter() - started, notes.attempt)
        return result

    def _log_end(self, context: Context, duration: float, attempt: int | None) -> None:
        text = "%s done in %.1f ms"
        if attempt is not None and attempt > 1:
            text += f", attempt {attempt}"
        level = self._level
        if self._slow is not None and duration > self._slow:
            level = max(level, logging.WARNING)
            text += f", more than {self._slow:g} s"
        self.log(level, text, (duration * 1000,), context, "done", duration=duration, attempt=attempt)

    def _log_failure(self, error: BaseException, context: Context, duration: float, attempt: int | None) -> None:
        kind = error_type(error)
        text = "%s failed after %.1f ms with %s"
        if attempt is not None and attempt > 1:
            text += f", attempt {attempt}"
        arguments: tuple[object, ...] = (duration * 1000, kind)
        level, outcome = logging.ERROR, "failed"
        if isinstance(error, PermanentError):
            level = logging.WARNING
        elif not isinstance(error, Exception):
            text, arguments = "%s cancelled after %.1f ms", (duration * 1000,)
            level, outcome = self._level, "cancelled"
        stack = error if self._settings.stack and outcome == "failed" else None
        self.log(
            level, text, arguments, context, outcome, stack=stack, duration=duration, attempt=attempt, error_type=kind
        )

    def log(
        self,
        level: int,
        text: str,
        arguments: tuple[object, ...],
        context: Context,
        outcome: str,
        *,
        stack: BaseException | None = None,
        **facts: object,
    ) -> None:
        """Log one line; ids are made, and anything is formatted, only if somebody listens at that level."""
        if not self._logger.isEnabledFor(level):
            return
        if self._settings.payload:
            text += ": %r"
            arguments = (*arguments, context.message)
        extra = {
            "message_type": self._type,
            "message_id": context.message_id,
            "correlation_id": context.correlation_id,
            "outcome": outcome,
            "duration": None,
            "attempt": None,
            "error_type": None,
            **facts,
        }
        self._logger.log(level, text, self._name, *arguments, exc_info=stack, extra=extra)

    def log_note(self, name: str, facts: Mapping[str, Any], context: Context, attempt: int) -> None:
        """Log a note with its facts, such as "PlaceOrder: retry (attempt=2, error=ValueError, wait=0.04)"."""
        shown = ", ".join(f"{fact}={_short(value)}" for fact, value in plain_facts(facts).items())
        self.log(self._level, "%s: %s%s", (name, f" ({shown})" if shown else ""), context, "noted", attempt=attempt)


class _Notes:
    """Logs the notes of a message while it is walked, and keeps the number of the attempt."""

    __slots__ = ("_context", "_logged", "attempt")

    def __init__(self, logged: _Logged, context: Context) -> None:
        self._logged = logged
        self._context: Context | None = context
        self.attempt = context.attempt

    def __call__(self, name: str, facts: Mapping[str, Any]) -> None:
        if self._context is None:
            return
        self.attempt = facts.get("attempt", self.attempt)
        self._logged.log_note(name, facts, self._context, self.attempt)

    def close(self) -> None:
        # The context holds its listeners: this reference back would keep both until the garbage collector comes.
        self._context = None


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
