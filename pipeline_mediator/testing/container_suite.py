"""What every container has to do, as tests to derive from.

    class TestMyContainer(ContainerConformance):
        features = ContainerFeatures(awaits_factories=True)

        def make_container(self, services, seeds):
            ...  # register each Service in your library, wrap it in your adapter

Runs under pytest with anyio's plugin. For readable failures say
`pytest.register_assert_rewrite("pipeline_mediator.testing.container_suite")` in a conftest.py.
"""

# ruff: noqa: D102, S101  # these are tests: a name says what holds, and assert is the tool

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator  # noqa: TC003  # containers read the annotations of the factories below
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import anyio
import anyio.lowlevel
import pytest

from pipeline_mediator.errors import ConfigurationError, ResolutionError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from pipeline_mediator.container import Container, Scope

__all__ = ["ContainerConformance", "ContainerFeatures", "Service"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ContainerFeatures:
    """What a library can do beyond what every container has to."""

    transient: bool = True
    """Services can be registered to be made anew each time."""
    defaults: bool = True
    """A parameter that nothing provides keeps its default."""
    awaits_factories: bool = False
    """A service can be made by an async function."""
    shows_error: bool = False
    """What a scope ends sees the error that ended the message."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service to register; what it asks for stands in the annotations of whatever makes it."""

    cls: type[Any]
    lifetime: Literal["singleton", "scoped", "transient"]
    generator: Callable[..., AsyncGenerator[Any, Any]] | None = None
    """Makes and ends it, for libraries that end services this way; others call its `aclose()`."""
    coroutine: Callable[..., Coroutine[Any, Any, Any]] | None = None
    """Makes it, if given; only where the features say `awaits_factories`."""


class ContainerConformance:
    """The promises of `Container` and `Scope`, one test each; derive, and say how your container is made."""

    features: ClassVar[ContainerFeatures] = ContainerFeatures()
    pytestmark: ClassVar[Any] = pytest.mark.anyio

    def make_container(self, services: Sequence[Service], seeds: Sequence[type]) -> Container:
        """A new container with these services registered.

        `seeds` are the types that scopes will be opened with, for libraries that have to know before `prepare`.
        """
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def empty_journal(self) -> None:
        """Every test starts without a past."""
        _journal.clear()

    # -- what a scope resolves -----------------------------------------------------------------------------------------

    async def test_handler_gets_services_and_seeds(self) -> None:
        session = Session()
        scope = self._shop(PlaceOrder).open({Session: session})
        handler = await _get(scope, PlaceOrder)
        await _close(scope)
        assert isinstance(handler.repository, Repository)
        assert isinstance(handler.connection.pool, Pool)
        assert handler.session is session

    async def test_seeds_reach_nested_services(self) -> None:
        session = Session()
        scope = self._shop(PlaceOrder).open({Session: session})
        handler = await _get(scope, PlaceOrder)
        await _close(scope)
        assert handler.repository.session is session

    async def test_seeds_are_left_as_they_were(self) -> None:
        session = Session()
        seeds: dict[type, object] = {Session: session}
        scope = self._shop(PlaceOrder).open(seeds)
        await _get(scope, PlaceOrder)
        await _close(scope)
        assert seeds == {Session: session}

    async def test_scoped_services_are_shared_within_a_scope(self) -> None:
        scope = self._shop(PlaceOrder, CancelOrder, Repository).open({Session: Session()})
        place, cancel = await _get(scope, PlaceOrder), await _get(scope, CancelOrder)
        repository = await _get(scope, Repository)
        await _close(scope)
        assert place.repository is cancel.repository is repository
        assert place.connection is repository.connection
        assert _journal.count("made Connection") == 1

    async def test_scopes_share_singletons_and_nothing_else(self) -> None:
        container = self._shop(PlaceOrder)
        first, second = container.open({Session: Session()}), container.open({Session: Session()})
        one, other = await _get(first, PlaceOrder), await _get(second, PlaceOrder)
        await _close(second)
        await _close(first)
        assert one.repository is not other.repository
        assert one.connection is not other.connection
        assert one.session is not other.session
        assert one.connection.pool is other.connection.pool

    async def test_interleaved_scopes_do_not_mix(self) -> None:
        container = self._shop(PlaceOrder, CancelOrder)
        everyone_is_here = _Meeting(3)
        sessions = [Session() for _ in range(3)]
        found: dict[Session, tuple[PlaceOrder, CancelOrder]] = {}

        async def message(session: Session) -> None:
            scope = container.open({Session: session})
            place = await _get(scope, PlaceOrder)
            await everyone_is_here.wait()
            found[session] = place, await _get(scope, CancelOrder)
            await _close(scope)

        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(message, session)

        for session, (place, cancel) in found.items():
            assert place.session is cancel.repository.session is session
            assert place.repository is cancel.repository
        assert len({id(place.repository) for place, _ in found.values()}) == len(sessions)

    async def test_handlers_are_made_anew(self) -> None:
        scope = self._shop(PlaceOrder).open({Session: Session()})
        first, second = await _get(scope, PlaceOrder), await _get(scope, PlaceOrder)
        await _close(scope)
        assert first is not second

    async def test_transient_services_are_made_anew_for_each_handler(self) -> None:
        if not self.features.transient:
            pytest.skip("the library has no transient services")
        container = self._prepared([Service(Basket, "transient")], Shopping)
        scope = container.open({Session: Session()})
        first, second = await _get(scope, Shopping), await _get(scope, Shopping)
        await _close(scope)
        assert first.basket is not second.basket

    async def test_registered_handler_is_not_registered_again(self) -> None:
        lifetime: Literal["scoped", "transient"] = "transient" if self.features.transient else "scoped"
        container = self._prepared([*_SHOP, Service(PlaceOrder, lifetime)], PlaceOrder)
        scope = container.open({Session: Session()})
        assert isinstance(await _get(scope, PlaceOrder), PlaceOrder)
        await _close(scope)

    async def test_type_wanted_twice_is_prepared_once(self) -> None:
        container = self.make_container(_SHOP, [Session])
        container.prepare([PlaceOrder, Repository, PlaceOrder, Repository], [Session, Session])
        scope = container.open({Session: Session()})
        assert isinstance(await _get(scope, PlaceOrder), PlaceOrder)
        await _close(scope)

    async def test_second_mediator_may_prepare_the_same_types(self) -> None:
        container = self._shop(PlaceOrder)
        before = container.open({Session: Session()})
        pool = (await _get(before, PlaceOrder)).connection.pool
        container.prepare([PlaceOrder], [Session])
        after = container.open({Session: Session()})
        assert (await _get(after, PlaceOrder)).connection.pool is pool
        await _close(after)
        await _close(before)

    async def test_handler_function_may_ask_for_a_seed(self) -> None:
        session = Session()
        scope = self._prepared([], Session).open({Session: session})
        assert await _get(scope, Session) is session
        await _close(scope)

    async def test_parameter_that_nothing_provides_keeps_its_default(self) -> None:
        if not self.features.defaults:
            pytest.skip("the library wants every parameter registered")
        scope = self._prepared([Service(Pool, "singleton")], Polling).open({Session: Session()})
        handler = await _get(scope, Polling)
        await _close(scope)
        assert (handler.seconds, handler.times) == (0.5, 3)

    async def test_async_factory_is_awaited(self) -> None:
        if not self.features.awaits_factories:
            pytest.skip("the library makes nothing asynchronously")
        scope = self._shop(PlaceOrder, slow=True).open({Session: Session()})
        assert isinstance((await _get(scope, PlaceOrder)).connection, Connection)
        await _close(scope)

    async def test_concurrent_tasks_in_one_scope_share_what_is_still_being_made(self) -> None:
        scope = self._shop(PlaceOrder, CancelOrder, slow=self.features.awaits_factories).open({Session: Session()})
        found: list[Any] = []

        async def resolve(wanted: type) -> None:
            found.append(await _get(scope, wanted))

        async with anyio.create_task_group() as tasks:
            for wanted in (PlaceOrder, CancelOrder, PlaceOrder):
                tasks.start_soon(resolve, wanted)
        await _close(scope)
        assert len({id(handler.repository.connection) for handler in found}) == 1
        assert _journal.count("made Connection") == 1

    async def test_concurrent_scopes_share_a_singleton_that_is_still_being_made(self) -> None:
        services = [Service(Pool, "singleton", coroutine=make_pool if self.features.awaits_factories else None)]
        container = self._prepared(services, UsesPool)
        found: list[UsesPool] = []

        async def message() -> None:
            scope = container.open({Session: Session()})
            found.append(await _get(scope, UsesPool))
            await _close(scope)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(message)
        assert len({id(handler.pool) for handler in found}) == 1

    async def test_task_cancelled_while_it_waits_does_not_block_the_scope(self) -> None:
        if not self.features.awaits_factories:
            pytest.skip("the library makes nothing asynchronously, so nobody waits")
        scope = self._shop(PlaceOrder, slow=True).open({Session: Session()})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_get, scope, PlaceOrder)
            tasks.start_soon(_get, scope, PlaceOrder)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        assert isinstance(await _get(scope, PlaceOrder), PlaceOrder)
        await _close(scope)

    async def test_error_of_a_constructor_passes_untouched(self) -> None:
        scope = self._shop(Exploding).open({Session: Session()})
        with pytest.raises(LookupError, match="no such order"):
            await _get(scope, Exploding)
        await _close(scope)

    # -- the end of a scope --------------------------------------------------------------------------------------------

    async def test_scope_ends_what_it_made_in_reverse_order(self) -> None:
        scope = self._shop(PlaceOrder).open({Session: Session()})
        await _get(scope, PlaceOrder)
        assert not _ended()
        await _close(scope)
        assert _ended() == ["Repository", "Connection"]

    async def test_seeds_and_singletons_are_not_ended(self) -> None:
        container = self._shop(PlaceOrder)
        for _ in range(2):
            session = Session()
            scope = container.open({Session: session})
            handler = await _get(scope, PlaceOrder)
            await _close(scope)
            assert not session.ended
            assert not handler.connection.pool.ended

    async def test_scope_of_which_nothing_was_asked_can_be_closed(self) -> None:
        await _close(self._shop(PlaceOrder).open({Session: Session()}))
        assert not _ended()

    async def test_each_scope_ends_its_own(self) -> None:
        container = self._shop(PlaceOrder)
        first, second = container.open({Session: Session()}), container.open({Session: Session()})
        one, other = await _get(first, PlaceOrder), await _get(second, PlaceOrder)
        await _close(first)
        assert one.repository.ended
        assert not other.repository.ended
        await _close(second)
        assert other.repository.ended

    async def test_scope_is_ended_after_an_error_which_is_not_raised_again(self) -> None:
        scope = self._shop(PlaceOrder).open({Session: Session()})
        handler = await _get(scope, PlaceOrder)
        error = ValueError("out of stock")
        await _close(scope, error)
        assert _ended() == ["Repository", "Connection"]
        if self.features.shows_error:
            assert handler.repository.ended_by is error
            assert handler.connection.ended_by is error

    async def test_what_was_made_before_a_failure_is_ended(self) -> None:
        scope = self._shop(Exploding).open({Session: Session()})
        with pytest.raises(LookupError) as failure:
            await _get(scope, Exploding)
        await _close(scope, failure.value)
        assert _ended() == ["Repository", "Connection"]

    async def test_failing_end_is_raised_after_the_rest_was_ended(self) -> None:
        services = [*_SHOP, Service(Receipt, "scoped", generator=open_receipt)]
        scope = self._prepared(services, PrintReceipt).open({Session: Session()})
        await _get(scope, PrintReceipt)
        with pytest.raises((RuntimeError, ExceptionGroup)) as failure:
            await _close(scope)
        assert any(str(error) == "printer on fire" for error in _leaves(failure.value))
        assert _ended() == ["Receipt", "Repository", "Connection"]

    async def test_shielded_close_ends_everything_in_a_cancelled_task(self) -> None:
        scope = self._shop(PlaceOrder).open({Session: Session()})
        with anyio.CancelScope() as cancelled:
            await _get(scope, PlaceOrder)
            cancelled.cancel()
            try:
                await anyio.sleep_forever()
            except BaseException as error:
                with anyio.CancelScope(shield=True):
                    await _close(scope, error)
                raise
        assert _ended() == ["Repository", "Connection"]

    # -- what is found out at start ------------------------------------------------------------------------------------

    async def test_nothing_is_made_in_the_dry_run(self) -> None:
        container = self.make_container(_SHOP, [Session])
        _journal.clear()
        container.prepare([PlaceOrder, CancelOrder, Repository], [Session])
        assert _journal == []

    async def test_one_error_lists_all_that_is_missing(self) -> None:
        container = self.make_container([*_SHOP, Service(Letters, "scoped")], [Session])
        _journal.clear()
        with pytest.raises(ResolutionError) as failure:
            container.prepare([PlaceOrder, Notify, SendLetters, Printer], [Session])
        missing = "\n".join(failure.value.missing)
        for entry in (
            "Notify(mailer: Mailer)",
            "Notify(printer: Printer)",
            "Letters(mailer: Mailer)",
            "Printer: ",
        ):
            assert missing.count(entry) == 1, missing
        assert "PlaceOrder" not in missing
        assert _journal == []

    async def test_seed_that_the_library_provides_too_is_an_error(self) -> None:
        container = self.make_container([Service(Session, "scoped")], [])
        with pytest.raises(ConfigurationError, match="provides Session"):
            container.prepare([Audit], [Session])

    async def test_scope_without_an_announced_seed_says_so(self) -> None:
        container = self._shop(PlaceOrder, Audit, Session)
        for wanted in (PlaceOrder, Audit, Session):
            scope = container.open({})
            with pytest.raises(ResolutionError, match="Session: this message's scope was opened without one"):
                await _get(scope, wanted)
            await _close(scope)

    # -- how the tests are written -------------------------------------------------------------------------------------

    def _shop(self, *wanted: type, slow: bool = False) -> Container:
        services = list(_SHOP)
        if slow:
            services[1] = Service(Connection, "scoped", coroutine=make_connection)
        return self._prepared(services, *wanted)

    def _prepared(self, services: Sequence[Service], *wanted: type) -> Container:
        container = self.make_container(services, [Session])
        container.prepare(wanted, [Session])
        return container


