"""One transaction around the handler of a message and the events it emits: all of it is committed, or nothing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import (
    CommitOutcomeUnknownError,
    CommittedButNotPublishedError,
    ConfigurationError,
    name_of,
)
from pipeline_mediator.pipeline import Once
from pipeline_mediator.unit import CLOSE_SECONDS, attempt
from pipeline_mediator.unit_of_work import callers_transaction, check_engine_of, control_of, yielded_by

if TYPE_CHECKING:
    from pipeline_mediator.context import Context
    from pipeline_mediator.events import Event
    from pipeline_mediator.pipeline import Next
    from pipeline_mediator.unit import PutOff
    from pipeline_mediator.unit_of_work import TransactionControl

__all__ = ["TransactionMiddleware", "UnitOfWork"]

logger = logging.getLogger(__name__)

UnitOfWork: TypeAlias = (
    Callable[[], AbstractAsyncContextManager[Any]] | Callable[["Context"], AbstractAsyncContextManager[Any]]
)
"""Gives an async context manager that commits when left, and rolls back when left by an error.

`async_sessionmaker.begin`, `AsyncEngine.begin`, or an `@asynccontextmanager` function, of the context if it wants one.
On asyncio it is left in another task than it was entered in, so that a cancellation cannot cut the commit off: no
cancel scope, task group or token of a context variable may span its `yield`.
"""


class TransactionMiddleware:
    """Begins a transaction, walks the rest of the chain and the emitted events in it, and commits.

        TransactionMiddleware(async_sessionmaker(engine, expire_on_commit=False).begin)

    What the unit of work yields (a session, a connection) reaches the handlers through the scope. In this order:
    begin, the chain inside, the queued events until there are none, commit, close the scope, messages that waited for
    the commit, after-commit hooks. Any error before the commit rolls back. Once committed the work is final: a clean-up
    or a hook that fails is logged and noted, and a cancellation or a timeout that came during the commit takes effect
    only after its answer.

    Messages sent from a handler join its transaction. If one fails, the whole is rolled back even if the handler caught
    the error (`TransactionDoomedError`); with `nested="savepoint"` each joined message has a savepoint of its own
    instead. Messages sent from a task that the handler started have a transaction of their own; on SQLite that one
    waits for the handler's lock, so there the handler must not wait for the task.

    Without an outbox, events for a broker are published after the commit, at most once: if that fails for good, it is
    logged and handed to `on_lost_event(event, error)`; with `on_publish_error="raise"`, `send` then raises
    `CommittedButNotPublishedError(result, events)`.

    `seconds` bounds each of commit, rollback, publishing and hooks. `yields` names the type of what the unit of work
    yields where it cannot be told from the callable.

    Raises `DatabaseNotPreparedError` for an SQLite engine that would lose updates, `CommitOutcomeUnknownError` if the
    connection dies between COMMIT and its answer.
    """

    role: ClassVar[str] = "transaction"
    rules: ClassVar = (Once("an inner transaction would commit what the outer one still may roll back"),)

    def __init__(
        self,
        unit_of_work: UnitOfWork,
        *,
        nested: Literal["join", "savepoint"] = "join",
        on_publish_error: Literal["log", "raise"] = "log",
        on_lost_event: Callable[[Event, Exception], Awaitable[None] | None] | None = None,
        yields: type | None = None,
        seconds: float = 30.0,
    ) -> None:
        if nested not in {"join", "savepoint"}:
            raise ConfigurationError(f'TransactionMiddleware(nested={nested!r}): it is "join" or "savepoint"')
        if on_publish_error not in {"log", "raise"}:
            raise ConfigurationError(
                f'TransactionMiddleware(on_publish_error={on_publish_error!r}): it is "log" or "raise"'
            )
        if not seconds > 0:
            raise ConfigurationError(f"TransactionMiddleware(seconds={seconds!r}): it must be above 0")
        self._begin = _taking_context(unit_of_work)
        self._engine_is_safe = check_engine_of(unit_of_work)
        self.unit_of_work = unit_of_work
        self._savepoints = nested == "savepoint"
        self._raise_publish_error = on_publish_error == "raise"
        self._on_lost_event = on_lost_event
        self._seconds = seconds
        yielded = yields or yielded_by(unit_of_work)
        self.seeds: tuple[type, ...] = () if yielded is None else (yielded,)

    @property
    def summary(self) -> str:
        """What it yields, and how joined messages are treated."""
        yielded = self.seeds[0].__name__ if self.seeds else ""
        return f"{yielded}, savepoint per joined message" if self._savepoints else yielded

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain in a transaction."""
        if context.parent is not None:
            return await call_next(context)
        unit = context.unit
        if unit.external:
            return await self._walk_in_callers(context, call_next)
        manager = self._begin(context)
        resource = await manager.__aenter__()
        running = _Running(context, manager, control_of(resource), self._seconds)
        try:
            if not self._engine_is_safe:
                check_engine_of(resource)
            running.begin(resource, self.unit_of_work, savepoints=self._savepoints)
            result = await call_next(context)
            await unit.walk_events()
            await running.flush()
        except BaseException as error:
            await finish(running.roll_back(error), seconds=running.bound)
            raise
        # One step, so that a cancellation cannot come between the commit and what belongs to it.
        lost = await finish(running.complete(self._report_lost), seconds=running.bound)
        if lost and self._raise_publish_error:
            raise CommittedButNotPublishedError(result, lost)
        return result

    async def _walk_in_callers(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain in a transaction that the caller commits."""
        unit = context.unit
        callers = callers_transaction(unit.resource)
        if callers is not None:
            await callers.take(unit)
        if self._savepoints:
            unit.savepoint = _savepoint_of(unit.resource, None if callers is None else callers.control)
        return await attempt(context, call_next)

    async def _report_lost(self, event: Event, error: Exception) -> None:
        logger.error(
            "%s was committed but not published, and is lost: %s. An outbox would have kept it.",
            type(event).__name__,
            type(error).__name__,
        )
        if self._on_lost_event is not None:
            try:
                called = self._on_lost_event(event, error)
                if called is not None:
                    await called
            except Exception:
                logger.exception("on_lost_event failed for %s", type(event).__name__)


class _Running:
    """One transaction, from its begin to its end."""

    def __init__(
        self,
        context: Context,
        manager: AbstractAsyncContextManager[Any],
        control: TransactionControl | None,
        seconds: float,
    ) -> None:
        self._context = context
        self._unit = context.unit
        self._manager = manager
        self._control = control
        self._seconds = seconds
        self._left = False
        self.bound = CLOSE_SECONDS + 6 * seconds
        """Seconds after which an end that ignores its own limits is given up: more than all of them together."""

    def begin(self, resource: Any, unit_of_work: object, *, savepoints: bool) -> None:
        place = None
        if self._control is not None:
            self._control.watch(self._unit.before_commit)
            place = self._control.place
        savepoint = _savepoint_of(resource, self._control) if savepoints else None
        self._unit.begin(resource, unit_of_work, savepoint, place)

    async def flush(self) -> None:
        """Write what is still in memory while a timeout or a cancellation may still interrupt it."""
        if self._control is not None:
            await self._control.flush()
        await self._unit.write_staged()

    async def roll_back(self, error: BaseException) -> None:
        """Give everything back; what this raises itself is logged, because `error` is what happened first."""
        if self._control is not None and self._control.committed:
            self._unit.mark_committed()
        await self._unit.abandon(error)
        await self._leave(error)

    async def complete(self, report_lost: Callable[[Event, Exception], Awaitable[None]]) -> list[Event]:
        """Commit and do what comes after it; only the commit raises. Gives the events that were lost."""
        await self._commit()
        await self._unit.close_scope(None)
        await self._leave(None)
        lost = await self._publish(report_lost)
        await self._call_hooks()
        self._unit.release()
        return lost

    async def _commit(self) -> None:
        """On return the work is final. An error rolls back and is raised."""
        import anyio

        try:
            with anyio.fail_after(self._seconds):
                if self._control is None:
                    self._left = True
                    await self._manager.__aexit__(None, None, None)
                else:
                    await self._control.commit()
        except BaseException as error:
            await self.roll_back(error)
            if self._no_answer(error):
                message: object = self._context.message
                raise CommitOutcomeUnknownError(type(message)) from error
            raise
        self._unit.mark_committed()
        self._unit.mark_ended()

    def _no_answer(self, error: BaseException) -> bool:
        if isinstance(error, TimeoutError):
            return True
        return self._control is not None and self._control.outcome_unknown(error)

    async def _publish(self, report_lost: Callable[[Event, Exception], Awaitable[None]]) -> list[Event]:
        """Walk the messages that waited for the commit."""
        import anyio

        deadline = anyio.current_time() + self._seconds
        lost: list[Event] = []
        for put_off in self._unit.put_off:
            error = await self._walk_put_off(put_off, deadline)
            if error is not None:
                lost.append(put_off.message)
                self._context.note("lost", event=type(put_off.message).__name__, error=type(error).__name__)
                with anyio.CancelScope(deadline=deadline + self._seconds):
                    await report_lost(put_off.message, error)
        return lost

    async def _walk_put_off(self, put_off: PutOff, deadline: float) -> Exception | None:
        import anyio

        with anyio.CancelScope(deadline=deadline):
            try:
                await put_off.context.mediator.walk_put_off(put_off)
            except Exception as error:  # noqa: BLE001 - reported as lost
                return error
            return None
        return TimeoutError(f"not published within {self._seconds:g} s after the commit")

    async def _call_hooks(self) -> None:
        import anyio

        with anyio.move_on_after(self._seconds):
            await self._unit.call_hooks()
        if self._unit.hooks:
            logger.error(
                "%d after-commit hooks of %s had not ended after %g s and were given up",
                len(self._unit.hooks),
                type(self._context.message).__name__,
                self._seconds,
            )
            self._context.note("after-commit hooks given up", hooks=len(self._unit.hooks))

    async def _leave(self, error: BaseException | None) -> None:
        """Leave the context manager of a transaction whose outcome is decided; what that raises is logged."""
        import anyio

        if self._left:
            return
        try:
            with anyio.fail_after(self._seconds):
                if error is None:
                    await self._manager.__aexit__(None, None, None)
                else:
                    await self._manager.__aexit__(type(error), error, error.__traceback__)
        except Exception as failure:
            if failure is not error:
                logger.exception("closing the transaction of %s failed", type(self._context.message).__name__)
                self._context.note("closing the transaction failed", error=type(failure).__name__)


def _savepoint_of(
    resource: object, control: TransactionControl | None
) -> Callable[[], AbstractAsyncContextManager[Any]]:
    if control is None:
        raise ConfigurationError(
            f'nested="savepoint" needs a session or connection of SQLAlchemy; {type(resource).__name__} has no '
            "savepoints that this library knows"
        )
    return control.savepoint


def _taking_context(unit_of_work: UnitOfWork) -> Callable[[Context], AbstractAsyncContextManager[Any]]:
    """The unit of work as a function of the context, whether it wants one or not."""
    function: Callable[..., Any] = unit_of_work
    if not callable(unit_of_work):
        raise ConfigurationError(
            "TransactionMiddleware takes a callable that gives an async context manager, such as sessions.begin, not "
            f"{name_of(unit_of_work)}"
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{name_of(function)} gives no async context manager: decorate it with contextlib.asynccontextmanager, and "
            "let it yield the session once"
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    wanted = [p for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    if len(wanted) > 1 or any(p.kind is p.KEYWORD_ONLY for p in wanted):
        raise ConfigurationError(
            f"{name_of(function)} asks for {', '.join(p.name for p in wanted)}; a unit of work is called with the "
            "context, or with nothing"
        )
    return function if wanted else lambda _context: function()
