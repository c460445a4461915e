"""What may be a handler, how it gets its context and its dependencies, and what is refused when it is bound."""

import functools
import threading
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NewType, Optional, Protocol, TypedDict, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from pipeline_mediator import Command, Context, DomainEvent, EventMap, Mediator, Query, Request, RequestMap, StreamQuery
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import HandlerSignatureError

T = TypeVar("T")


@dataclass(frozen=True)
class Add(Command[str]):
    """Handled by everything that may handle: the answer says what it was given."""

    number: int


@dataclass(frozen=True)
class Other(Command[str]):
    number: int


@dataclass(frozen=True)
class Numbers(StreamQuery[int]):
    limit: int


@dataclass(frozen=True)
class Added(DomainEvent):
    number: int


class Mailer:
    name = "mailer"


class Printer:
    name = "printer"


def given(command: Add, context: object = None) -> str:
    if context is None:
        return f"{command.number}"
    assert isinstance(context, Context)
    assert context.message is command
    return f"{command.number} and context"


def unannotated(function: Any, *names: str) -> Any:
    """The function, without the annotations of these parameters."""
    for name in names:
        del function.__annotations__[name]
    return function


def hidden(function: Any, **annotations: str) -> Any:
    """The function with annotations that only a type checker can resolve."""
    function.__annotations__.update(annotations)
    return function


# -- forms -------------------------------------------------------------------------------------------------------------


class Async:
    async def handle(self, command: Add) -> str:
        return given(command)


class AsyncWithContext:
    async def handle(self, command: Add, context: Context) -> str:
        return given(command, context)


class Sync:
    def handle(self, command: Add) -> str:
        return given(command)


class SyncWithContext:
    def handle(self, command: Add, context: Context) -> str:
        return given(command, context)


class WithDependency:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer

    async def handle(self, command: Add) -> str:
        return given(command) if self.mailer.name == "mailer" else "wrong"


class WithDependencyAndContext(WithDependency):
    async def handle(self, command: Add, context: Context | None = None) -> str:
        return given(command, context) if self.mailer.name == "mailer" else "wrong"


class SyncWithDependency:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer

    def handle(self, command: Add, context: Context) -> str:
        return given(command, context) if self.mailer.name == "mailer" else "wrong"


class Static:
    @staticmethod
    async def handle(command: Add) -> str:
        return given(command)


class StaticSync:
    @staticmethod
    def handle(command: Add, context: Context) -> str:
        return given(command, context)


class ClassMethod:
    @classmethod
    async def handle(cls, command: Add, context: Context) -> str:
        return given(command, context)


class Calls:
    async def __call__(self, command: Add) -> str:
        return given(command)


class CallsSync:
    def __call__(self, command: Add, context: Context) -> str:
        return given(command, context)


class Methods:
    async def on_add(self, command: Add) -> str:
        return given(command)

    def on_add_sync(self, command: Add, context: Context) -> str:
        return given(command, context)


async def function(command: Add) -> str:
    return given(command)


async def function_with_context(command: Add, context: Context) -> str:
    return given(command, context)


def sync_function(command: Add) -> str:
    return given(command)


def sync_function_with_context(command: Add, context: Context) -> str:
    return given(command, context)


def returning_awaitable(command: Add, context: Context) -> Awaitable[str]:
    return function_with_context(command, context)


def returning_coroutine(command: Add) -> Coroutine[Any, Any, str]:
    return function(command)


def returning_bare_awaitable(command: Add) -> Awaitable[str]:
    return function(command)


returning_bare_awaitable.__annotations__["return"] = Awaitable


async def with_prefix(prefix: str, command: Add, context: Context) -> str:
    assert prefix == "prefix"
    return given(command, context)


def with_suffix(command: Add, *, suffix: str) -> str:
    assert suffix == "suffix"
    return given(command)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return function(*args, **keywords)

    return call


@logged
async def decorated(command: Add, context: Context) -> str:
    return given(command, context)


class Decorated:
    @logged
    async def handle(self, command: Add, context: Context) -> str:
        return given(command, context)


