"""What was seen to go wrong in Diator 0.1.2, and that it does not here.

The numbers are the order in which it was found. 23 was pages whose code does not run, see tests/test_docs.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, assert_type

import di
import pytest
import redis.asyncio
import rodi
from azure.servicebus import ServiceBusMessage
from azure.servicebus.aio import ServiceBusClient
from di import bind_by_type
from di.dependent import Dependent
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pipeline_mediator import (
    Codec,
    Command,
    Context,
    DomainEvent,
    Event,
    EventMap,
    Mediator,
    Next,
    NotificationEvent,
    Query,
    RequestMap,
    Route,
    message,
)
from pipeline_mediator.container import Container, PlainContainer
from pipeline_mediator.container.di import DIContainer
from pipeline_mediator.container.rodi import RodiContainer
from pipeline_mediator.errors import (
    BindError,
    BrokerUnavailableError,
    CommittedButNotPublishedError,
    DuplicateHandlerError,
    HandlerNotFoundError,
    HandlerSignatureError,
    ResolutionError,
)
from pipeline_mediator.message_brokers import AzureMessageBroker, RedisMessageBroker
from pipeline_mediator.middlewares import PublishMiddleware, TransactionMiddleware
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite
from tests.amqp_peer import AmqpPeer
from tests.fakes import Broker
from tests.servers import MissingServerError, Running, free_port


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- messages, containers, a database ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join(Command[int]):
    user_id: int = 7


@dataclass(frozen=True)
class Joined(DomainEvent):
    number: int = 1


@message("meetings.grew", version=2)
@dataclass(frozen=True)
class MeetingGrew(NotificationEvent):
    number: int = 1
    picture: bytes = b"\xff\x00"


class Session:
    """Something with a life, of which a message has one."""

    closed = False


class JoinWithSession:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, command: Join, context: Context) -> int:
        seen.append(("command", self.session, self.session.closed))
        context.emit(Joined())
        return 1


class HearWithSession:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, event: Joined) -> None:
        seen.append(("event", self.session, self.session.closed))


seen: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


def opened_session() -> Generator[Session]:
    session = Session()
    seen.append("open")
    yield session
    session.closed = True
    seen.append("close")


def bound(**dependents: Any) -> di.Container:
    """A di container in which each of these scopes has these, by type."""
    container = di.Container()
    for scope, (kind, call) in dependents.items():
        container.bind(bind_by_type(Dependent(call, scope=scope), kind))
    return container


def di_with_session() -> Container:
    return DIContainer(bound(request=(Session, opened_session)))


def rodi_with_session() -> Container:
    services: Any = rodi.Container()  # half annotated
    services.add_scoped(Session)
    return RodiContainer(services)


both_containers = pytest.mark.parametrize("container", [di_with_session, rodi_with_session])


def mediator_with_session(container: Container) -> Mediator:
    requests, events = RequestMap().bind(Join, JoinWithSession), EventMap().bind(Joined, HearWithSession)
    return Mediator(requests, container, event_map=events)


class Shop(NamedTuple):
    """A database with a table of users who joined."""

    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncSession]

    async def joined(self) -> list[int]:
        async with self.engine.begin() as connection:
            return list((await connection.execute(text("SELECT user_id FROM joined"))).scalars())


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    engine = prepare_sqlite(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db"))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE joined (user_id int)"))
    yield Shop(engine, async_sessionmaker(engine, expire_on_commit=False))
    await engine.dispose()


async def join(command: Join, context: Context, session: AsyncSession) -> int:
    """Writes a row, and tells everyone."""
    await session.execute(text("INSERT INTO joined VALUES (:user_id)"), {"user_id": command.user_id})
    context.emit(Joined())
    context.emit(MeetingGrew())
    return command.user_id


# -- containers and scopes ---------------------------------------------------------------------------------------------


async def test_01_dependencies_with_yield_are_open_while_the_handler_runs() -> None:
    await mediator_with_session(di_with_session()).send(Join())
    kinds = [entry if isinstance(entry, str) else entry[0] for entry in seen]
    assert kinds == ["open", "command", "event", "close"]
    assert [entry[2] for entry in seen if not isinstance(entry, str)] == [False, False]


async def test_02_an_async_session_with_yield_can_be_a_dependency(shop: Shop) -> None:
    async def open_session() -> AsyncGenerator[AsyncSession]:
        async with shop.sessions.begin() as session:
            yield session

    requests, events = RequestMap().bind(Join, join), EventMap().bind(NotificationEvent, ignore)
    container = DIContainer(bound(request=(AsyncSession, open_session)))
    assert await Mediator(requests, container, event_map=events).send(Join(7)) == 7
    assert await shop.joined() == [7]


async def ignore(event: Event) -> None: ...


@both_containers
async def test_03_a_send_has_one_scope_and_every_send_its_own(container: Callable[[], Container]) -> None:
    mediator = mediator_with_session(container())
    await mediator.send(Join())
    await mediator.send(Join())
    first, first_event, second, second_event = (entry[1] for entry in seen if not isinstance(entry, str))
    assert first is first_event
    assert second is second_event
    assert first is not second


# -- events ------------------------------------------------------------------------------------------------------------


class Collecting:
    """A handler in Diator's manner."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, command: Join) -> int:
        self._events += [Joined(command.user_id), Joined(command.user_id + 1)]
        await asyncio.sleep(0)
        self._events.append(Joined(command.user_id + 2))
        return 1


