"""The pipeline: an ordered stack of middlewares, and how stacks are composed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from pipeline_mediator.chain import (
    Chain,
    Middleware,
    Next,
    bind,
    destination_of,
    displayed_name,
    flatten,
    selected_for,
    unwrapped,
)
from pipeline_mediator.context import Context, Kind, Route
from pipeline_mediator.errors import ConfigurationError, name_of
from pipeline_mediator.events import Event
from pipeline_mediator.rules import Inside, Once, Outside, Rule, Without

if TYPE_CHECKING:
    from pipeline_mediator.inbox.protocol import InboxStore
    from pipeline_mediator.middlewares.transaction import UnitOfWork
    from pipeline_mediator.outbox.protocol import OutboxStore

__all__ = [
    "Chain",
    "Inside",
    "Middleware",
    "Next",
    "Once",
    "Outside",
    "Pipeline",
    "Rule",
    "Without",
    "only",
    "unless",
]


class Pipeline(Sequence[Middleware]):
    """An ordered, immutable stack of middlewares, outermost first; itself a middleware, so that stacks nest.

        stack = Pipeline(LoggingMiddleware(), RetryMiddleware(attempts=3), TransactionMiddleware(sessions.begin))
        stack = stack.before(RetryMiddleware, Authorization()) + [audit]

    Every change gives a new pipeline. Raises `ConfigurationError` for an anchor that does not stand in it.
    """

    __slots__ = ("_middlewares",)

    def __init__(self, *middlewares: Middleware) -> None:
        for middleware in middlewares:
            if not callable(middleware) or isinstance(middleware, type):
                raise ConfigurationError(
                    f"{name_of(middleware)} is no middleware: pass an async function (context, call_next), or an "
                    "object with such a "
                    f"__call__{' (an object of the class, not the class)' if isinstance(middleware, type) else ''}"
                )
        self._middlewares = tuple(flatten(middlewares))

    @overload
    def __getitem__(self, index: int) -> Middleware: ...
    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...
    def __getitem__(self, index: int | slice) -> Middleware | Pipeline:
        return Pipeline(*self._middlewares[index]) if isinstance(index, slice) else self._middlewares[index]

    def __len__(self) -> int:
        return len(self._middlewares)

    def __add__(self, other: Iterable[Middleware]) -> Pipeline:
        return Pipeline(*self._middlewares, *other)

    def __radd__(self, other: Iterable[Middleware]) -> Pipeline:
        return Pipeline(*other, *self._middlewares)

    @classmethod
    def recommended(
        cls,
        unit_of_work: UnitOfWork,
        outbox: OutboxStore,
        publish: Middleware,
        *,
        inbox: InboxStore | None = None,
        extra: Iterable[Middleware] = (),
        attempts: int = 3,
        timeout: float | None = 30.0,
    ) -> Pipeline:
        """The built-in middlewares in the order that loses nothing; `extra` stand inside the transaction.

            Pipeline.recommended(
                sessions.begin,
                SQLAlchemyOutbox(engine, outbox_tables(Base.metadata)),
                PublishMiddleware(broker, {OrderPlaced: "orders"}),
            )

        Tracing, metrics, logging, dead letter, redelivery, retry (`attempts` of any error that may pass), timeout
        (seconds for one attempt; None for none), transaction, inbox, outbox, `extra`, publish. Change it with `before`,
        `after`, `replace`, `without`.
        """
        # Only here: whoever composes a pipeline otherwise loads only what stands in it.
        from pipeline_mediator import middlewares

        return cls(
            middlewares.TracingMiddleware(),
            middlewares.MetricsMiddleware(),
            middlewares.LoggingMiddleware(),
            middlewares.DeadLetterMiddleware(),
            middlewares.RedeliveryMiddleware(),
            middlewares.RetryMiddleware(attempts),
            middlewares.TimeoutMiddleware(timeout),
            middlewares.TransactionMiddleware(unit_of_work),
            *(() if inbox is None else (middlewares.InboxMiddleware(inbox),)),
            middlewares.OutboxMiddleware(outbox),
            *extra,
            publish,
        )

    def before(self, anchor: object, /, *middlewares: Middleware) -> Pipeline:
        """With these directly outside the first `anchor`: a class of middlewares, or a middleware itself."""
        at = self._position(anchor)
        return Pipeline(*self._middlewares[:at], *middlewares, *self._middlewares[at:])

    def after(self, anchor: object, /, *middlewares: Middleware) -> Pipeline:
        """With these directly inside the first `anchor`."""
        at = self._position(anchor) + 1
        return Pipeline(*self._middlewares[:at], *middlewares, *self._middlewares[at:])

    def replace(self, anchor: object, /, *middlewares: Middleware) -> Pipeline:
        """With these in the place of the first `anchor`."""
        at = self._position(anchor)
        return Pipeline(*self._middlewares[:at], *middlewares, *self._middlewares[at + 1 :])

    def without(self, anchor: object, /) -> Pipeline:
        """Without every `anchor`."""
        self._position(anchor)
        return Pipeline(*(middleware for middleware in self._middlewares if not _is(middleware, anchor)))

    def each(self, change: Callable[[Middleware], Middleware], /) -> Pipeline:
        """With each middleware changed; what `only` and `unless` put around it stays."""
        return Pipeline(
            *(one.around(change) if isinstance(one, _Conditional) else change(one) for one in self._middlewares)
        )

    def _position(self, anchor: object) -> int:
        for at, middleware in enumerate(self._middlewares):
            if _is(middleware, anchor):
                return at
        standing = ", ".join(map(displayed_name, self._middlewares)) or "nothing"
        raise ConfigurationError(f"{displayed_name(anchor)} does not stand in this pipeline; in it stand: {standing}")

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the whole stack, then `call_next`; a mediator never calls this, it folds what stands inside."""
        middlewares: list[Middleware] = []
        for middleware in self._middlewares:
            selected = selected_for(middleware, _route_of(context))
            if selected is not None:
                middlewares.append(selected)
        call = call_next
        for selected in reversed(middlewares):
            call = bind(selected, call)
        return await call(context)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(displayed_name, self._middlewares))})"


