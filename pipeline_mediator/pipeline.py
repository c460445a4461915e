"""Middlewares, the pipeline they stand in, and how it is compiled into one chain per route.

A chain is folded once, innermost link first, and never again (Starlette and Watermill fold at start; Diator and
python-cqrs once per message). Rules about order are checked on every compiled chain, not on the list: what counts is
what a message really walks through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeAlias, cast, overload

from pipeline_mediator.context import Context, Kind, Route
from pipeline_mediator.errors import ConfigurationError, OrderError, name_of
from pipeline_mediator.events import Event

__all__ = [
    "Chain",
    "Inside",
    "Link",
    "Middleware",
    "Next",
    "Once",
    "Outside",
    "Pipeline",
    "Rule",
    "Without",
    "compile_chain",
    "destination_of",
    "flatten",
    "only",
    "unless",
]

Next: TypeAlias = Callable[[Context], Awaitable[Any]]
"""The rest of the chain. May be called again, as retry does: it always starts at the next inner middleware."""

Middleware: TypeAlias = Callable[[Context, Next], Awaitable[Any]]
"""A link: an async function or an object whose `__call__` is one. An alias, so that parameter names are free.

It may have these attributes, read once when a chain is compiled:

* `for_route(route) -> Middleware | None`: what stands in the chain of that route: itself, a version specialised to it,
  or None to be left out, which costs the message nothing. Without it a middleware stands in all chains but the relay's.
* `ends_chain = True`, on what `for_route` returned: a terminal; what stands behind it is cut off. It may offer
  `terminal(context)`, called instead of `__call__(context, call_next)` because there is nothing to call next.
* `role`: the text by which the rules of other middlewares know it; a middleware never imports another.
* `rules`: `Inside`, `Outside`, `Once` and `Without`.
* `destination_for(message_type) -> str | None`: asked before a chain is compiled, so that its route knows where the
  message will be published. `message_types`: those that it names one by one.
* `resources`: what `async with mediator` opens and closes. `seeds`: the types of what it puts into each scope.
* `warnings_for(chain) -> Iterable[str]`: what `Mediator.check()` shall say about a chain that it stands in.
* `summary`: a few words for `Mediator.describe()`, such as "3 attempts".
"""


# -- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inside:
    """This middleware stands inside (after) every one with that role; with `required` there must be one."""

    role: str
    reason: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Outside:
    """This middleware stands outside (before) every one with that role."""

    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Once:
    """No other middleware of this one's role stands in the same chain."""

    reason: str


@dataclass(frozen=True, slots=True)
class Without:
    """No middleware with that role stands in the same chain; `fix` says what to do about it."""

    role: str
    reason: str
    fix: str


Rule: TypeAlias = Inside | Outside | Once | Without


def _violations(links: Sequence[Link], route: Route) -> Iterator[str]:
    for position, link in enumerate(links):
        for rule in link.rules:
            for violation in _broken(rule, links, position, route):
                yield f"{route}: {violation}"


def _broken(rule: Rule, links: Sequence[Link], position: int, route: Route) -> Iterator[str]:
    """What is wrong by this rule of the link at this position."""
    link, here = links[position], _place(links, position)
    if isinstance(rule, Once):
        others = [f"position {at + 1}" for at in range(position + 1, len(links)) if _alike(link, links[at])]
        if others:
            kind = link.role or link.name
            yield f"a second {kind} stands inside {here}, at {', '.join(others)}: {rule.reason}. {_KEEP_APART}"
        return
    found = [at for at, other in enumerate(links) if other.role == rule.role and at != position]
    if isinstance(rule, Inside) and rule.required and not found:
        yield f"{here} needs a {rule.role} middleware around it: {rule.reason}. {_how_to_add(rule, route)}"
    for at in found:
        there = _place(links, at)
        if isinstance(rule, Without):
            yield f"{here} and {there} exclude each other: {rule.reason}. {rule.fix}"
        elif isinstance(rule, Inside) and at > position:
            yield f"{here} must stand inside {there}: {rule.reason}. Move it behind {links[at].name}."
        elif isinstance(rule, Outside) and at < position:
            yield f"{here} must stand outside {there}: {rule.reason}. Move it before {links[at].name}."