async def hear(event: Joined) -> None:
    seen.append(event.number)


async def test_04_events_are_handled_in_the_order_of_their_emission() -> None:
    requests, events = RequestMap().bind(Join, Collecting), EventMap().bind(Joined, hear)
    await Mediator(requests, event_map=events).send(Join(1))
    assert seen == [1, 2, 3]


def di_with_singleton() -> Container:
    return DIContainer(bound(singleton=(Collecting, Collecting)))


def rodi_with_singleton() -> Container:
    services: Any = rodi.Container()
    services.add_singleton(Collecting)
    return RodiContainer(services)


@pytest.mark.parametrize(
    ("handler", "container"),
    [(Collecting, di_with_singleton), (Collecting, rodi_with_singleton), (Collecting(), PlainContainer)],
    ids=["di", "rodi", "object"],
)
async def test_05_a_handler_that_outlives_a_message_emits_its_events_once(
    handler: Any, container: Callable[[], Container]
) -> None:
    mediator = Mediator(RequestMap().bind(Join, handler), container(), event_map=EventMap().bind(Joined, hear))
    await mediator.send(Join(10))
    await mediator.send(Join(20))
    assert seen == [10, 11, 12, 20, 21, 22]
    seen.clear()
    await asyncio.gather(mediator.send(Join(10)), mediator.send(Join(20)))
    assert sorted(seen) == [10, 11, 12, 20, 21, 22]


async def test_06_middlewares_see_requests_events_and_what_is_published() -> None:
    async def record(context: Context, call_next: Next) -> Any:
        seen.append(type(context.message).__name__)
        return await call_next(context)

    async def emit(command: Join, context: Context) -> int:
        context.emit(Joined())
        context.emit(MeetingGrew())
        return 1

    requests, events = RequestMap().bind(Join, emit), EventMap().bind(Joined, ignore)
    broker = Broker()
    await Mediator(requests, event_map=events, middlewares=[record, PublishMiddleware(broker)]).send(Join())
    assert seen == ["Join", "Joined", "MeetingGrew"]
    assert len(broker.published) == 1


class CountedMiddleware:
    """Says how often it was put into a chain."""

    def for_route(self, route: Route) -> Any:
        seen.append(route.message_type)
        return self

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await call_next(context)


async def test_07_a_chain_is_built_once_and_not_for_every_message() -> None:
    async def one(command: Join) -> int:
        return 1

    mediator = Mediator(RequestMap().bind(Join, one), middlewares=[CountedMiddleware()] * 5)
    for _ in range(10):
        await mediator.send(Join())
    assert seen == [Join] * 5


async def test_08_di_solves_a_handler_once_and_not_for_every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = di.Container.solve

    def count(*arguments: Any, **keywords: Any) -> Any:
        solved.append(arguments)
        return solve(*arguments, **keywords)

    solved: list[Any] = []
    monkeypatch.setattr(di.Container, "solve", count)
    mediator = mediator_with_session(di_with_session())
    await mediator.send(Join())
    solved_for_the_first = list(solved)
    for _ in range(10):
        await mediator.send(Join())
    assert solved == solved_for_the_first


