"""The container that needs no library: it builds handlers from the annotations of their constructors."""

from __future__ import annotations

import inspect
from abc import ABC
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, get_origin

from pipeline_mediator.container.closing import close_all, closing_method
from pipeline_mediator.container.signature import (
    UNSET,
    Parameter,
    arrange,
    is_buildable_handler,
    parameters_of,
    refuse_provided_seeds,
    type_name,
    unprepared,
    unprovided,
    unseeded,
)
from pipeline_mediator.errors import ConfigurationError, ResolutionError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence

    from pipeline_mediator.container import Scope

__all__ = ["PlainContainer"]

T = TypeVar("T")

_NO_SEED = frozenset({Any, bool, bytes, dict, float, int, list, object, set, str, tuple})
"""No unit of work yields these, so a parameter that asks for one and has a default keeps the default."""


class PlainContainer:
    """Builds handlers from the annotations of their constructors, with nothing to register but what they share.

    `provided` are objects, which are singletons, and classes, which are built once per scope from their own
    annotations. Both are found under their class and its bases. A handler class need not be provided; it is built anew
    each time it is asked for.

        PlainContainer(Mailer("smtp.example.com"), OrderRepository)

    A parameter gets the first of these that there is: what the scope is opened with (the Context, the session that
    Transaction began), what is provided under exactly its type, what is provided under a subclass, its default. `T`,
    `T | None`, `Annotated[T, ...]` and string annotations all ask for `T`.

    What a scope built is ended with the scope, last first, if it has an `aclose()` or else a `close()` that needs no
    argument. Singletons are yours to close.

    Raises `ConfigurationError` for something that cannot be provided, and when the mediator provides the same type
    itself; `ResolutionError`, from `prepare`, with everything that is missing.
    """

    __slots__ = ("_builds", "_provided")

    def __init__(self, *provided: object) -> None:
        self._provided: dict[Any, list[_Provided]] = {}
        self._builds: dict[Any, Callable[[_PlainScope], Any]] = {}
        for thing in provided:
            if inspect.isroutine(thing) or get_origin(thing) is not None:
                raise ConfigurationError(
                    f"PlainContainer cannot provide {thing!r}: it takes objects, which it shares, and classes, which "
                    "it builds. Call a factory function yourself and give its result."
                )
            entry = _Provided(thing, None) if isinstance(thing, type) else _Provided(type(thing), _fixed(thing))
            if self._provides(entry.type):
                raise ConfigurationError(
                    f"PlainContainer was given {type_name(entry.type)} twice, and nothing tells which one is meant. "
                    "Remove one, or give the two classes of their own."
                )
            for name in _names_of(entry.type):
                self._provided.setdefault(name, []).append(entry)

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Plan how each of these types is built; raise one error with all that is missing. No object is made."""
        refuse_provided_seeds(self, [seed for seed in seeded if self._provides(seed)])
        planning = _Planning(self._provided, frozenset(seeded))
        plans = {it: planning.plan(it) for it in wanted}
        if planning.missing:
            raise ResolutionError(self, planning.missing)
        for it, plan in plans.items():
            self._builds[it] = plan.build

    def factory(self, wanted: type[T], /) -> Callable[[], T] | None:
        """A way to build this handler class that needs no scope; None where it takes one.

        May be asked for before `prepare`, so it is None as well where a seed could still be meant for a parameter.
        """
        if not is_buildable_handler(wanted) or self._provides(wanted) or closing_method(wanted) is not None:
            return None
        try:
            asked = parameters_of(wanted)
        except ValueError:  # prepare reports it
            return None
        values: dict[str, _Plan] = {}
        for parameter in asked:
            value = self._object(parameter.wanted)
            if value is not None:
                values[parameter.name] = value
            elif not parameter.has_default or self._could_be_given(parameter.wanted):
                return None
        return _call(wanted, *arrange(asked, lambda it: values.get(it.name), _fixed)).factory

    def open(self, seeds: Mapping[type, object], /) -> Scope:
        """A new scope."""
        return _PlainScope(self, self._builds, seeds)

    def _provides(self, wanted: Any) -> bool:
        return any(entry.type is wanted for entry in self._provided.get(wanted, ()))

    def _could_be_given(self, wanted: Any) -> bool:
        return wanted in self._provided or (isinstance(wanted, type) and wanted not in _NO_SEED)

    def _object(self, wanted: Any) -> _Plan | None:
        return next((entry.plan for entry in self._provided.get(wanted, ()) if entry.type is wanted), None)


class _PlainScope:
    __slots__ = ("_builds", "closing", "container", "seeds", "shared")

    is_async = False

    def __init__(
        self,
        container: PlainContainer,
        builds: Mapping[Any, Callable[[_PlainScope], Any]],
        seeds: Mapping[type, object],
    ) -> None:
        self.container = container
        self.seeds = seeds
        self.shared: dict[type, Any] = {}
        self.closing: list[tuple[Any, str]] | None = None
        self._builds = builds

    def get(self, wanted: type[T], /) -> T:
        build = self._builds.get(wanted)
        if build is None:
            raise ResolutionError(self.container, [unprepared(wanted)])
        found: T = build(self)
        return found

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        return None if self.closing is None else close_all(self.closing)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one value is come by."""

    build: Callable[[_PlainScope], Any]
    factory: Callable[[], Any] | None = None
    """Does the same without a scope, if that is possible."""
    value: Any = UNSET
    """What it always is, if that is known."""