FORMS: list[tuple[Any, str]] = [
    (Async, "1"),
    (Async(), "1"),
    (AsyncWithContext, "1 and context"),
    (AsyncWithContext(), "1 and context"),
    (Sync, "1"),
    (Sync(), "1"),
    (SyncWithContext, "1 and context"),
    (SyncWithContext(), "1 and context"),
    (WithDependency, "1"),
    (WithDependency(Mailer()), "1"),
    (WithDependencyAndContext, "1 and context"),
    (SyncWithDependency, "1 and context"),
    (Static, "1"),
    (Static(), "1"),
    (StaticSync, "1 and context"),
    (ClassMethod, "1 and context"),
    (ClassMethod(), "1 and context"),
    (Calls(), "1"),
    (CallsSync(), "1 and context"),
    (Methods().on_add, "1"),
    (Methods().on_add_sync, "1 and context"),
    (function, "1"),
    (function_with_context, "1 and context"),
    (sync_function, "1"),
    (sync_function_with_context, "1 and context"),
    (returning_awaitable, "1 and context"),
    (returning_coroutine, "1"),
    (returning_bare_awaitable, "1"),
    (functools.partial(with_prefix, "prefix"), "1 and context"),
    (functools.partial(with_suffix, suffix="suffix"), "1"),
    (functools.partial(Calls()), "1"),
    (decorated, "1 and context"),
    (Decorated, "1 and context"),
    (functools.lru_cache(sync_function), "1"),
]


@pytest.mark.parametrize(("handler", "answer"), FORMS)
async def test_a_handler_may_have_any_form(handler: Any, answer: str) -> None:
    mediator = Mediator(RequestMap().bind(Add, handler), PlainContainer(Mailer()))

    assert await mediator.send(Add(1)) == answer


@pytest.mark.parametrize("handler", [handler for handler, _ in FORMS])
def test_every_form_is_held_to_its_message_and_result(handler: Any) -> None:
    # Every handler of Add takes it, but none returns bytes; what a type says itself counts.
    add_numbers: Any = types.new_class("AddNumbers", (Add, Command[bytes]))

    with pytest.raises(HandlerSignatureError, match="which Other is not"):
        RequestMap().bind(Other, handler)
    if handler is not returning_bare_awaitable:
        with pytest.raises(HandlerSignatureError, match="it returns str, but the message promises bytes"):
            RequestMap().bind(add_numbers, handler)


@pytest.mark.parametrize("handler", [handler for handler, _ in FORMS])
def test_the_decorator_reads_the_type_of_every_form(handler: Any) -> None:
    requests = RequestMap()

    requests.handler(handler)

    assert list(requests) == [Add]


async def test_a_class_is_made_anew_for_each_message_and_an_object_is_not() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        async def handle(self, command: Add) -> str:
            self.calls += 1
            return str(self.calls)

    by_class = Mediator(RequestMap().bind(Add, Counting))
    by_object = Mediator(RequestMap().bind(Add, Counting()))

    assert [await by_class.send(Add(1)), await by_class.send(Add(1))] == ["1", "1"]
    assert [await by_object.send(Add(1)), await by_object.send(Add(1))] == ["1", "2"]


# -- context and dependencies ------------------------------------------------------------------------------------------


def by_annotation(command: Add, anything: Context) -> str:
    return given(command, anything)


def by_name(command: Add, context: Any) -> str:
    return given(command, context)


unannotated(by_name, "context")


def by_name_and_any(command: Add, context: Any) -> str:
    return given(command, context)


def by_keyword(command: Add, *, context: Context) -> str:
    return given(command, context)


def by_keyword_annotation(command: Add, *, anything: Context) -> str:
    return given(command, anything)


def optional(command: Add, context: Context | None = None) -> str:
    return given(command, context)


def annotated(command: Add, it: Annotated[Context, "of the message"]) -> str:
    return given(command, it)


def positional_only(command: Add, it: Context, /) -> str:
    return given(command, it)


def behind_a_default(command: Add, flag: bool = False, context: Context | None = None) -> str:  # noqa: FBT001, FBT002
    assert flag is False
    return given(command, context)


def behind_a_dependency(command: Add, mailer: Mailer, context: Context) -> str:
    assert isinstance(mailer, Mailer)
    return given(command, context)


