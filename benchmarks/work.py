"""The work that is the same in every library, and what an adapter says about one thing that is timed."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

__all__ = ["ANY", "COUNT", "NOTE", "ORDER", "RESULT", "AdapterError", "Subject", "classes", "copies"]

COUNT: Final = [0]
"""Every handler adds 1: after each timed loop it must have grown by what the loop asked for."""

RESULT: Final = ("done",)
"""What every handler of a request returns; made beforehand."""

ANY: Final[Any] = object()
"""Stands for a result that does not matter."""

ORDER: Final = 7
NOTE: Final = "leave at the door"
"""The two fields of every message."""


class AdapterError(Exception):
    """An adapter does not do the work that it is measured for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing that is timed: `await call(message)`, again and again."""

    call: Callable[[Any], Any]
    message: Any
    steps: tuple[Any, ...] = field(default=(), repr=False)
    """The functions that one call must run, in this order: middlewares from the outermost, then handlers."""
    handled: int = 1
    """How often COUNT grows by one call."""
    result: Any = RESULT
    new_message: Callable[[], Any] | None = None
    """Makes the message of each call, inside the timed loop; without it one message is sent every time."""
    awaited: bool = True
    """False for what is no coroutine."""


def copies(function: Any, number: int) -> list[Any]:
    """The same function several times, each with a code object of its own.

    Five middlewares of an application are five pieces of code, and CPython specialises each by itself. One function in
    five places would be something that nobody runs.
    """
    made: list[Any] = []
    for at in range(1, number + 1):
        code = function.__code__.replace(co_qualname=f"{function.__qualname__} {at}")
        copy = types.FunctionType(code, function.__globals__, f"{function.__name__}_{at}", function.__defaults__)
        copy.__annotations__ = dict(function.__annotations__)
        made.append(copy)
    return made


def classes(name: str, method: Any, number: int, *bases: Any, called: str = "handle") -> list[Any]:
    """Several classes that differ only in their names and in the code object of their one method."""
    made: list[Any] = []
    for at, copy in enumerate(copies(method, number), start=1):
        kind: Any = types.new_class(f"{name}{at}", bases, exec_body=partial(_fill, called, copy))
        made.append(kind)
    return made


def _fill(called: str, method: Any, namespace: dict[str, Any]) -> None:
    namespace["__module__"] = method.__module__
    namespace[called] = method
