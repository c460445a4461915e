"""What TransactionMiddleware can do with a transaction beside leaving its context manager.

A unit of work is any callable that gives an async context manager which commits when it is left without an error and
rolls back otherwise. That is enough for every library. Where the library is known, more can be told apart: whether the
handler committed by itself, whether an error came before COMMIT or instead of its answer, and savepoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from pipeline_mediator.staged import Staged

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from pipeline_mediator.unit import Unit

__all__ = [
    "CallersTransaction",
    "TransactionControl",
    "callers_transaction",
    "check_engine_of",
    "control_of",
    "yielded_by",
]


class TransactionControl(Protocol):
    """One open transaction of a library that is known."""

    def watch(
        self, before_commit: Callable[[], Awaitable[None] | None], after_commit: Callable[[], None] | None = None
    ) -> None:
        """Take notice from here on of a commit, whoever does it.

        What `before_commit` returns is awaited first, and may still execute statements; its error prevents the commit.
        `after_commit` is called where the library tells of it.
        """
        ...

    @property
    def committed(self) -> bool:
        """Whether the transaction has been committed since it is watched."""
        ...

    async def begin(self) -> None:
        """Begin where that has only been promised: without a transaction there is nothing to commit."""
        ...

    async def flush(self) -> None:
        """Write what is still in memory; an error here leaves nothing committed."""
        ...

    async def commit(self) -> None:
        """Send COMMIT and await its answer; nothing where the handler has committed already."""
        ...

    def outcome_unknown(self, error: BaseException, /) -> bool:
        """Whether this error of `commit` means that no answer came back."""
        ...

    def place(self) -> Callable[[], bool]:
        """A function that tells, asked later, whether what is done now is still part of the transaction.

        It is not, once the transaction was rolled back, or a savepoint that is open now.
        """
        ...

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Released when left, rolled back when left by an error."""
        ...


class CallersTransaction:
    """A transaction that the caller commits, and what was sent in it has staged for that commit."""

    def __init__(self, resource: object, control: TransactionControl) -> None:
        self.resource = resource
        self.control = control
        self.staged = Staged(resource, control.place)
        self.attempts: list[Unit] = []
        """Those at work in it; a handler may ask for the commit."""
        control.watch(self._before_commit, self.staged.committed)

    async def take(self, unit: Unit) -> None:
        """An attempt begins in it."""
        await self.control.begin()
        unit.callers = self
        unit.begin(unit.resource, unit.unit_of_work, place=self.control.place)
        self.attempts.append(unit)

    async def absorb(self, staged: Staged) -> None:
        """Take over what an attempt has staged, for the caller's commit."""
        await self.control.begin()  # a handler may have ended the one before
        self.staged.absorb(staged)

    def _before_commit(self) -> Awaitable[None] | None:
        steps = [step for unit in self.attempts if (step := unit.before_commit()) is not None]
        return self._settle(steps) if steps or self.staged else None

    async def _settle(self, steps: Sequence[Awaitable[None]]) -> None:
        await self.staged.write()
        for step in steps:
            await step


_CALLERS: WeakValueDictionary[int, CallersTransaction] = WeakValueDictionary()
"""By the id of the session or connection, which holds what it is watched by, and so keeps its entry alive."""


def callers_transaction(resource: object) -> CallersTransaction | None:
    """What is known of a transaction that was handed to `send`; None for a library that is not known."""
    callers = _CALLERS.get(id(resource))
    if callers is not None and callers.resource is resource:
        return callers
    control = control_of(resource)
    if control is None:
        return None
    callers = _CALLERS[id(resource)] = CallersTransaction(resource, control)
    return callers


def control_of(resource: object) -> TransactionControl | None:
    """The control of what a unit of work yielded; None for a library that is not known."""
    if not _is_of_sqlalchemy(resource):
        return None
    from pipeline_mediator.unit_of_work.sqlalchemy import control_of as sqlalchemy_control_of

    return sqlalchemy_control_of(resource)


def check_engine_of(source: object) -> bool:
    """Raise `DatabaseNotPreparedError` if this unit of work, or what it yielded, would lose updates.

    False if its engine cannot be told.
    """
    owner = getattr(source, "__self__", source)
    if not _is_of_sqlalchemy(owner):
        return False
    from pipeline_mediator.unit_of_work.sqlalchemy import check_engine_of as check_sqlalchemy_engine_of

    return check_sqlalchemy_engine_of(owner)


def yielded_by(unit_of_work: object) -> type | None:
    """The type that a unit of work yields, as far as it can be told before it is called."""
    owner = getattr(unit_of_work, "__self__", None)
    if _is_of_sqlalchemy(owner):
        from pipeline_mediator.unit_of_work.sqlalchemy import yielded_by_method_of

        return yielded_by_method_of(owner)
    return _annotated(unit_of_work)


def _annotated(unit_of_work: object) -> type | None:
    """The T of `-> AsyncGenerator[T]`, under `@asynccontextmanager` too."""
    import inspect
    import typing
    from collections import abc

    function: Any = inspect.unwrap(unit_of_work) if callable(unit_of_work) else unit_of_work
    returned = getattr(function, "__annotations__", {}).get("return")
    if isinstance(returned, str):
        # By itself: what only a type checker imports for the parameters does not matter here, nor do the iterators.
        names = {**vars(abc), **getattr(function, "__globals__", {})}
        try:
            returned = eval(returned, names)  # noqa: S307 - the application's own source
        except (NameError, TypeError, AttributeError, SyntaxError):
            return None
    arguments = typing.get_args(returned)
    return arguments[0] if arguments and isinstance(arguments[0], type) else None


def _is_of_sqlalchemy(thing: object) -> bool:
    # By name, so that SQLAlchemy is imported only where the application has done so already.
    return any(base.__module__.startswith("sqlalchemy.") for base in type(thing).__mro__)
