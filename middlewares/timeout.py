"""A limit on how long one attempt at a message may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.pipeline import Inside, Outside

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next, Rule

__all__ = ["TimeoutMiddleware"]


class TimeoutMiddleware:
    """Cancels an attempt that takes longer than `seconds` and raises `TimeoutError`.

        TimeoutMiddleware(5.0)
        TimeoutMiddleware({Query: 1.0, PlaceOrder: 10.0}, default=5.0)     # the nearest base class wins

    It stands inside retry, so that each attempt has the whole time; `total=True` is for one that stands outside and
    limits all attempts together. It has no effect between the start of COMMIT and its answer, and cannot stop a plain
    function in a worker thread. None (the default) stands in no chain and costs nothing.
    """

    role = "timeout"

    # Mapping's key is invariant: with `type` for Any, a dict[type[PlaceOrder], ...] in a variable would be refused.
    def __init__(
        self,
        seconds: float | Mapping[Any, float] | None = None,
        *,
        default: float | None = None,
        total: bool = False,
    ) -> None:
        self._by_type = dict(seconds) if isinstance(seconds, Mapping) else {}
        self._seconds = default if isinstance(seconds, Mapping) else seconds
        for one in (*self._by_type.values(), self._seconds):
            if one is not None and not one > 0:
                raise ConfigurationError(f"a timeout of {one!r} s: it must be above 0, or None for no limit")
        self._total = total
        transaction = Outside("transaction", "a transaction must end by itself; around it, a limit lets it roll back")
        retry: Rule = (
            Outside("retry", "total=True limits all attempts together")
            if total
            else Inside("retry", "the limit is for one attempt; pass total=True to limit all of them together")
        )
        self.rules: tuple[Rule, ...] = (transaction, retry)

    def for_route(self, route: Route) -> _Timeout | None:
        """The limit of this message type; None where it has none."""
        if route.origin == "relay":
            return None
        for base in route.message_type.__mro__:
            if base in self._by_type:
                return _Timeout(self._by_type[base], route, total=self._total)
        return None if self._seconds is None else _Timeout(self._seconds, route, total=self._total)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Apply the limit; a mediator compiles `for_route` instead."""
        limited = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if limited is None else limited(context, call_next))


class _Timeout:
    def __init__(self, seconds: float, route: Route, *, total: bool) -> None:
        self._seconds = seconds
        self._total = total
        self._name = route.message_type.__name__

    @property
    def summary(self) -> str:
        return f"{self._seconds:g} s{' for all attempts' if self._total else ''}"

    async def __call__(self, context: Context, call_next: Next) -> Any:
        import anyio

        with anyio.move_on_after(self._seconds):
            return await call_next(context)
        context.note("timeout", seconds=self._seconds)
        raise TimeoutError(f"{self._name} took longer than {self.summary}")