# -- Redis -------------------------------------------------------------------------------------------------------------

Client: Any = redis.asyncio.Redis


async def emit_through_redis(url: str, *events: Event, **options: Any) -> None:
    mediator = Mediator(middlewares=[PublishMiddleware(RedisMessageBroker(url))], codec=Codec(source="meetings"))
    async with mediator:
        for event in events:
            await mediator.emit(event, **options)


@asynccontextmanager
async def subscribed(url: str, *channels: str) -> AsyncGenerator[Callable[[], Any]]:
    async with Client.from_url(url) as client, client.pubsub(ignore_subscribe_messages=True) as subscriber:
        await subscriber.subscribe(*channels)

        async def receive() -> Any:
            async with asyncio.timeout(10):
                while (entry := await subscriber.get_message(timeout=10)) is None:
                    pass
            return entry

        # The answer to SUBSCRIBE: from here on nothing is missed.
        assert await subscriber.get_message(timeout=10) is None
        yield receive


async def test_10_redis_gets_one_publish_per_message_over_one_connection(redis_server: Running) -> None:
    async with Client.from_url(redis_server.url) as client:

        async def counts() -> dict[str, int]:
            commands, statistics = await client.info("commandstats"), await client.info("stats")
            calls = {name: commands.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("publish", "subscribe")}
            return calls | {"connections": statistics["total_connections_received"]}

        before = await counts()
        await emit_through_redis(redis_server.url, MeetingGrew(1), MeetingGrew(2), MeetingGrew(3))
        after = await counts()
    assert {name: after[name] - before[name] for name in after} == {"publish": 3, "subscribe": 0, "connections": 1}


async def test_11_redis_channels_are_named_after_what_is_sent_not_after_each_message(redis_server: Running) -> None:
    async with subscribed(redis_server.url, "meetings.grew") as receive:
        await emit_through_redis(redis_server.url, MeetingGrew(1), MeetingGrew(2))
        numbers = [json.loads((await receive())["data"])["data"]["number"] for _ in range(2)]
    assert numbers == [1, 2]


# -- Azure Service Bus -------------------------------------------------------------------------------------------------


@pytest.fixture
def peer() -> Iterator[AmqpPeer]:
    try:
        peer = AmqpPeer()
    except MissingServerError as error:
        if os.environ.get("REQUIRE_AZURE") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    with peer:
        yield peer
    # The client may leave a connection to the garbage collector, see tests/message_brokers/azure/conftest.py.
    gc.collect()


def publishing_to(topic: str, client: ServiceBusClient) -> Mediator:
    return Mediator(middlewares=[PublishMiddleware(AzureMessageBroker(client), {MeetingGrew: topic})])


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_09_the_azure_client_stays_open_and_has_one_connection_for_all_messages(peer: AmqpPeer) -> None:
    meetings, mine = peer.entity("meetings"), peer.entity("mine")
    client = ServiceBusClient.from_connection_string(peer.connection_string)
    async with client, client.get_queue_sender("mine") as own:
        async with publishing_to("meetings", client) as mediator:
            await asyncio.gather(*(mediator.emit(MeetingGrew(number)) for number in range(5)))
            await own.send_messages(ServiceBusMessage(b"while"))
            await mediator.emit(MeetingGrew(5))
        await own.send_messages(ServiceBusMessage(b"after"))
    assert sorted(json.loads(body)["number"] for body in meetings.bodies) == [0, 1, 2, 3, 4, 5]
    assert mine.bodies == [b"while", b"after"]
    assert peer.opened == 2, "one for the events, one for the own sender"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_22_an_azure_message_says_which_it_is_what_it_is_and_where_it_belongs(peer: AmqpPeer) -> None:
    meetings = peer.entity("meetings")
    client = ServiceBusClient.from_connection_string(peer.connection_string)
    async with client, publishing_to("meetings", client) as mediator:
        await mediator.emit(MeetingGrew(1), key="room 5", correlation_id="conversation")
        await mediator.emit(MeetingGrew(2), key="room 5", correlation_id="conversation")
    first, second = meetings.messages
    for stored in (first, second):
        assert (stored.subject, stored.correlation_id, stored.group_id) == ("meetings.grew", "conversation", "room 5")
    assert first.id
    assert first.id != second.id