def before_a_dependency(command: Add, context: Context, mailer: Mailer) -> str:
    assert isinstance(mailer, Mailer)
    return given(command, context)


def in_quotes(command: "Add", it: "Context") -> "str":
    return given(command, it)


def with_extras(command: Add, *args: Any, context: Context, **keywords: Any) -> str:
    assert not args
    assert not keywords
    return given(command, context)


@pytest.mark.parametrize(
    "handler",
    [
        by_annotation,
        by_name,
        by_name_and_any,
        by_keyword,
        by_keyword_annotation,
        optional,
        annotated,
        positional_only,
        behind_a_default,
        behind_a_dependency,
        before_a_dependency,
        in_quotes,
        with_extras,
    ],
)
async def test_the_context_is_known_by_annotation_or_by_name(handler: Any) -> None:
    async def the_same_but_async(*args: Any, **keywords: Any) -> str:
        answer: str = handler(*args, **keywords)
        return answer

    container = PlainContainer(Mailer())
    asynchronous: Any = functools.wraps(handler)(the_same_but_async)

    assert await Mediator(RequestMap().bind(Add, handler), container).send(Add(1)) == "1 and context"
    assert await Mediator(RequestMap().bind(Add, asynchronous), container).send(Add(1)) == "1 and context"


async def test_a_context_that_is_imported_for_type_checkers_only_is_known_by_the_name_of_its_type() -> None:
    async def handle(command: Add, ctx: Any) -> str:
        return given(command, ctx)

    for annotation in ("missing.Context", "Context", "missing.Context | None"):
        handler = hidden(handle, command="missing.Add", ctx=annotation)
        assert await Mediator(RequestMap().bind(Add, handler)).send(Add(1)) == "1 and context"


async def test_a_function_gets_its_further_parameters_from_the_scope() -> None:
    async def handle(
        command: Add,
        mailer: Mailer,
        context: Context,
        *,
        printer: "Annotated[Printer, 'the big one'] | None",
        copies: int = 2,
    ) -> str:
        assert printer is not None
        return f"{given(command, context)}, {mailer.name}, {printer.name}, {copies}"

    mediator = Mediator(RequestMap().bind(Add, handle), PlainContainer(Mailer(), Printer))

    assert await mediator.send(Add(1)) == "1 and context, mailer, printer, 2"


async def test_the_other_annotations_count_where_one_is_unknown() -> None:
    async def handle(command: Add, mailer: Mailer, note: Any = None) -> str:
        assert note is None
        return mailer.name

    handler = hidden(handle, note="missing.Note")
    mediator = Mediator(RequestMap().bind(Add, handler), PlainContainer(Mailer()))

    assert await mediator.send(Add(1)) == "mailer"
    with pytest.raises(HandlerSignatureError, match="it takes Add, which Other is not"):
        RequestMap().bind(Other, handler)


def test_a_known_result_counts_where_another_annotation_is_unknown() -> None:
    async def handle(command: Add, note: Any = None) -> None: ...

    with pytest.raises(HandlerSignatureError, match="it returns None, but the message promises str"):
        RequestMap().bind(Add, hidden(handle, note="missing.Note"))


# -- worker threads ----------------------------------------------------------------------------------------------------

TENANT: ContextVar[str] = ContextVar("TENANT", default="nobody")


async def test_a_plain_function_runs_in_a_worker_thread_and_sees_the_context_variables() -> None:
    threads: list[threading.Thread] = []

    def handle(command: Add) -> str:
        threads.append(threading.current_thread())
        return TENANT.get()

    token = TENANT.set("acme")
    try:
        assert await Mediator(RequestMap().bind(Add, handle)).send(Add(1)) == "acme"
    finally:
        TENANT.reset(token)
    assert threads[0] is not threading.current_thread()


async def test_an_async_function_runs_where_it_was_sent_from() -> None:
    async def handle(command: Add) -> str:
        return threading.current_thread().name

    assert await Mediator(RequestMap().bind(Add, handle)).send(Add(1)) == threading.current_thread().name


