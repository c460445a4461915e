"""What TransactionMiddleware can do with a transaction beside leaving its context manager.

A unit of work is any callable that gives an async context manager which commits when it is left without an error and
rolls back otherwise. That is enough for every library. Where the library is known, more can be told apart: whether the
handler committed by itself, whether an error came before COMMIT or instead of its answer, and savepoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

__all__ = ["TransactionControl", "check_engine_of", "control_of", "yielded_by"]


class TransactionControl(Protocol):
    """One open transaction of a library that is known."""

    def watch_commit(self) -> None:
        """Take notice from here on of a commit, whoever does it."""
        ...

    @property
    def committed(self) -> bool:
        """Whether the transaction has been committed since it is watched."""
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

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Released when left, rolled back when left by an error."""
        ...


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
