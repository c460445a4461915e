"""DIContainer: the suite, and what is special to di."""

from __future__ import annotations

import functools
import io
from collections.abc import AsyncGenerator, Hashable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import anyio
import anyio.lowlevel
import pytest
from di import Container, SolvedDependent, bind_by_type
from di.dependent import Dependent, Marker

from pipeline_mediator.container.di import DIContainer
from pipeline_mediator.errors import ConfigurationError, ResolutionError
from pipeline_mediator.testing.container_suite import ContainerConformance, ContainerFeatures, Service

if TYPE_CHECKING:

    class Postcard: ...


class TestConformance(ContainerConformance):
    features = ContainerFeatures(awaits_factories=True, shows_error=True)

    def make_container(self, services: Sequence[Service], seeds: Sequence[type]) -> DIContainer:
        container = Container()
        for it in services:
            call: Any = it.coroutine or it.generator or it.cls
            scope = "singleton" if it.lifetime == "singleton" else "request"
            dependent = Dependent[Any](call, scope=scope, use_cache=it.lifetime != "transient")
            container.bind(bind_by_type(dependent, it.cls))
        return DIContainer(container)


class Handler:
    async def handle(self, message: object) -> None: ...


class Session: ...


class Replica(Session): ...


class Mailer: ...


class SmtpMailer(Mailer): ...


class SendMail(Handler):
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


def missing(container: DIContainer, *wanted: type) -> tuple[str, ...]:
    with pytest.raises(ResolutionError) as failure:
        container.prepare(wanted, [Session])
    return failure.value.missing


async def resolve(container: DIContainer, wanted: type[Any], session: Session | None = None) -> Any:
    container.prepare([wanted], [Session])
    scope = container.open({Session: session or Session()})
    made = await scope.get(wanted)
    closing = scope.close(None)
    if closing is not None:
        await closing
    return made


# -- the container that is attached ------------------------------------------------------------------------------------


async def test_container_attached_and_handler_bound_as_in_diator() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SendMail, scope="request"), SendMail))
    container = DIContainer()
    container.attach_external_container(external_container)
    container.prepare([SendMail], [Session])
    scope = container.open({Session: Session()})
    first, second = await scope.get(SendMail), await scope.get(SendMail)
    assert isinstance(first.mailer, Mailer)
    assert first is not second, "its events list would be emitted again"


async def test_container_in_use_cannot_be_exchanged() -> None:
    container = DIContainer()
    container.prepare([SendMail], [])
    with pytest.raises(ConfigurationError, match="Attach the container before the Mediator is used"):
        container.attach_external_container(Container())


async def test_binds_of_the_application_hold() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SmtpMailer, scope="request"), Mailer))
    assert type((await resolve(DIContainer(external_container), SendMail)).mailer) is SmtpMailer


class Audit(Handler):
    def __init__(self, session: Session) -> None:
        self.session = session


async def test_nothing_stays_bound_in_the_container_of_the_application() -> None:
    external_container = Container()
    await resolve(DIContainer(external_container), Audit)
    solved = external_container.solve(Dependent(Audit, scope="request"), ["request"])
    assert [it.dependency.call for it in solved.dag[solved.dependency]] == [Session]


class CountingContainer(Container):
    solved = 0

    def solve(self, *args: Any, **keywords: Any) -> SolvedDependent[Any]:
        self.solved += 1
        return super().solve(*args, **keywords)


async def test_nothing_is_solved_while_messages_are_handled() -> None:
    counting = CountingContainer()
    container = DIContainer(counting)
    container.prepare([SendMail], [Session])
    before = counting.solved
    for _ in range(3):
        await container.open({Session: Session()}).get(SendMail)
    assert counting.solved == before


async def test_handler_bound_wider_than_a_message_is_shared() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SendMail, scope="singleton"), SendMail))
    container = DIContainer(external_container)
    assert await resolve(container, SendMail) is await resolve(container, SendMail)


class Letters:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


class SendLetters(Handler):
    def __init__(self, letters: Letters, mailer: Mailer) -> None:
        self.mailers = (letters.mailer, mailer)