async def test_a_plain_function_may_emit() -> None:
    heard: list[int] = []

    def handle(command: Add, context: Context) -> str:
        context.emit(Added(command.number))
        return "added"

    async def hear(event: Added) -> None:
        heard.append(event.number)

    mediator = Mediator(RequestMap().bind(Add, handle), event_map=EventMap().bind(Added, hear))

    assert await mediator.send(Add(1)) == "added"
    assert heard == [1]


async def test_a_function_that_returns_an_awaitable_runs_where_it_was_sent_from() -> None:
    threads: list[threading.Thread] = []

    def handle(command: Add) -> Awaitable[str]:
        threads.append(threading.current_thread())
        return function(command)

    for annotation in (Awaitable[str], Awaitable):
        handle.__annotations__["return"] = annotation
        assert await Mediator(RequestMap().bind(Add, handle)).send(Add(1)) == "1"
    assert threads == [threading.current_thread()] * 2


async def test_what_a_plain_function_raises_is_raised_as_it_is() -> None:
    def handle(command: Add) -> str:
        raise LookupError(command.number)

    with pytest.raises(LookupError, match="1"):
        await Mediator(RequestMap().bind(Add, handle)).send(Add(1))


# -- refused -----------------------------------------------------------------------------------------------------------


class WithoutHandle:
    async def run(self, command: Add) -> str: ...


class TakesOther:
    async def handle(self, command: Other) -> str: ...


class TakesNothing:
    async def handle(self) -> str: ...


class AsksInHandle:
    async def handle(self, command: Add, mailer: Mailer, printer: Printer) -> str: ...


class UnknownContext:
    async def handle(self, command: Add, ctx: Any) -> str: ...


unannotated(UnknownContext.handle, "ctx")


class Yields:
    async def handle(self, command: Add) -> AsyncIterator[str]:
        yield "a"


class YieldsWhenCalled:
    async def __call__(self, command: Add) -> AsyncIterator[str]:
        yield "a"


class SyncWithSession:
    def __init__(self, session: AsyncSession) -> None: ...

    def handle(self, command: Add) -> str: ...


class OwnSession(AsyncSession):
    pass


class SyncWithOwnSession:
    def __init__(self, session: OwnSession | None) -> None: ...

    def handle(self, command: Add) -> str: ...


def takes_other(command: Other) -> str: ...


def takes_nothing() -> str: ...


def takes_a_keyword(*, command: Add) -> str: ...


def yields(command: Add) -> Iterator[str]:
    yield "a"


def with_session(command: Add, session: AsyncSession) -> str: ...


def without_annotation(command: Add, mailer: Any) -> str: ...


unannotated(without_annotation, "mailer")


def with_unknown(command: Add, mailer: Any) -> str: ...


hidden(with_unknown, mailer="missing.Mailer")


def late_context(command: Add, mailer: Mailer, context: Context, /) -> str: ...


def positional_dependency(command: Add, mailer: Mailer, /) -> str: ...


