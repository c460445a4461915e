"""Resolves handlers from a dishka container."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

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
from pipeline_mediator.container.turns import Turns
from pipeline_mediator.context import Context
from pipeline_mediator.errors import MissingExtraError, ResolutionError

try:
    from dishka import DEFAULT_COMPONENT, AsyncContainer, Container, Provider, Scope
    from dishka.entities.factory_type import FactoryType
    from dishka.entities.key import DependencyKey, hint_to_dependency_key
    from dishka.exceptions import NoContextValueError
except ModuleNotFoundError as error:
    if error.name != "dishka":
        raise
    raise MissingExtraError("DishkaContainer", "dishka", "dishka") from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence

    from dishka import BaseScope
    from dishka.dependency_source import Factory
    from dishka.registry import Registry

    from pipeline_mediator.container import Scope as OpenedScope

__all__ = ["DishkaContainer", "MediatorProvider"]

T = TypeVar("T")


class MediatorProvider(Provider):
    """Tells a dishka container what the mediator opens each scope with, so that your own factories may ask for it.

    That is the Context, and the types you name: what the unit of work of your TransactionMiddleware yields, in the form
    in which your factories ask for it. It goes last, so that these come from the mediator even where another provider
    has them. Handlers need not be named, here or elsewhere. Where only handlers ask for these types, a container does
    without this provider.

        make_async_container(ShopProvider(), MediatorProvider(AsyncSession))
    """

    def __init__(self, *seeds: type, scope: BaseScope = Scope.REQUEST) -> None:
        super().__init__(scope=scope)
        for seed in dict.fromkeys((Context, *seeds)):
            self.from_context(seed)


class DishkaContainer:
    """Resolves handlers from your dishka container, one dishka scope per root message.

    Takes what `make_async_container` or `make_container` gives. Handlers need not be provided: those that are not are
    built anew each time from the annotations of their constructors, where `T | None`, defaults and
    `Annotated[T, FromComponent("x")]` mean what they say. A parameter gets, in this order: what the mediator opened the
    scope with, what the container provides, its default. Factories of your own that ask for the session that
    Transaction began need a `MediatorProvider` in the container.

        container = make_async_container(ShopProvider(), MediatorProvider(AsyncSession))
        mediator = Mediator(requests, DishkaContainer(container), ...)

    Generators live until the message's scope ends and receive, from `yield`, what ended the message. The dishka scope
    is entered when the first thing is asked of it. `scope` is the one to enter, by default the next that dishka does
    not skip: REQUEST. The container itself is yours to close. On trio make it with `lock_factory=trio.Lock`: dishka's
    default is asyncio's.

    Raises `ConfigurationError` if the container provides what the mediator provides; `ResolutionError` with everything
    that is missing.
    """

    __slots__ = ("_container", "_enter", "_plans", "_scope_class")

    def __init__(self, container: AsyncContainer | Container, *, scope: BaseScope | None = None) -> None:
        self._container = container
        self._enter: Callable[..., Any] = partial(container, scope=scope)
        self._scope_class = _AsyncScope if isinstance(container, AsyncContainer) else _SyncScope
        self._plans: dict[Any, _Plan] = {}

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Plan how each of these types is resolved; raise one error with all that is missing. No object is made."""
        graph = _Graph(self._container, self._enter(), frozenset(seeded))
        refuse_provided_seeds(self, [seed for seed in seeded if graph.provides_itself(seed)])
        plans = {it: graph.plan(it) for it in dict.fromkeys(wanted)}
        if graph.missing:
            raise ResolutionError(self, list(dict.fromkeys(graph.missing)))
        self._plans |= plans

    def open(self, seeds: Mapping[type, object], /) -> OpenedScope:
        """A new scope."""
        return self._scope_class(self, self._enter, self._plans, seeds)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one value comes from: from dishka, or from the seeds, with a default."""

    wanted: Any
    component: str | None = None
    """None for the seeds."""
    default: Any = UNSET


@dataclass(frozen=True, slots=True)
class _Plan:
    """A call and where its arguments come from; the last of them are passed by `names`."""

    call: Callable[..., Any]
    sources: Sequence[_Source]
    names: Sequence[str] = ()
    ends: bool = False
    """Whether the scope may have to be closed after it; if not, a message does not pay for that."""

    def make(self, values: Sequence[Any]) -> Any:
        if not self.names:
            return self.call(*values)
        at = len(values) - len(self.names)
        return self.call(*values[:at], **dict(zip(self.names, values[at:], strict=True)))


class _DishkaScope:
    __slots__ = ("_enter", "_plans", "_seeds", "child", "container", "ends")

    def __init__(
        self,
        container: DishkaContainer,
        enter: Callable[..., Any],
        plans: Mapping[Any, _Plan],
        seeds: Mapping[type, object],
    ) -> None:
        self.container = container
        self.child: Any = None
        self.ends = False
        self._enter = enter
        self._plans = plans
        self._seeds = seeds

    def plan_of(self, wanted: Any) -> _Plan:
        plan = self._plans.get(wanted)
        if plan is None:
            raise ResolutionError(self.container, [unprepared(wanted)])
        self.ends = self.ends or plan.ends
        return plan

    def seed(self, source: _Source) -> Any:
        value = self._seeds.get(source.wanted, source.default)
        if value is UNSET:
            raise ResolutionError(self.container, [unseeded(source.wanted)])
        return value

    def enter(self) -> Any:
        self.child = self._enter(context=dict(self._seeds))
        return self.child


class _AsyncScope(_DishkaScope):
    __slots__ = ("_turns",)

    is_async = True

    def __init__(
        self,
        container: DishkaContainer,
        enter: Callable[..., Any],
        plans: Mapping[Any, _Plan],
        seeds: Mapping[type, object],
    ) -> None:
        super().__init__(container, enter, plans, seeds)
        self._turns = Turns()

    async def get(self, wanted: type[T], /) -> T:
        plan = self.plan_of(wanted)
        values: list[Any] = []
        await self._turns.take()
        try:
            for source in plan.sources:
                if source.component is None:
                    values.append(self.seed(source))
                else:
                    child = self.child or self.enter()
                    values.append(await child.get(source.wanted, source.component))
        except NoContextValueError as error:
            raise ResolutionError(self.container, [unseeded(*error.args)]) from error
        finally:
            self._turns.give()
        made: T = plan.make(values)
        return made

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        if self.child is None or not self.ends:
            return None
        closing: Awaitable[None] = self.child.close(error)
        return closing


class _SyncScope(_DishkaScope):
    __slots__ = ()

    is_async = False

    def get(self, wanted: type[T], /) -> T:
        plan = self.plan_of(wanted)
        values: list[Any] = []
        try:
            for source in plan.sources:
                if source.component is None:
                    values.append(self.seed(source))
                else:
                    child = self.child or self.enter()
                    values.append(child.get(source.wanted, source.component))
        except NoContextValueError as error:
            raise ResolutionError(self.container, [unseeded(*error.args)]) from error
        made: T = plan.make(values)
        return made

    def close(self, error: BaseException | None, /) -> None:
        if self.child is not None:
            self.child.close(error)


class _Graph:
    """One dry run through what a dishka container can make in a message's scope; collects what is missing.

    dishka checks its own factories when a container is made, unless told not to; what it cannot know is which context
    values the mediator will give. `inner` is a scope entered for this alone; nothing is made in it.
    """

    def __init__(self, outer: object, inner: Any, seeded: Collection[type]) -> None:
        self.missing: list[str] = []
        self._seeded = seeded
        self._registries: list[Registry] = []
        self._entered: set[BaseScope] = set()
        self._seen: set[DependencyKey] = set()
        is_inside = True
        while inner is not None:
            is_inside = is_inside and inner is not outer
            self._registries.append(inner.registry)
            if is_inside:
                self._entered.add(inner.registry.scope)
            inner = inner.parent_container

    def provides_itself(self, seed: type) -> bool:
        """Whether the container has this from anywhere else than the values that a scope is entered with."""
        factory = self._find(DependencyKey(seed, DEFAULT_COMPONENT))
        while factory is not None and factory.type is FactoryType.ALIAS:
            factory = self._find(factory.dependencies[0])
        return factory is not None and not self._is_scope_value(factory)

    def plan(self, wanted: Any) -> _Plan:
        """How a type is resolved that the mediator asks for."""
        if wanted in self._seeded:
            return _Plan(_itself, [_Source(wanted)])
        key = DependencyKey(wanted, DEFAULT_COMPONENT)
        if self._lack_of(key) is None:
            self._look_through(key)
            return self._planned(_itself, [_Source(wanted, DEFAULT_COMPONENT)])
        if is_buildable_handler(wanted):
            return self._construct(wanted)
        self.missing.append(unprovided(wanted))
        return _NOTHING

    def _construct(self, handler: type) -> _Plan:
        try:
            asked = parameters_of(handler)
        except ValueError as error:
            self.missing.append(str(error))
            return _NOTHING
        positional, keywords = arrange(asked, self._source_of, lambda value: _Source(None, default=value))
        return self._planned(handler, [*positional, *keywords.values()], list(keywords))

    def _planned(self, call: Callable[..., Any], sources: Sequence[_Source], names: Sequence[str] = ()) -> _Plan:
        seen: set[DependencyKey] = set()
        fetched = [DependencyKey(it.wanted, it.component) for it in sources if it.component is not None]
        return _Plan(call, sources, names, ends=any(self._may_end(key, seen) for key in fetched))

    def _may_end(self, key: DependencyKey, seen: set[DependencyKey]) -> bool:
        """Whether something is made for this key that ends with the scope."""
        factory = self._find(key)
        if factory is None or factory.scope not in self._entered or key in seen:
            return False
        seen.add(key)
        return (
            factory.type in (FactoryType.GENERATOR, FactoryType.ASYNC_GENERATOR)
            or bool(factory.when_dependencies)  # which of them it will be is not known
            or key.type_hint in (AsyncContainer, Container)  # nor what this is asked for
            or any(self._may_end(dependency, seen) for _, dependency in _asked_by(factory))
        )

    def _source_of(self, parameter: Parameter) -> _Source | None:
        wanted = parameter.wanted
        component = hint_to_dependency_key(parameter.annotation).component
        if wanted in self._seeded and component is None:
            return _Source(wanted, default=parameter.default)
        key = DependencyKey(wanted, DEFAULT_COMPONENT if component is None else component)
        lack = self._lack_of(key)
        if lack is None:
            self._look_through(key)
            return _Source(wanted, key.component)
        if not parameter.has_default:
            self.missing.append(parameter.missing(lack))
        return None

    def _look_through(self, key: DependencyKey) -> None:
        """Note what the container's own factories will not find."""
        factory = self._find(key)
        if factory is None or key in self._seen:
            return
        self._seen.add(key)
        for name, dependency in _asked_by(factory):
            lack = self._lack_of(dependency)
            if lack is None:
                self._look_through(dependency)
            elif factory.type is FactoryType.ALIAS:
                self.missing.append(f"{type_name(key.type_hint)} is an alias: {lack}")
            else:
                asked = Parameter(factory.source, name, dependency.type_hint, UNSET, keyword_only=False)
                self.missing.append(asked.missing(lack))

    def _lack_of(self, key: DependencyKey) -> str | None:
        """Why there will be nothing under this key; None if there will be."""
        if key.is_type_var() or key.is_const() or key.type_hint in (AsyncContainer, Container, DependencyKey):
            return None
        found = self._find(key)
        if found is None:
            return f"nothing provides {type_name(key.type_hint)}"
        if self._is_scope_value(found) and key.type_hint not in self._seeded:
            return "dishka has it from the context, where the mediator puts none"
        return None

    def _is_scope_value(self, factory: Factory) -> bool:
        return factory.type is FactoryType.CONTEXT and factory.scope in self._entered

    def _find(self, key: DependencyKey) -> Factory | None:
        found = (registry.get_factory(key) for registry in self._registries)
        return next((factory for factory in found if factory is not None), None)


def _itself(value: T) -> T:
    return value


_NOTHING = _Plan(_itself, [])
"""Stands for what is missing until the error is raised."""


def _asked_by(factory: Factory) -> Iterator[tuple[str, DependencyKey]]:
    names = inspect.signature(factory.source).parameters if factory.dependencies else ()
    yield from zip(names, factory.dependencies, strict=False)
    yield from factory.kw_dependencies.items()
