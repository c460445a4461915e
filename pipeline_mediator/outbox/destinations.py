"""Destinations that take no messages at the moment, each left alone for a while of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import anyio

from pipeline_mediator.trouble import Trouble

if TYPE_CHECKING:
    from tenacity.wait import WaitBaseT

__all__ = ["Destinations"]

_SHARE: Final = 4
"""A destination that hangs holds the rows of others in the same batch: it is left alone this much longer than tried."""


class Destinations:
    """A circuit breaker for each destination, in memory of this relay alone.

    One that has taken nothing is left out for a pause. Then it is open to one message, the probe: taken, all is well;
    refused, the next pause is longer.
    """

    def __init__(self, pauses: WaitBaseT) -> None:
        self._pauses = pauses
        self._closed: dict[str, _Closed] = {}
        self._left_out: list[_Closed] = []
        """Since it was last asked: a pause that has ended meanwhile is one that nobody has looked after yet."""

    def left_out(self) -> list[str]:
        """Those that are left alone now."""
        now = anyio.current_time()
        found = {name: closed for name, closed in self._closed.items() if closed.until > now}
        self._left_out = list(found.values())
        return list(found)

    def next_probe(self) -> float:
        """Seconds until the first of those that were left out may be tried again; infinite without one."""
        now = anyio.current_time()
        return min((max(0.0, one.until - now) for one in self._left_out), default=math.inf)

    def failures_of(self, name: str) -> int:
        """How often it has refused in a row; 0 for one that works, as far as is known."""
        closed = self._closed.get(name)
        return 0 if closed is None else closed.trouble.failures

    def refused(self, name: str, error: BaseException, tried: float) -> None:
        """It took nothing, and needed `tried` seconds to say so."""
        closed = self._closed.get(name)
        if closed is None:
            closed = self._closed[name] = _Closed(
                Trouble(f"{name!r} takes no messages", f"{name!r} takes messages again", self._pauses)
            )
        pause = closed.trouble.again(error, at_least=_SHARE * tried)
        closed.until = anyio.current_time() + pause
        self._left_out.append(closed)

    def accepted(self, name: str) -> None:
        """It took a message."""
        if self._closed and (closed := self._closed.pop(name, None)) is not None:
            closed.trouble.over()


class _Closed:
    __slots__ = ("trouble", "until")

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.until = 0.0