REFUSED: list[tuple[Any, str]] = [
    (WithoutHandle, "WithoutHandle cannot be bound to Add: the class has no method handle(message)"),
    (
        WithoutHandle(),
        (
            "WithoutHandle object cannot be bound to Add: a handler is a class or an object with handle(message), or a "
            "function of the message"
        ),
    ),
    (TakesOther, "TakesOther cannot be bound to Add: it takes Other, which Add is not"),
    (TakesOther(), "TakesOther object cannot be bound to Add: it takes Other, which Add is not"),
    (takes_other, "takes_other cannot be bound to Add: it takes Other, which Add is not"),
    (functools.partial(takes_other), "takes_other cannot be bound to Add: it takes Other, which Add is not"),
    (TakesNothing, "TakesNothing cannot be bound to Add: it takes no positional parameter for the message"),
    (takes_nothing, "takes_nothing cannot be bound to Add: it takes no positional parameter for the message"),
    (takes_a_keyword, "takes_a_keyword cannot be bound to Add: it takes no positional parameter for the message"),
    (max, "max cannot be bound to Add: its signature cannot be read; wrap it in a plain function"),
    (
        AsksInHandle,
        (
            "AsksInHandle cannot be bound to Add: handle() takes (message) or (message, context), but it also asks for "
            "mailer, printer. Ask for dependencies in __init__; a context is known by its annotation Context, or by "
            "the name `context`."
        ),
    ),
    (
        UnknownContext(),
        (
            "UnknownContext object cannot be bound to Add: handle() takes (message) or (message, context), but it also "
            "asks for ctx. Ask for dependencies in __init__; a context is known by its annotation Context, or by the "
            "name `context`."
        ),
    ),
    (
        Yields,
        (
            "Yields cannot be bound to Add: it yields, so it is for a StreamQuery; return a result instead, or derive "
            "the message from StreamQuery"
        ),
    ),
    (
        YieldsWhenCalled(),
        (
            "YieldsWhenCalled object cannot be bound to Add: it yields, so it is for a StreamQuery; return a result "
            "instead, or derive the message from StreamQuery"
        ),
    ),
    (
        yields,
        (
            "yields cannot be bound to Add: it yields, so it is for a StreamQuery; return a result instead, or derive "
            "the message from StreamQuery"
        ),
    ),
    (
        SyncWithSession,
        (
            "SyncWithSession cannot be bound to Add: it is a plain function, which runs in a worker thread, and asks "
            "for AsyncSession, which belongs to the event loop. Make it `async def`, or give it a synchronous session "
            "of its own."
        ),
    ),
    (
        SyncWithOwnSession,
        (
            "SyncWithOwnSession cannot be bound to Add: it is a plain function, which runs in a worker thread, and "
            "asks for OwnSession, which belongs to the event loop. Make it `async def`, or give it a synchronous "
            "session of its own."
        ),
    ),
    (
        with_session,
        (
            "with_session cannot be bound to Add: it is a plain function, which runs in a worker thread, and asks for "
            "AsyncSession, which belongs to the event loop. Make it `async def`, or give it a synchronous session of "
            "its own."
        ),
    ),
    (
        without_annotation,
        (
            "without_annotation cannot be bound to Add: parameter 'mailer' is resolved from the scope by its "
            "annotation, and it has none"
        ),
    ),
    (
        with_unknown,
        (
            "with_unknown cannot be bound to Add: parameter 'mailer' is resolved from the scope by its annotation, and "
            "'missing.Mailer' is unknown at run time: import it outside `if TYPE_CHECKING`"
        ),
    ),
    (
        late_context,
        (
            "late_context cannot be bound to Add: its parameter 'mailer' is positional-only; only the message and, "
            "directly behind it, the context are passed by position. Move the `/` in front of it."
        ),
    ),
    (
        positional_dependency,
        (
            "positional_dependency cannot be bound to Add: its parameter 'mailer' is positional-only; only the message "
            "and, directly behind it, the context are passed by position. Move the `/` in front of it."
        ),
    ),
    (
        "add",
        (
            "str object cannot be bound to Add: a handler is a class or an object with handle(message), or a function "
            "of the message"
        ),
    ),
    (
        None,
        (
            "None cannot be bound to Add: a handler is a class or an object with handle(message), or a function of the "
            "message"
        ),
    ),
]


@pytest.mark.parametrize(("handler", "text"), REFUSED)
def test_a_handler_that_cannot_be_called_is_refused(handler: Any, text: str) -> None:
    requests = RequestMap()

    with pytest.raises(HandlerSignatureError) as raised:
        requests.bind(Add, handler)

    assert str(raised.value) == text
    assert raised.value.handler is handler
    assert raised.value.message_type is Add
    assert len(requests) == 0


def test_an_event_handler_is_held_to_its_event() -> None:
    bind_event: Any = EventMap().bind
    with pytest.raises(HandlerSignatureError) as raised:
        bind_event(Added, takes_other)

    assert str(raised.value) == "takes_other cannot be bound to Added: it takes Other, which Added is not"


# -- results -----------------------------------------------------------------------------------------------------------

OrderId = NewType("OrderId", int)


class Page(Generic[T]):
    pass


class IntPage(Page[int]):
    pass


class Closable(Protocol):
    def close(self) -> None: ...


class Summary(TypedDict):
    total: int


class Base(Command[T], Generic[T]):
    __slots__ = ()


class Narrowed(Base[list[T]], Generic[T]):
    __slots__ = ()


class IntCommand(Command[int]):
    __slots__ = ()


