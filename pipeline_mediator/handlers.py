"""What a handler is: read once, when it is bound, so that nothing is inspected while messages are handled."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableSequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Union

from pipeline_mediator.container.signature import wanted_type
from pipeline_mediator.context import Context
from pipeline_mediator.errors import HandlerSignatureError, name_of

__all__ = ["UNKNOWN", "Handler", "assignable", "declared_result", "message_type_of", "read_handler"]

UNKNOWN: Any = object()
"""An annotation that is missing, or names something that only a type checker can see."""

_ASYNC_SESSIONS = "sqlalchemy.ext.asyncio"
_AWAITED = (Awaitable, Coroutine)


@dataclass(frozen=True, slots=True)
class Handler:
    """A bound handler: how to get it, and how to call it."""

    target: Any
    """The class, object or function that the user bound."""
    form: Literal["class", "object", "function"]
    function: Callable[..., Any]
    """What is called: the function, the object's bound `handle`, or the class's plain `handle`."""
    takes_context: bool
    context_keyword: str | None
    """The name to pass the context by, where it is not the second position."""
    parameters: tuple[tuple[str, type], ...]
    """Further parameters of a function, with the types that the scope resolves."""
    is_async: bool
    collects_events: bool
    """Whether it has an `events` property, or is an object with a list of that name (Diator's way of emitting)."""

    @property
    def name(self) -> str:
        """How people know it."""
        return name_of(self.target)

    @property
    def wanted(self) -> tuple[type, ...]:
        """The types that the scope has to provide."""
        if self.form == "class":
            return (self.target,)
        return tuple(wanted for _, wanted in self.parameters)


def read_handler(target: Any, message_type: type, *, result: Any, stream: bool = False) -> Handler:
    """Read and check a handler of `message_type`.

    `result` is what the message type declares (`UNKNOWN` if nothing). Raises `HandlerSignatureError` that names the
    handler, the message type, what is wrong and what would be right.
    """
    form, function = _form_of(target, message_type)
    refuse = _Refusal(target, message_type)
    positional, further = _parameters_of(function, skip_self=_takes_self(target), refuse=refuse)
    hints = _hints_of(function)
    _check_message(hints.get(positional.name, UNKNOWN), message_type, refuse)
    context_parameter = next((p for p in further if _is_context(p, hints)), None)
    resolved = [p for p in further if p is not context_parameter and p.default is inspect.Parameter.empty]
    if form != "function" and resolved:
        refuse(
            "handle() takes (message) or (message, context), but it also asks for "
            f"{', '.join(p.name for p in resolved)}. Ask for dependencies in __init__; a context is known by its "
            "annotation Context, or by the name `context`."
        )
    _check_result(function, hints.get("return", UNKNOWN), result, stream=stream, refuse=refuse)
    handler = Handler(
        target=target,
        form=form,
        function=function,
        takes_context=context_parameter is not None,
        context_keyword=_context_keyword(context_parameter, further),
        parameters=tuple((p.name, _resolvable(p, hints, refuse)) for p in resolved),
        is_async=stream or _is_async(function, hints),
        collects_events=_collects_events(target),
    )
    _refuse_unnameable(handler, further, refuse)
    if not handler.is_async:
        _refuse_async_sessions(handler, refuse)
    return handler


def message_type_of(function: Callable[..., Any]) -> type:
    """The message type that a function is annotated with, for `@map.handler`."""
    refuse = _Refusal(function, None)
    _, call = _form_of(function, None)
    positional, _ = _parameters_of(call, skip_self=_takes_self(function), refuse=refuse)
    hint = _hints_of(call).get(positional.name, UNKNOWN)
    if not isinstance(hint, type) or hint is Any:
        refuse(
            f"its first parameter {positional.name!r} must be annotated with the message type, and that type must be "
            "importable at run time"
        )
    message_type: type = hint
    return message_type


class _Refusal:
    """Raises `HandlerSignatureError` for one handler and one message type."""

    def __init__(self, target: object, message_type: type | None) -> None:
        self._target = target
        self._message_type = message_type

    def __call__(self, problem: str) -> typing.NoReturn:
        raise HandlerSignatureError(self._target, self._message_type, problem)


# -- form and parameters -----------------------------------------------------------------------------------------------


def _form_of(
    target: Any, message_type: type | None
) -> tuple[Literal["class", "object", "function"], Callable[..., Any]]:
    handle = getattr(target, "handle", None)
    if isinstance(target, type):
        if not callable(handle):
            raise HandlerSignatureError(target, message_type, "the class has no method handle(message)")
        return "class", handle
    if callable(handle):
        return "object", handle
    if callable(target):
        return "function", target
    raise HandlerSignatureError(
        target, message_type, "a handler is a class or an object with handle(message), or a function of the message"
    )


def _takes_self(target: Any) -> bool:
    return isinstance(target, type) and inspect.isfunction(inspect.getattr_static(target, "handle", None))


def _parameters_of(
    function: Callable[..., Any], *, skip_self: bool, refuse: _Refusal
) -> tuple[inspect.Parameter, list[inspect.Parameter]]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        refuse("its signature cannot be read; wrap it in a plain function")
    taken = [p for p in parameters[1 if skip_self else 0 :] if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    if not taken or taken[0].kind is inspect.Parameter.KEYWORD_ONLY:
        refuse("it takes no positional parameter for the message")
    return taken[0], taken[1:]


def _called(function: Any) -> Any:
    """What runs in the end: the function under `functools.partial`, the `__call__` of a callable object."""
    while isinstance(function, partial):
        function = function.func
    return function if inspect.isroutine(function) else function.__call__


def _hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by parameter name; those that cannot be resolved are `UNKNOWN`, the others still count."""
    plain: Any = inspect.unwrap(_called(function))
    try:
        return typing.get_type_hints(plain)
    except Exception:  # noqa: BLE001 - one annotation, whatever it raises, must not hide the others
        names = {**getattr(plain, "__globals__", {})}
        return {name: _hint(annotation, names) for name, annotation in getattr(plain, "__annotations__", {}).items()}


def _hint(annotation: object, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation  # noqa: S307 - own source
    except Exception:  # noqa: BLE001 - whatever it raises, it is unknown
        return UNKNOWN


def _is_context(parameter: inspect.Parameter, hints: dict[str, Any]) -> bool:
    hint = hints.get(parameter.name, UNKNOWN)
    if hint is UNKNOWN or hint is Any:
        # Often imported for type checkers only.
        annotation = parameter.annotation if isinstance(parameter.annotation, str) else ""
        return parameter.name == "context" or annotation.rpartition(".")[2].removesuffix(" | None") == "Context"
    return wanted_type(hint) is Context


def _context_keyword(context: inspect.Parameter | None, further: list[inspect.Parameter]) -> str | None:
    """The name to pass the context by; None where the second position will do."""
    if context is None or (context is further[0] and context.kind is not inspect.Parameter.KEYWORD_ONLY):
        return None
    return context.name


def _refuse_unnameable(handler: Handler, further: list[inspect.Parameter], refuse: _Refusal) -> None:
    passed_by_name = {handler.context_keyword, *(name for name, _ in handler.parameters)}
    for parameter in further:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.name in passed_by_name:
            refuse(
                f"its parameter {parameter.name!r} is positional-only; only the message and, directly behind it, the "
                "context are passed by position. Move the `/` in front of it."
            )


def _resolvable(parameter: inspect.Parameter, hints: dict[str, Any], refuse: _Refusal) -> type:
    hint = hints.get(parameter.name, UNKNOWN)
    if hint is UNKNOWN:
        refuse(
            f"parameter {parameter.name!r} is resolved from the scope by its annotation, and "
            + (
                "it has none"
                if parameter.annotation is inspect.Parameter.empty
                else f"{parameter.annotation!r} is unknown at run time: import it outside `if TYPE_CHECKING`"
            )
        )
    return typing.cast("type", wanted_type(hint))


def _is_async(function: Callable[..., Any], hints: dict[str, Any]) -> bool:
    returned = hints.get("return")
    return inspect.iscoroutinefunction(_called(function)) or (typing.get_origin(returned) or returned) in _AWAITED


def _collects_events(target: Any) -> bool:
    # Not any `events`: an object may well keep a store or a client under that name.
    declared = inspect.getattr_static(target if isinstance(target, type) else type(target), "events", None)
    return isinstance(declared, property | cached_property) or isinstance(
        getattr(target, "events", None), MutableSequence
    )


def _refuse_async_sessions(handler: Handler, refuse: _Refusal) -> None:
    if handler.form == "class":
        asked = [hint for name, hint in _hints_of(handler.target.__init__).items() if name != "return"]
    else:
        asked = [wanted for _, wanted in handler.parameters]
    for hint in asked:
        wanted = wanted_type(hint)
        if any(base.__module__.startswith(_ASYNC_SESSIONS) for base in getattr(wanted, "__mro__", ())):
            refuse(
                f"it is a plain function, which runs in a worker thread, and asks for {name_of(wanted)}, which belongs "
                "to the event loop. Make it `async def`, or give it a synchronous session of its own."
            )


# -- message and result ------------------------------------------------------------------------------------------------


def _check_message(hint: Any, message_type: type, refuse: _Refusal) -> None:
    if not assignable(message_type, hint):
        refuse(f"it takes {_text(hint)}, which {message_type.__name__} is not")


def _check_result(function: Callable[..., Any], returned: Any, wanted: Any, *, stream: bool, refuse: _Refusal) -> None:
    called = _called(function)
    if stream:
        if not inspect.isasyncgenfunction(called) and not _is_async_iterator(returned):
            refuse(
                "a stream's handler is an async generator (`async def handle(...)` with `yield`), or returns an "
                "AsyncIterator and is annotated so"
            )
        items = typing.get_args(returned)
        if items and not assignable(items[0], wanted):
            refuse(f"it yields {_text(items[0])}, but the message promises {_text(wanted)}")
        return
    if inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        refuse("it yields, so it is for a StreamQuery; return a result instead, or derive the message from StreamQuery")
    if (typing.get_origin(returned) or returned) in _AWAITED:
        returned = (UNKNOWN, *typing.get_args(returned))[-1]
    if not assignable(returned, wanted):
        refuse(f"it returns {_text(returned)}, but the message promises {_text(wanted)}")


def _is_async_iterator(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, AsyncIterator)


def declared_result(message_type: type, kinds: tuple[type, ...]) -> Any:
    """The R of `Command[R]` that a message type derives from, the nearest one; `UNKNOWN` for a bare `Command`.

    `kinds` are the generic message classes to look for.
    """
    level: list[Any] = [message_type]
    while level:
        for hint in level:
            if typing.get_origin(hint) in kinds:
                return typing.get_args(hint)[0]
        level = [base for hint in level if hint not in kinds for base in _bases_of(hint, kinds)]
    return UNKNOWN


def _bases_of(hint: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The bases of `Page[int]` that lead to one of the kinds, as they were written, with `int` put in."""
    origin: Any = typing.get_origin(hint) or hint
    given = dict(zip(getattr(origin, "__parameters__", ()), typing.get_args(hint), strict=False))
    written: tuple[Any, ...] = origin.__dict__.get("__orig_bases__", origin.__bases__)
    leading = [base for base in written if issubclass(typing.get_origin(base) or base, kinds)]
    return [_with_arguments(base, given) for base in leading]


def _with_arguments(base: Any, given: dict[Any, Any]) -> Any:
    parameters: tuple[Any, ...] = base.__parameters__ if typing.get_origin(base) else ()
    return base[tuple(given.get(one, Any) for one in parameters)] if parameters else base


def assignable(given: Any, wanted: Any) -> bool:
    """Whether a value of type `given` may stand where `wanted` is asked for, as far as that shows at run time.

    Errs on the side of yes: a type checker knows better, this catches what no checker was run on.
    """
    if given is Any or wanted is Any:
        return True
    given, wanted = _plain(given), _plain(wanted)
    if _is_union(given):
        return all(assignable(one, wanted) for one in typing.get_args(given))
    if _is_union(wanted):
        return any(assignable(given, one) for one in typing.get_args(wanted))
    given_origin, wanted_origin = typing.get_origin(given) or given, typing.get_origin(wanted) or wanted
    try:
        fits = issubclass(given_origin, wanted_origin) or (given is int and wanted is float)
    except TypeError:
        # No class at run time: UNKNOWN, a TypeVar, a Literal, a TypedDict, most protocols.
        return True
    pairs = zip(typing.get_args(given), typing.get_args(wanted), strict=False)
    return fits and (given_origin is not wanted_origin or all(assignable(one, other) for one, other in pairs))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in {Union, types.UnionType}


def _plain(hint: Any) -> Any:
    if hint is None:
        return type(None)
    if typing.get_origin(hint) is typing.Annotated:
        return typing.get_args(hint)[0]
    return getattr(hint, "__supertype__", hint)


def _text(hint: Any) -> str:
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
