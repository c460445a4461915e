"""PlainContainer: the suite, and what the annotations of a constructor can say."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, Optional, Protocol, TypeVar

import anyio
import pytest

from pipeline_mediator.container import PlainContainer
from pipeline_mediator.errors import ConfigurationError, ResolutionError
from pipeline_mediator.testing.container_suite import ContainerConformance, ContainerFeatures, Service

if TYPE_CHECKING:

    class Postcard: ...


E = TypeVar("E")


class TestConformance(ContainerConformance):
    features = ContainerFeatures(transient=False)

    def make_container(self, services: Sequence[Service], seeds: Sequence[type]) -> PlainContainer:
        return PlainContainer(*(it.cls() if it.lifetime == "singleton" else it.cls for it in services))


class Handler:
    async def handle(self, message: object) -> None: ...


class Session: ...


class Mailer: ...


class SmtpMailer(Mailer): ...


class FakeMailer(Mailer): ...


def resolve(container: PlainContainer, wanted: type[E], seeds: dict[type, object] | None = None) -> E:
    container.prepare([wanted], [Session])
    made: E = container.open({Session: Session()} if seeds is None else seeds).get(wanted)
    return made


def missing(container: PlainContainer, wanted: type) -> tuple[str, ...]:
    with pytest.raises(ResolutionError) as failure:
        container.prepare([wanted], [Session])
    return failure.value.missing


# -- annotations -------------------------------------------------------------------------------------------------------


class Everything(Handler):
    def __init__(
        self,
        session: Session,
        annotated: Annotated[Mailer, "by mail"],
        optional: Mailer | None,
        absent: float | None = None,
        *args: int,
        old_optional: Optional[Mailer],  # noqa: UP045  # the old spelling is what is tested
        both: Annotated[Mailer | None, "by mail"] = None,
        keyword: Mailer,
        keyword_default: str = "x",
        **kwargs: int,
    ) -> None:
        self.session = session
        self.mailers = [annotated, optional, old_optional, both, keyword]
        self.defaults = (absent, keyword_default)


def test_every_form_of_annotation_asks_for_its_type() -> None:
    mailer = Mailer()
    made = resolve(PlainContainer(mailer), Everything)
    assert made.mailers == [mailer] * 5
    assert isinstance(made.session, Session)
    assert made.defaults == (None, "x")


class AfterADefault(Handler):
    def __init__(self, limit: int = 5, /, mailer: Mailer | None = None, tag: str = "t", *, session: Session) -> None:
        self.got = (limit, mailer, tag)
        self.session = session


@pytest.mark.parametrize("provided", [[Mailer], [Mailer()], []])
def test_default_before_a_dependency_is_kept(provided: list[object]) -> None:
    limit, mailer, tag = resolve(PlainContainer(*provided), AfterADefault).got
    assert (limit, tag) == (5, "t")
    assert isinstance(mailer, Mailer) is bool(provided)


class Alternating(Handler):
    def __init__(
        self, limit: int = 5, mailer: Mailer | None = None, tag: str = "t", other: Mailer | None = None
    ) -> None:
        self.got = (limit, mailer, tag, other)


def test_defaults_between_dependencies_are_kept() -> None:
    mailer = Mailer()
    assert resolve(PlainContainer(mailer), Alternating).got == (5, mailer, "t", mailer)


@dataclass
class WithFields(Handler):
    session: Session
    seen: list[str] = field(default_factory=list[str])


def test_dataclass_keeps_its_default_factories() -> None:
    container = PlainContainer()
    first, second = resolve(container, WithFields), resolve(container, WithFields)
    assert first.seen == []
    assert first.seen is not second.seen


class FourOfThem(Handler):
    def __init__(self, a: Session, b: Mailer, c: Session, d: Mailer) -> None:
        self.order = [type(it).__name__ for it in (a, b, c, d)]


def test_many_parameters_keep_their_order() -> None:
    assert resolve(PlainContainer(Mailer()), FourOfThem).order == ["Session", "Mailer", "Session", "Mailer"]


class Handles(Protocol):
    async def handle(self, message: object, /) -> None: ...


class NeedsMailer:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


class ByProtocolAndBase(Handles, NeedsMailer):
    async def handle(self, message: object, /) -> None: ...


class ByProtocolAlone(Handles):
    async def handle(self, message: object, /) -> None: ...


def test_protocol_base_does_not_hide_the_constructor() -> None:
    mailer = Mailer()
    assert resolve(PlainContainer(mailer), ByProtocolAndBase).mailer is mailer
    assert isinstance(resolve(PlainContainer(), ByProtocolAlone), ByProtocolAlone)


class Abstract(Handler, ABC):
    @abstractmethod
    def place(self) -> None: ...


class Unannotated(Handler):
    def __init__(self, mailer) -> None: ...  # type: ignore[no-untyped-def]  # what is tested


class OnlyForTheChecker(Handler):
    def __init__(self, mailer: Postcard) -> None: ...


class Written(dict[str, str], Handler):
    """Has a constructor that was written in C."""


class Misspelt(Handler):
    def __init__(self, number: io.Bites) -> None: ...  # type: ignore[name-defined]  # what is tested


class EitherOr(Handler):
    def __init__(self, way: Mailer | Session) -> None: ...


class ForgottenDefault(Handler):
    def __init__(self, mailer: Mailer | None) -> None: ...


@pytest.mark.parametrize(
    ("wanted", "entry"),
    [
        (NeedsMailer, "NeedsMailer: nothing provides it, and only concrete classes with a `handle` are built unasked"),
        (Handles, "Handles: nothing provides it, and only concrete classes with a `handle` are built unasked"),
        (Abstract, "Abstract: nothing provides it, and only concrete classes with a `handle` are built unasked"),
        (ByProtocolAndBase, "ByProtocolAndBase(mailer: Mailer): nothing provides Mailer"),
        (Unannotated, "Unannotated(mailer): it has no annotation and no default"),
        (ForgottenDefault, "nothing provides Mailer"),
        (EitherOr, "EitherOr(way: "),
        (Misspelt, "Misspelt: what it asks for cannot be read, module 'io' has no attribute 'Bites'"),
        (Written, "Written: what it asks for cannot be read, no signature found"),
        (
            OnlyForTheChecker,
            "OnlyForTheChecker: what it asks for cannot be read, name 'Postcard' is not defined. Import that name",
        ),
    ],
)
def test_missing_entry_names_class_parameter_and_type(wanted: type, entry: str) -> None:
    (found,) = missing(PlainContainer(), wanted)
    assert entry in found


# -- what is provided --------------------------------------------------------------------------------------------------


class SendMail(Handler):
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


def test_subclass_provides_its_base() -> None:
    assert type(resolve(PlainContainer(SmtpMailer()), SendMail).mailer) is SmtpMailer
    assert type(resolve(PlainContainer(SmtpMailer), SendMail).mailer) is SmtpMailer


def test_class_itself_goes_before_its_subclasses() -> None:
    assert type(resolve(PlainContainer(SmtpMailer(), Mailer(), FakeMailer()), SendMail).mailer) is Mailer


def test_two_subclasses_are_ambiguous() -> None:
    container = PlainContainer(SmtpMailer(), FakeMailer())
    (entry,) = missing(container, SendMail)
    assert entry.startswith("SendMail(mailer: Mailer): SmtpMailer and FakeMailer both provide Mailer; ask for one")
    assert missing(container, Mailer)[0].startswith("SmtpMailer and FakeMailer both provide Mailer")


class Repository(Generic[E]): ...


class Orders(Repository[int]): ...


class Customers(Repository[str]): ...


class ListOrders(Handler):
    def __init__(self, orders: Repository[int]) -> None:
        self.orders = orders


def test_generic_base_is_told_apart_by_its_argument() -> None:
    assert isinstance(resolve(PlainContainer(Customers(), Orders()), ListOrders).orders, Orders)


def test_provided_handler_object_is_the_handler() -> None:
    handler = SendMail(Mailer())
    container = PlainContainer(handler)
    assert resolve(container, SendMail) is handler
    assert container.factory(SendMail) is None


class SendMailTwice(SendMail): ...


def test_provided_subclass_of_a_handler_is_another_handler() -> None:
    assert type(resolve(PlainContainer(SendMailTwice(Mailer()), Mailer()), SendMail)) is SendMail


class A:
    def __init__(self, b: B) -> None: ...


class B:
    def __init__(self, a: A) -> None: ...


class NeedsA(Handler):
    def __init__(self, a: A) -> None: ...


def test_circle_is_named() -> None:
    assert missing(PlainContainer(A, B), NeedsA) == ("A -> B -> A: each needs the next one built first",)


def test_missing_dependency_of_a_shared_class_is_listed_once() -> None:
    class First(Handler):
        def __init__(self, shared: NeedsMailer, again: NeedsMailer) -> None: ...

    class Second(First): ...

    with pytest.raises(ResolutionError) as failure:
        PlainContainer(NeedsMailer).prepare([First, Second], [])
    assert failure.value.missing == ("NeedsMailer(mailer: Mailer): nothing provides Mailer",)


def test_same_class_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="given Mailer twice"):
        PlainContainer(Mailer(), Mailer)


def a_factory() -> Mailer:
    return Mailer()


@pytest.mark.parametrize("thing", [a_factory, Repository[int], len])
def test_what_is_neither_object_nor_class_is_refused(thing: object) -> None:
    with pytest.raises(ConfigurationError, match="it takes objects, which it shares, and classes"):
        PlainContainer(thing)


class ReplicaSession(Session): ...


class Report(Handler):
    def __init__(self, session: Session, replica: ReplicaSession) -> None:
        self.sessions = (type(session), type(replica))


def test_only_the_very_type_of_a_seed_is_refused() -> None:
    assert resolve(PlainContainer(ReplicaSession()), Report).sessions == (Session, ReplicaSession)
    with pytest.raises(ConfigurationError, match="PlainContainer provides Session, and so does the mediator"):
        PlainContainer(Session()).prepare([Report], [Session])
    with pytest.raises(ConfigurationError, match="Take Session out of the container"):
        PlainContainer(Session).prepare([Report], [Session])


class MaybeInTransaction(Handler):
    def __init__(self, session: Session | None = None) -> None:
        self.session = session


def test_seed_with_a_default_may_be_left_out_of_a_scope() -> None:
    assert resolve(PlainContainer(), MaybeInTransaction).session is not None
    assert resolve(PlainContainer(), MaybeInTransaction, seeds={}).session is None


def test_second_mediator_adds_its_types() -> None:
    container = PlainContainer(Mailer())
    container.prepare([SendMail], [Session])
    container.prepare([MaybeInTransaction], [Session])
    scope = container.open({Session: Session()})
    assert isinstance(scope.get(SendMail), SendMail)
    assert isinstance(scope.get(MaybeInTransaction), MaybeInTransaction)


def test_type_that_was_never_prepared_is_named() -> None:
    with pytest.raises(ResolutionError, match="SendMail: the mediator did not ask for it at start"):
        PlainContainer(Mailer()).open({}).get(SendMail)


# -- without a scope ---------------------------------------------------------------------------------------------------


class Simple(Handler):
    def __init__(
        self, limit: int = 3, names: tuple[str, ...] = (), either: int | str = 1, anything: Any = None
    ) -> None:
        self.limit = limit


class MaybeMail(Handler):
    def __init__(self, *, mailer: Mailer | None = None) -> None:
        self.mailer = mailer


class MaybeOrders(Handler):
    def __init__(self, orders: Repository[int] | None = None) -> None: ...


class Ending(Handler):
    def close(self) -> None: ...


def test_handler_without_dependencies_needs_no_scope() -> None:
    assert PlainContainer().factory(Simple) is Simple


def test_handler_of_singletons_needs_no_scope() -> None:
    mailer = Mailer()
    container = PlainContainer(mailer)
    for factory in (container.factory(SendMail), container.factory(MaybeMail)):
        assert factory is not None
        assert factory().mailer is mailer
        assert factory() is not factory()


@pytest.mark.parametrize(
    ("provided", "wanted"),
    [
        ([], MaybeInTransaction),  # the session may be a seed
        ([], MaybeMail),  # so may the mailer, as far as is known before prepare
        ([SmtpMailer()], SendMail),  # likewise
        ([Mailer], SendMail),  # one per scope
        ([Mailer], Mailer),
        ([Simple], Simple),
        ([Orders], MaybeOrders),
        ([], SendMail),  # missing, which prepare reports
        ([], OnlyForTheChecker),
        ([], Ending),  # somebody has to close it
        ([], Mailer),  # no handler
    ],
)
def test_what_takes_a_scope_has_no_factory(provided: list[object], wanted: type) -> None:
    assert PlainContainer(*provided).factory(wanted) is None


# -- the end of a scope ------------------------------------------------------------------------------------------------

ended: list[str] = []


@pytest.fixture(autouse=True)
def nothing_ended() -> None:
    ended.clear()


class File:
    def close(self) -> None:
        ended.append("file")


class Both:
    def __init__(self, file: File) -> None: ...

    async def aclose(self) -> None:
        ended.append("both")

    def close(self) -> None:
        raise AssertionError("aclose goes before close")


class Account:
    def close(self, reason: str) -> None:
        raise AssertionError("this one is the account's business")


class Shop(Handler):
    def __init__(self, both: Both, account: Account) -> None: ...

    def close(self, *, quickly: bool = True) -> None:
        ended.append("handler")


async def test_scope_ends_whatever_it_built() -> None:
    container = PlainContainer(File, Both, Account)
    container.prepare([Shop], [])
    scope = container.open({})
    scope.get(Shop)
    scope.get(Shop)
    closing = scope.close(None)
    assert closing is not None
    await closing
    assert ended == ["handler", "handler", "both", "file"]


class Log(io.BufferedReader):
    """Has a `close` that was written in C."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())


