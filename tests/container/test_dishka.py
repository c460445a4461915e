"""DishkaContainer: the suite, and what is special to dishka."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import pytest
from dishka import AsyncContainer, FromComponent, Marker, Provider, Scope, make_async_container, make_container

from pipeline_mediator.container.dishka import DishkaContainer, MediatorProvider
from pipeline_mediator.context import Context
from pipeline_mediator.errors import ConfigurationError, ResolutionError
from pipeline_mediator.testing.container_suite import ContainerConformance, ContainerFeatures, Service

if TYPE_CHECKING:

    class Postcard: ...


def provider_of(services: Sequence[Service]) -> Provider:
    provider = Provider()
    for it in services:
        source: Any = it.coroutine or it.generator or it.cls
        scope = Scope.APP if it.lifetime == "singleton" else Scope.REQUEST
        provider.provide(source, provides=it.cls, scope=scope, cache=it.lifetime != "transient")
    return provider


class TestConformance(ContainerConformance):
    features = ContainerFeatures(awaits_factories=True, shows_error=True)

    def make_container(self, services: Sequence[Service], seeds: Sequence[type]) -> DishkaContainer:
        # Without dishka's own check, which would stop at the first thing that is missing.
        return DishkaContainer(
            make_async_container(
                provider_of(services), MediatorProvider(*seeds), lock_factory=anyio.Lock, skip_validation=True
            )
        )


class Handler:
    async def handle(self, message: object) -> None: ...


class Session: ...


class Mailer: ...


class SendMail(Handler):
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


class Audit(Handler):
    def __init__(self, session: Session) -> None:
        self.session = session


def mailers(*, cache: bool = True, scope: Scope = Scope.REQUEST) -> Provider:
    provider = Provider(scope=scope)
    provider.provide(Mailer, cache=cache)
    return provider


def missing(container: DishkaContainer, *wanted: type) -> tuple[str, ...]:
    with pytest.raises(ResolutionError) as failure:
        container.prepare(wanted, [Session])
    return failure.value.missing


async def resolve(container: DishkaContainer, wanted: type[Any], seeds: dict[type, object] | None = None) -> Any:
    container.prepare([wanted], [Session])
    scope = container.open({Session: Session()} if seeds is None else seeds)
    made = scope.get(wanted)
    if scope.is_async:
        made = await made
    closing = scope.close(None)
    if closing is not None:
        await closing
    return made


# -- synchronous containers --------------------------------------------------------------------------------------------

ended: list[object] = []


@pytest.fixture(autouse=True)
def nothing_ended() -> None:
    ended.clear()


def open_mailer(session: Session) -> Generator[Mailer, object]:
    error = yield Mailer()
    ended.append(error)


def open_forever() -> Generator[Mailer]:
    yield Mailer()
    ended.append("application")


async def test_synchronous_container_resolves_and_closes_at_once() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(open_mailer)
    container = DishkaContainer(make_container(provider, MediatorProvider(Session)))
    container.prepare([SendMail, Audit], [Session])
    scope = container.open({Session: Session()})
    assert not scope.is_async
    assert scope.get(SendMail).mailer is scope.get(SendMail).mailer
    error = ValueError("out of stock")
    assert scope.close(error) is None
    assert ended == [error]
    assert container.open({}).close(None) is None
    with pytest.raises(ResolutionError, match="Session: this message's scope was opened without one"):
        container.open({}).get(Audit)
    with pytest.raises(ResolutionError, match="Session: this message's scope was opened without one"):
        container.open({}).get(SendMail)


# -- seeds and MediatorProvider ----------------------------------------------------------------------------------------


class Outbox:
    def __init__(self, context: Context, session: Session) -> None:
        self.context = context
        self.session = session


class Emitting(Handler):
    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox


async def test_mediator_provider_gives_context_and_session_to_factories() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(Outbox)
    container = DishkaContainer(make_async_container(provider, MediatorProvider(Session)))
    container.prepare([Emitting], [Context, Session])
    context, session = Context("message"), Session()
    outbox = (await container.open({Context: context, Session: session}).get(Emitting)).outbox
    assert outbox.context is context
    assert outbox.session is session


async def test_handlers_get_seeds_without_the_provider_and_without_a_dishka_scope() -> None:
    container = DishkaContainer(make_async_container())
    container.prepare([Audit], [Session])
    session = Session()
    scope = container.open({Session: session})
    made = scope.get(Audit)
    assert (await made).session is session
    assert scope.close(None) is None


def sessions() -> Provider:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(Session)
    return provider


async def test_mediator_provider_that_goes_last_wins() -> None:
    session = Session()
    container = DishkaContainer(make_async_container(sessions(), MediatorProvider(Session)))
    assert (await resolve(container, Audit, {Session: session})).session is session


@pytest.mark.parametrize("scope", [Scope.APP, Scope.REQUEST])
def test_provider_of_a_seed_is_refused(scope: Scope) -> None:
    provider = Provider(scope=scope)
    provider.provide(Session)
    aliased = Provider(scope=scope)
    aliased.provide(Mailer)
    aliased.alias(Mailer, provides=Session)
    in_the_root = make_async_container(context={Session: Session()})
    for container in (
        make_async_container(MediatorProvider(Session), provider),
        make_async_container(aliased),
        in_the_root,
    ):
        with pytest.raises(ConfigurationError, match="DishkaContainer provides Session"):
            DishkaContainer(container).prepare([Audit], [Session])


async def test_alias_of_a_seed_is_no_second_provider() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.alias(Session, provides=Mailer)
    container = DishkaContainer(make_async_container(provider, MediatorProvider(Session)))
    session = Session()
    container.prepare([SendMail], [Session, Mailer])
    made = container.open({Session: session, Mailer: session}).get(SendMail)
    assert (await made).mailer is session


class Request: ...


class ByRequest:
    def __init__(self, request: Request) -> None: ...


class FromTheWeb(Handler):
    def __init__(self, request: Request, nested: ByRequest) -> None: ...


class MaybeFromTheWeb(Handler):
    def __init__(self, request: Request | None = None) -> None:
        self.request = request


async def test_context_value_that_only_the_web_framework_gives_is_missing() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.from_context(Request)
    provider.provide(ByRequest)
    container = DishkaContainer(make_async_container(provider))
    assert missing(container, FromTheWeb, ByRequest, Request) == (
        "FromTheWeb(request: Request): dishka has it from the context, where the mediator puts none",
        "ByRequest(request: Request): dishka has it from the context, where the mediator puts none",
        "Request: nothing provides it, and only concrete classes with a `handle` are built unasked",
    )
    assert (await resolve(container, MaybeFromTheWeb)).request is None


# -- how handlers are built --------------------------------------------------------------------------------------------


class Forms(Handler):
    def __init__(
        self,
        optional: Mailer | None,
        limit: int = 3,
        other: Annotated[Mailer | None, FromComponent("other")] = None,
        *,
        annotated: Annotated[Mailer, "by mail"],
        tag: str = "t",
    ) -> None:
        self.mailers = [optional, annotated]
        self.other = other
        self.defaults = (limit, tag)


@pytest.mark.parametrize("make", [make_async_container, make_container])
async def test_annotations_and_components_mean_what_they_say(make: Any) -> None:
    container = DishkaContainer(make(mailers(), mailers().to_component("other")))
    made = await resolve(container, Forms)
    assert made.mailers[0] is made.mailers[1]
    assert isinstance(made.other, Mailer)
    assert made.other is not made.mailers[0]
    assert made.defaults == (3, "t")


class Replicating(Handler):
    def __init__(self, session: Session, replica: Annotated[Session, FromComponent("replica")]) -> None:
        self.sessions = (session, replica)


async def test_component_has_its_own_session() -> None:
    container = DishkaContainer(make_async_container(sessions().to_component("replica")))
    session = Session()
    first, second = (await resolve(container, Replicating, {Session: session})).sessions
    assert first is session
    assert second is not session


class Located:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


async def locate(container: AsyncContainer) -> Located:
    return Located(await container.get(Mailer))


class Locating(Handler):
    def __init__(self, located: Located) -> None:
        self.located = located


async def test_what_a_factory_asks_of_the_container_itself_is_ended() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(locate)
    provider.provide(open_mailer)
    container = DishkaContainer(make_async_container(provider, MediatorProvider(Session)))
    assert isinstance((await resolve(container, Locating)).located.mailer, Mailer)
    assert ended == [None]


async def test_what_an_activated_factory_opens_is_ended() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(Mailer)
    provider.provide(open_mailer, when=Marker("real"))
    provider.activate(lambda: True, Marker("real"))
    await resolve(DishkaContainer(make_async_container(provider, MediatorProvider(Session))), SendMail)
    assert ended == [None]


@pytest.mark.parametrize("make", [make_async_container, make_container])
async def test_scope_with_nothing_to_end_is_closed_at_once(make: Any) -> None:
    provider = Provider(scope=Scope.APP)
    provider.provide(open_forever, provides=Mailer)
    container = make(provider)
    mediated = DishkaContainer(container)
    mediated.prepare([SendMail], [])
    scope = mediated.open({})
    made = scope.get(SendMail)
    if scope.is_async:
        await made
    assert scope.close(None) is None
    assert ended == []


async def test_component_that_does_not_exist_is_missing() -> None:
    class Elsewhere(Handler):
        def __init__(self, mailer: Annotated[Mailer, FromComponent("elsewhere")]) -> None: ...

    (entry,) = missing(DishkaContainer(make_async_container(mailers())), Elsewhere)
    assert entry.startswith("Elsewhere(mailer: ")
    assert entry.endswith("nothing provides Mailer")


async def test_provided_handler_comes_from_the_container() -> None:
    provider = Provider(scope=Scope.APP)
    provider.provide(SendMail)
    container = DishkaContainer(make_async_container(mailers(scope=Scope.APP), provider))
    assert await resolve(container, SendMail) is await resolve(container, SendMail)


async def test_scope_to_enter_can_be_chosen() -> None:
    container = DishkaContainer(make_async_container(mailers(scope=Scope.ACTION)), scope=Scope.ACTION)
    assert isinstance((await resolve(container, SendMail)).mailer, Mailer)
    (entry,) = missing(DishkaContainer(make_async_container(mailers(scope=Scope.ACTION))), SendMail)
    assert entry == "SendMail(mailer: Mailer): nothing provides Mailer"


class OnlyForTheChecker(Handler):
    def __init__(self, card: Postcard) -> None: ...


def needs_session(session: Session, *, retries: int) -> Mailer:
    raise AssertionError("nothing is made in a dry run")


async def test_missing_entries_name_what_asks() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(needs_session)
    container = DishkaContainer(make_async_container(provider, skip_validation=True))
    assert missing(container, SendMail) == (
        "needs_session(session: Session): nothing provides Session",
        "needs_session(retries: int): nothing provides int",
    )
    (entry,) = missing(container, OnlyForTheChecker)
    assert entry.startswith("OnlyForTheChecker: what it asks for cannot be read, name 'Postcard' is not defined")


async def test_type_that_was_never_prepared_is_named() -> None:
    scope = DishkaContainer(make_async_container()).open({})
    with pytest.raises(ResolutionError, match="SendMail: the mediator did not ask for it at start"):
        await scope.get(SendMail)


class A:
    def __init__(self, b: B) -> None: ...


class B:
    def __init__(self, a: A) -> None: ...


class NeedsA(Handler):
    def __init__(self, a: A) -> None: ...


def test_circle_in_an_unchecked_container_does_not_stop_the_dry_run() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.provide_all(A, B)
    container = DishkaContainer(make_async_container(provider, skip_validation=True))
    assert missing(container, NeedsA, SendMail) == ("SendMail(mailer: Mailer): nothing provides Mailer",)


def test_alias_without_a_source_in_an_unchecked_container_is_missing() -> None:
    provider = Provider(scope=Scope.REQUEST)
    provider.alias(Outbox, provides=Mailer)
    container = DishkaContainer(make_async_container(provider, skip_validation=True))
    assert missing(container, SendMail) == ("Mailer is an alias: nothing provides Outbox",)