async def test_what_nobody_bound_is_shared_within_a_message_too() -> None:
    first, second = (await resolve(DIContainer(), SendLetters)).mailers
    assert first is second


# -- scopes ------------------------------------------------------------------------------------------------------------


async def test_names_of_the_scopes_are_the_applications() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SmtpMailer, scope="app"), Mailer))
    container = DIContainer(external_container, scopes=["app", "message"])
    first, second = await resolve(container, SendMail), await resolve(container, SendMail)
    assert first.mailer is second.mailer


@pytest.mark.parametrize("scopes", [("request",), ("singleton", "request")])
async def test_dependent_without_a_scope_lives_as_long_as_the_message(scopes: Sequence[Hashable]) -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SmtpMailer), Mailer))
    container = DIContainer(external_container, scopes=scopes)
    first, second = await resolve(container, SendMail), await resolve(container, SendMail)
    assert first.mailer is not second.mailer


def test_no_scope_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one scope"):
        DIContainer(scopes=())


opened: list[str] = []


@pytest.fixture(autouse=True)
def nothing_opened() -> None:
    opened.clear()


async def open_mailer() -> AsyncGenerator[Mailer]:
    opened.append("open")
    await anyio.lowlevel.checkpoint()
    yield Mailer()
    opened.append("closed")


async def test_what_outlives_messages_is_ended_with_the_container_which_can_be_used_again() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(open_mailer, scope="singleton"), Mailer))
    container = DIContainer(external_container)
    for _ in range(2):
        await resolve(container, SendMail)
        await resolve(container, SendMail)
        await container.aclose()
    await container.aclose()
    assert opened == ["open", "closed"] * 2


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return functools.partial(wrapper)


class Opening:
    async def __call__(self) -> AsyncGenerator[Mailer]:
        async for mailer in open_mailer():
            yield mailer


@pytest.mark.parametrize("call", [open_mailer, functools.partial(open_mailer), wrapped(open_mailer), Opening()])
async def test_dependency_that_yields_is_ended_however_it_is_wrapped(call: Any) -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(call, scope="request"), Mailer))
    await resolve(DIContainer(external_container), SendMail)
    assert opened == ["open", "closed"]


@pytest.mark.parametrize(("scope", "at_once"), [("singleton", True), ("request", False)])
async def test_scope_with_nothing_to_end_is_closed_at_once(scope: str, *, at_once: bool) -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(open_mailer, scope=scope), Mailer))
    container = DIContainer(external_container)
    container.prepare([SendMail], [])
    one = container.open({})
    await one.get(SendMail)
    closing = one.close(None)
    assert (closing is None) is at_once
    if closing is not None:
        await closing
    await container.aclose()
    assert opened == ["open", "closed"]


async def test_failed_singleton_is_made_by_the_next_message() -> None:
    async def connect() -> Mailer:
        opened.append("try")
        if len(opened) == 1:
            raise ConnectionError("no route to host")
        return Mailer()

    external_container = Container()
    external_container.bind(bind_by_type(Dependent(connect, scope="singleton"), Mailer))
    container = DIContainer(external_container)
    with pytest.raises(ConnectionError, match="no route to host"):
        await resolve(container, SendMail)
    await resolve(container, SendMail)
    await resolve(container, SendMail)
    assert opened == ["try", "try"]


async def test_message_that_waits_does_not_hold_up_the_others() -> None:
    connected = anyio.Event()

    async def connect(mailer: Mailer, session: Session) -> Letters:
        if isinstance(session, Replica):
            await connected.wait()
        return Letters(mailer)

    external_container = Container()
    external_container.bind(bind_by_type(Dependent(SmtpMailer, scope="singleton"), Mailer))
    external_container.bind(bind_by_type(Dependent(connect, scope="request"), Letters))
    container = DIContainer(external_container)
    await resolve(container, SendLetters)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(container.open({Session: Replica()}).get, SendLetters)
            await anyio.lowlevel.checkpoint()
            await container.open({Session: Session()}).get(SendLetters)
            connected.set()


# -- seeds -------------------------------------------------------------------------------------------------------------


def open_replica() -> Replica:
    return Replica()