async def test_method_without_a_readable_signature_ends_too() -> None:
    container = PlainContainer(Log)
    container.prepare([Log], [])
    scope = container.open({})
    log = scope.get(Log)
    closing = scope.close(None)
    assert closing is not None
    await closing
    assert log.closed


class Sour:
    async def aclose(self) -> None:
        raise RuntimeError("sour")


class Bitter:
    def __init__(self, sour: Sour, file: File) -> None: ...

    async def aclose(self) -> None:
        raise ValueError("bitter")


async def test_several_failures_are_raised_together_after_the_rest_was_ended() -> None:
    container = PlainContainer(Sour, Bitter, File)
    container.prepare([Bitter], [])
    scope = container.open({})
    scope.get(Bitter)
    closing = scope.close(None)
    assert closing is not None
    with pytest.raises(ExceptionGroup, match="2 objects of a scope could not be ended") as failure:
        await closing
    assert [str(error) for error in failure.value.exceptions] == ["bitter", "sour"]
    assert ended == ["file"]


class Slow:
    def __init__(self, file: File, sour: Sour) -> None: ...

    async def aclose(self) -> None:
        await anyio.sleep_forever()


async def test_cancellation_does_not_keep_the_rest_from_being_ended() -> None:
    container = PlainContainer(Slow, Sour, File)
    container.prepare([Slow], [])
    scope = container.open({})
    scope.get(Slow)
    closing = scope.close(None)
    assert closing is not None
    with anyio.CancelScope() as cancelled:
        cancelled.cancel()
        await closing
    assert cancelled.cancelled_caught
    assert ended == ["file"]


def test_scope_with_nothing_to_end_is_closed_at_once() -> None:
    container = PlainContainer(Mailer)
    container.prepare([SendMail], [])
    scope = container.open({})
    scope.get(SendMail)
    assert scope.close(None) is None
