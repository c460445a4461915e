"""A relay publishes what the outbox keeps, wakes when there is something, and ends without losing what it knows."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import AsyncExitStack
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tenacity import wait_fixed

from pipeline_mediator import Mediator
from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError, LeaseLostError
from pipeline_mediator.middlewares import PublishMiddleware, TracingMiddleware
from pipeline_mediator.outbox import OutboxRelay
from pipeline_mediator.outbox.protocol import LANES, StoredMessage
from pipeline_mediator.testing.clocks import host_clock_off_by
from tests.outbox.memory_store import MemoryStore
from tests.outbox.relay_fakes import DESTINATIONS, LONG, Broker, Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline_mediator.message_brokers.protocol import Outgoing


def once(name: str) -> Callable[[Outgoing], Exception | None]:
    """Refuses the message with this id the first time."""
    errors = iter([ValueError("once")])
    return lambda outgoing: next(errors, None) if outgoing.message_id == name else None


CALLER: ContextVar[str] = ContextVar("caller", default="nobody")


# -- three ways --------------------------------------------------------------------------------------------------------


async def test_beside_the_application() -> None:
    shop = Shop()
    async with shop.mediator, shop.relay():
        await shop.put("a", "b", to="orders")
        await shop.put("c", to="payments")
        await shop.broker.has(3)
    assert sorted(shop.broker.ids) == ["a", "b", "c"]
    assert shop.store.rows == {}


async def test_until_it_is_stopped() -> None:
    shop = Shop()
    relay = shop.relay()
    await shop.put("a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        await shop.broker.has(1)
        relay.stop()
        relay.stop()
    assert shop.store.rows == {}


async def test_until_it_is_cancelled() -> None:
    shop = Shop()
    await shop.put("a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shop.relay().run)
        await shop.broker.has(1)
        tasks.cancel_scope.cancel()
    assert shop.store.rows == {}
    assert shop.store.wakers == shop.store.listeners == 0


async def test_drained() -> None:
    shop = Shop()
    for number in range(20):
        await shop.put(f"orders {number}", to="orders")
        await shop.put(f"payments {number}", to="payments")
    assert await shop.relay(batch=7).drain() == 40
    assert await shop.relay().drain() == 0
    assert len(shop.broker.ids) == 40


async def test_drain_does_not_wait_for_what_backs_off() -> None:
    shop = Shop()
    await shop.put("a", "b")
    shop.broker.refuse = lambda outgoing: None if outgoing.message_id == "a" else ValueError("no")
    assert await shop.relay(backoff=wait_fixed(LONG)).drain() == 1
    assert shop.store.rows[2].failures == 1


async def test_drain_raises_what_the_store_raises() -> None:
    shop = Shop()
    shop.store.broken = ConnectionRefusedError("no database")
    with pytest.raises(ConnectionRefusedError, match="no database"):
        await shop.relay().drain()


async def test_drain_works_beside_the_running_relay() -> None:
    shop = Shop()
    relay = shop.relay(poll=LONG)
    async with relay:
        await shop.put(*(str(number) for number in range(100)))
        await relay.drain()
        await shop.broker.has(100)
    assert len(set(shop.broker.ids)) == len(shop.broker.ids) == 100


async def test_drain_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pipeline_mediator.outbox.loop._PROGRESS", 0.0)
    caplog.set_level(logging.INFO)
    shop = Shop(store=MemoryStore(lanes_at_a_time=LANES))
    await shop.put("a", "b", "c")
    await shop.relay(batch=2).drain()
    assert caplog.messages == ["outbox: 2 messages published so far", "outbox: 3 messages published so far"]


async def test_drain_may_be_stopped() -> None:
    shop = Shop(store=MemoryStore(lanes_at_a_time=LANES))
    hang = shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("a", "b")
    relay = shop.relay(batch=1)
    counts: list[int] = []

    async def drain() -> None:
        counts.append(await relay.drain())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain)
        await shop.until(lambda: shop.broker.calls)
        relay.stop()
        hang.set()
    assert counts == [1]
    assert await relay.drain() == 1


async def test_drain_tells_of_a_cancellation_that_a_client_lets_escape() -> None:
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        pytest.skip("trio does not let anybody raise one")

    class Leaking(MemoryStore):
        async def _reach(self) -> None:
            raise anyio.get_cancelled_exc_class()

    with pytest.raises(RuntimeError, match="let the cancellation of something else escape"):
        await Shop(store=Leaking()).relay().drain()


async def test_it_serves_the_outbox_of_the_pipeline() -> None:
    shop = Shop()

    class Outbox:
        role = "outbox"
        store = shop.store

        def for_route(self, route: object) -> None: ...

        async def __call__(self, context: Any, call_next: Any) -> Any:
            return await call_next(context)

    mediator = Mediator(middlewares=[Outbox(), PublishMiddleware(shop.broker, DESTINATIONS)])
    await shop.put("a")
    relay = OutboxRelay(mediator)
    assert (await relay.health()).pending == 1
    assert await relay.drain() == 1


def test_without_an_outbox_there_is_nothing_to_relay() -> None:
    with pytest.raises(ConfigurationError, match="no OutboxMiddleware stands in the mediator's pipeline"):
        OutboxRelay(Mediator())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch": 0}, "batch=0, and has to be at least 1"),
        ({"poll": 0}, "poll=0"),
        ({"attempts": 0}, "attempts=0"),
        ({"lease": 0}, "lease=0"),
        ({"clean_every": 0}, "clean_every=0"),
        ({"stop_within": -1, "poll": -1}, "poll=-1, and has to be above 0; stop_within=-1, and has to be at least 0"),
        ({"on_dead": "bury"}, "on_dead='bury', and has to be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        OutboxRelay(Mediator(), MemoryStore(), **settings)


# -- beginning and ending ----------------------------------------------------------------------------------------------


async def test_it_may_be_entered_by_one_task_and_left_by_another() -> None:
    """As test fixtures and some frameworks do; on trio, tasks belong to the one that began them."""
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        pytest.skip("trio's nurseries are left where they were entered")
    shop = Shop()
    stack = AsyncExitStack()

    async def enter() -> None:
        await stack.enter_async_context(shop.mediator)
        await stack.enter_async_context(shop.relay())

    async def leave() -> None:
        await stack.aclose()

    for step in (enter, leave):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(step)
        if step is enter:
            await shop.put("a")
            await shop.broker.has(1)
    assert shop.store.wakers == 0


async def test_its_block_may_fail() -> None:
    shop = Shop()

    async def fail() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(shop.mediator)
            await stack.enter_async_context(shop.relay())
            await shop.put("a")
            await shop.broker.has(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert shop.store.wakers == 0
    assert shop.store.rows == {}


async def test_its_block_may_be_cancelled() -> None:
    shop = Shop()
    with anyio.CancelScope() as scope:
        async with shop.mediator, shop.relay():
            await shop.put("a")
            await shop.broker.has(1)
            scope.cancel()
            await anyio.sleep(LONG)
    assert shop.store.wakers == 0
    assert shop.store.rows == {}


async def test_it_runs_once_at_a_time() -> None:
    shop = Shop()
    relay = shop.relay()
    async with relay:
        await shop.until(lambda: shop.store.wakers)
        with pytest.raises(ConfigurationError, match="already runs"):
            await relay.run()
        with pytest.raises(ConfigurationError, match="already runs"):
            await relay.__aenter__()
    await shop.put("a")
    async with relay:
        await shop.broker.has(1)


async def test_an_end_that_nobody_asked_for_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        pytest.skip("trio's tasks cannot be cancelled by whoever finds them")
    shop = Shop()
    before = asyncio.all_tasks()
    async with shop.relay(name="shop"):
        await shop.until(lambda: shop.store.wakers)
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await shop.until(lambda: "shop: the relay was cancelled; nothing is published any more" in caplog.messages)
    assert shop.store.wakers == 0


async def test_a_store_that_is_none_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(MemoryStore):
        def on_commit(self, wake: Callable[[], None], /) -> Callable[[], None]:
            raise TypeError("this is no store")

    async with Shop(store=Wrong()).relay(name="shop"):
        await anyio.sleep(0.01)
    assert "shop: the relay has ended; nothing is published any more" in caplog.messages
    with pytest.raises(TypeError, match="this is no store"):
        await Shop(store=Wrong()).relay().run()


async def test_a_stop_that_comes_first_ends_the_run_at_once() -> None:
    shop = Shop()
    await shop.put("a")
    relay = shop.relay()
    relay.stop()
    await relay.run()
    relay.stop()
    assert await relay.drain() == 0
    assert shop.broker.ids == []
    async with relay:
        await shop.broker.has(1)


async def test_a_stop_lets_the_batch_at_hand_finish() -> None:
    shop = Shop()
    hang = shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("a")
    relay = shop.relay(stop_within=LONG)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        await shop.until(lambda: shop.broker.calls)
        relay.stop()
        await shop.put("b")
        hang.set()
    assert shop.broker.ids == ["a"]
    assert [row.message.message_id for row in shop.store.rows.values()] == ["b"]


async def test_what_was_taken_when_it_was_stopped_is_given_back() -> None:
    may_take = anyio.Event()

    class Slow(MemoryStore):
        async def _reach(self) -> None:
            if self.takes:
                await may_take.wait()

    shop = Shop(store=Slow())
    await shop.put("a")
    relay = shop.relay()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        await shop.until(lambda: shop.store.takes)
        relay.stop()
        may_take.set()
    assert shop.broker.calls == []
    assert shop.store.state_of(1) == "pending"


async def test_a_stop_gives_back_what_takes_too_long_and_writes_what_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = Shop()
    shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("a", to="orders")
    await shop.put("b", to="payments")
    relay = shop.relay(stop_within=0.02)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        await shop.broker.has(1)
        relay.stop()
    assert [(row.message.message_id, row.failures) for row in shop.store.rows.values()] == [("a", 0)]
    assert shop.broker.ids == ["b"]
    assert caplog.messages == [], "nobody is to blame"


async def test_a_cancelled_run_writes_what_is_known() -> None:
    shop = Shop()
    shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("a", to="orders")
    await shop.put("b", to="payments")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shop.relay().run)
        await shop.broker.has(1)
        tasks.cancel_scope.cancel()
    assert [(row.message.message_id, row.failures) for row in shop.store.rows.values()] == [("a", 0)]


async def test_a_cancelled_run_knows_every_walk_that_ended() -> None:
    """A batch is published in pieces, so that little of it is unknown at any time."""
    hang = anyio.Event()

    class Second(Broker):
        async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
            if self.calls:
                self.hangs["orders"] = hang
            return await super().publish(batch)

    shop = Shop(Second(), MemoryStore(lanes_at_a_time=LANES))
    await shop.put(*(str(number) for number in range(300)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shop.relay().run)
        await shop.until(lambda: len(shop.broker.calls) >= 2)
        tasks.cancel_scope.cancel()
    assert len(shop.store.rows) == 50
    assert len(shop.broker.ids) == 250


async def test_a_stop_waits_no_longer_for_a_database_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_mediator.outbox.loop._WRITING", 0.02)
    shop = Shop()
    shop.store.hangs_on_leaving = anyio.Event()
    await shop.put("a")
    relay = shop.relay(stop_within=0.0)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            await shop.broker.has(1)
            relay.stop()
    assert shop.store.state_of(1) == "pending"


async def test_not_even_if_it_was_told_while_it_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_mediator.outbox.loop._WRITING", 0.02)
    shop = Shop()
    hang = shop.broker.hangs["orders"] = anyio.Event()
    shop.store.hangs_on_leaving = anyio.Event()
    await shop.put("a")
    relay = shop.relay(stop_within=0.0)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            await shop.until(lambda: shop.broker.calls)
            relay.stop()
            hang.set()


async def test_an_outcome_is_written_whoever_cancels_meanwhile() -> None:
    shop = Shop()
    leaving = shop.store.hangs_on_leaving = anyio.Event()
    await shop.put("a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shop.relay().run)
        await shop.broker.has(1)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.02)
            leaving.set()
    assert shop.store.rows == {}


# -- waking ------------------------------------------------------------------------------------------------------------


async def test_a_commit_wakes_it() -> None:
    shop = Shop()
    async with shop.relay(poll=LONG):
        await shop.until(lambda: shop.store.takes)
        await shop.put("a")
        await shop.broker.has(1)


async def test_a_commit_in_another_thread_wakes_it() -> None:
    shop = Shop()
    async with shop.relay(poll=LONG):
        await shop.put("a")
        await shop.broker.has(1)
        await shop.until(lambda: shop.store.takes > 1)
        await shop.store.add(None, [StoredMessage("b", "orders.placed", 1, "orders", "application/json", b"{}")])
        thread = threading.Thread(target=shop.store.committed)
        thread.start()
        await shop.broker.has(2)
        thread.join()


async def test_it_looks_by_itself_too() -> None:
    shop = Shop()
    async with shop.relay(poll=0.01):
        await shop.until(lambda: shop.store.takes)
        await shop.store.add(None, [StoredMessage("a", "orders.placed", 1, "orders", "application/json", b"{}")])
        await shop.broker.has(1)


async def test_it_wakes_when_the_first_row_is_due_again() -> None:
    shop = Shop(store=MemoryStore(lanes_at_a_time=LANES))
    shop.broker.refuse = once("a")
    async with shop.relay(poll=LONG, backoff=wait_fixed(0.02)):
        await shop.until(lambda: shop.store.takes > 1)
        await shop.put("a", "b")
        await shop.broker.has(2)
    assert shop.broker.ids == ["b", "a"]


async def test_it_wakes_when_a_row_is_due_that_another_relay_put_off() -> None:
    shop = Shop()
    await shop.put("a")
    shop.store.rows[1].failures = 1
    shop.store.rows[1].available_at += 0.05
    async with shop.relay(poll=LONG):
        await shop.broker.has(1)


async def test_it_goes_on_while_there_is_something() -> None:
    """More than one batch, of more lanes than a batch has."""
    shop = Shop(store=MemoryStore(lanes_at_a_time=1))
    await shop.put(*(str(number) for number in range(40)))
    async with shop.relay(poll=LONG, batch=2):
        await shop.broker.has(40)
    assert max(len(call) for call in shop.broker.calls) <= 2


async def test_it_rests_while_another_relay_has_the_lanes() -> None:
    shop = Shop()
    other = Shop(store=shop.store)
    hang = other.broker.hangs["orders"] = anyio.Event()
    await shop.put("a", key="k")
    async with other.relay(poll=LONG):
        await shop.until(lambda: other.broker.calls)
        async with shop.relay(poll=LONG):
            await shop.put("b", key="k")
            await anyio.sleep(0.05)
            before = shop.store.takes
            await anyio.sleep(0.05)
            assert shop.store.takes == before
        hang.set()
        await other.broker.has(2)
    assert shop.broker.ids == []


async def test_commits_that_lead_to_nothing_do_not_keep_it_busy() -> None:
    shop = Shop()
    async with shop.relay(poll=LONG):
        await shop.until(lambda: shop.store.takes)
        for _ in range(100):
            shop.store.committed()
            await anyio.sleep(0.001)
        assert shop.store.takes < 50


async def test_a_commit_after_its_end_disturbs_nobody() -> None:
    shop = Shop()
    async with shop.relay():
        await shop.until(lambda: shop.store.wakers)
        (waker,) = shop.store._wakers.values()  # pyright: ignore[reportPrivateUsage]
    waker()
    thread = threading.Thread(target=waker)
    thread.start()
    thread.join()


# -- what is published -------------------------------------------------------------------------------------------------


async def test_a_key_is_published_in_order() -> None:
    shop = Shop()
    for number in range(10):
        await shop.put(f"k{number}", key="k")
        await shop.put(f"l{number}", key="l")
    await shop.relay(batch=3).drain()
    for key in "kl":
        assert [name for name in shop.broker.ids if name[0] == key] == [f"{key}{number}" for number in range(10)]


async def test_a_key_is_published_in_order_across_destinations() -> None:
    shop = Shop()
    for name, to in (("1", "orders"), ("2", "payments"), ("3", "orders"), ("4", "orders"), ("5", "payments")):
        await shop.put(name, to=to, key="k")
    await shop.put("other", to="payments", key="l")
    assert await shop.relay().drain() == 6
    assert [name for name in shop.broker.ids if name != "other"] == ["1", "2", "3", "4", "5"]
    assert len(shop.store.left_out) == 2, "in one batch"


async def test_a_row_that_was_not_taken_keeps_back_those_of_its_key_that_go_elsewhere() -> None:
    shop = Shop()
    shop.broker.refuse = lambda outgoing: ValueError("no") if outgoing.message_id == "1" else None
    await shop.put("0", to="orders")
    await shop.put("1", to="orders", key="k")
    await shop.put("2", to="payments", key="k")
    await shop.put("3", to="payments", key="l")
    await shop.relay(backoff=wait_fixed(LONG)).drain()
    assert sorted(shop.broker.ids) == ["0", "3"]


async def test_it_belongs_to_nobodys_trace_and_to_no_context() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    callers: list[str] = []

    class Curious(Broker):
        async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
            callers.append(CALLER.get())
            return await super().publish(batch)

    shop = Shop(Curious())
    mediator = Mediator(middlewares=[TracingMiddleware(provider), PublishMiddleware(shop.broker, DESTINATIONS)])
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stored = StoredMessage("a", "orders.placed", 1, "orders", "application/json", b"{}", {"traceparent": traceparent})
    await shop.store.add(None, [stored])
    token = CALLER.set("a request")
    with provider.get_tracer("test").start_as_current_span("a request"):
        await OutboxRelay(mediator, shop.store).drain()
        await shop.store.add(None, [stored])
        async with OutboxRelay(mediator, shop.store):
            await shop.broker.has(2)
        await shop.store.add(None, [stored])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(OutboxRelay(mediator, shop.store).run)
            await shop.broker.has(3)
            tasks.cancel_scope.cancel()
    CALLER.reset(token)
    assert callers == ["nobody"] * 3
    relayed = [span for span in exporter.get_finished_spans() if span.name == "send orders"]
    assert len(relayed) == 3
    for span in relayed:
        assert span.parent is None
        assert [f"{link.context.span_id:x}" for link in span.links] == ["b7ad6b7169203331"]


async def test_a_clock_that_is_ten_minutes_off_changes_nothing() -> None:
    for minutes in (-10, 10):
        shop = Shop()
        shop.broker.refuse = once("a")
        relay = shop.relay(poll=LONG, backoff=wait_fixed(0.01))
        with host_clock_off_by(timedelta(minutes=minutes), of=relay):
            async with relay:
                await shop.put("a", "b")
                await shop.broker.has(2)
                await shop.put("c")
                await shop.broker.has(3)


# -- the store fails ---------------------------------------------------------------------------------------------------


async def test_it_goes_on_when_the_database_is_back(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.store.broken = ConnectionRefusedError("secret")
    await shop.store.add(None, [StoredMessage("a", "orders.placed", 1, "orders", "application/json", b"{}")])
    async with shop.relay(name="shop", pauses=wait_fixed(0.05)):
        await shop.until(lambda: len(caplog.messages) == 3)
        shop.store.broken = None
        await shop.broker.has(1)
    lines = [record for record in caplog.records if record.name == "pipeline_mediator.trouble"]
    texts = [record.getMessage() for record in lines]
    assert [text.partition(" (")[0].partition(", ")[0] for text in texts] == [
        *["shop: relaying fails"] * 3,
        "shop: relaying works again",
    ]
    assert "(ConnectionRefusedError); next try in 0.1 s" in texts[0]
    assert "for 0 s now" in texts[1]
    assert "secret" not in "".join(texts)
    assert [record.exc_info is not None for record in lines] == [True, False, False, False]


async def test_a_lost_lease_is_told_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.store.loses_lease = True
    await shop.put("a")
    async with shop.relay():
        await shop.until(lambda: not shop.store.rows)
    assert shop.broker.ids == ["a", "a"]
    (told,) = [text for text in caplog.messages if "LeaseLostError" in text]
    assert "The lease had expired. 1 messages that were published will be published again." in told


async def test_drain_tells_of_a_lost_lease() -> None:
    shop = Shop()
    shop.store.loses_lease = True
    await shop.put("a")
    with pytest.raises(LeaseLostError, match="1 messages that were published will be published again"):
        await shop.relay().drain()


async def test_an_outcome_that_cannot_be_written_in_time_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline_mediator.outbox.loop._WRITING", 0.02)
    shop = Shop()
    shop.store.hangs_on_leaving = anyio.Event()
    await shop.put("a")
    async with shop.relay(lease=0.05):
        await shop.until(lambda: "TimeoutError" in caplog.text)
        shop.store.hangs_on_leaving = None
        await shop.until(lambda: not shop.store.rows)
    assert shop.broker.ids == ["a", "a"]


async def test_a_mistake_in_the_loop_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()

    class Wrong(MemoryStore):
        async def next_due(self) -> float | None:
            if self.takes < 3:
                raise TypeError("a mistake")
            return await super().next_due()

    shop = Shop(store=Wrong())
    async with shop.relay():
        await shop.until(lambda: shop.store.takes >= 3)
        await shop.put("a")
        await shop.broker.has(1)
    assert "a mistake" in caplog.text, "with its traceback"


async def test_a_cancellation_that_a_client_lets_escape_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        pytest.skip("trio does not let anybody raise one")

    class Leaking(MemoryStore):
        async def next_due(self) -> float | None:
            if self.takes < 3:
                raise anyio.get_cancelled_exc_class()
            return await super().next_due()

    shop = Shop(store=Leaking())
    errors = iter([anyio.get_cancelled_exc_class()()])

    def refuse(outgoing: Outgoing) -> Exception | None:
        for error in errors:
            raise error
        return None

    shop.broker.refuse = refuse
    async with shop.relay():
        await shop.until(lambda: shop.store.takes >= 3)
        await shop.put("a")
        await shop.broker.has(1)
    assert "relaying fails" in caplog.text
    assert "'orders' takes no messages (BrokerUnavailableError: a client let the cancellation" in caplog.text


async def test_it_says_when_it_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shop = Shop()
    async with shop.relay(name="shop"):
        await shop.until(lambda: shop.store.wakers)
    assert [text for text in caplog.messages if text.startswith("shop: relay ")] == [
        "shop: relay started",
        "shop: relay stopped",
    ]


async def test_no_broker_no_end() -> None:
    """A broker that is down when the relay begins."""
    shop = Shop()
    shop.broker.refuse = lambda _: BrokerUnavailableError("down")
    await shop.put("a")
    async with shop.relay():
        await shop.until(lambda: len(shop.broker.calls) >= 3)
        shop.broker.refuse = lambda _: None
        await shop.broker.has(1)
    assert shop.store.rows == {}