# -- what is lost, and who is told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [Event(), MeetingGrew()])
async def test_12_an_event_that_nobody_takes_is_refused_where_it_is_emitted(event: Event, shop: Shop) -> None:
    async def emit(command: Join, context: Context, session: AsyncSession) -> int:
        await session.execute(text("INSERT INTO joined VALUES (1)"))
        context.emit(event)
        return 1

    mediator = Mediator(RequestMap().bind(Join, emit), middlewares=[TransactionMiddleware(shop.sessions.begin)])
    with pytest.raises(HandlerNotFoundError, match="neither a handler nor a destination"):
        await mediator.send(Join())
    assert await shop.joined() == []
    with pytest.raises(HandlerNotFoundError):
        await mediator.emit(event)


def test_12_a_domain_event_that_may_go_unheard_is_shown_as_such() -> None:
    assert "no handlers" in Mediator().describe(Joined)


async def test_13_a_broker_that_fails_after_the_commit_does_not_turn_the_outcome_around(shop: Shop) -> None:
    lost: list[tuple[Event, Exception]] = []

    def keep(event: Event, error: Exception) -> None:
        lost.append((event, error))

    nobody_there = PublishMiddleware(RedisMessageBroker(f"redis://127.0.0.1:{free_port()}"))
    transaction = TransactionMiddleware(shop.sessions.begin, on_lost_event=keep)
    mediator = Mediator(RequestMap().bind(Join, join), middlewares=[transaction, nobody_there])
    assert await mediator.send(Join(7)) == 7
    assert await shop.joined() == [7]
    assert [(event, type(error)) for event, error in lost] == [(MeetingGrew(), BrokerUnavailableError)]

    transaction = TransactionMiddleware(shop.sessions.begin, on_publish_error="raise")
    mediator = Mediator(RequestMap().bind(Join, join), middlewares=[transaction, nobody_there])
    with pytest.raises(CommittedButNotPublishedError) as caught:
        await mediator.send(Join(8))
    assert (caught.value.result, caught.value.events) == (8, (MeetingGrew(),))
    assert await shop.joined() == [7, 8]


async def refuse(event: Joined) -> None:
    raise PermissionError


async def test_13_nothing_is_published_for_a_command_that_was_not_committed(shop: Shop) -> None:
    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(Join, join),
        event_map=EventMap().bind(Joined, refuse),
        middlewares=[TransactionMiddleware(shop.sessions.begin), PublishMiddleware(broker)],
    )
    with pytest.raises(PermissionError):
        await mediator.send(Join())
    assert broker.published == []


async def test_14_a_failing_event_handler_undoes_the_command_so_that_an_error_means_nothing_happened(
    shop: Shop,
) -> None:
    mediator = Mediator(
        RequestMap().bind(Join, join),
        event_map=EventMap().bind(Joined, refuse).bind(MeetingGrew, ignore),
        middlewares=[TransactionMiddleware(shop.sessions.begin)],
    )
    with pytest.raises(PermissionError):
        await mediator.send(Join())
    assert await shop.joined() == []


async def test_14_a_failing_event_handler_lets_the_others_run_where_that_is_asked_for() -> None:
    mediator = Mediator(event_map=EventMap().bind(Joined, refuse, hear, fan_out="collect"))
    with pytest.raises(ExceptionGroup, match="1 handlers of Joined failed"):
        await mediator.emit(Joined(1))
    assert seen == [1]


# -- what could not be said --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warned(DomainEvent):
    number: int


async def test_15_event_handlers_may_emit_events_and_those_of_base_classes_run_too() -> None:
    async def warn(event: Joined, context: Context) -> None:
        context.emit(Warned(event.number))

    async def audit(event: DomainEvent) -> None:
        seen.append(event)

    mediator = Mediator(event_map=EventMap().bind(Joined, warn).bind(DomainEvent, audit))
    await mediator.emit(Joined(1))
    assert seen == [Joined(1), Warned(1)]


