"""The consumer handles what subscriptions hand over, and tells them what became of it; nothing is lost on the way."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import pytest
from tenacity import wait_fixed

from pipeline_mediator import Consumer
from pipeline_mediator.errors import BrokerRefusedError, BrokerUnavailableError, ConfigurationError, DestinationError
from pipeline_mediator.message_brokers.protocol import Ack, Dead, Delivery, Later, Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from pipeline_mediator.inbox.protocol import InboxStore

SOON = 5.0
AWAY = BrokerUnavailableError("the broker is away")


class Deliverer:
    """A mediator whose chain is one function."""

    inboxes: Sequence[InboxStore] = ()

    def __init__(self, handle: Callable[[Delivery], Awaitable[None]] | None = None) -> None:
        self._handle = handle
        self.begun: list[Delivery] = []
        self.handled: list[Delivery] = []
        self.cancelled: list[Delivery] = []
        self.skips_unknown = False

    async def deliver(self, delivery: Delivery, /, *, skip_unknown: bool = False) -> None:
        self.skips_unknown = skip_unknown
        self.begun.append(delivery)
        try:
            if self._handle is not None:
                await self._handle(delivery)
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(delivery)
            raise
        self.handled.append(delivery)
        if delivery.outcome is None:
            delivery.outcome = Ack()


class Script:
    """A subscription that hands over what it is told, and keeps what it was asked."""

    dead_letters = None

    def __init__(self, *deliveries: str, name: str = "warehouse") -> None:
        self.name = name
        self.waiting = deque(delivery_of(one) for one in deliveries)
        self.out: set[str | None] = set()
        self.settled: list[tuple[str | None, object]] = []
        self.settlements: list[int] = []
        self.limits: list[int] = []
        self.errors: list[Exception] = []
        """What `receive` raises first."""
        self.entering: list[Exception] = []
        self.answers: list[Exception | None] = []
        """What `settle` answers first, one for a call."""
        self.before_settling: Callable[[], Awaitable[None]] | None = None
        self.open = False
        self.entered = 0
        self._filled = anyio.Event()
        self._settling = False

    def put(self, *names: str) -> None:
        self.waiting.extend(delivery_of(one) for one in names)
        self._filled.set()

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        assert self.open
        assert limit > 0
        self.limits.append(limit)
        if self.errors:
            raise self.errors.pop(0)
        while not self.waiting:
            self._filled = anyio.Event()
            await self._filled.wait()
        taken = [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]
        self.out |= {one.message_id for one in taken}
        return taken

    async def settle(self, deliveries: Sequence[Delivery], /) -> Sequence[Exception | None]:
        assert self.open
        assert not self._settling, "two at a time"
        self._settling = True
        self.settlements.append(len(deliveries))
        try:
            await anyio.lowlevel.checkpoint()
            if self.before_settling is not None:
                await self.before_settling()
        finally:
            self._settling = False
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            for one in deliveries:
                self.out.discard(one.message_id)
                self.settled.append((one.message_id, one.outcome))
        return [answer] * len(deliveries)

    async def until(self, count: int) -> None:
        """So many were settled."""
        with anyio.fail_after(SOON):
            while len(self.settled) < count:  # noqa: ASYNC110 - what is waited for knows nothing of events
                await anyio.sleep(0.001)

    async def __aenter__(self) -> Self:
        self.entered += 1
        if self.entering:
            raise self.entering.pop(0)
        self.open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.open
        self.open = False


def delivery_of(name: str) -> Delivery:
    return Delivery("orders", b"{}", None, {}, name, None, 1, "warehouse")


@asynccontextmanager
async def consuming(mediator: Any, *subscriptions: Any, **settings: Any) -> AsyncGenerator[Consumer]:
    """A consumer that runs, and that has ended in time."""
    with anyio.fail_after(2 * SOON):
        async with Consumer(mediator, *subscriptions, pauses=wait_fixed(0.001), **settings) as consumer:
            yield consumer


async def eventually(condition: Callable[[], object]) -> None:
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await anyio.sleep(0.001)


# -- handling ----------------------------------------------------------------------------------------------------------


async def test_everything_is_handled_and_settled_once() -> None:
    names = [str(number) for number in range(500)]
    script, mediator = Script(*names), Deliverer()
    async with consuming(mediator, script):
        await script.until(500)
    assert [one.message_id for one in mediator.handled] == names
    assert script.settled == [(name, Ack()) for name in names]
    assert not script.open


async def test_no_more_are_handled_at_a_time_than_told() -> None:
    at_work = most = 0

    async def handle(_: Delivery) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await anyio.sleep(0.001)
        at_work -= 1

    script = Script(*map(str, range(60)))
    async with consuming(Deliverer(handle), script, concurrency=7):
        await script.until(60)
    assert most == 7


async def test_a_slow_handler_slows_the_broker_down() -> None:
    go = anyio.Event()

    async def handle(_: Delivery) -> None:
        await go.wait()

    script = Script(*map(str, range(1000)))
    async with consuming(Deliverer(handle), script, concurrency=4, read_ahead=6):
        await eventually(lambda: len(script.out) == 10)
        await anyio.sleep(0.02)
        assert len(script.out) == 10
        go.set()
        await script.until(1000)
    assert max(script.limits) == 10


async def test_outcomes_are_settled_many_at_a_time_and_by_one_task() -> None:
    """Service Bus confuses the answers to two settlements of one receiver at the same time."""
    script = Script(*map(str, range(300)))

    async def slow() -> None:
        await anyio.sleep(0.002)

    script.before_settling = slow
    async with consuming(Deliverer(), script, concurrency=50):
        await script.until(300)
    assert len(script.settlements) < 100


async def test_outcomes_are_those_that_were_decided() -> None:
    outcomes: dict[str, Outcome] = {"a": Ack(), "b": Later(3), "c": Dead("never")}

    async def handle(delivery: Delivery) -> None:
        delivery.outcome = outcomes[str(delivery.message_id)]
        if delivery.message_id != "a":
            raise BrokenPipeError

    script = Script(*outcomes)
    async with consuming(Deliverer(handle), script):
        await script.until(3)
    assert dict(script.settled) == outcomes


async def test_one_message_that_fails_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(delivery: Delivery) -> None:
        if delivery.message_id == "bad":
            raise BrokenPipeError("secret")

    script = Script("bad", *map(str, range(20)))
    async with consuming(Deliverer(handle), script, concurrency=1):
        await script.until(21)
    assert isinstance(dict(script.settled)["bad"], Later)
    (told,) = [text for text in caplog.messages if "nothing in the pipeline decides" in text]
    assert "DeadLetterMiddleware" in told
    assert "secret" not in told


async def test_unknown_types_can_be_passed_over() -> None:
    script, mediator = Script("a"), Deliverer()
    async with consuming(mediator, script, unknown="skip"):
        await script.until(1)
    assert mediator.skips_unknown


async def test_subscriptions_share_the_workers() -> None:
    here, there = Script(*map(str, range(30))), Script(*map(str, range(30)), name="mail")
    async with consuming(Deliverer(), here, there, concurrency=2):
        await here.until(30)
        await there.until(30)


async def test_messages_belong_to_nobody_who_started_the_consumer() -> None:
    """A consumer that is started in a request would otherwise put all its messages into that request's trace."""
    from contextvars import ContextVar

    variable = ContextVar("variable", default="nobody")
    seen: list[str] = []

    async def handle(_: Delivery) -> None:
        seen.append(variable.get())

    variable.set("a request")
    script = Script("a")
    async with consuming(Deliverer(handle), script):
        await script.until(1)
    assert seen == ["nobody"]


