"""Reads, once, what a constructor asks for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

from pipeline_mediator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = [
    "UNSET",
    "Parameter",
    "arrange",
    "is_buildable_handler",
    "parameters_of",
    "refuse_provided_seeds",
    "type_name",
    "unprepared",
    "unprovided",
    "unreadable",
    "unseeded",
    "wanted_type",
]

R = TypeVar("R")

UNSET: Any = inspect.Parameter.empty
"""Stands where a parameter has no annotation or no default."""


class _Bare(Protocol): ...


# What `typing` puts in front of the real __init__ of a class with a Protocol among its bases.
_PROTOCOL_INIT: Any = _Bare.__init__


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a constructor: `PlaceOrderHandler(mailer: Mailer)`."""

    owner: type
    name: str
    annotation: Any
    """As written, strings evaluated; UNSET where there is none."""
    default: Any
    keyword_only: bool

    @property
    def wanted(self) -> Any:
        """The type to provide: the annotation without Annotated and without None."""
        return wanted_type(self.annotation)

    @property
    def has_default(self) -> bool:
        """Whether the call works without it."""
        return self.default is not UNSET

    def missing(self, why: str | None = None) -> str:
        """The entry of a ResolutionError for this parameter."""
        if self.annotation is UNSET:
            return f"{type_name(self.owner)}({self.name}): {why or 'it has no annotation and no default'}"
        place = f"{type_name(self.owner)}({self.name}: {type_name(self.annotation)})"
        return f"{place}: {why or f'nothing provides {type_name(self.wanted)}'}"


def parameters_of(owner: type) -> tuple[Parameter, ...]:
    """What the constructor of `owner` asks for, without *args and **kwargs.

    Raises `ValueError` with the entry of a ResolutionError where the signature or an annotation cannot be read.
    """
    try:
        if getattr(owner, "__init__", None) is _PROTOCOL_INIT:
            found = list(inspect.signature(_real_init(owner), eval_str=True).parameters.values())[1:]
        else:
            found = list(inspect.signature(owner, eval_str=True).parameters.values())
    except Exception as error:  # to evaluate an annotation is to run the user's code
        raise ValueError(unreadable(owner, error)) from error
    return tuple(
        Parameter(owner, it.name, it.annotation, it.default, it.kind is inspect.Parameter.KEYWORD_ONLY)
        for it in found
        if it.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    )


def _real_init(owner: type) -> Any:
    inits = (vars(base).get("__init__") for base in owner.__mro__)
    return next(init for init in inits if init is not None and init is not _PROTOCOL_INIT)


def arrange(
    asked: Iterable[Parameter],
    source_of: Callable[[Parameter], R | None],
    fixed: Callable[[object], R],
) -> tuple[list[R], dict[str, R]]:
    """The sources of a call's positional and keyword arguments; a parameter without a source keeps its default."""
    positional: list[R] = []
    keywords: dict[str, R] = {}
    skipped: list[object] = []
    for parameter in asked:
        source = source_of(parameter)
        if parameter.keyword_only:
            if source is not None:
                keywords[parameter.name] = source
        elif source is None:
            skipped.append(parameter.default)
        else:
            positional += [*map(fixed, skipped), source]
            skipped.clear()
    return positional, keywords


def wanted_type(annotation: Any) -> Any:
    """`T` of `T`, `T | None`, `Annotated[T, ...]` and their mixtures."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return wanted_type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        arms = [arm for arm in get_args(annotation) if arm is not NoneType]
        if len(arms) == 1:
            return wanted_type(arms[0])
    return annotation


def is_buildable_handler(wanted: Any) -> bool:
    """Whether this is a handler class, which a container builds although nobody provided it.

    Nothing else is: a Settings() that a container makes up from defaults is worse than an error at start.
    """
    return (
        isinstance(wanted, type)
        and callable(getattr(wanted, "handle", None))
        and not inspect.isabstract(wanted)
        and not getattr(wanted, "_is_protocol", False)
    )


def unprovided(wanted: Any) -> str:
    """The entry of a ResolutionError for a type that a handler function asks for."""
    return f"{type_name(wanted)}: nothing provides it, and only concrete classes with a `handle` are built unasked"


def unreadable(owner: type, error: Exception) -> str:
    """The entry of a ResolutionError for a class without a signature, or with annotations that do not evaluate."""
    hint = ". Import that name at run time, outside `if TYPE_CHECKING:`" if isinstance(error, NameError) else ""
    return f"{type_name(owner)}: what it asks for cannot be read, {error}{hint}"


def unprepared(wanted: Any) -> str:
    """The entry of a ResolutionError for a type that was never announced."""
    return f"{type_name(wanted)}: the mediator did not ask for it at start"


def unseeded(wanted: Any) -> str:
    """The entry of a ResolutionError for a seed that one scope was opened without."""
    return (
        f"{type_name(wanted)}: this message's scope was opened without one, though the mediator announced it. Is "
        "TransactionMiddleware left out of this message's chain?"
    )


def refuse_provided_seeds(container: object, provided: Collection[type]) -> None:
    """Raise if the container provides by itself what every scope is opened with."""
    if provided:
        names = ", ".join(map(type_name, provided))
        raise ConfigurationError(
            f"{type(container).__name__} provides {names}, and so does the mediator, for each message (from "
            "TransactionMiddleware or as the Context): handlers would write to another one than the one that is "
            f"committed. Take {names} out of the container; nested services get the mediator's."
        )


def type_name(wanted: Any) -> str:
    """The name by which a person knows a type, or what else asks for one."""
    name = getattr(wanted, "__name__", None)
    return name if isinstance(name, str) and get_origin(wanted) is None else inspect.formatannotation(wanted)