def subclass_of(base: Any) -> Any:
    return types.new_class("Asked", (base,))


def returning(returned: Any) -> Any:
    """An async handler that is annotated with this result."""

    async def handle(message: Any) -> Any: ...

    handle.__annotations__["return"] = returned
    return handle


FITTING: list[tuple[Any, Any]] = [
    (int, int),
    (int, bool),
    (float, int),
    (None, None),
    (object, str),
    (Any, str),
    (int, Any),
    (int | None, int),
    (int | None, None),
    (Optional[int], int | None),  # noqa: UP045 - as many still write it
    (int | str | None, int | str),
    (OrderId, int),
    (OrderId, OrderId),
    (int, OrderId),
    (Annotated[int, "positive"], int),
    (int, Annotated[int, "positive"]),
    (list[int], list[int]),
    (Sequence[int], list[int]),
    (Sequence[int], list),
    (list, list[int]),
    (dict[str, Any], dict[str, int]),
    (dict[str, list[int]], dict[str, list[int]]),
    (tuple[int, ...], tuple[int, ...]),
    (Page[int], Page[int]),
    (Page[int], IntPage),
    (Page, Page[str]),
    (Callable[[int], str], Callable[[int], str]),
    (Literal["a", "b"], Literal["a"]),
    (type[int], type[int]),
    (Closable, Mailer),
    (Summary, Summary),
    (Summary, dict),
    (dict, Summary),
    ("int", str),
    (T, str),
]


@pytest.mark.parametrize(("promised", "returned"), FITTING)
def test_a_result_that_fits_is_taken(promised: Any, returned: Any) -> None:
    RequestMap().bind(subclass_of(Command[promised]), returning(returned))


