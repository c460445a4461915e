"""RodiContainer: the suite, and what is special to rodi."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import pytest
import rodi

from pipeline_mediator.container.rodi import RodiContainer
from pipeline_mediator.errors import ConfigurationError, ResolutionError
from pipeline_mediator.testing.container_suite import ContainerConformance, ContainerFeatures, Service

if TYPE_CHECKING:

    class Postcard: ...


class TestConformance(ContainerConformance):
    features = ContainerFeatures(defaults=False)

    def make_container(self, services: Sequence[Service], seeds: Sequence[type]) -> RodiContainer:
        container: Any = rodi.Container()
        for it in services:
            add = {
                "singleton": container.add_singleton,
                "scoped": container.add_scoped,
                "transient": container.add_transient,
            }[it.lifetime]
            add(it.cls)
        return RodiContainer(container)


class Handler:
    async def handle(self, message: object) -> None: ...


class Session: ...


class Mailer: ...


class SendMail(Handler):
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


@pytest.fixture
def services() -> Any:
    """A rodi container; Any, because rodi's methods are only half annotated."""
    return rodi.Container()


def missing(services: Any, *wanted: type) -> tuple[str, ...]:
    with pytest.raises(ResolutionError) as failure:
        RodiContainer(services).prepare(wanted, [Session])
    return failure.value.missing


# -- the container that is attached ------------------------------------------------------------------------------------


def test_container_attached_as_in_diator(services: Any) -> None:
    services.add_singleton(Mailer)
    services.register(SendMail)
    container = RodiContainer()
    container.attach_external_container(services)
    container.prepare([SendMail], [Session])
    assert isinstance(container.open({Session: Session()}).get(SendMail).mailer, Mailer)


def test_container_in_use_cannot_be_exchanged(services: Any) -> None:
    container = RodiContainer(services)
    container.prepare([], [Session])
    with pytest.raises(ConfigurationError, match="Attach the container before the Mediator is used"):
        container.attach_external_container(rodi.Container())


def test_without_a_container_handlers_live_on_seeds() -> None:
    class Save(Handler):
        def __init__(self, session: Session) -> None:
            self.session = session

    container = RodiContainer()
    container.prepare([Save], [Session])
    session = Session()
    assert container.open({Session: session}).get(Save).session is session


def test_singletons_are_those_that_the_application_resolves(services: Any) -> None:
    services.add_singleton(Mailer)
    container = RodiContainer(services)
    container.prepare([SendMail], [Session])
    assert container.open({Session: Session()}).get(SendMail).mailer is services.resolve(Mailer)


def test_container_that_was_resolved_from_is_refused(services: Any) -> None:
    services.add_singleton(Mailer)
    services.resolve(Mailer)
    with pytest.raises(ConfigurationError, match=r"Call mediator\.prepare\(\) before anything is resolved"):
        RodiContainer(services).prepare([SendMail], [Session])


def test_second_adapter_over_the_same_container_finds_everything_registered(services: Any) -> None:
    services.add_singleton(Mailer)
    first, second = RodiContainer(services), RodiContainer(services)
    for container in (first, second):
        container.prepare([SendMail], [Session])
    mailers = {it.open({Session: Session()}).get(SendMail).mailer for it in (first, second)}
    assert len(mailers) == 1


def test_registered_lifetime_of_a_handler_is_kept(services: Any) -> None:
    services.add_singleton(Mailer)
    services.add_scoped(SendMail)
    container = RodiContainer(services)
    container.prepare([SendMail], [Session])
    scope = container.open({Session: Session()})
    assert scope.get(SendMail) is scope.get(SendMail)


def test_nothing_is_registered_when_something_is_missing(services: Any) -> None:
    missing(services, SendMail)
    assert SendMail not in services
    assert Session not in services


# -- how rodi reads classes --------------------------------------------------------------------------------------------


class Sends(Protocol):
    def send(self) -> None: ...


class SmtpSender(Sends):
    def send(self) -> None: ...


class ByProtocol(Handler):
    def __init__(self, sender: Sends, mailer: Annotated[Mailer, "by mail"]) -> None:
        self.parts = (type(sender), type(mailer))


def test_protocols_and_annotated_parameters_are_found(services: Any) -> None:
    services.add_transient(Sends, SmtpSender)
    services.add_transient(Mailer)
    container = RodiContainer(services)
    container.prepare([ByProtocol], [Session])
    assert container.open({Session: Session()}).get(ByProtocol).parts == (SmtpSender, Mailer)


class WithAttributes(Handler):
    sent: ClassVar[list[str]]
    mailer: Mailer
    session: Session
    limit: int = 3


