"""Resolves handlers from a `rodi.Container`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, get_origin, get_type_hints

from pipeline_mediator.container.closing import close_all, closing_method
from pipeline_mediator.container.signature import (
    UNSET,
    Parameter,
    is_buildable_handler,
    refuse_provided_seeds,
    type_name,
    unprovided,
    unreadable,
    unseeded,
)
from pipeline_mediator.errors import ConfigurationError, MissingExtraError, ResolutionError

try:
    import rodi
except ModuleNotFoundError as error:
    if error.name != "rodi":
        raise
    raise MissingExtraError("RodiContainer", "rodi", "rodi") from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Iterator, Mapping

    from pipeline_mediator.container import Scope

__all__ = ["RodiContainer"]


class RodiContainer:
    """Resolves handlers from your `rodi.Container`, one rodi scope per root message.

    Give it a container from which nothing was resolved yet: its provider is built once, before the mediator's first
    message, and what is registered later is not seen. Handlers need not be registered: those that are not become
    transient. Services may ask for what the mediator opens each scope with (the Context, the session that Transaction
    began).

        services = rodi.Container()
        services.add_singleton(Mailer)
        services.add_scoped(OrderRepository)
        mediator = Mediator(requests, RodiContainer(services), ...)

    rodi itself ends nothing, so the scope does: every scoped service that has an `aclose()`, or else a `close()`, that
    needs no argument, last built first. So a scoped factory owns what it returns; do not let one return a singleton.
    Transient services and singletons are not ended.

    rodi resolves synchronously: an async factory hands out a bare coroutine. It builds singletons when they are first
    asked for and is not thread-safe, so let one thread resolve.

    Raises `ConfigurationError` if the container is built already, or provides what the mediator provides;
    `ResolutionError` with everything that is missing. A parameter with a default has to be registered too: rodi's rule.
    """

    __slots__ = ("_ending", "_provider", "_seeded", "_services")

    def __init__(self, services: rodi.Container | None = None) -> None:
        self._services = rodi.Container() if services is None else services
        self._seeded: set[type] = set()
        self._provider = rodi.Services()
        self._ending: _Ending | None = None

    def attach_external_container(self, container: rodi.Container) -> None:
        """Use this container; the same as giving it to the constructor."""
        if self._seeded:
            raise ConfigurationError(
                "a mediator was already prepared over this RodiContainer, so its rodi container cannot be exchanged. "
                "Attach the container before the Mediator is used."
            )
        self._services = container

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Register handlers and placeholders for the seeds, and build the provider. No object is made."""
        services: Any = self._services  # its methods are only half annotated
        known: dict[Any, Any] = dict(services)
        refuse_provided_seeds(self, [it for it in seeded if it in known and not _is_placeholder(known[it])])
        seeds = [it for it in dict.fromkeys(seeded) if it not in known]
        strangers = [it for it in dict.fromkeys(wanted) if it not in known and it not in seeds]
        handlers = [it for it in strangers if is_buildable_handler(it)]

        constructed = [it for it in map(_constructed_by, known.values()) if it is not None]
        missing = [unprovided(it) for it in strangers if it not in handlers]
        for it in dict.fromkeys([*handlers, *constructed]):
            missing += _missing(it, {*known, *seeds, *handlers})
        if missing:
            raise ResolutionError(self, missing)

        if seeds or handlers:
            self._refuse_built()
        for it in seeds:
            services.add_scoped_by_factory(_Placeholder(self, it), it)
        for it in handlers:
            services.add_transient(it)
        try:
            self._provider = services.provider
        except Exception as error:  # rodi has no root for what a bad registration may raise
            raise ResolutionError(self, [f"rodi refuses to build its provider: {error}"]) from error
        self._seeded.update(seeded)
        if any(map(_may_need_ending, known.values())):
            self._ending = _Ending(self._seeded)

    def open(self, seeds: Mapping[type, object], /) -> Scope:
        """A new scope."""
        services: Any = dict(seeds)
        scope = _RodiScope(self._provider, services)
        scope.ending = self._ending
        return scope

    def _refuse_built(self) -> None:
        if getattr(self._services, "_provider", None) is not None:  # rodi does not tell otherwise
            raise ConfigurationError(
                "the rodi container is built already: something was resolved from it, or a mediator with other "
                "handlers uses it. Building it again would make its singletons a second time. Call mediator.prepare() "
                "before anything is resolved, and give each mediator a container of its own."
            )