async def test_16_an_event_for_a_broker_may_have_handlers_here_as_well(shop: Shop) -> None:
    async def write(event: MeetingGrew, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO joined VALUES (2)"))

    broker = Broker()
    mediator = Mediator(
        RequestMap().bind(Join, join),
        event_map=EventMap().bind(MeetingGrew, write, at="emit"),
        middlewares=[TransactionMiddleware(shop.sessions.begin), PublishMiddleware(broker)],
    )
    await mediator.send(Join(1))
    assert await shop.joined() == [1, 2]
    assert [outgoing.name for outgoing in broker.published] == ["meetings.grew"]


async def other(command: Join) -> int:
    return 2


def test_17_a_second_bind_raises_instead_of_replacing_or_running_twice() -> None:
    with pytest.raises(DuplicateHandlerError, match=r"Join is already bound to Collecting.* other was refused"):
        RequestMap().bind(Join, Collecting).bind(Join, other)
    with pytest.raises(BindError, match="hear is bound twice"):
        EventMap().bind(Joined, hear).bind(Joined, hear)


def test_17_looking_an_event_up_does_not_bind_it() -> None:
    events = EventMap()
    assert events.bindings_for(Joined) == []
    assert Joined not in events
    assert list(events) == []


@dataclass(frozen=True)
class CountUsers(Query[dict[str, int]]):
    pass


async def count_users(query: CountUsers) -> dict[str, int]:
    return {"users": 1}


async def test_18_a_result_may_be_of_any_type_and_a_type_checker_knows_it() -> None:
    mediator = Mediator(RequestMap().bind(CountUsers, count_users).bind(Join, other))
    assert assert_type(await mediator.send(CountUsers()), dict[str, int]) == {"users": 1}
    assert assert_type(await mediator.send(Join()), int) == 2


# -- what travels ------------------------------------------------------------------------------------------------------


async def test_19_bytes_travel(redis_server: Running) -> None:
    async with subscribed(redis_server.url, "meetings.grew") as receive:
        await emit_through_redis(redis_server.url, MeetingGrew(picture=bytes(range(256))))
        body = (await receive())["data"]
    assert Codec(MeetingGrew).decode(body).message == MeetingGrew(picture=bytes(range(256)))


async def test_20_the_envelope_says_what_when_which_version_and_in_which_conversation(redis_server: Running) -> None:
    async with subscribed(redis_server.url, "meetings.grew") as receive:
        await emit_through_redis(
            redis_server.url, MeetingGrew(), headers={"tenant": "north"}, correlation_id="conversation"
        )
        entry = await receive()
    envelope = json.loads(entry["data"])
    assert (envelope["type"], envelope["dataversion"], envelope["source"]) == ("meetings.grew", 2, "meetings")
    assert datetime.fromisoformat(envelope["time"]).utcoffset() == timedelta(0)
    assert envelope["correlationid"] == "conversation"
    assert json.loads(envelope["headers"]) == {"tenant": "north"}
    assert MeetingGrew.__name__ not in entry["data"].decode()


# -- handlers and the start --------------------------------------------------------------------------------------------


class WithoutEvents:
    async def handle(self, query: CountUsers) -> dict[str, int]:
        return {"users": 2}


async def test_21_a_handler_need_not_have_events() -> None:
    assert await Mediator(RequestMap().bind(CountUsers, WithoutEvents)).send(CountUsers()) == {"users": 2}


class NeedsWhatIsNowhere:
    def __init__(self, retries: int) -> None: ...

    async def handle(self, command: Join) -> int:
        raise AssertionError


@both_containers
async def test_24_what_cannot_be_resolved_is_said_at_start(container: Callable[[], Container]) -> None:
    mediator = Mediator(RequestMap().bind(Join, NeedsWhatIsNowhere), container())
    with pytest.raises(ResolutionError, match=r"NeedsWhatIsNowhere.*retries.*int"):
        async with mediator:
            raise AssertionError


class TakesSomethingElse:
    async def handle(self, command: CountUsers) -> int:
        return 1


def test_24_a_handler_for_something_else_is_refused_when_it_is_bound() -> None:
    requests: Any = RequestMap()
    with pytest.raises(HandlerSignatureError, match="it takes CountUsers, which Join is not"):
        requests.bind(Join, TakesSomethingElse)
