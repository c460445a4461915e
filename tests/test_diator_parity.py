"""What runs on Diator runs here, with the package's name replaced; what has no counterpart is on the migration page."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import di
import pytest
import rodi
from di import bind_by_type
from di.dependent import Dependent

from pipeline_mediator import Context, Middleware, Next, Pipeline, only
from pipeline_mediator.container import Container
from pipeline_mediator.container.di import DIContainer
from pipeline_mediator.container.rodi import RodiContainer
from pipeline_mediator.errors import HandlerNotFoundError, MissingExtraError
from pipeline_mediator.events import (
    DomainEvent,
    ECSTEvent,
    Event,
    EventEmitter,
    EventHandler,
    EventMap,
    NotificationEvent,
)
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.message_brokers.memory import MemoryBroker
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.requests import Request, RequestHandler, RequestMap
from tests.fakes import Broker, Database

PAGE = Path(__file__).parent.parent / "docs" / "migrating-from-diator.md"


# -- the README of Diator ----------------------------------------------------------------------------------------------


class MeetingAPI:
    """What the README leaves to its reader."""

    calls: list[str] = []  # noqa: RUF012 - di makes the object that the handler gets; here its calls can be seen

    def join(self, meeting_id: int, user_id: int) -> None:
        self.calls.append(f"user {user_id} joins {meeting_id}")

    def warn(self, user_id: int) -> None:
        self.calls.append(f"user {user_id} is late")


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[str]]:
    MeetingAPI.calls.clear()
    yield MeetingAPI.calls
    MeetingAPI.calls.clear()


def test_the_example_of_the_readme_runs_with_the_name_replaced_and_its_dependency_annotated(calls: list[str]) -> None:
    readme = str(metadata("diator")["Description"])
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    example = re.sub(r"\bdiator\b", "pipeline_mediator", example)
    example = example.replace("def __init__(self, meeting_api)", "def __init__(self, meeting_api: MeetingAPI)")
    exec(example, {"__name__": "__main__", "MeetingAPI": MeetingAPI})  # noqa: S102 - the README of a release
    assert calls == ["user 1 joins 1", "user 1 is late"]


# -- a program in Diator's manner, on both of its containers -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JoinMeeting(Request):
    meeting_id: int
    user_id: int
    is_late: bool = field(default=False)


@dataclass(frozen=True, kw_only=True)
class UserJoined(DomainEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserWarned(DomainEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class MeetingGrew(NotificationEvent):
    meeting_id: int


@dataclass(frozen=True, kw_only=True)
class MeetingChanged(ECSTEvent):
    meeting_id: int
    name: str


class JoinMeetingHandler(RequestHandler[JoinMeeting, None]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: JoinMeeting) -> None:
        self._meeting_api.join(request.meeting_id, request.user_id)
        self._events.append(UserJoined(user_id=request.user_id))
        if request.is_late:
            self._events.append(UserWarned(user_id=request.user_id))


class GreetUser(EventHandler[UserJoined]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserJoined) -> None:
        self._meeting_api.calls.append(f"user {event.user_id} is greeted")


class WarnUser(EventHandler[UserWarned]):
    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserWarned) -> None:
        self._meeting_api.warn(event.user_id)


@dataclass(frozen=True, kw_only=True)
class MeetingRead:
    link: str


@dataclass(frozen=True, kw_only=True)
class ReadMeeting(Request[MeetingRead]):
    meeting_id: int


class ReadMeetingHandler(RequestHandler[ReadMeeting, MeetingRead]):
    async def handle(self, request: ReadMeeting) -> MeetingRead:
        return MeetingRead(link=f"/meetings/{request.meeting_id}")


HANDLERS = (JoinMeetingHandler, GreetUser, WarnUser, ReadMeetingHandler)


def di_container() -> Container:
    external_container = di.Container()
    for handler in HANDLERS:
        external_container.bind(bind_by_type(Dependent(handler, scope="request"), handler))
    container = DIContainer()
    container.attach_external_container(external_container)
    return container


def rodi_container() -> Container:
    external_container: Any = rodi.Container()  # half annotated
    external_container.register(MeetingAPI)
    for handler in HANDLERS:
        external_container.register(handler)
    container = RodiContainer()
    container.attach_external_container(external_container)
    return container


@pytest.fixture(params=[di_container, rodi_container])
def container(request: pytest.FixtureRequest) -> Container:
    make: Callable[[], Container] = request.param
    return make()


def maps() -> tuple[RequestMap, EventMap]:
    request_map = RequestMap()
    request_map.bind(JoinMeeting, JoinMeetingHandler)
    request_map.bind(ReadMeeting, ReadMeetingHandler)
    event_map = EventMap()
    event_map.bind(UserJoined, GreetUser)
    event_map.bind(UserWarned, WarnUser)
    return request_map, event_map


async def test_a_command_its_events_and_a_query(container: Container, calls: list[str]) -> None:
    request_map, event_map = maps()
    event_emitter = EventEmitter(event_map=event_map, container=container, message_broker=None)
    mediator = Mediator(request_map=request_map, event_emitter=event_emitter, container=container)

    await mediator.send(JoinMeeting(user_id=7, meeting_id=1, is_late=True))
    assert calls == ["user 7 joins 1", "user 7 is greeted", "user 7 is late"]
    assert await mediator.send(ReadMeeting(meeting_id=1)) == MeetingRead(link="/meetings/1")


async def test_the_emitter_works_without_a_mediator(container: Container, calls: list[str]) -> None:
    _, event_map = maps()
    event_emitter = EventEmitter(event_map, container)
    await event_emitter.emit(UserJoined(user_id=7))
    await event_emitter.emit(UserWarned(user_id=7))
    assert calls == ["user 7 is greeted", "user 7 is late"]


async def test_the_emitters_broker_publishes_both_kinds_of_integration_events(container: Container) -> None:
    broker = Broker()
    event_emitter = EventEmitter(EventMap(), container, broker)
    await event_emitter.emit(MeetingGrew(meeting_id=1))
    await event_emitter.emit(MeetingChanged(meeting_id=1, name="weekly"))
    assert [(outgoing.destination, outgoing.name) for outgoing in broker.published] == [
        ("MeetingGrew", "MeetingGrew"),
        ("MeetingChanged", "MeetingChanged"),
    ]
    assert b'"data":{"meeting_id":1,"name":"weekly"}' in broker.published[1].body


async def test_an_integration_event_without_a_broker_is_refused_before_it_is_lost(container: Container) -> None:
    with pytest.raises(HandlerNotFoundError, match="MeetingGrew: it has neither a handler nor a destination"):
        await EventEmitter(EventMap(), container).emit(MeetingGrew(meeting_id=1))


# -- the emitter of a mediator -----------------------------------------------------------------------------------------


class EmitsByItself(RequestHandler[JoinMeeting, None]):
    """Asks for the emitter, which Diator allows, instead of collecting events."""

    emitter: EventEmitter

    async def handle(self, request: JoinMeeting) -> None:
        await self.emitter.emit(MeetingGrew(meeting_id=request.meeting_id))
        if request.is_late:
            raise PermissionError


async def test_what_the_emitter_emits_inside_a_handler_leaves_after_the_commit() -> None:
    database = Database()

    class LoggingBroker(Broker):
        async def publish(self, batch: Any, /) -> Any:
            database.log.append("publish")
            return await super().publish(batch)

    broker = LoggingBroker()
    emitter = EmitsByItself.emitter = EventEmitter(EventMap(), message_broker=broker)
    mediator = Mediator(
        RequestMap().bind(JoinMeeting, EmitsByItself),
        event_emitter=emitter,
        middlewares=[TransactionMiddleware(database.begin)],
    )
    await mediator.send(JoinMeeting(meeting_id=1, user_id=7))
    assert database.log == ["begin", "commit", "publish"]
    with pytest.raises(PermissionError):
        await mediator.send(JoinMeeting(meeting_id=1, user_id=7, is_late=True))
    assert len(broker.published) == 1


async def test_the_emitter_uses_the_middlewares_of_its_mediator() -> None:
    seen: list[str] = []

    async def record(context: Context, call_next: Next) -> Any:
        seen.append(type(context.message).__name__)
        return await call_next(context)

    broker = Broker()
    emitter = EventEmitter(EventMap(), message_broker=broker)
    Mediator(event_emitter=emitter, middlewares=[record])
    await emitter.emit(MeetingGrew(meeting_id=1))
    assert seen == ["MeetingGrew"]
    assert len(broker.published) == 1


async def test_the_broker_of_the_emitter_is_opened_and_closed_with_the_mediator() -> None:
    broker = MemoryBroker(timeout=5)
    subscription = broker.subscribe("MeetingGrew", name="screens")
    async with Mediator(event_emitter=EventEmitter(EventMap(), message_broker=broker)), subscription:
        pass
    with pytest.raises(Exception, match="closed"):
        await subscription.receive(1)


# -- its middlewares ---------------------------------------------------------------------------------------------------


def from_diator(old: Callable[[Any, Callable[[Any], Awaitable[Any]]], Awaitable[Any]]) -> Middleware:
    async def middleware(context: Context, call_next: Next) -> Any:
        return await old(context.message, lambda request: call_next(context.replace(message=request)))

    return middleware


def mediator_with(*middlewares: Middleware) -> Mediator:
    request_map, event_map = maps()
    container = di_container()
    emitter = EventEmitter(event_map, container)
    return Mediator(request_map, container, event_emitter=emitter, middlewares=middlewares)


async def test_diators_own_middleware_runs_through_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    old: Any = import_module("diator.middlewares.logging").LoggingMiddleware(level=logging.INFO)
    caplog.set_level(logging.INFO)
    assert await mediator_with(from_diator(old)).send(ReadMeeting(meeting_id=1)) == MeetingRead(link="/meetings/1")
    assert [record.message for record in caplog.records] == [
        "Handle ReadMeeting request",
        "Request ReadMeeting handled. Response: MeetingRead(link='/meetings/1')",
    ]


async def test_a_middleware_of_diator_may_exchange_the_request_and_the_response(calls: list[str]) -> None:
    async def one_further(request: Any, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        read = await handle(ReadMeeting(meeting_id=request.meeting_id + 1))
        return MeetingRead(link=read.link + "?")

    async def never(request: Any, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        return None

    read = ReadMeeting(meeting_id=1)
    assert await mediator_with(from_diator(one_further)).send(read) == MeetingRead(link="/meetings/2?")
    await mediator_with(from_diator(never)).send(JoinMeeting(meeting_id=1, user_id=7))
    assert calls == []


async def test_only_requests_go_through_an_adapted_middleware_if_it_is_said_so() -> None:
    seen: list[type] = []

    async def record(request: Request, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        seen.append(type(request))
        return await handle(request)

    await mediator_with(Pipeline(only(Request, from_diator(record)))).send(JoinMeeting(meeting_id=1, user_id=7))
    assert seen == [JoinMeeting]


# -- its names ---------------------------------------------------------------------------------------------------------


class Public(NamedTuple):
    """A public name of Diator: a class or function, or with `member` one of its methods, fields or parameters."""

    module: str
    name: str
    member: str | None = None
    parameter: str | None = None

    def __str__(self) -> str:
        """As it stands on the migration page."""
        if self.parameter is not None:
            return f"{self.name}({self.parameter}=)"
        return f"{self.module}.{self.name}" if self.member is None else f"{self.name}.{self.member}"


def public_names() -> Iterator[Public]:
    """From its source: to import all of it would need every client that it knows."""
    spec = find_spec("diator")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py")):
        module = ".".join(("diator", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.ClassDef):
                yield Public(module, statement.name)
                yield from _members(module, statement)
            assert not isinstance(statement, ast.FunctionDef) or statement.name.startswith("_")


def _members(module: str, owner: ast.ClassDef) -> Iterator[Public]:
    for statement in owner.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield Public(module, owner.name, statement.target.id)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            if statement.name == "__init__":
                arguments = [*statement.args.args[1:], *statement.args.kwonlyargs]
                yield from (Public(module, owner.name, parameter=argument.arg) for argument in arguments)
            elif not statement.name.startswith("_"):
                yield Public(module, owner.name, statement.name)


def counterpart(name: Public) -> Any:
    """The same name here, in the same module or in the package that Diator shows it from; None if there is none."""
    path = name.module.replace("diator", "pipeline_mediator", 1)
    while path:
        try:
            return getattr(import_module(path), name.name, None)
        except MissingExtraError:
            return None
        except ModuleNotFoundError:
            path = path.rpartition(".")[0]
    return None


def is_here(name: Public) -> bool:
    thing = counterpart(name)
    if name.parameter is not None:
        return thing is not None and name.parameter in inspect.signature(thing).parameters
    return thing is not None and (name.member is None or hasattr(thing, name.member))


def is_of_something_gone(name: Public) -> bool:
    return counterpart(name) is None and (name.member, name.parameter) != (None, None)


@pytest.mark.parametrize("name", [name for name in public_names() if not is_of_something_gone(name)], ids=str)
def test_a_public_name_of_diator_is_here_or_on_the_page(name: Public) -> None:
    assert is_here(name) or f"`{name}`" in PAGE.read_text()


def test_what_the_page_names_is_here() -> None:
    names = set(re.findall(r"`(pipeline_mediator(?:\.\w+)*)\.(\w+)", PAGE.read_text()))
    assert len(names) > 5
    for module, name in names:
        assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}"), (module, name)
