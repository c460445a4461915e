"""One transaction around the handler of a message and the events it emits: all of it is committed, or nothing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pipeline_mediator.concurrency import finish
from pipeline_mediator.errors import CommitOutcomeUnknownError, CommittedButNotPublishedError, ConfigurationError
from pipeline_mediator.pipeline import Once
from pipeline_mediator.unit import attempt
from pipeline_mediator.unit_of_work import check_engine_of, control_of, yielded_by

if TYPE_CHECKING:
    from pipeline_mediator.context import Context
    from pipeline_mediator.events import Event
    from pipeline_mediator.pipeline import Next
    from pipeline_mediator.unit import Unit
    from pipeline_mediator.unit_of_work import TransactionControl

__all__ = ["TransactionMiddleware", "UnitOfWork"]

logger = logging.getLogger(__name__)

UnitOfWork: TypeAlias = (
    Callable[[], AbstractAsyncContextManager[Any]] | Callable[["Context"], AbstractAsyncContextManager[Any]]
)
"""Gives an async context manager that commits when left, and rolls back when left by an error.

`async_sessionmaker.begin`, `AsyncEngine.begin`, or an `@asynccontextmanager` function, of the context if it wants one.
"""


class TransactionMiddleware:
    """Begins a transaction, walks the rest of the chain and the emitted events in it, and commits.

        TransactionMiddleware(async_sessionmaker(engine, expire_on_commit=False).begin)

    What the unit of work yields (a session, a connection) reaches the handlers through the scope. In this order: begin,
    the chain inside, the queued events until there are none, commit, close the scope, messages that waited for the
    commit, after-commit hooks. Any error before the commit rolls back. Once committed the work is final: a clean-up or a
    hook that fails is logged and noted, and a cancellation or a timeout that came during the commit is raised only after
    its answer.

    Messages sent from a handler join its transaction. If one fails, the whole is rolled back even if the handler caught
    the error (`TransactionDoomedError`); with `nested="savepoint"` each joined message has a savepoint of its own instead.

    Without an outbox, events for a broker are published after the commit, at most once: if that fails for good, it is
    logged and handed to `on_lost_event(event, error)`; with `on_publish_error="raise"`, `send` then raises
    `CommittedButNotPublishedError(result, events)`.

    `seconds` bounds each of commit, rollback, and the work after the commit. `yields` names the type of what the unit of
    work yields where it cannot be told from the callable.

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
        if not callable(unit_of_work):
            raise ConfigurationError(
                f"TransactionMiddleware takes a callable that gives an async context manager, such as sessions.begin, "
                f"not {type(unit_of_work).__name__}"
            )
        check_engine_of(unit_of_work)
        self.unit_of_work = unit_of_work
        self._begin: Callable[[Context], AbstractAsyncContextManager[Any]] = _taking_context(unit_of_work)
        self._savepoints = nested == "savepoint"
        self._raise_publish_error = on_publish_error == "raise"
        self._on_lost_event = on_lost_event
        self._seconds = seconds
        self._checked = False
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
            return await attempt(context, call_next)
        manager = self._begin(context)
        resource = await manager.__aenter__()
        running = _Running(context, unit, manager, control_of(resource), self._seconds)
        try:
            self._check_once(resource)
            running.begin(resource, self.unit_of_work, savepoints=self._savepoints)
            result = await call_next(context)
            await unit.walk_events()
            unit.refuse_if_doomed()
        except BaseException as error:
            await finish(running.roll_back(error), seconds=3 * self._seconds)
            raise
        lost = await finish(self._complete(running), seconds=3 * self._seconds)
        if lost and self._raise_publish_error:
            raise CommittedButNotPublishedError(result, lost)
        return result

    def _check_once(self, resource: object) -> None:
        """For a unit of work whose engine shows only in what it yields."""
        if not self._checked:
            check_engine_of(resource)
            self._checked = True

    async def _complete(self, running: _Running) -> list[Event]:
        """Commit and do what comes after it, in one step that a cancellation cannot cut in two."""
        await running.commit()
        return await running.after_commit(self._report_lost)

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
        unit: Unit,
        manager: AbstractAsyncContextManager[Any],
        control: TransactionControl | None,
        seconds: float,
    ) -> None:
        self._context = context
        self._unit = unit
        self._manager = manager
        self._control = control
        self._seconds = seconds

    def begin(self, resource: Any, unit_of_work: object, *, savepoints: bool) -> None:
        savepoint = None
        if self._control is not None:
            self._control.on_commit(self._unit.mark_committed)
            savepoint = self._control.savepoint
        if savepoints and savepoint is None:
            raise ConfigurationError(
                f'nested="savepoint" needs a session or connection of SQLAlchemy; {type(resource).__name__} has no '
                "savepoints that this library knows"
            )
        self._unit.begin(resource, unit_of_work, savepoint if savepoints else None)

    async def roll_back(self, error: BaseException) -> None:
        """Give everything back; what this raises itself is logged, because `error` is what happened first."""
        import anyio

        await self._unit.abandon(error)
        with anyio.move_on_after(self._seconds) as bound:
            await self._leave(error)
        if bound.cancelled_caught:
            logger.error("rolling back %s took longer than %g s", type(self._context.message).__name__, self._seconds)

    async def commit(self) -> None:
        """Commit; on return the work is final. An error rolls back and is raised."""
        try:
            if self._control is None:
                await self._manager.__aexit__(None, None, None)
            else:
                await self._control.flush()
                await self._send_commit(self._control)
        except BaseException as error:
            await self._unit.abandon(error)
            if self._control is not None:
                await self._leave(error)
            raise
        self._unit.mark_committed()
        self._unit.mark_ended()

    async def _send_commit(self, control: TransactionControl) -> None:
        import anyio

        try:
            with anyio.fail_after(self._seconds):
                await control.commit()
        except Exception as error:
            if isinstance(error, TimeoutError) or control.outcome_unknown(error):
                raise CommitOutcomeUnknownError(type(self._context.message)) from error
            raise

    async def after_commit(self, report_lost: Callable[[Event, Exception], Awaitable[None]]) -> list[Event]:
        """Close the scope and the transaction, then publish what waited and call the hooks. Nothing here raises."""
        import anyio

        unit = self._unit
        await unit.close_scope(None)
        if self._control is not None:
            await self._leave(None)
        lost: list[Event] = []
        with anyio.move_on_after(self._seconds):
            while unit.put_off:
                put_off = unit.put_off[0]
                try:
                    await put_off.context.mediator.walk_put_off(put_off)
                except Exception as error:
                    lost.append(put_off.message)
                    self._context.note("lost", event=type(put_off.message).__name__, error=type(error).__name__)
                    await report_lost(put_off.message, error)
                unit.put_off.pop(0)
            await unit.call_hooks()
        for put_off in unit.put_off:
            lost.append(put_off.message)
            await report_lost(put_off.message, TimeoutError(f"not published within {self._seconds:g} s"))
        unit.release()
        return lost

    async def _leave(self, error: BaseException | None) -> None:
        """Leave the context manager of a transaction whose outcome is decided."""
        try:
            if error is None:
                await self._manager.__aexit__(None, None, None)
            else:
                await self._manager.__aexit__(type(error), error, error.__traceback__)
        except Exception as failure:
            if failure is not error:
                logger.exception("closing the transaction of %s failed", type(self._context.message).__name__)
                self._context.note("closing the transaction failed", error=type(failure).__name__)


def _taking_context(unit_of_work: Callable[..., Any]) -> Callable[[Any], Any]:
    """The unit of work as a function of the context, whether it wants one or not."""
    try:
        parameters = list(inspect.signature(unit_of_work).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    wants = [p for p in parameters if p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    return unit_of_work if wants else lambda _context: unit_of_work()