_KEEP_APART = "Remove one, or keep them apart with only()."


def _place(links: Sequence[Link], position: int) -> str:
    return f"{links[position].name} (position {position + 1})"


def _alike(link: Link, other: Link) -> bool:
    return other.name == link.name if link.role is None else other.role == link.role


def _how_to_add(rule: Inside, route: Route) -> str:
    if rule.role == "transaction" and route.destination is not None:
        return (
            "What goes straight to a broker is in no transaction: leave it out of such chains with "
            "only(..., when=lambda route: route.destination is None), or add an OutboxMiddleware."
        )
    return "Add one before it."


# -- compiling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """One place of a compiled chain: what the user wrote, and what stands there for the route."""

    source: object
    """The middleware as it stands in the pipeline."""
    middleware: Middleware
    """What `for_route` made of it."""

    @property
    def name(self) -> str:
        """The class's or function's name."""
        return _name(self.source)

    @property
    def role(self) -> str | None:
        """The role that rules know it by."""
        role: str | None = _attribute(self, "role")
        return role

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Where it may stand."""
        return tuple(_attribute(self, "rules") or ())

    @property
    def summary(self) -> str:
        """A few words about how it is set up."""
        return _attribute(self, "summary") or ""

    def warnings_for(self, chain: Chain) -> Iterable[str]:
        """What it says about the chain that it stands in."""
        warnings_for = _attribute(self, "warnings_for")
        return () if warnings_for is None else cast("Iterable[str]", warnings_for(chain))


def _attribute(link: Link, name: str) -> Any:
    """From the specialised version if it says something of its own, else from what the user wrote."""
    own = getattr(link.middleware, name, None)
    return getattr(link.source, name, None) if own is None else own


@dataclass(frozen=True, slots=True)
class Chain:
    """A pipeline compiled for one route."""

    route: Route
    links: tuple[Link, ...]
    call: Next
    """The folded chain."""
    direct: Callable[[Any], Coroutine[Any, Any, Any]] | None
    """The handler alone, where nothing in the chain needs a context."""
    unit_of_work: object
    """What its transaction begins; None without one."""
    begins_unit: bool
    """Whether an attempt begins at once, in the task that walks, because something in the chain needs one."""

    def has(self, role: str) -> bool:
        """Whether a middleware of this role stands in it."""
        return any(link.role == role for link in self.links)

    @property
    def publishes(self) -> bool:
        """Whether walking it sends the message to a broker at once, instead of storing it with the transaction."""
        return self.route.destination is not None and self.route.origin == "local" and not self.has("outbox")


def compile_chain(
    route: Route, middlewares: Iterable[Middleware], attempt: Callable[[Context, Next], Awaitable[Any]]
) -> Chain:
    """Select what stands in the chain of `route`, check its order, and fold it.

    `attempt` is the core's own link that begins and ends an attempt where retry repeats one and no transaction does.
    Raises `OrderError` with every violation, and `ConfigurationError` for a chain without a terminal.
    """
    links: list[Link] = []
    for middleware in flatten(middlewares):
        selected = _for_route(middleware, route)
        if selected is not None:
            links.append(Link(_unwrapped(middleware), selected))
            if getattr(selected, "ends_chain", False):
                break
    else:
        raise ConfigurationError(f"{route}: no terminal stands in its chain, so nothing would happen to the message")
    if route.destination is not None and not any(link.role == "outbox" for link in links):
        # What goes straight to a broker writes nothing: it must not hold a transaction open meanwhile.
        links = [link for link in links if link.role != "transaction"]
    violations = list(_violations(links, route))
    if violations:
        raise OrderError(violations)
    terminal = links[-1].middleware
    transactions = [link for link in links if link.role == "transaction"]
    unit_of_work = getattr(transactions[0].source, "unit_of_work", None) if transactions else None
    return Chain(
        route=route,
        links=tuple(links),
        call=_fold(_with_attempt(links, attempt)),
        direct=getattr(terminal, "direct", None) if len(links) == 1 else None,
        unit_of_work=unit_of_work,
        begins_unit=unit_of_work is not None or getattr(terminal, "needs_scope", False),
    )


def _with_attempt(links: Sequence[Link], attempt: Middleware) -> list[Middleware]:
    """The links to fold; where no transaction begins and ends an attempt, the core's link does.

    It stands inside whatever repeats, limits or observes attempts, so that these see the emitted events too. Where
    nothing inside could emit, and where nothing is outside, the walk itself ends the attempt and it is left out.
    """
    middlewares = [link.middleware for link in links]
    around = [at for at, link in enumerate(links) if link.role in _AROUND_ATTEMPTS]
    if around and not any(link.role == "transaction" for link in links):
        inside = links[around[-1] + 1 :]
        if len(inside) > 1 or getattr(inside[-1].middleware, "direct", None) is None:
            middlewares.insert(around[-1] + 1, attempt)
    return middlewares


_AROUND_ATTEMPTS = frozenset({"tracing", "metrics", "logging", "retry", "timeout"})


def _fold(middlewares: Sequence[Middleware]) -> Next:
    call_next: Next = _end_of_chain
    for middleware in reversed(middlewares):
        call_next = _bind(middleware, call_next)
    return call_next


def _bind(middleware: Middleware, call_next: Next) -> Next:
    terminal: Next | None = getattr(middleware, "terminal", None)
    if terminal is not None and getattr(middleware, "ends_chain", False):
        return terminal
    # An object's `__call__` is bound once here, not looked up for every message.
    function = isinstance(middleware, FunctionType | MethodType)
    call: Middleware = middleware if function else cast("Any", middleware).__call__

    def link(context: Context) -> Awaitable[Any]:
        return call(context, call_next)

    return link


async def _end_of_chain(context: Context) -> Any:
    raise ConfigurationError(f"{context.route}: its last middleware called call_next, but it is the terminal")


def _for_route(middleware: Middleware, route: Route) -> Middleware | None:
    for_route = getattr(middleware, "for_route", None)
    if for_route is None:
        return None if route.origin == "relay" else middleware
    selected: Middleware | None = for_route(route)
    return selected


def destination_of(message_type: type, middlewares: Iterable[Middleware]) -> str | None:
    """Where the first Publish middleware that claims this type sends it."""
    for middleware in flatten(middlewares):
        destination_for = getattr(middleware, "destination_for", None)
        if destination_for is not None and (destination := destination_for(message_type)) is not None:
            return cast("str", destination)
    return None


def flatten(middlewares: Iterable[Middleware]) -> Iterator[Middleware]:
    """The middlewares of a pipeline and of the pipelines in it, outermost first."""
    for middleware in middlewares:
        if isinstance(middleware, Pipeline):
            yield from flatten(middleware)
        else:
            yield middleware


# -- composing ---------------------------------------------------------------------------------------------------------


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

    def _position(self, anchor: object) -> int:
        for at, middleware in enumerate(self._middlewares):
            if _is(middleware, anchor):
                return at
        standing = ", ".join(map(_name, self._middlewares)) or "nothing"
        raise ConfigurationError(f"{_name(anchor)} does not stand in this pipeline; in it stand: {standing}")

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the whole stack, then `call_next`; a mediator never calls this, it folds what stands inside."""
        middlewares: list[Middleware] = []
        for middleware in self._middlewares:
            selected = _for_route(middleware, _route_of(context))
            if selected is not None:
                middlewares.append(selected)
        call = call_next
        for selected in reversed(middlewares):
            call = _bind(selected, call)
        return await call(context)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(_name, self._middlewares))})"


def _name(middleware: object) -> str:
    return name_of(_unwrapped(middleware)).removesuffix(" object")


def _is(middleware: Middleware, anchor: object) -> bool:
    inner = _unwrapped(middleware)
    return isinstance(inner, anchor) if isinstance(anchor, type) else inner is anchor


def _unwrapped(middleware: Any) -> Any:
    """What the user wrote, without the conditions around it."""
    while isinstance(middleware, _Conditional):
        middleware = middleware.middleware
    return middleware


class _Conditional:
    """A middleware that stands only in the chains of some routes; its role and rules hold where it stands."""

    def __init__(self, middleware: Middleware, when: Callable[[Route], bool]) -> None:
        self.middleware = middleware
        self._when = when

    def for_route(self, route: Route) -> Middleware | None:
        return _for_route(self.middleware, route) if self._when(route) else None

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