class _RodiScope(rodi.ActivationScope):
    # A subclass, so that `get` is rodi's own: a wrapper would cost a third of it again.
    __slots__ = ("ending",)

    is_async = False
    ending: _Ending | None

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        scope: Any = self  # rodi leaves its methods unannotated
        closing = None if self.ending is None else self.ending.of(scope.scoped_services)
        scope.dispose()
        return close_all(closing) if closing else None


class _Ending:
    """Knows which of the objects that a rodi scope holds it has to end, and how."""

    def __init__(self, seeded: Collection[type]) -> None:
        self._seeded = frozenset(seeded)
        self._methods: dict[type, str | None] = {}

    def of(self, services: Mapping[Any, object]) -> list[tuple[object, str]]:
        """Those to end, in the order they were made, with the method that ends them."""
        closing: list[tuple[object, str]] = []
        # A factory may hand out a seed, or another service, under a second type.
        done = {id(service) for key, service in services.items() if key in self._seeded}
        for service in services.values():
            method = self._method_of(type(service))
            if method is not None and id(service) not in done:
                done.add(id(service))
                closing.append((service, method))
        return closing

    def _method_of(self, kind: type) -> str | None:
        if kind not in self._methods:
            self._methods[kind] = closing_method(kind)
        return self._methods[kind]


def _may_need_ending(resolver: Any) -> bool:
    """Whether what this makes could have to be ended with its scope; what a factory returns is only known then."""
    if getattr(resolver, "life_style", None) is not rodi.ServiceLifeStyle.SCOPED or _is_placeholder(resolver):
        return False
    constructed = _constructed_by(resolver)
    return constructed is None or closing_method(constructed) is not None


def _constructed_by(resolver: object) -> Any:
    """The class that this resolver calls; None where it uses a factory, an instance, or a decorator."""
    return getattr(resolver, "concrete_type", None) if isinstance(resolver, rodi.DynamicResolver) else None


class _Placeholder:
    """Registered for a seed, so that services may ask for it; called only in a scope that has none."""

    __slots__ = ("_container", "_wanted")

    def __init__(self, container: RodiContainer, wanted: type) -> None:
        self._container = container
        self._wanted = wanted

    def __call__(self, scope: object, activating: object) -> NoReturn:
        raise ResolutionError(self._container, [unseeded(self._wanted)])


def _is_placeholder(resolver: object) -> bool:
    return isinstance(getattr(resolver, "factory", None), _Placeholder)


def _missing(owner: type, known: Collection[Any]) -> Iterator[str]:
    """What rodi will not find when it builds `owner`, by rodi's own rules."""
    try:
        parameters, attributes = list(_parameters(owner)), list(_attributes(owner))
    except Exception as error:  # noqa: BLE001  # to evaluate an annotation is to run the user's code
        yield unreadable(owner, error)
        return
    for parameter in parameters:
        if parameter.annotation not in known and parameter.annotation is not UNSET:  # rodi goes by the name then
            default = "; rodi wants it registered although it has a default" if parameter.has_default else ""
            yield parameter.missing(f"nothing provides {type_name(parameter.annotation)}{default}")
    for name, wanted in attributes:
        if wanted not in known and all(name != parameter.name for parameter in parameters):
            yield (
                f"{type_name(owner)}.{name}: nothing provides {type_name(wanted)}, which rodi would assign, as it does "
                "with annotated attributes without a value"
            )


def _parameters(owner: Any) -> Iterator[Parameter]:
    init = owner.__init__
    hints = get_type_hints(init)
    for it in list(inspect.signature(init).parameters.values())[1:]:
        if it.name not in ("args", "kwargs"):
            yield Parameter(owner, it.name, hints.get(it.name, it.annotation), it.default, it.kind is it.KEYWORD_ONLY)


def _attributes(owner: type) -> Iterator[tuple[str, Any]]:
    for name, wanted in get_type_hints(owner).items():
        if get_origin(wanted) is not ClassVar and getattr(owner, name, None) is None:
            yield name, wanted
