"""Resolves handlers through a `di.Container`."""

from __future__ import annotations

import inspect
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline_mediator.container.signature import (
    Parameter,
    is_buildable_handler,
    refuse_provided_seeds,
    type_name,
    unprepared,
    unreadable,
    unseeded,
    wanted_type,
)
from pipeline_mediator.container.turns import Turns
from pipeline_mediator.errors import ConfigurationError, MissingExtraError, ResolutionError

try:
    from di import Container, ScopeState, SolvedDependent
    from di.dependent import Dependent, Marker
    from di.exceptions import DependencyInjectionException
    from di.executors import AsyncExecutor
    from di.typing import get_markers_from_annotation
except ModuleNotFoundError as error:
    if error.name != "di":
        raise
    raise MissingExtraError("DIContainer", "di", "di") from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from di.api.dependencies import DependentBase

    from pipeline_mediator.container import Scope

__all__ = ["DIContainer"]

T = TypeVar("T")


class DIContainer:
    """Resolves handlers through your `di.Container`, one di scope per root message.

    Handlers need not be bound; as di does with every class, they are wired from their annotations. A handler is made
    anew each time it is asked for, everything else once in its scope. Dependencies with `yield` live until the
    message's scope ends, and what ended the message is raised in them. Your binds are used and nothing is added to your
    container; each wanted type is solved once, when the mediator is prepared.

        container = di.Container()
        container.bind(bind_by_type(Dependent(open_mailer, scope="singleton"), Mailer))
        mediator = Mediator(requests, DIContainer(container), ...)

    `scopes` are the names that your dependents use, widest first. The last one is the message's, and that of every
    dependent that names none; the others live until `aclose()`, which is yours to call.

    di makes `int()` out of `retries: int`, and an empty session out of a session that nobody binds. The first is
    refused here: built-in types, abstract classes and protocols that no bind provides are missing.

    Raises `ConfigurationError` if a bind provides what the mediator provides; `ResolutionError` with everything that is
    missing or that di cannot solve.
    """

    __slots__ = ("_contexts", "_placeholders", "_plans", "_scopes", "_services", "_state", "_turns")

    def __init__(
        self, container: Container | None = None, *, scopes: Sequence[Hashable] = ("singleton", "request")
    ) -> None:
        if not scopes:
            raise ConfigurationError("DIContainer needs at least one scope, the message's: scopes=('request',)")
        self._services = Container() if container is None else container
        self._scopes = tuple(scopes)
        self._plans: dict[Any, _Plan] = {}
        self._placeholders: dict[type, _Placeholder] = {}
        self._state: ScopeState | None = None
        self._contexts: list[AbstractAsyncContextManager[ScopeState]] = []
        self._turns = Turns()

    def attach_external_container(self, container: Container) -> None:
        """Use this container; the same as giving it to the constructor."""
        if self._plans:
            raise ConfigurationError(
                "a mediator was already prepared over this DIContainer, so its di container cannot be exchanged. "
                "Attach the container before the Mediator is used."
            )
        self._services = container

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Solve each of these types once; raise one error with all that is missing. No object is made."""
        refuse_provided_seeds(self, _bound(self._services, seeded))
        for seed in seeded:
            self._placeholders.setdefault(seed, _Placeholder(self, seed))
        wiring = _Wiring(self._placeholders, self._scopes)
        with self._services.bind(wiring):
            plans = {it: self._solve(it, wiring) for it in dict.fromkeys(wanted)}
        if wiring.missing:
            raise ResolutionError(self, list(dict.fromkeys(wiring.missing)))
        self._plans.update((it, plan) for it, plan in plans.items() if plan is not None)

    def open(self, seeds: Mapping[type, object], /) -> Scope:
        """A new scope."""
        known = self._placeholders
        return _DIScope(self._execute, {known[seed]: value for seed, value in seeds.items() if seed in known})

    async def aclose(self) -> None:
        """End what lives longer than a message, in reverse order."""
        contexts, self._contexts, self._state = self._contexts, [], None
        async with AsyncExitStack() as stack:
            for context in contexts:
                stack.push_async_exit(context)

    def _solve(self, wanted: Any, wiring: _Wiring) -> _Plan | None:
        message_scope = self._scopes[-1]

        def scope_of(dependent: DependentBase[Any], _inner: Sequence[Hashable], _all: Sequence[Hashable]) -> Hashable:
            return _scope_of(dependent, message_scope)

        try:
            solved = self._services.solve(Dependent[Any](wanted, scope=message_scope), self._scopes, scope_of)
        except DependencyInjectionException as error:
            wiring.missing.append(f"{type_name(wanted)}: di cannot solve it: {error}")
        except Exception as error:  # noqa: BLE001  # to evaluate an annotation is to run the user's code
            wiring.missing.append(unreadable(wanted, error))
        else:
            wiring.look_through(wanted, solved)
            inner = [it for it in solved.dag if _scope_of(it, message_scope) == message_scope]
            return _Plan(solved, wide=len(inner) < len(solved.dag), ends=any(_yields(it.call) for it in inner))
        return None

    async def _execute(self, wanted: Any, scope: _DIScope) -> Any:
        plan = self._plans.get(wanted)
        if plan is None:
            raise ResolutionError(self, [unprepared(wanted)])
        if scope.state is None:
            outer = self._state or await self._enter_wide()
            scope.context = self._services.enter_scope(self._scopes[-1], outer)
            scope.state = await scope.context.__aenter__()
        scope.ends = scope.ends or plan.ends
        if not plan.wide or plan.settled_in is self._state:
            return await plan.solved.execute_async(_EXECUTOR, scope.state, scope.values)
        # What all messages share may not be there yet: one builds it, the others find it.
        await self._turns.take()
        try:
            found = await plan.solved.execute_async(_EXECUTOR, scope.state, scope.values)
            plan.settled_in = self._state
            return found
        finally:
            self._turns.give()

    async def _enter_wide(self) -> ScopeState:
        state = ScopeState()
        for name in self._scopes[:-1]:
            context = self._services.enter_scope(name, state)
            state = await context.__aenter__()  # never suspends, so that no other message can come between
            self._contexts.append(context)
        self._state = state
        return state


class _DIScope:
    __slots__ = ("_execute", "_turns", "context", "ends", "state", "values")

    is_async = True

    def __init__(self, execute: Callable[[Any, _DIScope], Awaitable[Any]], values: Mapping[Any, object]) -> None:
        self.values = values
        self.state: ScopeState | None = None
        self.context: AbstractAsyncContextManager[ScopeState] | None = None
        self.ends = False
        self._execute = execute
        self._turns = Turns()

    async def get(self, wanted: type[T], /) -> T:
        await self._turns.take()
        try:
            found: T = await self._execute(wanted, self)
            return found
        finally:
            self._turns.give()

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        return None if self.context is None or not self.ends else _leave(self.context, error)


async def _leave(context: AbstractAsyncContextManager[ScopeState], error: BaseException | None) -> None:
    if error is None:
        await context.__aexit__(None, None, None)
    else:
        await context.__aexit__(type(error), error, error.__traceback__)


@dataclass(slots=True)
class _Plan:
    solved: SolvedDependent[Any]
    wide: bool
    """Whether it needs something that lives longer than a message."""
    ends: bool
    """Whether the scope has to be left after it; if not, a message does not pay for that."""
    settled_in: ScopeState | None = None
    """Where all of that has been built."""


class _Placeholder:
    """Stands for a seed: the key of its value, called only in a scope that has none."""

    __slots__ = ("_container", "_wanted")

    def __init__(self, container: DIContainer, wanted: type) -> None:
        self._container = container
        self._wanted = wanted

    def __call__(self) -> NoReturn:
        raise ResolutionError(self._container, [unseeded(self._wanted)])


class _Transient(Dependent[Any]):
    """A handler: made anew, while what it asks for stays shared in the scope. di would pass `use_cache` down."""

    def __init__(self, handler: type, *, scope: Hashable) -> None:
        super().__init__(handler, scope=scope, use_cache=False)

    def get_default_marker(self) -> Marker:
        return Marker(scope=self.scope)


class _Wiring:
    """A bind, after all of the user's, that holds while the mediator's types are solved.

    It puts placeholders for seeds, makes handlers transient, and puts a stand-in for what is missing, so that solving
    goes on to the next.
    """

    def __init__(self, placeholders: Mapping[type, _Placeholder], scopes: Sequence[Hashable]) -> None:
        self.missing: list[str] = []
        self._message_scope = scopes[-1]
        self._seeds = {
            seed: Dependent[Any](placeholder, wire=False, scope=scopes[-1])
            for seed, placeholder in placeholders.items()
        }
        self._stand_in = Dependent[Any](_nothing, wire=False, scope=scopes[0], use_cache=False)

    def __call__(self, param: inspect.Parameter | None, dependent: DependentBase[Any]) -> DependentBase[Any] | None:
        if param is None:
            return self._root(dependent)
        wanted = wanted_type(param.annotation)
        if wanted in self._seeds and next(get_markers_from_annotation(param.annotation, Marker), None) is None:
            return self._seeds[wanted]
        if dependent.call is None and param.default is param.empty:
            return self._stand_in
        return self._stand_in if dependent.call is wanted and _is_made_up(wanted) else None

    def _root(self, dependent: DependentBase[Any]) -> DependentBase[Any] | None:
        wanted: Any = dependent.call
        if wanted in self._seeds:
            return self._seeds[wanted]
        scope = _scope_of(dependent, self._message_scope)
        if is_buildable_handler(wanted) and scope == self._message_scope and type(dependent) is Dependent:
            return _Transient(wanted, scope=scope)
        return self._stand_in if _is_made_up(wanted) else None

    def look_through(self, wanted: Any, solved: SolvedDependent[Any]) -> None:
        """Note where the stand-in was put."""
        if solved.dependency is self._stand_in:
            self.missing.append(f"{type_name(wanted)}: no bind provides it, and it cannot be made from its annotations")
        for owner, asked in solved.dag.items():
            for dependency, it in asked:
                if dependency is self._stand_in and it is not None:
                    call: Any = owner.call
                    keyword_only = it.kind is it.KEYWORD_ONLY
                    self.missing.append(Parameter(call, it.name, it.annotation, it.default, keyword_only).missing())


_EXECUTOR = AsyncExecutor()
_PROBE = object()


def _nothing() -> None: ...


def _scope_of(dependent: DependentBase[Any], otherwise: Hashable) -> Hashable:
    return otherwise if dependent.scope is None else dependent.scope


def _yields(call: Any) -> bool:
    """Whether di makes a context manager of this, told as di tells it."""
    while inner := _inside(call):
        call = inner
    return any(inspect.isgeneratorfunction(it) or inspect.isasyncgenfunction(it) for it in (call, call.__call__))


def _inside(call: Any) -> Any:
    return getattr(call, "func" if isinstance(call, partial) else "__wrapped__", None)


def _is_made_up(wanted: Any) -> bool:
    """Whether di would call this class for want of a bind, and should not."""
    return isinstance(wanted, type) and (
        wanted.__module__ == "builtins" or inspect.isabstract(wanted) or getattr(wanted, "_is_protocol", False)
    )


def _bound(container: Container, seeded: Collection[type]) -> list[type]:
    """Those of the types that a bind of the user's provides.

    Binds are functions that cannot be listed, so one parameter of each type is solved, and whatever dependent a bind
    puts in its place is seen to have another scope.
    """
    bound: list[type] = []
    untouched = Dependent[Any](_nothing, wire=False, scope=_PROBE)

    def look(param: inspect.Parameter | None, dependent: DependentBase[Any]) -> DependentBase[Any] | None:
        if param is None:
            return None
        if dependent.scope is not _PROBE:
            bound.append(param.annotation)
        return untouched

    with container.bind(look):
        container.solve(Dependent[Any](_Asking(seeded), scope=_PROBE), [_PROBE])
    return bound


class _Asking:
    """A callable that has one parameter for each of these types."""

    def __init__(self, types: Iterable[type]) -> None:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(f"p{at}", kind, annotation=it) for at, it in enumerate(types)]
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self) -> None: ...