@dataclass(frozen=True, slots=True)
class _Provided:
    type: type
    plan: _Plan | None
    """None for a class, which is planned when it is needed."""


class _Planning:
    """One dry run: turns constructors into plans and collects what is missing."""

    def __init__(self, provided: Mapping[Any, Sequence[_Provided]], seeded: Collection[type]) -> None:
        self.missing: list[str] = []
        self._provided = provided
        self._seeded = seeded
        self._shared: dict[type, _Plan] = {}
        self._path: list[type] = []

    def plan(self, wanted: Any) -> _Plan:
        """How a type is built that the mediator asks for."""
        if wanted in self._seeded:
            return _seed(wanted)
        candidates = self._candidates(wanted)
        if is_buildable_handler(wanted) and not (candidates and candidates[0].type is wanted):
            # Its provided subclass, if there is one, is another handler.
            return self._construct(wanted)
        if len(candidates) == 1:
            return self._provide(candidates[0])
        self.missing.append(_ambiguous(wanted, candidates) if candidates else unprovided(wanted))
        return _NOTHING

    def _source_of(self, parameter: Parameter) -> _Plan | None:
        wanted = parameter.wanted
        if wanted in self._seeded:
            return _seed(wanted, parameter.default)
        candidates = self._candidates(wanted)
        if len(candidates) == 1:
            return self._provide(candidates[0])
        if candidates:
            self.missing.append(parameter.missing(_ambiguous(wanted, candidates)))
        elif not parameter.has_default:
            self.missing.append(parameter.missing())
        return None

    def _candidates(self, wanted: Any) -> Sequence[_Provided]:
        entries = self._provided.get(wanted, ())
        return [entry for entry in entries if entry.type is wanted] or entries

    def _provide(self, entry: _Provided) -> _Plan:
        if entry.plan is not None:
            return entry.plan
        if entry.type in self._path:
            circle = " -> ".join(map(type_name, [*self._path[self._path.index(entry.type) :], entry.type]))
            self.missing.append(f"{circle}: each needs the next one built first")
            return _NOTHING
        plan = self._shared.get(entry.type)
        if plan is None:
            self._path.append(entry.type)
            plan = self._shared[entry.type] = _shared(entry.type, self._construct(entry.type))
            self._path.pop()
        return plan

    def _construct(self, wanted: type) -> _Plan:
        try:
            asked = parameters_of(wanted)
        except ValueError as error:
            self.missing.append(str(error))
            return _NOTHING
        plan = _call(wanted, *arrange(asked, self._source_of, _fixed))
        method = closing_method(wanted)
        return plan if method is None else _closing(plan, method)


def _fixed(value: object) -> _Plan:
    return _Plan(lambda _: value, lambda: value, value)


_NOTHING = _fixed(None)
"""Stands for what is missing until the error is raised."""


def _seed(wanted: type, default: object = UNSET) -> _Plan:
    def build(scope: _PlainScope) -> object:
        value = scope.seeds.get(wanted, default)
        if value is UNSET:
            raise ResolutionError(scope.container, [unseeded(wanted)])
        return value

    return _Plan(build)


def _shared(wanted: type, plan: _Plan) -> _Plan:
    construct = plan.build

    def build(scope: _PlainScope) -> Any:
        shared = scope.shared
        if wanted not in shared:
            shared[wanted] = construct(scope)
        return shared[wanted]

    return _Plan(build)


def _closing(plan: _Plan, method: str) -> _Plan:
    construct = plan.build

    def build(scope: _PlainScope) -> Any:
        made = construct(scope)
        if scope.closing is None:
            scope.closing = []
        scope.closing.append((made, method))
        return made

    return _Plan(build)


def _call(wanted: type, positional: Sequence[_Plan], keywords: Mapping[str, _Plan]) -> _Plan:
    if all(plan.value is not UNSET for plan in (*positional, *keywords.values())):
        named_values = {name: plan.value for name, plan in keywords.items()}
        values = [plan.value for plan in positional]
        factory = partial(wanted, *values, **named_values) if values or named_values else wanted
        return _Plan(lambda _: factory(), factory)
    builds = [plan.build for plan in positional]
    if not keywords:
        return _Plan(_call_by_position(wanted, builds))
    named = {name: plan.build for name, plan in keywords.items()}
    return _Plan(
        lambda scope: wanted(*[build(scope) for build in builds], **{name: named[name](scope) for name in named})
    )


def _call_by_position(wanted: type, builds: Sequence[Callable[[_PlainScope], Any]]) -> Callable[[_PlainScope], Any]:
    # Written out for the usual numbers: a comprehension and a starred call would cost as much as the rest of a scope.
    match builds:
        case [one]:
            return lambda scope: wanted(one(scope))
        case [one, two]:
            return lambda scope: wanted(one(scope), two(scope))
        case [one, two, three]:
            return lambda scope: wanted(one(scope), two(scope), three(scope))
        case _:
            return lambda scope: wanted(*[build(scope) for build in builds])


def _names_of(provided: type) -> Iterator[Any]:
    """What a class is found under: itself and its bases, `Repository[Order]` included."""
    for base in provided.__mro__:
        if base not in (object, ABC, Generic, Protocol):
            yield base
            yield from (it for it in vars(base).get("__orig_bases__", ()) if get_origin(it) not in (Generic, Protocol))


def _ambiguous(wanted: Any, candidates: Sequence[_Provided]) -> str:
    names = " and ".join(type_name(entry.type) for entry in candidates)
    return f"{names} both provide {type_name(wanted)}; ask for one of them, or provide only one"
