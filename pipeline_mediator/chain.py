"""How the middlewares of a pipeline become the chain of one route.

A chain is folded once, innermost link first, and never again (Starlette and Watermill fold at start; Diator and
python-cqrs once per message). Rules about order are checked on every compiled chain, not on the list: what counts is
what a message really walks through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeAlias, cast

from pipeline_mediator.context import Context, Route
from pipeline_mediator.errors import ConfigurationError, OrderError, name_of
from pipeline_mediator.rules import Rule, violations

__all__ = [
    "Chain",
    "Link",
    "Middleware",
    "Next",
    "bind",
    "compile_chain",
    "destination_of",
    "displayed_name",
    "flatten",
    "selected_for",
    "unwrapped",
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
        return displayed_name(self.source)

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
    cut_off: list[Link] = []
    ended = False
    for middleware in flatten(middlewares):
        selected = selected_for(middleware, route)
        if selected is not None:
            (cut_off if ended else links).append(Link(unwrapped(middleware), selected))
            ended = ended or getattr(selected, "ends_chain", False)
    if not ended:
        raise ConfigurationError(f"{route}: no terminal stands in its chain, so nothing would happen to the message")
    if route.destination is not None and not any(link.role == "outbox" for link in links):
        # What goes straight to a broker writes nothing: it must not hold a transaction open meanwhile.
        links = [link for link in links if link.role != "transaction"]
    broken = list(violations(links, cut_off, route))
    if broken:
        raise OrderError(broken)
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
        call_next = bind(middleware, call_next)
    return call_next


def bind(middleware: Middleware, call_next: Next) -> Next:
    """A link and the rest of the chain as one call."""
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


def selected_for(middleware: Middleware, route: Route) -> Middleware | None:
    """What stands in the chain of this route; None if nothing does."""
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
        if isinstance(middleware, Sequence):
            yield from flatten(cast("Sequence[Middleware]", middleware))
        else:
            yield middleware


def unwrapped(middleware: Any) -> Any:
    """What the user wrote, without the conditions around it."""
    return getattr(middleware, "unconditional", middleware)


def displayed_name(middleware: object) -> str:
    """The class's or function's name, as errors and `describe` show it."""
    return name_of(unwrapped(middleware)).removesuffix(" object")
