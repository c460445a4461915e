"""What belongs to one attempt at a message: its scope, transaction, queued events and what waits for the commit."""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline_mediator.concurrency import current_task, finish
from pipeline_mediator.errors import (
    EmitError,
    TransactionDoomedError,
    TransactionError,
    TransactionFinishedError,
)
from pipeline_mediator.staged import Staged

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from pipeline_mediator.container import Scope
    from pipeline_mediator.context import Context, Given
    from pipeline_mediator.events import Event
    from pipeline_mediator.outbox.protocol import OutboxStore, StoredMessage
    from pipeline_mediator.pipeline import Chain, Next
    from pipeline_mediator.unit_of_work import CallersTransaction

__all__ = ["ENDED", "Hook", "PutOff", "QueuedEvent", "Unit", "attempt", "seed_types"]

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000
"""Events that may wait in one attempt; more is an event handler that emits what it handles."""

CLOSE_SECONDS = 30.0
"""How long closing a scope may take before it is given up."""


class QueuedEvent(NamedTuple):
    """An event that `context.emit` queued, and the message that emitted it."""

    event: Event
    key: str | None
    context: Context


class PutOff(NamedTuple):
    """A message for a broker that waits until its transaction has committed, and what caused it."""

    chain: Chain
    message: Any
    given: Given
    context: Context


class Hook(NamedTuple):
    """What to call after the commit, and the message that asked for it."""

    call: Callable[[], Awaitable[object] | None]
    context: Context


class _Queues:
    """What waits in one attempt; made when first looked at, because in most nothing ever does."""

    __slots__ = ("events", "hooks", "put_off")

    def __init__(self) -> None:
        self.events: deque[QueuedEvent] = deque()
        self.hooks: list[Hook] = []
        self.put_off: list[PutOff] = []


