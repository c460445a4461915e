"""What a handler is: read once, when it is bound, so that nothing is inspected while messages are handled."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from pipeline_mediator.context import Context
from pipeline_mediator.errors import HandlerSignatureError, name_of

__all__ = ["UNKNOWN", "Handler", "assignable", "declared_result", "message_type_of", "read_handler"]

UNKNOWN: Any = object()
"""An annotation that is missing, or names something that only a type checker can see."""

_ASYNC_SESSIONS = "sqlalchemy.ext.asyncio"


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
    """Whether it has an `events` property (Diator's way of emitting)."""

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
            f"handle() takes (message) or (message, context), but it also asks for {', '.join(p.name for p in resolved)}. "
            "Ask for dependencies in __init__."
        )
    is_async = _is_async(function, hints)
    _check_result(function, hints.get("return", UNKNOWN), result, stream=stream, refuse=refuse)
    handler = Handler(
        target=target,
        form=form,
        function=function,
        takes_context=context_parameter is not None,
        context_keyword=None if context_parameter is None or context_parameter is further[0] and context_parameter.kind is not inspect.Parameter.KEYWORD_ONLY else context_parameter.name,
        parameters=tuple((p.name, _resolvable(p, hints, refuse)) for p in resolved),
        is_async=is_async or stream,
        collects_events=form != "function" and hasattr(target, "events"),
    )
    if not handler.is_async:
        _refuse_async_sessions(handler, refuse)
    return handler


def message_type_of(function: Callable[..., Any]) -> type:
    """The message type that a function is annotated with, for `@map.handler`."""
    refuse = _Refusal(function, None)
    _, call = _form_of(function, None)
    positional, _ = _parameters_of(call, skip_self=_takes_self(function), refuse=refuse)
    hint = _hints_of(call).get(positional.name, UNKNOWN)
    if not isinstance(hint, type):
        refuse(
            f"its first parameter {positional.name!r} must be annotated with the message type, and that type must be "
            "importable at run time"
        )
    return typing.cast("type", hint)


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


def _hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by parameter name; those that cannot be resolved are `UNKNOWN`, the others still count."""
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004 - its hints
    plain = inspect.unwrap(getattr(call, "func", call))
    try:
        return typing.get_type_hints(plain)
    except (NameError, AttributeError, TypeError):
        pass
    hints: dict[str, Any] = {}
    names = {**getattr(plain, "__globals__", {})}
    for name, annotation in getattr(plain, "__annotations__", {}).items():
        try:
            hints[name] = eval(annotation, names) if isinstance(annotation, str) else annotation  # noqa: S307 - own source
        except Exception:
            hints[name] = UNKNOWN
    return hints


def _is_context(parameter: inspect.Parameter, hints: dict[str, Any]) -> bool:
    hint = hints.get(parameter.name, UNKNOWN)
    return hint is Context or (hint is UNKNOWN and parameter.name == "context")


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
    return typing.cast("type", hint)


def _is_async(function: Callable[..., Any], hints: dict[str, Any]) -> bool:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return True
    returned = typing.get_origin(hints.get("return")) or hints.get("return")
    return returned in {Awaitable, Coroutine}


def _refuse_async_sessions(handler: Handler, refuse: _Refusal) -> None:
    if handler.form == "class":
        asked = [hint for name, hint in _hints_of(handler.target.__init__).items() if name != "return"]
    else:
        asked = [wanted for _, wanted in handler.parameters]
    for hint in asked:
        if getattr(hint, "__module__", "").startswith(_ASYNC_SESSIONS):
            refuse(
                f"it is a plain function, which runs in a worker thread, and asks for {name_of(hint)}, which belongs to "
                "the event loop. Make it `async def`, or give it a synchronous session of its own."
            )


# -- message and result ------------------------------------------------------------------------------------------------


def _check_message(hint: Any, message_type: type, refuse: _Refusal) -> None:
    if not assignable(message_type, hint):
        refuse(f"it takes {_text(hint)}, which {message_type.__name__} is not")


def _check_result(function: Callable[..., Any], returned: Any, wanted: Any, *, stream: bool, refuse: _Refusal) -> None:
    if stream:
        if inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(getattr(function, "__call__", None)):  # noqa: B004
            items = typing.get_args(returned)
            if items and not assignable(items[0], wanted):
                refuse(f"it yields {_text(items[0])}, but the message promises {_text(wanted)}")
        elif not _is_async_iterator(returned):
            refuse(
                "a stream's handler is an async generator (`async def handle(...)` with `yield`), or returns an "
                "AsyncIterator and is annotated so"
            )
        return
    if inspect.isasyncgenfunction(function):
        refuse("it yields, so it is for a StreamQuery; return a result instead, or derive the message from StreamQuery")
    if typing.get_origin(returned) in {Awaitable, Coroutine}:
        returned = typing.get_args(returned)[-1]
    if not assignable(returned, wanted):
        refuse(f"it returns {_text(returned)}, but the message promises {_text(wanted)}")


def _is_async_iterator(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, AsyncIterator)


def declared_result(message_type: type, bases: tuple[Any, ...]) -> Any:
    """The R of `Command[R]` that a message type derives from; `UNKNOWN` if it says none.

    `bases` are the generic message classes to look for.
    """
    for base in message_type.__mro__:
        for generic in getattr(base, "__orig_bases__", ()):
            if typing.get_origin(generic) in bases:
                declared = typing.get_args(generic)[0]
                return UNKNOWN if isinstance(declared, TypeVar) else declared
    return UNKNOWN


def assignable(given: Any, wanted: Any) -> bool:
    """Whether a value of type `given` may stand where `wanted` is asked for, as far as that shows at run time.

    Errs on the side of yes: a type checker knows better, this catches what no checker was run on.
    """
    if any(one is UNKNOWN or one is Any or isinstance(one, TypeVar | str) for one in (given, wanted)) or wanted is object:
        return True
    given, wanted = _plain(given), _plain(wanted)
    if _is_union(given):
        return all(assignable(one, wanted) for one in typing.get_args(given))
    if _is_union(wanted):
        return any(assignable(given, one) for one in typing.get_args(wanted))
    given_origin, wanted_origin = typing.get_origin(given) or given, typing.get_origin(wanted) or wanted
    if not isinstance(given_origin, type) or not isinstance(wanted_origin, type):
        return True
    if not _is_subclass(given_origin, wanted_origin):
        return False
    pairs = zip(typing.get_args(given), typing.get_args(wanted), strict=False)
    return given_origin is not wanted_origin or all(assignable(one, other) for one, other in pairs)


def _is_subclass(given: type, wanted: type) -> bool:
    if getattr(wanted, "_is_protocol", False) or (wanted is float and given is int):
        return True
    return issubclass(given, wanted)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in {Union, types.UnionType}


def _plain(hint: Any) -> Any:
    if hint is None:
        return type(None)
    if typing.get_origin(hint) is typing.Annotated:
        return typing.get_args(hint)[0]
    return getattr(hint, "__supertype__", hint)


def _text(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