def _is(middleware: Middleware, anchor: object) -> bool:
    inner = unwrapped(middleware)
    return isinstance(inner, anchor) if isinstance(anchor, type) else inner is anchor


class _Conditional:
    """A middleware that stands only in the chains of some routes; its role and rules hold where it stands."""

    def __init__(self, middleware: Middleware, when: Callable[[Route], bool]) -> None:
        self.middleware = middleware
        self._when = when
        self.unconditional = unwrapped(middleware)

    def around(self, change: Callable[[Middleware], Middleware]) -> _Conditional:
        """The same conditions around what `change` makes of the middleware."""
        inner = self.middleware
        return _Conditional(inner.around(change) if isinstance(inner, _Conditional) else change(inner), self._when)

    def for_route(self, route: Route) -> Middleware | None:
        return selected_for(self.middleware, route) if self._when(route) else None

    def destination_for(self, message_type: type) -> str | None:
        destination = destination_of(message_type, [self.middleware])
        if destination is None:
            return None
        kind: Kind = "event" if Event in message_type.__mro__ else "request"
        return destination if self._when(Route(message_type, kind, "local", destination)) else None

    def __getattr__(self, name: str) -> Any:
        # What else a middleware has (resources, seeds, ...) counts as if nothing stood around it.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.middleware, name)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        selected = self.for_route(_route_of(context))
        return await (call_next(context) if selected is None else selected(context, call_next))


def _route_of(context: Context) -> Route:
    return context.route or Route(context.message.__class__, "request", "local")


Types: TypeAlias = type | tuple[type, ...]


@overload
def only(types: Types, /, *middlewares: Middleware) -> Pipeline: ...
@overload
def only(*middlewares: Middleware, when: Callable[[Route], bool]) -> Pipeline: ...
def only(*args: Any, when: Callable[[Route], bool] | None = None) -> Pipeline:
    """These middlewares stand only in the chains of some message types (and their subclasses), or of some routes.

    It is decided when a chain is compiled: what does not concern a message costs it nothing.

        Pipeline(only(Query, CacheQueries(seconds=30)), only(audit, when=lambda route: route.origin == "broker"))
    """
    return _conditional(args, when, keep=True)


@overload
def unless(types: Types, /, *middlewares: Middleware) -> Pipeline: ...
@overload
def unless(*middlewares: Middleware, when: Callable[[Route], bool]) -> Pipeline: ...
def unless(*args: Any, when: Callable[[Route], bool] | None = None) -> Pipeline:
    """These middlewares stand in every chain but those of some message types, or of some routes."""
    return _conditional(args, when, keep=False)


def _conditional(args: tuple[Any, ...], when: Callable[[Route], bool] | None, *, keep: bool) -> Pipeline:
    if when is None:
        types, *args_left = args or (None,)
        chosen = _concerns(types)
    else:
        chosen, args_left = when, list(args)

    def stands(route: Route) -> bool:
        return bool(chosen(route)) is keep

    return Pipeline(*(_Conditional(middleware, stands) for middleware in Pipeline(*args_left)))


def _concerns(types: Types | None) -> Callable[[Route], bool]:
    given = types if isinstance(types, tuple) else (types,)
    wanted = tuple(one for one in given if isinstance(one, type))
    if len(wanted) < len(given):
        raise ConfigurationError(
            "only() and unless() take a message type or a tuple of them first, or when=lambda route: ..."
        )
    return lambda route: issubclass(route.message_type, wanted)
