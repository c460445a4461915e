"""Metrics: which instruments a message moves, by how much, and with which attributes."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint

from pipeline_mediator import Command, Context, IntegrationEvent, Mediator, RequestMap, Route
from pipeline_mediator.message_brokers import Delivery
from pipeline_mediator.middlewares import MetricsMiddleware
from pipeline_mediator.pipeline import Next

PROCESS = "messaging.process.duration"
OPERATION = "messaging.client.operation.duration"
SENT = "messaging.client.sent.messages"
ACTIVE = "pipeline_mediator.active_messages"


@dataclass(frozen=True)
class Pay(Command[str]):
    amount: int = 1


@dataclass(frozen=True)
class Paid(IntegrationEvent):
    amount: int = 1


async def pay(command: Pay) -> str:
    return "paid"


async def fail(command: Pay) -> str:
    raise LookupError("secret")


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def metrics(reader: InMemoryMetricReader) -> MetricsMiddleware:
    return MetricsMiddleware(MeterProvider([reader], shutdown_on_exit=False))


def measured(reader: InMemoryMetricReader, name: str) -> list[tuple[float, dict[str, Any]]]:
    """The points of one instrument: its value, or how often it was recorded, and the attributes."""
    collected = reader.get_metrics_data()
    if collected is None:
        return []
    points = [
        point
        for metric in collected.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == name
        for point in metric.data.data_points
    ]
    return [
        (point.value if isinstance(point, NumberDataPoint) else point.count, dict(point.attributes or {}))
        for point in points
    ]


ATTRIBUTES = {
    "messaging.system": "pipeline_mediator",
    "messaging.operation.name": "process",
    "messaging.operation.type": "process",
    "messaging.destination.name": "Pay",
    "pipeline_mediator.message_type": "Pay",
}
SENDING = ATTRIBUTES | {
    "messaging.operation.name": "send",
    "messaging.operation.type": "send",
    "messaging.destination.name": "payments",
}


async def test_a_handled_message_is_measured_in_seconds(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[metrics])
    await mediator.send(Pay())
    await mediator.send(Pay())
    assert measured(reader, PROCESS) == [(2, ATTRIBUTES)]
    assert measured(reader, OPERATION) == measured(reader, SENT) == []


async def test_histograms_have_the_buckets_of_the_conventions(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    await Mediator(RequestMap().bind(Pay, pay), middlewares=[metrics]).send(Pay())
    collected = reader.get_metrics_data()
    assert collected is not None
    (scope,) = collected.resource_metrics[0].scope_metrics
    assert scope.scope.name == "pipeline_mediator"
    (histogram,) = (one for one in scope.metrics if one.name == PROCESS)
    (point,) = histogram.data.data_points
    assert isinstance(point, HistogramDataPoint)
    assert histogram.unit == "s"
    assert list(point.explicit_bounds) == [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
    assert 0 <= point.sum < 60


async def test_failed_and_cancelled_are_told_apart(metrics: MetricsMiddleware, reader: InMemoryMetricReader) -> None:
    with pytest.raises(LookupError, match="secret"):
        await Mediator(RequestMap().bind(Pay, fail), middlewares=[metrics]).send(Pay())

    async def hang(command: Pay) -> str:
        scope.cancel()
        await anyio.sleep_forever()
        return "never"

    with anyio.CancelScope() as scope:
        await Mediator(RequestMap().bind(Pay, hang), middlewares=[metrics]).send(Pay())
    assert measured(reader, PROCESS) == [
        (1, ATTRIBUTES | {"error.type": "LookupError"}),
        (1, ATTRIBUTES | {"error.type": "cancelled"}),
    ]


async def test_active_messages_go_up_and_down(metrics: MetricsMiddleware, reader: InMemoryMetricReader) -> None:
    during: list[Any] = []

    async def look(command: Pay) -> str:
        during.extend(measured(reader, ACTIVE))
        raise LookupError

    with pytest.raises(LookupError):
        await Mediator(RequestMap().bind(Pay, look), middlewares=[metrics]).send(Pay())
    assert during == [(1, ATTRIBUTES)]
    assert measured(reader, ACTIVE) == [(0, ATTRIBUTES)]


NOTES: list[tuple[str, dict[str, Any], str, dict[str, str]]] = [
    ("retry", {"attempt": 2, "error": "LookupError", "wait": 0.1}, "retries", {"error.type": "LookupError"}),
    ("timeout", {"seconds": 1.0}, "timeouts", {}),
    ("duplicate", {}, "duplicates", {}),
    (
        "lost",
        {"event": "Paid", "error": "OSError"},
        "lost_messages",
        {"error.type": "OSError", "pipeline_mediator.event": "Paid"},
    ),
    ("after-commit hook failed", {}, "hook_failures", {}),
    ("after-commit hooks given up", {"hooks": 2}, "hook_failures", {}),
    ("scope clean-up failed", {}, "cleanup_failures", {}),
    ("closing the transaction failed", {"error": OSError}, "transaction_failures", {"error.type": "OSError"}),
]


@pytest.mark.parametrize("noted", NOTES, ids=[one[0] for one in NOTES])
async def test_notes_are_counted(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader, noted: tuple[str, dict[str, Any], str, dict[str, str]]
) -> None:
    note, facts, counter, attributes = noted

    async def noting(context: Context, call_next: Next) -> Any:
        context.note(note, **facts)
        context.note("something else", number=1)
        return await call_next(context)

    await Mediator(RequestMap().bind(Pay, pay), middlewares=[metrics, noting]).send(Pay())
    assert measured(reader, f"pipeline_mediator.{counter}") == [(1, ATTRIBUTES | attributes)]


async def test_a_note_from_outside_is_not_counted(metrics: MetricsMiddleware, reader: InMemoryMetricReader) -> None:
    async def note_afterwards(context: Context, call_next: Next) -> Any:
        result = await call_next(context)
        context.note("duplicate")
        return result

    await Mediator(RequestMap().bind(Pay, pay), middlewares=[note_afterwards, metrics]).send(Pay())
    assert measured(reader, "pipeline_mediator.duplicates") == []


class Outlet:
    """Publishes every command, as the Publish middleware does; `failures` are raised first, one for each attempt."""

    ends_chain: ClassVar[bool] = True

    def __init__(self, *failures: Exception, **facts: Any) -> None:
        self.failures = list(failures)
        self.facts: dict[str, Any] = {"system": "redis", **facts}

    def destination_for(self, message_type: type) -> str:
        return "payments"

    async def __call__(self, context: Context, call_next: Next) -> None:
        context.note("publish", **self.facts)
        if self.failures:
            raise self.failures.pop(0)


@dataclass(frozen=True)
class Ship(Command):
    pass


SHIPPING = SENDING | {"pipeline_mediator.message_type": "Ship", "messaging.system": "redis"}


async def send_away(metrics: MetricsMiddleware, *inner: Any) -> None:
    await Mediator(middlewares=[metrics, *inner]).send(Ship())


async def test_a_published_message_is_sent_and_not_processed(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    await send_away(metrics, Outlet())
    assert measured(reader, SENT) == [(1, SHIPPING)]
    assert measured(reader, OPERATION) == [(1, SHIPPING)]
    assert measured(reader, PROCESS) == []


async def test_each_attempt_to_send_is_counted_with_its_own_error(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    async def twice_more(context: Context, call_next: Next) -> Any:
        for attempt in (2, 3):
            try:
                return await call_next(context)
            except LookupError:
                context.note("retry", attempt=attempt, error="LookupError", wait=0.0)
        return await call_next(context)

    with pytest.raises(OSError, match="the last"):
        await send_away(metrics, twice_more, Outlet(LookupError(), LookupError(), OSError("the last")))
    expected = [(2, SHIPPING | {"error.type": "LookupError"}), (1, SHIPPING | {"error.type": "OSError"})]
    assert measured(reader, SENT) == expected
    assert measured(reader, OPERATION) == expected


async def test_what_was_refused_or_only_stored_was_not_sent(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    async def refuse(context: Context, call_next: Next) -> Any:
        raise LookupError

    async def store(context: Context, call_next: Next) -> Any:
        context.note("stored")

    with pytest.raises(LookupError):
        await send_away(metrics, refuse, Outlet())
    await send_away(metrics, store, Outlet())
    assert measured(reader, SENT) == measured(reader, OPERATION) == measured(reader, PROCESS) == []


async def end(context: Context) -> str:
    return "end"


async def test_a_batch_of_the_relays_counts_its_messages(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    async def publish(context: Context) -> None:
        context.note("publish", system="redis", count=3)

    route = Route(Paid, "event", "relay", "payments")
    await metrics(Context([1, 2, 3], route), publish)
    assert [value for value, _ in measured(reader, SENT)] == [3]
    assert [value for value, _ in measured(reader, OPERATION)] == [1]


async def test_a_delivery_says_where_it_was_waiting_and_for_whom(
    metrics: MetricsMiddleware, reader: InMemoryMetricReader
) -> None:
    context = Context(Paid(), Route(Paid, "event", "broker"))
    context.delivery = Delivery("payments", b"", None, {}, "id", None, 1, "warehouse")
    assert await metrics(context, end) == "end"
    ((count, attributes),) = measured(reader, PROCESS)
    assert count == 1
    assert attributes == ATTRIBUTES | {
        "messaging.destination.name": "payments",
        "messaging.consumer.group.name": "warehouse",
        "pipeline_mediator.message_type": "Paid",
    }


async def test_a_context_without_a_route_passes(metrics: MetricsMiddleware, reader: InMemoryMetricReader) -> None:
    assert await metrics(Context(Pay()), end) == "end"
    assert measured(reader, PROCESS) == []


async def test_no_context_is_kept_alive(metrics: MetricsMiddleware) -> None:
    contexts: list[weakref.ref[Context]] = []

    async def remember(context: Context, call_next: Next) -> Any:
        contexts.append(weakref.ref(context))
        context.note("retry", attempt=2, error="LookupError")
        return await call_next(context)

    mediator = Mediator(RequestMap().bind(Pay, fail), middlewares=[metrics, remember])
    gc.disable()
    try:
        with pytest.raises(LookupError):
            await mediator.send(Pay())
        assert [one() for one in contexts] == [None]
    finally:
        gc.enable()


GLOBAL = """
import asyncio
from dataclasses import dataclass

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from pipeline_mediator import Command, Mediator, RequestMap
from pipeline_mediator.middlewares import MetricsMiddleware

@dataclass
class Pay(Command): ...

async def pay(command: Pay) -> None: ...

mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[MetricsMiddleware()])
asyncio.run(mediator.send(Pay()))
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
asyncio.run(mediator.send(Pay()))
found = {one.name: one for one in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics}
assert found["messaging.process.duration"].data.data_points[0].count == 1, "the second message only"
"""


class Unheard(Context):
    def on_note(self, *args: object) -> None:
        pytest.fail("nobody measures, so nobody needs to listen")


async def test_without_a_provider_it_steps_aside() -> None:
    assert await Mediator(RequestMap().bind(Pay, pay), middlewares=[MetricsMiddleware()]).send(Pay()) == "paid"
    assert await MetricsMiddleware()(Unheard(Pay(), Route(Pay, "request", "local")), end) == "end"


def test_a_provider_may_be_set_after_the_mediator_was_made() -> None:
    done = subprocess.run([sys.executable, "-c", GLOBAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