def test_annotated_attributes_are_assigned(services: Any) -> None:
    services.add_transient(Mailer)
    container = RodiContainer(services)
    container.prepare([WithAttributes], [Session])
    session = Session()
    made = container.open({Session: session}).get(WithAttributes)
    assert isinstance(made.mailer, Mailer)
    assert made.session is session
    assert made.limit == 3


class Limited(Handler):
    def __init__(self, mailer: Mailer, limit: int = 3, *args: float, **kwargs: float) -> None: ...


@dataclass
class WithFields(Handler):
    mailer: Mailer


class Misspelt(Handler):
    def __init__(self, number: io.Bites) -> None: ...  # type: ignore[name-defined]  # what is tested


class OnlyForTheChecker(Handler):
    def __init__(self, card: Postcard) -> None: ...


def test_missing_entries_say_what_rodi_wants(services: Any) -> None:
    entries = missing(services, Limited, WithAttributes, WithFields, Misspelt, OnlyForTheChecker)
    expected = (
        "Limited(mailer: Mailer): nothing provides Mailer",
        "Limited(limit: int): nothing provides int; rodi wants it registered although it has a default",
        "WithAttributes.mailer: nothing provides Mailer, which rodi would assign, as it does with annotated attributes",
        "WithFields(mailer: Mailer): nothing provides Mailer",
        "Misspelt: what it asks for cannot be read, module 'io' has no attribute 'Bites'",
        "OnlyForTheChecker: what it asks for cannot be read, name 'Postcard' is not defined. Import that name at run",
    )
    for entry, start in zip(entries, expected, strict=True):
        assert entry.startswith(start)


def test_parameter_without_annotation_is_found_by_its_name(services: Any) -> None:
    services.add_transient(Mailer)

    class ByName(Handler):
        def __init__(self, mailer) -> None:  # type: ignore[no-untyped-def]  # what is tested
            self.mailer = mailer

    container = RodiContainer(services)
    container.prepare([ByName], [Session])
    made: Any = container.open({Session: Session()}).get(ByName)
    assert isinstance(made.mailer, Mailer)


class A:
    def __init__(self, b: B) -> None: ...


class B:
    def __init__(self, a: A) -> None: ...


def test_what_rodi_refuses_by_itself_is_an_error_of_ours(services: Any) -> None:
    services.add_transient(A)
    services.add_transient(B)
    (entry,) = missing(services)
    assert entry.startswith("rodi refuses to build its provider: A circular dependency was detected")


# -- the end of a scope ------------------------------------------------------------------------------------------------

ended: list[object] = []


@pytest.fixture(autouse=True)
def nothing_ended() -> None:
    ended.clear()


class File:
    def close(self) -> None:
        ended.append(self)


class Folder(File): ...


class OpenSession(Session):
    async def aclose(self) -> None:
        raise AssertionError("a seed is not the scope's to end")


class Save(Handler):
    def __init__(self, file: File, folder: Folder, mailer: Mailer) -> None:
        self.made = [file, folder]
        self.mailer = mailer


async def close(container: RodiContainer, wanted: type[Any], seeds: dict[type, object]) -> Any:
    scope = container.open(seeds)
    made = scope.get(wanted)
    closing = scope.close(None)
    if closing is not None:
        await closing
    return made


async def test_what_a_scoped_factory_returns_is_ended(services: Any) -> None:
    def open_folder(scope: Any) -> Folder:
        assert isinstance(scope.get(Session), Session)
        return Folder()

    services.add_scoped_by_factory(File, File)
    services.add_scoped_by_factory(open_folder, Folder)
    services.add_singleton(Mailer)
    container = RodiContainer(services)
    container.prepare([Save], [Session])
    made = await close(container, Save, {Session: Session()})
    assert ended == made.made[::-1]


async def test_what_a_factory_hands_on_is_ended_once_and_a_seed_not_at_all(services: Any) -> None:
    def same_folder(scope: Any) -> Any:
        return scope.get(Folder)

    def same_session(scope: Any) -> Any:
        return scope.get(Session)

    services.add_scoped(Folder)
    services.add_scoped_by_factory(same_folder, File)
    services.add_scoped_by_factory(same_session, Mailer)
    container = RodiContainer(services)
    container.prepare([Save], [Session])
    session = OpenSession()
    made = await close(container, Save, {Session: session})
    assert made.mailer is session
    assert made.made[0] is made.made[1]
    assert ended == [made.made[0]]


async def test_transient_services_are_not_ended(services: Any) -> None:
    services.add_transient(File)
    services.add_transient(Folder)
    services.add_transient(Mailer)
    container = RodiContainer(services)
    container.prepare([Save], [Session])
    await close(container, Save, {Session: Session()})
    assert ended == []