class Inbox:
    """Counts how often it is told to forget; fails the first time."""

    retention = timedelta(days=1)

    def __init__(self) -> None:
        self.cleaned = 0

    async def record(self, *_: object) -> bool:
        raise NotImplementedError

    async def validate_schema(self) -> None:
        raise NotImplementedError

    async def clean(self, limit: int, /) -> int:
        self.cleaned += 1
        if self.cleaned == 1:
            raise BrokenPipeError
        return limit


async def test_inboxes_are_cleaned_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody forgets fills the disk."""
    mediator, inbox = Deliverer(), Inbox()
    mediator.inboxes = (inbox,)
    async with consuming(mediator, Script(), clean_every=0.001):
        await eventually(lambda: inbox.cleaned >= 3)
    assert "consumer: an inbox cannot be cleaned (BrokenPipeError)" in caplog.messages


# -- stopping ----------------------------------------------------------------------------------------------------------


async def test_a_stop_lets_handlers_finish_and_gives_back_the_rest() -> None:
    go = anyio.Event()

    async def handle(_: Delivery) -> None:
        await go.wait()

    script, mediator = Script("a", "b", "c", "d"), Deliverer(handle)
    async with consuming(mediator, script, concurrency=2) as consumer:
        await eventually(lambda: len(script.out) == 4 and len(mediator.begun) == 2)
        consumer.stop()
        await script.until(2)
        assert script.settled == [("c", None), ("d", None)]
        assert mediator.cancelled == []
        go.set()
    assert sorted(map(str, script.settled[2:])) == [f"('{one}', {Ack()})" for one in "ab"]
    assert script.out == set()


async def test_what_is_not_done_in_time_is_cancelled_and_given_back(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(_: Delivery) -> None:
        await anyio.sleep_forever()

    script, mediator = Script("a", "b"), Deliverer(handle)
    async with consuming(mediator, script, concurrency=2, grace=0.01) as consumer:
        await eventually(lambda: len(mediator.begun) == 2)
        consumer.stop()
    assert {one.message_id for one in mediator.cancelled} == {"a", "b"}
    assert sorted(map(str, script.settled)) == ["('a', None)", "('b', None)"]
    assert "consumer: 2 messages were not done in time and are given back" in caplog.messages


async def test_a_second_stop_is_more_impatient() -> None:
    async def handle(_: Delivery) -> None:
        await anyio.sleep_forever()

    script, mediator = Script("a"), Deliverer(handle)
    async with consuming(mediator, script) as consumer:
        await eventually(lambda: mediator.begun)
        consumer.stop()
        await anyio.sleep(0.01)
        assert script.settled == []
        consumer.stop(grace=0)
        await script.until(1)
    assert script.settled == [("a", None)]


async def test_what_was_decided_while_it_was_cancelled_stands() -> None:
    """A commit is not undone by a cancellation that comes during it."""

    async def handle(delivery: Delivery) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            delivery.outcome = Ack()

    script, mediator = Script("a"), Deliverer(handle)
    async with consuming(mediator, script, grace=0) as consumer:
        await eventually(lambda: mediator.begun)
        consumer.stop()
    assert script.settled == [("a", Ack())]


async def test_a_cancellation_gives_everything_back() -> None:
    async def handle(_: Delivery) -> None:
        await anyio.sleep_forever()

    script = Script("a", "b", "c")
    consumer = Consumer(Deliverer(handle), script, concurrency=1)
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consumer.run)
            await eventually(lambda: len(script.out) == 2)
            tasks.cancel_scope.cancel()
    assert sorted(map(str, script.settled)) == ["('a', None)", "('b', None)"]
    assert not script.open


async def test_stopped_before_it_runs_it_ends_at_once() -> None:
    script = Script("a")
    consumer = Consumer(Deliverer(), script)
    consumer.stop()
    with anyio.fail_after(SOON):
        await consumer.run()
    assert len(script.waiting) == 1


async def test_it_runs_again_after_it_was_stopped() -> None:
    script = Script("a")
    consumer = Consumer(Deliverer(), script)
    for name in ("b", "c"):
        async with consumer:
            await eventually(lambda: len(script.settled) == len(script.settlements) and not script.waiting)
        script.put(name)
    assert script.entered == 2


async def test_it_runs_once_at_a_time() -> None:
    async with consuming(Deliverer(), Script()) as consumer:
        with pytest.raises(ConfigurationError, match="this consumer already runs"):
            await consumer.run()


# -- what was handed over is lost --------------------------------------------------------------------------------------


async def test_a_message_that_is_lost_is_handled_no_further() -> None:
    """Another consumer has it by now: two handlers of one message at the same time help nobody."""

    async def handle(delivery: Delivery) -> None:
        if delivery.message_id == "lost":
            await anyio.sleep_forever()

    script, mediator = Script("lost"), Deliverer(handle)
    seen: list[Delivery] = []
    receive = script.receive

    async def remember(limit: int, /) -> Sequence[Delivery]:
        taken = await receive(limit)
        seen.extend(taken)
        return taken

    script.receive = remember  # type: ignore[method-assign]
    async with consuming(mediator, script, concurrency=1):
        await eventually(lambda: seen and seen[0].on_lost is not None)
        seen[0].lose()
        script.put("next", "last")
        await script.until(2)
    assert [one.message_id for one in mediator.cancelled] == ["lost"]
    assert [name for name, _ in script.settled] == ["next", "last"]


async def test_a_message_that_was_lost_before_its_turn_is_not_handled() -> None:
    go = anyio.Event()

    async def handle(delivery: Delivery) -> None:
        if delivery.message_id == "slow":
            await go.wait()

    script, mediator = Script("slow"), Deliverer(handle)
    lost = delivery_of("lost")
    script.waiting.append(lost)
    async with consuming(mediator, script, concurrency=1):
        await eventually(lambda: len(script.out) == 2)
        lost.lose()
        go.set()
        script.put("next")
        await script.until(2)
    assert [name for name, _ in script.settled] == ["slow", "next"]
    assert lost not in mediator.handled


async def test_losing_what_is_done_cancels_nobody() -> None:
    script, mediator = Script("a"), Deliverer()
    async with consuming(mediator, script, concurrency=1):
        await script.until(1)
        mediator.handled[0].lose()
        script.put("b")
        await script.until(2)
    assert mediator.cancelled == []


# -- brokers that are away ---------------------------------------------------------------------------------------------


async def test_a_broker_that_is_away_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = Script("a")
    script.entering = [AWAY, AWAY]
    script.errors = [AWAY, AWAY, AWAY]
    async with consuming(Deliverer(), script):
        await script.until(1)
    assert script.entered == 3
    told = [record.getMessage() for record in caplog.records if record.name == "pipeline_mediator.trouble"]
    assert len([text for text in told if "receives nothing" in text]) == 5
    assert len([text for text in told if "receives again" in text]) == 2


async def test_a_stop_does_not_wait_for_a_broker_that_is_away() -> None:
    script = Script()
    script.entering = [AWAY] * 100_000
    consumer = Consumer(Deliverer(), script, pauses=wait_fixed(1000))
    with anyio.fail_after(SOON):
        async with consumer:
            await eventually(lambda: script.entered)


async def test_an_error_that_nobody_foresaw_stops_no_consumer() -> None:
    script = Script("a")
    script.errors = [ValueError("the client has a fault")]
    async with consuming(Deliverer(), script):
        await script.until(1)


@pytest.mark.parametrize("error", [DestinationError("no such queue"), BrokerRefusedError("no rights")])
async def test_what_no_waiting_mends_ends_the_consumer_and_is_raised(error: Exception) -> None:
    wrong, right = Script(name="wrong"), Script("a")
    wrong.entering = [error]
    with anyio.fail_after(SOON), pytest.raises(type(error)):
        await Consumer(Deliverer(), right, wrong).run()
    assert not right.open
    assert right.out == set()


async def test_one_that_ends_the_consumer_gives_the_others_their_time_and_no_more() -> None:
    async def handle(_: Delivery) -> None:
        await anyio.sleep_forever()

    class Wrong(Script):
        async def __aenter__(self) -> Self:
            await eventually(lambda: mediator.begun)
            raise DestinationError("no such queue")

    right, mediator = Script("a"), Deliverer(handle)
    with anyio.fail_after(SOON), pytest.raises(DestinationError):
        await Consumer(mediator, right, Wrong(name="wrong"), grace=0.01).run()
    assert right.settled == [("a", None)]


async def test_what_could_not_be_settled_is_settled_when_the_broker_is_back(caplog: pytest.LogCaptureFixture) -> None:
    script = Script("a", "b")
    script.answers = [AWAY, AWAY]
    async with consuming(Deliverer(), script, concurrency=1):
        await script.until(2)
    assert sorted(map(str, script.settled)) == [f"('{one}', {Ack()})" for one in "ab"]
    assert any("tells the broker again" in text for text in caplog.messages)


async def test_meanwhile_nothing_more_is_fetched_than_fits() -> None:
    script = Script(*map(str, range(100)))
    script.answers = [AWAY] * 1_000_000
    consumer = Consumer(Deliverer(), script, concurrency=5, pauses=wait_fixed(0.001))
    with anyio.fail_after(SOON):
        async with consumer:
            await eventually(lambda: len(script.settlements) > 10)
            assert len(script.out) == 10
            script.answers.clear()
            await script.until(100)


async def test_what_the_broker_does_not_let_settle_is_said_and_left(caplog: pytest.LogCaptureFixture) -> None:
    script = Script("a")
    script.answers = [BrokerRefusedError("the lock is gone")]
    async with consuming(Deliverer(), script, concurrency=1):
        await eventually(lambda: script.settlements)
        script.put("b")
        await script.until(1)
    assert any(
        "could not be settled (BrokerRefusedError: the lock is gone); it comes again" in it for it in caplog.messages
    )


async def test_a_subscription_that_raises_where_it_should_answer_loses_nothing() -> None:
    script = Script("a", "b")

    async def fail() -> None:
        script.before_settling = None
        raise BrokerUnavailableError("in the middle")

    script.before_settling = fail
    async with consuming(Deliverer(), script, concurrency=1):
        await script.until(2)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"read_ahead": -1}, "read_ahead=-1"),
        ({"grace": -1}, "grace=-1"),
        ({"clean_every": 0}, "clean_every=0"),
        ({"unknown": "drop"}, "unknown='drop'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Consumer(Deliverer(), Script(), **settings)


def test_it_needs_subscriptions_that_can_be_told_apart() -> None:
    with pytest.raises(ConfigurationError, match="needs a subscription"):
        Consumer(Deliverer())
    with pytest.raises(ConfigurationError, match="called 'warehouse'"):
        Consumer(Deliverer(), Script(), Script())
