"""Requests (commands, queries, streams) and the map that binds each to its one handler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Protocol, Self, TypeVar

from pipeline_mediator.errors import BindError, DuplicateHandlerError, FrozenMapError, name_of
from pipeline_mediator.handlers import UNKNOWN, Handler, declared_result, message_type_of, read_handler

if TYPE_CHECKING:
    # PEP 696: a bare `Command` is `Command[None]`, a bare `Request` is `Request[Any]`.
    from typing_extensions import TypeVar as DefaultedTypeVar

    R_co = DefaultedTypeVar("R_co", covariant=True, default=Any)
    C_co = DefaultedTypeVar("C_co", covariant=True, default=None)
else:
    R_co = TypeVar("R_co", covariant=True)
    C_co = TypeVar("C_co", covariant=True)

__all__ = ["Command", "Query", "Request", "RequestHandler", "RequestMap", "StreamQuery"]

T_co = TypeVar("T_co", covariant=True)
H = TypeVar("H")
H_contra = TypeVar("H_contra", contravariant=True)
F = TypeVar("F", bound=Callable[..., Any])
Q_contra = TypeVar("Q_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class RequestHandler(Protocol[Q_contra, Result_co]):
    """What handles one request type; to derive from it is optional.

    `handle(message)` or `handle(message, context)`, async or plain (a plain one runs in a worker thread).
    """

    async def handle(self, message: Q_contra, /) -> Result_co:
        """Do what the request asks for."""
        ...


class _Handles(Protocol[Q_contra, Result_co]):
    def handle(self, message: Q_contra, /, *args: Any, **kwargs: Any) -> Result_co: ...


if TYPE_CHECKING:
    Q = TypeVar("Q")
    X = TypeVar("X")
    HandlerOf = type[_Handles[Q, X]] | _Handles[Q, X] | Callable[Concatenate[Q, ...], X]


class Request(Generic[R_co]):
    """A message with exactly one handler and a result of type R.

    The bases carry no fields, so a request may be a dataclass, an attrs class, a msgspec Struct or a pydantic model
    (`class PlaceOrder(BaseModel, Command[int])`, in that order). The mediator sets nothing on a message.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        # Never called: it gives type checkers the message and the result of a class at once, for RequestMap.bind.
        @classmethod
        def __bind__(cls, handler: HandlerOf[Self, Awaitable[R_co] | R_co], /) -> None: ...


class Command(Request[C_co]):
    """A request that changes something; bare, it returns None."""

    __slots__ = ()


class Query(Request[T_co]):
    """A request that only reads."""

    __slots__ = ()


class StreamQuery(Generic[T_co]):
    """A request whose items of type T are handed over one by one; for `mediator.stream`."""

    __slots__ = ()

    if TYPE_CHECKING:

        @classmethod
        def __bind__(cls, handler: HandlerOf[Self, AsyncIterator[T_co]], /) -> None: ...


_KINDS = (Request, Command, Query, StreamQuery)


class Bindable(Protocol[H_contra]):
    """A request class, seen through its phantom `__bind__`."""

    def __bind__(self, handler: H_contra, /) -> None:
        """Never called."""
        ...


class RequestMap:
    """Binds each request type to its one handler: a class, an object, or a function.

        requests = RequestMap().bind(PlaceOrder, PlaceOrderHandler)

        @requests.handler
        async def get_stock(query: GetStock) -> int: ...

    Type checkers hold the handler to the message and to its result; `bind` does so again at run time. Raises
    `HandlerSignatureError`, `DuplicateHandlerError`, and `FrozenMapError` once a mediator has compiled the map.
    """

    def __init__(self) -> None:
        self._handlers: dict[type, Handler] = {}
        self._frozen = False

    def bind(self, request: Bindable[H], handler: H) -> Self:
        """Bind a handler to a request type."""
        return self._bind(request, handler)

    def handler(self, function: F) -> F:
        """Bind a function to the request type that its first parameter is annotated with."""
        self._bind(message_type_of(function), function)
        return function

    def include(self, *maps: RequestMap) -> Self:
        """Take over what other maps bind; a request that two of them bind raises `DuplicateHandlerError`."""
        before = dict(self._handlers)
        try:
            for other in maps:
                for message_type, handler in other._handlers.items():
                    self._add(message_type, handler)
        except BindError:
            self._handlers = before
            raise
        return self

    def _bind(self, request: Any, target: Any) -> Self:
        if not _is_request(request):
            raise BindError(
                f"{name_of(request)} is no request type: derive it from Command[R], Query[R], StreamQuery[T] or "
                f"Request[R]{'. An event is bound with EventMap.' if _is_event(request) else ''}"
            )
        if request in _KINDS:
            raise BindError(
                f"{request.__name__} is a kind of request; nobody sends one of exactly that type, and a request needs "
                "its own handler: bind the classes derived from it"
            )
        stream = issubclass(request, StreamQuery)
        promised = promised_result(request)
        return self._add(request, read_handler(target, request, result=promised, stream=stream))

    def _add(self, message_type: type, handler: Handler) -> Self:
        if self._frozen:
            raise FrozenMapError("this RequestMap", message_type)
        existing = self._handlers.get(message_type)
        if existing is not None:
            raise DuplicateHandlerError(message_type, existing.target, handler.target)
        self._handlers[message_type] = handler
        return self

    def get(self, message_type: type) -> Handler | None:
        """The handler of exactly this type."""
        return self._handlers.get(message_type)

    def freeze(self) -> None:
        """Refuse further binds; a mediator does this when it compiles the map."""
        self._frozen = True

    def __contains__(self, message_type: object) -> bool:
        return isinstance(message_type, type) and message_type in self._handlers

    def __iter__(self) -> Iterator[type]:
        return iter(self._handlers)

    def __len__(self) -> int:
        return len(self._handlers)


def promised_result(request: type) -> Any:
    """What a request type declares to return: the R of `Command[R]`, None for a bare `Command`, else `UNKNOWN`."""
    declared = declared_result(request, _KINDS)
    return type(None) if declared is UNKNOWN and issubclass(request, Command) else declared


def _is_request(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, _KINDS)


def _is_event(thing: object) -> bool:
    from pipeline_mediator.events import Event

    return isinstance(thing, type) and issubclass(thing, Event)