class Unit:
    """One attempt: everything in it happens, or nothing.

    Whoever began the attempt ends it: TransactionMiddleware where there is one, else the attempt's own link or the
    root. A unit that has ended lets go of everything, so that a task which outlives its message holds nothing open.
    """

    __slots__ = (
        "__weakref__",
        "_doomed_by",
        "_joinable",
        "_place",
        "_previous",
        "_queues",
        "callers",
        "committed",
        "external",
        "handed_over",
        "open",
        "resource",
        "root",
        "savepoint",
        "scope",
        "staged",
        "task",
        "unit_of_work",
        "walked",
    )

    def __init__(self, root: Context | None, task: object = None) -> None:
        self.root = root
        self.task = task
        """The task that the attempt runs in, from where calls through the mediator join it; None once it has ended."""
        self._joinable = task is not None
        self.open = True
        self.walked = False
        """Whether the queue has been walked to its end; no event is taken after that."""
        self.committed = False
        """Whether work of this message has been committed, in this attempt or an earlier one: never repeat it."""
        self.handed_over = False
        """Whether items of a stream have reached the caller: they cannot be taken back."""
        self.scope: Scope | None = None
        self.resource: object = None
        """What the unit of work yielded: a session, a connection."""
        self.unit_of_work: object = None
        self.external = False
        """Whether the transaction is the caller's, who commits it."""
        self.savepoint: Callable[[], AbstractAsyncContextManager[Any]] | None = None
        self._place: Callable[[], Callable[[], bool] | None] | None = None
        self.callers: CallersTransaction | None = None
        """What the caller's transaction holds for its commit, where one was handed to `send`."""
        self.staged: Staged | None = None
        """Messages that the transaction shall store."""
        self._queues: _Queues | None = None
        self._doomed_by: tuple[type, str] | None = None
        self._previous: Unit | None = None

    def succeed(self, root: Context) -> Unit:
        """The unit of a further attempt at the same message."""
        unit = Unit(root, current_task() if self._joinable else None)
        unit._previous = None if self is ENDED else self
        return unit

    # -- the queues ----------------------------------------------------------------------------------------------------

    @property
    def events(self) -> deque[QueuedEvent]:
        """The events that wait to be walked."""
        return self._waiting().events

    @property
    def hooks(self) -> list[Hook]:
        """What to call after the commit."""
        return self._waiting().hooks

    @property
    def put_off(self) -> list[PutOff]:
        """The messages for a broker that wait for the commit."""
        return self._waiting().put_off

    def _waiting(self) -> _Queues:
        if self._queues is None:
            self._queues = _Queues()
        return self._queues

    def queue(self, event: Event, key: str | None, context: Context) -> None:
        """Take an event to walk when the handler has returned."""
        if self.walked or not self.open:
            raise TransactionFinishedError(
                f"{type(event).__name__} was emitted after the events of this attempt had been walked: it would be "
                "lost. Emit before the handler returns, or call `await mediator.emit(event)` for a message of its own."
            )
        if len(self.events) >= MAX_EVENTS:
            raise EmitError(
                f"{type(event).__name__}: {MAX_EVENTS} events already wait in this attempt. Does an event handler emit "
                "the event that it handles?"
            )
        self.events.append(QueuedEvent(event, key, context))

    async def walk_events(self) -> None:
        """Walk the queue, first in first out, until it is empty; events emitted meanwhile are walked too.

        Not in a transaction that may not commit: `TransactionDoomedError`.
        """
        await self._walk_queue()
        self.walked = True

    async def _walk_queue(self) -> None:
        walked = 0
        self._refuse_if_doomed()
        while self.events:
            walked += 1
            if walked > MAX_EVENTS:
                raise EmitError(
                    f"{MAX_EVENTS} events were walked in one attempt and {type(self.events[0].event).__name__} is "
                    "next. Does an event handler emit the event that it handles?"
                )
            queued = self.events.popleft()
            await queued.context.mediator.walk_queued(queued)
            self._refuse_if_doomed()

    def drop_events_of(self, context: Context) -> None:
        """Forget what a joined message, and those that joined it, left for later: it failed."""
        queues = self._queues
        if queues is not None:
            queues.events = deque(queued for queued in queues.events if not _descends(queued.context, context))
            queues.put_off = [later for later in queues.put_off if not _descends(later.context, context)]
            queues.hooks = [hook for hook in queues.hooks if not _descends(hook.context, context)]

    # -- the transaction -----------------------------------------------------------------------------------------------

    def begin(
        self,
        resource: object,
        unit_of_work: object,
        savepoint: Callable[[], Any] | None = None,
        place: Callable[[], Callable[[], bool] | None] | None = None,
    ) -> None:
        """A transaction is open: `resource` is what its unit of work yielded; `place` as in `Staged`."""
        self.resource = resource
        self.unit_of_work = unit_of_work
        self.savepoint = savepoint
        self._place = place

    def stage(self, store: OutboxStore, message: StoredMessage) -> None:
        """Take a message that the transaction shall store."""
        if not self.open or self.resource is None:
            raise TransactionFinishedError(
                f"{message.name} was emitted after its transaction had ended, so it cannot be stored in it"
            )
        if self.staged is None:
            self.staged = Staged(self.resource, self._place)
        self.staged.add(store, message)

    async def write_staged(self) -> None:
        """Write what is staged; in a transaction of the caller's its commit does that, if it can be told of one."""
        if not self.staged:
            return
        if self.callers is None:
            await self.staged.write()
        else:
            await self.callers.absorb(self.staged)

    def before_commit(self) -> Awaitable[None] | None:
        """What belongs into the transaction before a commit that a handler asks for; None if nothing does."""
        if self.open and (self._queues is not None or self.staged or self._doomed_by is not None):
            return self._settle()
        return None

    async def _settle(self) -> None:
        await self._walk_queue()
        if self.staged:
            await self.staged.write()

    def mark_committed(self) -> None:
        """Work of this message is in the database for good; outer middlewares see it on the unit that they hold."""
        unit: Unit | None = self
        while unit is not None:
            unit.committed = True
            unit = unit._previous
        if self.staged is not None:
            self.staged.committed()

    def doom(self, message_type: type, error: BaseException) -> None:
        """A joined message failed: whatever its caller does with the error, this transaction may not commit.

        Only the name of the error is kept: an exception holds its traceback, and that holds the contexts.
        """
        if self._doomed_by is None:
            self._doomed_by = (message_type, type(error).__name__)

    def _refuse_if_doomed(self) -> None:
        """A joined message failed and its caller went on."""
        if self._doomed_by is not None and self.root is not None:
            message_type, error = self._doomed_by
            root: object = self.root.message
            raise TransactionDoomedError(message_type, type(root), error)

    def add_hook(self, hook: Callable[[], Awaitable[object] | None], context: Context) -> None:
        """Take a hook to call after the commit; `context` is the message that asks for it."""
        if not self.open:
            raise TransactionFinishedError(
                "after_commit was called after the attempt had ended: the hook would never run"
            )
        if self.external:
            raise TransactionError(
                "after_commit inside send(..., transaction=...): the caller commits that transaction, and this library "
                "does not learn of it. Do it after your own commit."
            )
        self.hooks.append(Hook(hook, context))

    # -- scope and end -------------------------------------------------------------------------------------------------

    def open_scope(self) -> Scope:
        """The scope of this attempt, opened when the first handler needs it."""
        root = self.root
        if root is None or not self.open:
            raise TransactionFinishedError("a handler was resolved in an attempt that has already ended")
        seeds: dict[type, object] = {type(root): root}
        if self.resource is not None:
            yielded: type = type(self.resource)
            seeds.update(dict.fromkeys(seed_types(yielded), self.resource))
        self.scope = root.mediator.container.open(seeds)
        return self.scope

    async def end(self) -> None:
        """End an attempt that went well and commits nothing: walk the events, close the scope, call the hooks."""
        if not self.open:
            return
        if self.events or self._doomed_by is not None:
            await self.walk_events()
        if self.staged:
            await self.write_staged()
        self.mark_ended()
        try:
            if self.scope is not None and (closing := self._start_closing(None)) is not None:
                await self._finish_closing(closing)
            if self.hooks:
                await self.call_hooks()
        finally:
            self.release()

    def end_at_once(self) -> Awaitable[None] | None:
        """What `end` does, without a coroutine where there is nothing to await; else what to await."""
        if not self.open:
            return None
        if self._queues is not None or self.staged or self._doomed_by is not None:
            return self.end()
        self.mark_ended()
        closing = None if self.scope is None else self._start_closing(None)
        if closing is not None:
            return self._end_with(closing)
        self.release()
        return None

    async def _end_with(self, closing: Awaitable[None]) -> None:
        try:
            await self._finish_closing(closing)
        finally:
            self.release()

    async def abandon(self, error: BaseException) -> None:
        """End an attempt that failed: drop what was queued, close the scope."""
        if not self.open:
            return
        self.mark_ended()
        self._queues = None
        try:
            if self.scope is not None:
                await self.close_scope(error)
        finally:
            self.release()

    def mark_ended(self) -> None:
        """From here on nothing joins this attempt and nothing is queued in it."""
        if self.callers is not None:
            self.callers.attempts.remove(self)
            self.callers = None
        self.open = False
        self.walked = True
        self.task = None
        self.resource = None
        self.savepoint = None
        self._place = None

    def release(self) -> None:
        """Let go of the message: it holds this unit, and a cycle would keep both until the next collection."""
        self.root = None
        self.staged = None
        self._queues = None

    async def close_scope(self, error: BaseException | None) -> None:
        """Close the scope whatever happens to the caller; what clean-up raises is logged: the outcome is decided."""
        closing = self._start_closing(error)
        if closing is not None:
            await self._finish_closing(closing)

    def _start_closing(self, error: BaseException | None) -> Awaitable[None] | None:
        """Apart from the rest, because most scopes have nothing to await."""
        scope, self.scope = self.scope, None
        try:
            return None if scope is None else scope.close(error)
        except Exception as failure:  # noqa: BLE001 - reported
            self._report("scope clean-up failed", failure)
            return None

    async def _finish_closing(self, closing: Awaitable[None]) -> None:
        try:
            await finish(_awaited(closing), seconds=CLOSE_SECONDS)
        except Exception as failure:  # noqa: BLE001 - reported
            self._report("scope clean-up failed", failure)

    async def call_hooks(self) -> None:
        """Call the after-commit hooks in order; what one raises is logged, and the next one is called.

        A hook is taken off the queue when it has ended, so what is left after a cancellation did not run to its end.
        """
        while self.hooks:
            try:
                called = self.hooks[0].call()
                if called is not None:
                    await called
            except Exception as failure:  # noqa: BLE001 - reported
                self._report("after-commit hook failed", failure)
            del self.hooks[0]

    def _report(self, what: str, failure: Exception) -> None:
        """Log an error that must not change the outcome, and count it."""
        root = self.root
        name = "?" if root is None else type(root.message).__name__
        logger.error("%s for %s; its outcome stands", what, name, exc_info=failure)
        if root is not None:
            root.note(what)


ENDED = Unit(None)
"""What a message has whose attempt ended without anything having asked for a unit: nothing joins it any more."""
ENDED.mark_ended()


async def attempt(context: Context, call_next: Next) -> Any:
    """Begin and end an attempt where no transaction does: a link like any other.

    So that an attempt means the same with and without a transaction: the handler and the events that it emitted.
    """
    if context.parent is not None:
        return await call_next(context)
    try:
        result = await call_next(context)
        if context.begun_unit is not None and (ending := context.begun_unit.end_at_once()) is not None:
            await ending
    except BaseException as error:
        if context.begun_unit is not None:
            await context.begun_unit.abandon(error)
        raise
    finally:
        if context.begun_unit is None:
            context.begun_unit = ENDED
    return result


@cache
def seed_types(resource_type: type) -> tuple[type, ...]:
    """The types a scope provides what a unit of work yields under: its class, and the bases that mean something."""
    return tuple(base for base in resource_type.__mro__ if base.__module__ not in {"builtins", "typing", "abc"})


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable


def _descends(context: Context | None, ancestor: Context) -> bool:
    while context is not None:
        if context.is_same_message(ancestor):
            return True
        context = context.parent
    return False