class Forms(Handler):
    def __init__(
        self,
        annotated: Annotated[Session, "the open one"],
        optional: Session | None,
        defaulted: Session | None = None,
        *,
        chosen: Annotated[Session, Marker(open_replica)],
    ) -> None:
        self.seeds = [annotated, optional, defaulted]
        self.chosen = chosen


async def test_every_form_of_annotation_gets_the_seed_unless_it_chooses_otherwise() -> None:
    session = Session()
    made = await resolve(DIContainer(), Forms, session)
    assert made.seeds == [session] * 3
    assert isinstance(made.chosen, Replica)


async def make_mailer(session: Session) -> SmtpMailer:
    opened.append(type(session).__name__)
    return SmtpMailer()


async def test_factories_of_the_application_get_seeds() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(make_mailer, scope="request"), Mailer))
    await resolve(DIContainer(external_container), SendMail, Replica())
    assert opened == ["Replica"]


@pytest.mark.parametrize("scope", ["request", "singleton", None])
def test_bind_for_a_seed_is_refused_whatever_it_binds(scope: str | None) -> None:
    for dependent in (Dependent[Any](Session, scope=scope), Dependent[Any](open_replica, scope=scope)):
        external_container = Container()
        external_container.bind(bind_by_type(dependent, Session))
        with pytest.raises(ConfigurationError, match="DIContainer provides Session"):
            DIContainer(external_container).prepare([Audit], [Mailer, Session])


# -- what is missing ---------------------------------------------------------------------------------------------------


class Sends(Protocol):
    def send(self) -> None: ...


class MadeUp(Handler):
    def __init__(self, sender: Sends, retries: int, name: str = "x") -> None: ...


class Unannotated(Handler):
    def __init__(self, mailer) -> None: ...  # type: ignore[no-untyped-def]  # what is tested


class Misspelt(Handler):
    def __init__(self, number: io.Bites) -> None: ...  # type: ignore[name-defined]  # what is tested


class OnlyForTheChecker(Handler):
    def __init__(self, card: Postcard) -> None: ...


class EitherOr(Handler):
    def __init__(self, way: Mailer | Session) -> None: ...


def needs_retries(retries: int) -> Mailer:
    raise AssertionError("nothing is made in a dry run")


def test_what_di_would_make_up_is_missing() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(needs_retries, scope="request"), Mailer))
    entries = missing(
        DIContainer(external_container),
        MadeUp,
        Unannotated,
        OnlyForTheChecker,
        Misspelt,
        EitherOr,
        Sends,
        int,
        SendMail,
    )
    expected = (
        "MadeUp(sender: Sends): nothing provides Sends",
        "MadeUp(retries: int): nothing provides int",
        "Unannotated(mailer): it has no annotation and no default",
        "OnlyForTheChecker: what it asks for cannot be read, name 'Postcard' is not defined",
        "Misspelt: what it asks for cannot be read, module 'io' has no attribute 'Bites'",
        "EitherOr(way: ",
        "Sends: no bind provides it, and it cannot be made from its annotations",
        "int: no bind provides it, and it cannot be made from its annotations",
        "needs_retries(retries: int): nothing provides int",
    )
    for entry, start in zip(entries, expected, strict=True):
        assert entry.startswith(start)


class A:
    def __init__(self, b: B) -> None: ...


class B:
    def __init__(self, a: A) -> None: ...


class NeedsA(Handler):
    def __init__(self, a: A) -> None: ...


def test_what_di_refuses_by_itself_is_listed_too() -> None:
    external_container = Container()
    external_container.bind(bind_by_type(Dependent(make_mailer, scope="singleton"), Mailer))
    circle, narrow = missing(DIContainer(external_container), NeedsA, SendMail)
    assert circle.startswith("NeedsA: di cannot solve it: Dependencies are in a cycle")
    assert narrow.startswith("SendMail: di cannot solve it: ")
    assert "narrower" in narrow


async def test_type_that_was_never_prepared_is_named() -> None:
    with pytest.raises(ResolutionError, match="SendMail: the mediator did not ask for it at start"):
        await DIContainer().open({}).get(SendMail)
