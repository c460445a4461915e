"""What belongs to one attempt begins and ends with it."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline_mediator import unit as unit_module
from pipeline_mediator.context import Context
from pipeline_mediator.errors import EmitError, TransactionDoomedError, TransactionFinishedError
from pipeline_mediator.events import DomainEvent, EventMap
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.requests import Command, RequestMap
from pipeline_mediator.unit import ENDED, Unit, attempt, seed_types

if TYPE_CHECKING:
    from collections.abc import Generator


class Place(Command[int]):
    pass


class Placed(DomainEvent):
    pass


class Scope:
    """A scope that logs."""

    is_async = False

    def __init__(self, log: list[str], *, fails: bool = False, slow: bool = False) -> None:
        self.log = log
        self.fails = fails
        self.slow = slow

    def get(self, wanted: type) -> Any:
        return wanted()

    async def close(self, error: BaseException | None, /) -> None:
        self.log.append(f"closing after {type(error).__name__}")
        if self.slow:
            await anyio.sleep(0.01)
        await checkpoint()
        self.log.append("closed")
        if self.fails:
            raise RuntimeError("cannot close")


def unit_of(log: list[str] | None = None, **scope: bool) -> Unit:
    context = Context(Place())
    context.begun_unit = unit = Unit(context)
    unit.scope = None if log is None else Scope(log, **scope)
    return unit


def root_of(unit: Unit) -> Context:
    assert unit.root is not None
    return unit.root


async def test_it_ends_in_order() -> None:
    log: list[str] = []

    async def placed(event: Placed) -> None:
        log.append("event")

    context = Context(Place(), None, Mediator(event_map=EventMap().bind(Placed, placed)))
    unit = context.unit
    unit.scope = Scope(log)
    context.emit(Placed())
    context.after_commit(lambda: log.append("hook"))
    await unit.end()
    await unit.end()
    assert log == ["event", "closing after NoneType", "closed", "hook"]


async def test_abandoned_it_drops_everything_and_closes_its_scope_with_the_error() -> None:
    log: list[str] = []
    unit = unit_of(log)
    context = root_of(unit)
    context.emit(Placed())
    context.after_commit(lambda: log.append("hook"))
    await unit.abandon(ValueError("no"))
    await unit.abandon(ValueError("no"))
    await unit.end()
    assert log == ["closing after ValueError", "closed"]
    assert context.events == []


async def test_the_clean_up_of_a_scope_is_finished_whoever_is_cancelled() -> None:
    log: list[str] = []
    unit = unit_of(log, slow=True)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await unit.end()
        await checkpoint()
        log.append("went on")
    assert log == ["closing after NoneType", "closed"]


@pytest.mark.parametrize("how", ["end", "abandon"])
async def test_a_failing_clean_up_is_logged(how: str, caplog: pytest.LogCaptureFixture) -> None:
    unit = unit_of([], fails=True)
    notes: list[str] = []
    root_of(unit).on_note(lambda name, _facts: notes.append(name))
    await (unit.end() if how == "end" else unit.abandon(ValueError()))
    assert "scope clean-up failed for Place; its outcome stands" in caplog.text
    assert "cannot close" in caplog.text
    assert notes == ["scope clean-up failed"]


async def test_a_clean_up_that_fails_without_awaiting_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scope):
        def close(self, error: BaseException | None, /) -> Any:
            raise RuntimeError("cannot close")

    unit = unit_of()
    unit.scope = Broken([])
    await unit.end()
    assert "scope clean-up failed for Place; its outcome stands" in caplog.text


async def test_a_clean_up_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unit_module, "CLOSE_SECONDS", 0.01)

    class Hanging(Scope):
        async def close(self, error: BaseException | None, /) -> None:
            await anyio.sleep_forever()

    unit = unit_of()
    unit.scope = Hanging([])
    await unit.end()
    assert "not finished within 0.01 s" in caplog.text


async def test_after_its_end_it_takes_nothing() -> None:
    unit = unit_of()
    context = root_of(unit)
    await unit.end()
    with pytest.raises(TransactionFinishedError, match="Placed was emitted after the events of this attempt"):
        context.emit(Placed())
    with pytest.raises(TransactionFinishedError, match="the hook would never run"):
        context.after_commit(lambda: None)
    with pytest.raises(TransactionFinishedError, match="in an attempt that has already ended"):
        unit.open_scope()


async def test_its_queue_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "MAX_EVENTS", 3)
    context = root_of(unit_of())
    for _ in range(3):
        context.emit(Placed())
    with pytest.raises(EmitError, match="3 events already wait in this attempt"):
        context.emit(Placed())


async def test_a_doomed_one_walks_no_events() -> None:
    walked: list[str] = []

    async def placed(event: Placed) -> None:
        walked.append("placed")

    context = Context(Place(), None, Mediator(event_map=EventMap().bind(Placed, placed)))
    context.emit(Placed())
    context.unit.doom(Command, ValueError("no"))
    with pytest.raises(TransactionDoomedError, match="Place may not commit: Command"):
        await context.unit.end()
    assert walked == []


async def test_only_the_first_doom_is_told() -> None:
    unit = unit_of()
    unit.doom(Place, ValueError())
    unit.doom(Command, KeyError())
    with pytest.raises(TransactionDoomedError, match=r"Place, sent from its handler, failed inside .* ValueError"):
        await unit.end()


async def test_committed_is_seen_on_the_units_of_earlier_attempts_too() -> None:
    """A middleware outside of retry holds the first one."""
    first = unit_of()
    second = first.succeed(Context(Place()))
    third = second.succeed(Context(Place()))
    second.mark_committed()
    assert (first.committed, second.committed, third.committed) == (True, True, False)


def test_what_is_shared_by_all_that_ended_without_a_unit_is_never_committed() -> None:
    """Or no message would be tried again any more."""
    unit = ENDED.succeed(Context(Place()))
    unit.mark_committed()
    assert unit.committed
    assert not ENDED.committed


async def test_a_handler_without_transaction_or_dependencies_still_has_an_attempt_that_ends() -> None:
    log: list[str] = []

    async def place(command: Place, context: Context) -> int:
        context.emit(Placed())
        context.after_commit(lambda: log.append("hook"))
        return 1

    async def placed(event: Placed) -> None:
        log.append("event")

    mediator = Mediator(RequestMap().bind(Place, place), event_map=EventMap().bind(Placed, placed))
    assert await mediator.send(Place()) == 1
    assert log == ["event", "hook"]


@pytest.mark.parametrize("fails", [True, False])
async def test_the_link_of_an_attempt_ends_it(*, fails: bool) -> None:
    log: list[str] = []
    unit = unit_of(log)

    async def call_next(context: Context) -> str:
        context.after_commit(lambda: log.append("hook"))
        if fails:
            raise ValueError("no")
        return "result"

    if fails:
        with pytest.raises(ValueError, match="no"):
            await attempt(root_of(unit), call_next)
        assert log == ["closing after ValueError", "closed"]
    else:
        assert await attempt(root_of(unit), call_next) == "result"
        assert log == ["closing after NoneType", "closed", "hook"]


async def test_the_link_of_an_attempt_leaves_joined_messages_to_their_root() -> None:
    unit = unit_of()
    joined = Context(Place(), None, None, root_of(unit))

    async def call_next(context: Context) -> str:
        return "result"

    assert await attempt(joined, call_next) == "result"
    assert unit.open


@pytest.fixture
def no_collection() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("how", ["end", "abandon", "cancelled"])
@pytest.mark.usefixtures("no_collection")
async def test_ended_it_lets_go_of_its_message(how: str) -> None:
    context = Context(Place())
    gone = weakref.ref(context)
    context.emit(Placed())
    context.unit.events.clear()
    context.after_commit(checkpoint)
    context.unit.add_hook(checkpoint, context)
    with anyio.CancelScope() as scope:
        if how == "cancelled":
            scope.cancel()
        if how == "abandon":
            await context.unit.abandon(ValueError())
        else:
            await context.unit.end()
    del context
    assert gone() is None


class Base:
    pass


class Session(Base, dict[str, int]):
    pass


def test_what_a_unit_of_work_yields_is_seeded_under_its_class_and_the_bases_that_mean_something() -> None:
    assert seed_types(Session) == (Session, Base)