async def _get(scope: Scope, wanted: type[T]) -> T:
    found = scope.get(wanted)
    if scope.is_async:
        with anyio.fail_after(10):  # a scope that waits for itself is a failure, not a hang
            found = await found
    made: T = found
    return made


async def _close(scope: Scope, error: BaseException | None = None) -> None:
    closing = scope.close(error)
    if closing is not None:
        await closing


def _leaves(error: BaseException) -> list[BaseException]:
    parts: Sequence[BaseException] = getattr(error, "exceptions", ())
    return [leaf for part in parts for leaf in _leaves(part)] or [error]


class _Meeting:
    """Lets everyone go on when all have arrived."""

    def __init__(self, expected: int) -> None:
        self._missing = expected
        self._complete = anyio.Event()

    async def wait(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._complete.set()
        await self._complete.wait()


# -- the shop that the containers put together -------------------------------------------------------------------------

_journal: list[str] = []


def _ended() -> list[str]:
    return [entry.removeprefix("ended ") for entry in _journal if entry.startswith("ended ")]


class Recorded:
    """Writes down when it is made and ended."""

    def __init__(self) -> None:
        self.ended = False
        self.ended_by: BaseException | None = None
        _journal.append(f"made {type(self).__name__}")

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.ended = True
        _journal.append(f"ended {type(self).__name__}")


class Session(Recorded):
    """What the unit of work yields."""


class Pool(Recorded):
    """Lives as long as the application."""


class Connection(Recorded):
    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool


class Repository(Recorded):
    def __init__(self, connection: Connection, session: Session) -> None:
        super().__init__()
        self.connection = connection
        self.session = session


class Receipt(Recorded):
    """Fails to end."""

    def __init__(self, repository: Repository) -> None:
        super().__init__()
        self.repository = repository

    async def aclose(self) -> None:
        await super().aclose()
        raise RuntimeError("printer on fire")


class Basket: ...


class Mailer(ABC):
    @abstractmethod
    def send(self) -> None: ...


class Printer(ABC):
    @abstractmethod
    def print(self) -> None: ...


class Letters:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


@asynccontextmanager
async def _life(made: Recorded) -> AsyncGenerator[None]:
    try:
        yield
    except BaseException as error:
        made.ended_by = error
        raise
    finally:
        await made.aclose()


# Some libraries raise in a generator what ended the message, others hand it over as the value of `yield`.


async def open_connection(pool: Pool) -> AsyncGenerator[Connection, BaseException | None]:
    connection = Connection(pool)
    async with _life(connection):
        connection.ended_by = yield connection


async def open_repository(connection: Connection, session: Session) -> AsyncGenerator[Repository, BaseException | None]:
    repository = Repository(connection, session)
    async with _life(repository):
        repository.ended_by = yield repository


async def open_receipt(repository: Repository) -> AsyncGenerator[Receipt, BaseException | None]:
    receipt = Receipt(repository)
    async with _life(receipt):
        receipt.ended_by = yield receipt


async def make_pool() -> Pool:
    await anyio.lowlevel.checkpoint()
    return Pool()


async def make_connection(pool: Pool) -> Connection:
    await anyio.lowlevel.checkpoint()
    return Connection(pool)


_SHOP = (
    Service(Pool, "singleton"),
    Service(Connection, "scoped", generator=open_connection),
    Service(Repository, "scoped", generator=open_repository),
)


class PlaceOrder:
    def __init__(self, repository: Repository, connection: Connection, session: Session) -> None:
        self.repository = repository
        self.connection = connection
        self.session = session

    async def handle(self, message: object) -> None: ...


class CancelOrder:
    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    async def handle(self, message: object) -> None: ...


class Audit:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, message: object) -> None: ...


class Shopping:
    def __init__(self, basket: Basket) -> None:
        self.basket = basket

    async def handle(self, message: object) -> None: ...


class UsesPool:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def handle(self, message: object) -> None: ...


class Polling:
    def __init__(self, pool: Pool, seconds: float = 0.5, *, times: int = 3) -> None:
        self.pool = pool
        self.seconds = seconds
        self.times = times

    async def handle(self, message: object) -> None: ...


class Exploding:
    def __init__(self, repository: Repository) -> None:
        raise LookupError("no such order")

    async def handle(self, message: object) -> None: ...


class PrintReceipt:
    def __init__(self, receipt: Receipt) -> None:
        self.receipt = receipt

    async def handle(self, message: object) -> None: ...


class Notify:
    def __init__(self, mailer: Mailer, printer: Printer) -> None:
        self.mailer = mailer
        self.printer = printer

    async def handle(self, message: object) -> None: ...


class SendLetters:
    def __init__(self, letters: Letters) -> None:
        self.letters = letters

    async def handle(self, message: object) -> None: ...