@pytest.mark.parametrize(
    ("promised", "returned", "text"),
    [
        (int, str, "it returns str, but the message promises int"),
        (int, float, "it returns float, but the message promises int"),
        (int, None, "it returns None, but the message promises int"),
        (float, str, "it returns str, but the message promises float"),
        (int, int | None, "it returns int | None, but the message promises int"),
        (int, Optional[str], "it returns Optional[str], but the message promises int"),  # noqa: UP045 - likewise
        (None, int, "it returns int, but the message promises None"),
        (int | None, str, "it returns str, but the message promises int | None"),
        (int | str, int | None, "it returns int | None, but the message promises int | str"),
        (OrderId, str, "it returns str, but the message promises tests.test_handlers.OrderId"),
        (Annotated[int, "positive"], str, "it returns str, but the message promises Annotated[int, 'positive']"),
        (list[int], list[str], "it returns list[str], but the message promises list[int]"),
        (list[int], Sequence[int], "it returns collections.abc.Sequence[int], but the message promises list[int]"),
        (dict[str, list[int]], dict[str, list[str]], "but the message promises dict[str, list[int]]"),
        (Page[int], Page[str], "it returns tests.test_handlers.Page[str]"),
        (IntPage, Page[int], "but the message promises IntPage"),
        (int, Summary, "it returns Summary, but the message promises int"),
        (int, object, "it returns object, but the message promises int"),
        (str, Awaitable[int], "it returns int, but the message promises str"),
        (str, Coroutine[Any, Any, int], "it returns int, but the message promises str"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(promised: Any, returned: Any, text: str) -> None:
    with pytest.raises(HandlerSignatureError) as raised:
        RequestMap().bind(subclass_of(Command[promised]), returning(returned))

    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("base", "returned", "refused"),
    [
        (Command, None, False),
        (Command, int, True),
        (Request, int, False),
        (Query, int, False),
        (Query[int], str, True),
        (Request[int], str, True),
        (IntCommand, int, False),
        (IntCommand, str, True),
        (Base[int], int, False),
        (Base[int], str, True),
        (Base, str, False),
        (Narrowed[str], list[str], False),
        (Narrowed[str], list[int], True),
    ],
)
def test_what_the_kinds_promise(base: Any, returned: Any, *, refused: bool) -> None:
    message_type = subclass_of(base)

    if refused:
        with pytest.raises(HandlerSignatureError):
            RequestMap().bind(message_type, returning(returned))
    else:
        RequestMap().bind(message_type, returning(returned))


def test_a_result_that_only_a_type_checker_can_see_is_taken() -> None:
    async def handle(message: IntCommand) -> Any: ...

    RequestMap().bind(IntCommand, hidden(handle, **{"return": "missing.Result"}))


def test_what_an_event_handler_returns_does_not_matter() -> None:
    async def handle(event: Added) -> str:
        return "ignored"

    EventMap().bind(Added, handle)


# -- streams -----------------------------------------------------------------------------------------------------------


async def generator(query: Numbers) -> AsyncIterator[int]:
    yield query.limit


async def full_generator(query: Numbers) -> AsyncGenerator[int, None]:
    yield query.limit


async def bare_generator(query: Numbers) -> Any:
    yield query.limit


unannotated(bare_generator, "return")


def returning_iterator(query: Numbers) -> AsyncIterator[int]:
    return generator(query)


def returning_bare_iterator(query: Numbers) -> AsyncIterator[int]:
    return generator(query)


returning_bare_iterator.__annotations__["return"] = AsyncIterator


async def awaited_iterator(query: Numbers) -> AsyncIterator[int]:
    return generator(query)


class GeneratorHandler:
    async def handle(self, query: Numbers, context: Context) -> AsyncIterator[int]:
        assert context.message is query
        yield query.limit


class CallableGenerator:
    async def __call__(self, query: Numbers) -> Any:
        yield query.limit


STREAM_HANDLERS: list[Any] = [
    generator,
    full_generator,
    bare_generator,
    returning_iterator,
    returning_bare_iterator,
    awaited_iterator,
    GeneratorHandler,
    GeneratorHandler(),
    CallableGenerator(),
    functools.partial(generator),
]


@pytest.mark.parametrize("handler", STREAM_HANDLERS)
async def test_a_stream_handler_may_have_any_form(handler: Any) -> None:
    mediator = Mediator(RequestMap().bind(Numbers, handler))

    async with mediator.stream(Numbers(3)) as items:
        assert [item async for item in items] == [3]


def test_a_stream_handler_may_ask_for_an_async_session() -> None:
    class Handler:
        def __init__(self, session: AsyncSession) -> None: ...

        async def handle(self, query: Numbers) -> AsyncIterator[int]:
            yield query.limit

    RequestMap().bind(Numbers, Handler)


class TextItems(StreamQuery[str]):
    __slots__ = ()


async def texts(query: Any) -> AsyncIterator[str]:
    yield ""


def returning_texts(query: Any) -> AsyncIterator[str]:
    return texts(query)


async def unknown_items(query: Any) -> AsyncIterator[str]:
    yield ""


hidden(unknown_items, **{"return": "AsyncIterator[missing.Item]"})


async def numbers(query: Any) -> AsyncGenerator[int, None]:
    yield 1


def returning_numbers(query: Any) -> AsyncIterator[int]:
    return numbers(query)


async def awaited_numbers(query: Any) -> AsyncIterator[int]:
    return numbers(query)


@pytest.mark.parametrize("handler", [texts, returning_texts, unknown_items])
def test_a_stream_of_the_promised_items_is_taken(handler: Any) -> None:
    RequestMap().bind(TextItems, handler)


@pytest.mark.parametrize("handler", [numbers, returning_numbers, awaited_numbers])
def test_a_stream_of_other_items_is_refused(handler: Any) -> None:
    with pytest.raises(HandlerSignatureError, match="it yields int, but the message promises str"):
        RequestMap().bind(TextItems, handler)


def says_nothing(query: Any) -> Any: ...


unannotated(says_nothing, "return")


@pytest.mark.parametrize(
    "handler", [function, sync_function, returning_awaitable, yields, Async, Async(), says_nothing]
)
def test_a_stream_handler_gives_an_async_iterator(handler: Any) -> None:
    # Every handler of Add takes it.
    adding: Any = types.new_class("Adding", (Add, StreamQuery[str]))

    with pytest.raises(HandlerSignatureError) as raised:
        RequestMap().bind(adding, handler)

    assert str(raised.value).endswith(
        "a stream's handler is an async generator (`async def handle(...)` with `yield`), or returns an AsyncIterator "
        "and is annotated so"
    )
