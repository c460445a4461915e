"""Ends what a scope has made: in reverse order, all of it, whatever fails on the way."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["close_all", "closing_method"]


def closing_method(made: type) -> str | None:
    """`aclose` or `close`, whichever objects of this type can be ended by, without arguments; None for neither."""
    for name in ("aclose", "close"):
        method = getattr(made, name, None)
        if callable(method) and _takes_only_self(method):
            return name
    return None


def _takes_only_self(method: Any) -> bool:
    try:
        asked = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):  # written in C, without a signature
        return True
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(it.default is not it.empty or it.kind in optional for it in asked)


async def close_all(made: Sequence[tuple[Any, str]]) -> None:
    """End these objects by these methods, last first.

    One that fails does not keep the others from being ended. What failed is raised afterwards, in a group if it is more
    than one; a cancellation goes before it. (`AsyncExitStack` would raise the last failure alone.)
    """
    failures: list[BaseException] = []
    for thing, method in reversed(made):
        try:
            ended = getattr(thing, method)()
            if inspect.isawaitable(ended):
                await ended
        except BaseException as error:  # noqa: BLE001  # raised below, when the rest is ended
            failures.append(error)
    try:
        if failures:
            raise _combined(failures)
    finally:
        # The error's traceback holds this frame: without this, a cycle keeps what was ended alive.
        del failures


def _combined(failures: Sequence[BaseException]) -> BaseException:
    errors = [error for error in failures if isinstance(error, Exception)]
    if len(errors) < len(failures):
        return next(error for error in failures if not isinstance(error, Exception))
    return (
        errors[0]
        if len(errors) == 1
        else ExceptionGroup(f"{len(errors)} objects of a scope could not be ended", errors)
    )
