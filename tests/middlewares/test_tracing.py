"""Tracing: which spans a message has, how they hang together, and what of a trace leaves and enters the process."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, ClassVar

import anyio
import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    IntegrationEvent,
    Mediator,
    Pipeline,
    RequestMap,
    Route,
    StreamQuery,
)
from pipeline_mediator.message_brokers import Delivery
from pipeline_mediator.middlewares import (
    OutboxMiddleware,
    PublishMiddleware,
    TracingMiddleware,
    TransactionMiddleware,
)
from pipeline_mediator.outbox.protocol import Relayed, StoredMessage, StoredRow
from pipeline_mediator.pipeline import Next
from tests.middlewares.shop import Memory, RecordingBroker

SECRET = "4111-1111-1111-1111"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
"""A traceparent from elsewhere, sampled."""


@dataclass(frozen=True)
class Order(Command[str]):
    pass


@dataclass(frozen=True)
class Pay(Command[str]):
    card: str = SECRET


@dataclass(frozen=True)
class ListOrders(StreamQuery[int]):
    pass


@dataclass(frozen=True)
class Ordered(DomainEvent):
    pass


@dataclass(frozen=True)
class Paid(IntegrationEvent):
    pass


async def pay(command: Pay) -> str:
    return "paid"


async def fail(command: Pay) -> str:
    raise LookupError(command.card)


async def end(context: Context) -> str:
    return "end"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def tracing(provider: TracerProvider) -> TracingMiddleware:
    return TracingMiddleware(provider)


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The finished spans, by name."""
    return {span.name: span for span in exporter.get_finished_spans()}


def only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def traceparent_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id_of(span: ReadableSpan) -> str:
    return traceparent_of(span).split("-")[1]


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def span_id_of(span: ReadableSpan) -> str:
    return traceparent_of(span).split("-")[2]


def links_of(span: ReadableSpan) -> list[str]:
    return [f"00-{link.context.trace_id:032x}-{link.context.span_id:016x}-01" for link in span.links]


@dataclass
class Outlet:
    """Publishes every `Paid` to "payments", as the Publish middleware does, and keeps the headers."""

    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    note: str = "publish"
    role: str = "publish"
    ends_chain: ClassVar[bool] = True

    def destination_for(self, message_type: type) -> str | None:
        return "payments" if issubclass(message_type, Paid) else None

    def for_route(self, route: Route) -> Outlet | None:
        return None if route.destination is None else self

    async def __call__(self, context: Context, call_next: Next) -> None:
        context.note(self.note, system="redis")
        self.headers.append(dict(context.headers))


# -- in the process ----------------------------------------------------------------------------------------------------


async def test_a_message_has_one_span_by_the_conventions(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    contexts: list[Context] = []

    async def keep(context: Context, call_next: Next) -> Any:
        contexts.append(context)
        return await call_next(context)

    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[tracing, keep])
    assert await mediator.send(Pay(), correlation_id="conversation") == "paid"
    span = only_span(exporter)
    assert (span.name, span.kind, span.parent, span.status.status_code) == (
        "process Pay",
        SpanKind.INTERNAL,
        None,
        StatusCode.UNSET,
    )
    assert attributes_of(span) == {
        "messaging.system": "pipeline_mediator",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "Pay",
        "messaging.message.id": contexts[0].message_id,
        "messaging.message.conversation_id": "conversation",
        "pipeline_mediator.message_type": "Pay",
    }
    assert contexts[0].headers == {}
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "pipeline_mediator"
    assert "INTERNAL span `process Pay`" in mediator.describe()


class Attempt:
    """Makes the core begin an attempt inside, as RetryMiddleware does."""

    role: ClassVar[str] = "retry"

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await call_next(context)


async def test_what_a_message_causes_has_spans_below_its_own(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    async def order(command: Order, context: Context) -> str:
        context.emit(Ordered())
        return await context.send(Pay())

    async def celebrate(event: Ordered) -> None: ...

    mediator = Mediator(
        RequestMap().bind(Order, order).bind(Pay, pay),
        event_map=EventMap().bind(Ordered, celebrate),
        middlewares=[tracing, Attempt()],
    )
    assert await mediator.send(Order()) == "paid"
    spans = spans_of(exporter)
    root = spans["process Order"]
    assert parent_of(spans["process Pay"]) == parent_of(spans["process Ordered"]) == span_id_of(root)
    conversations = {attributes_of(span)["messaging.message.conversation_id"] for span in spans.values()}
    assert conversations == {attributes_of(root)["messaging.message.id"]}


async def test_it_hangs_below_the_current_span_and_leaves_it_current(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[tracing])
    with provider.get_tracer("http").start_as_current_span("POST") as request:
        await mediator.send(Pay(), headers={"traceparent": PARENT})
        assert trace.get_current_span() is request
    assert parent_of(spans_of(exporter)["process Pay"]) == f"{request.get_span_context().span_id:016x}"


async def test_a_trace_in_the_callers_headers_goes_on_where_no_span_is_current(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[tracing])
    await mediator.send(Pay(), headers={"traceparent": PARENT})
    assert trace_id_of(only_span(exporter)) == TRACE
    assert parent_of(only_span(exporter)) == PARENT.split("-")[2]


async def test_a_failure_is_told_by_type_and_without_its_text(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(LookupError):
        await Mediator(RequestMap().bind(Pay, fail), middlewares=[tracing]).send(Pay())
    span = only_span(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert attributes_of(span)["error.type"] == "LookupError"
    assert SECRET not in span.to_json()


async def test_the_text_of_an_error_is_recorded_when_asked(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    tracing = TracingMiddleware(provider, record_errors=True)
    with pytest.raises(LookupError):
        await Mediator(RequestMap().bind(Pay, fail), middlewares=[tracing]).send(Pay())
    span = only_span(exporter)
    assert span.status.description == SECRET
    (event,) = span.events
    assert event.name == "exception"
    assert dict(event.attributes or {})["exception.message"] == SECRET


async def test_what_is_cancelled_is_no_error(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async def hang(command: Pay) -> str:
        scope.cancel()
        await anyio.sleep_forever()
        return "never"

    tracing = TracingMiddleware(provider, record_errors=True)
    with anyio.CancelScope() as scope:
        await Mediator(RequestMap().bind(Pay, hang), middlewares=[tracing]).send(Pay())
    span = only_span(exporter)
    assert span.status.status_code is StatusCode.UNSET
    assert attributes_of(span)["error.type"] == "cancelled"
    assert span.events == ()


async def test_notes_are_events_of_the_span(tracing: TracingMiddleware, exporter: InMemorySpanExporter) -> None:
    async def noted(context: Context, call_next: Next) -> Any:
        context.note("retry", attempt=2, error="LookupError", wait=0.5)
        context.note("retry", attempt=3, error="LookupError", wait=1.0)
        context.note("kept back", message=context.message, kind=Pay)
        return await call_next(context)

    await Mediator(RequestMap().bind(Pay, pay), middlewares=[tracing, noted]).send(Pay())
    span = only_span(exporter)
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("retry", {"pipeline_mediator.attempt": 2, "error.type": "LookupError", "pipeline_mediator.wait": 0.5}),
        ("retry", {"pipeline_mediator.attempt": 3, "error.type": "LookupError", "pipeline_mediator.wait": 1.0}),
        ("kept back", {"pipeline_mediator.message": "Pay", "pipeline_mediator.kind": "Pay"}),
    ]
    assert attributes_of(span)["pipeline_mediator.attempts"] == 3


async def test_a_note_after_the_end_is_none_of_the_spans(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    async def note_afterwards(context: Context, call_next: Next) -> Any:
        result = await call_next(context)
        context.note("afterwards")
        return result

    with caplog.at_level(logging.WARNING):
        await Mediator(RequestMap().bind(Pay, pay), middlewares=[note_afterwards, tracing]).send(Pay())
    assert only_span(exporter).events == ()
    assert caplog.records == []


async def test_the_span_of_a_stream_lasts_as_long_as_the_stream(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    async def numbers(query: ListOrders) -> AsyncIterator[int]:
        yield 1
        yield 2

    mediator = Mediator(RequestMap().bind(ListOrders, numbers), middlewares=[tracing])
    async with mediator.stream(ListOrders()) as items:
        assert await anext(aiter(items)) == 1
        assert exporter.get_finished_spans() == ()
        assert [item async for item in items] == [2]
    assert only_span(exporter).name == "process ListOrders"


async def test_local_spans_can_be_left_out(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    outlet = Outlet()
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[TracingMiddleware(provider, local=False), outlet])
    await mediator.send(Pay())
    assert exporter.get_finished_spans() == ()
    assert "Tracing" not in mediator.describe(Pay)
    await mediator.emit(Paid())
    assert only_span(exporter).name == "send payments"


async def test_a_context_without_a_route_passes(tracing: TracingMiddleware, exporter: InMemorySpanExporter) -> None:
    assert await tracing(Context(Pay()), end) == "end"
    assert exporter.get_finished_spans() == ()


async def test_no_context_is_kept_alive(tracing: TracingMiddleware) -> None:
    contexts: list[weakref.ref[Context]] = []

    async def remember(context: Context, call_next: Next) -> Any:
        contexts.append(weakref.ref(context))
        context.note("retry", attempt=2, error="LookupError")
        return await call_next(context)

    mediator = Mediator(RequestMap().bind(Pay, fail), middlewares=[tracing, remember])
    gc.disable()
    try:
        with pytest.raises(LookupError):
            await mediator.send(Pay())
        assert [one() for one in contexts] == [None]
    finally:
        gc.enable()


# -- to a broker -------------------------------------------------------------------------------------------------------


async def test_what_goes_to_a_broker_carries_the_context_of_its_producer_span(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    outlet = Outlet()
    await Mediator(middlewares=[tracing, outlet]).emit(Paid())
    span = only_span(exporter)
    assert (span.name, span.kind, span.links) == ("send payments", SpanKind.PRODUCER, ())
    assert outlet.headers == [{"traceparent": traceparent_of(span)}]
    attributes = attributes_of(span)
    assert attributes["messaging.system"] == "redis"
    assert attributes["messaging.operation.name"] == attributes["messaging.operation.type"] == "send"
    assert attributes["messaging.destination.name"] == "payments"
    assert attributes["pipeline_mediator.message_type"] == "Paid"
    assert span.events == ()


async def test_what_an_outbox_stores_is_created_not_sent(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    outlet = Outlet(note="stored")
    await Mediator(middlewares=[tracing, outlet]).emit(Paid())
    span = only_span(exporter)
    assert (span.name, span.kind) == ("create payments", SpanKind.PRODUCER)
    assert attributes_of(span)["messaging.operation.name"] == "create"
    assert attributes_of(span)["messaging.operation.type"] == "create"
    assert outlet.headers == [{"traceparent": traceparent_of(span)}]


async def test_baggage_goes_along(tracing: TracingMiddleware) -> None:
    outlet = Outlet()
    mediator = Mediator(middlewares=[tracing, outlet])
    token = otel.attach(baggage.set_baggage("tenant", "blue"))
    try:
        await mediator.emit(Paid())
    finally:
        otel.detach(token)
    await mediator.emit(Paid(), headers={"baggage": "tenant=green", "other": "stays"})
    assert [headers.get("baggage") for headers in outlet.headers] == ["tenant=blue", "tenant=green"]
    assert outlet.headers[1]["other"] == "stays"


async def test_a_span_that_is_not_sampled_is_passed_on_as_such() -> None:
    outlet = Outlet()
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    await Mediator(middlewares=[TracingMiddleware(provider), outlet]).emit(Paid())
    flags = int(outlet.headers[0]["traceparent"].split("-")[3], 16)
    assert not flags & trace.TraceFlags.SAMPLED


async def test_a_trace_that_the_caller_gave_is_linked_and_not_overwritten(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    outlet = Outlet()
    await Mediator(middlewares=[tracing, outlet]).emit(Paid(), headers={"traceparent": PARENT, "tracestate": "a=b"})
    assert outlet.headers == [{"traceparent": PARENT, "tracestate": "a=b"}]
    span = only_span(exporter)
    assert (span.kind, links_of(span)) == (SpanKind.CLIENT, [PARENT])
    assert trace_id_of(span) != TRACE


# -- from a broker -----------------------------------------------------------------------------------------------------


def delivered(headers: Mapping[str, str]) -> Context:
    context = Context(Paid(), Route(Paid, "event", "broker"))
    context.delivery = Delivery("payments", b"", None, {}, "id", None, 1, "warehouse")
    context.headers.update(headers)
    return context


async def test_what_came_from_a_broker_is_linked_to_where_it_was_made(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    await tracing(delivered({"traceparent": PARENT}), end)
    span = only_span(exporter)
    assert (span.name, span.kind) == ("process payments", SpanKind.CONSUMER)
    assert (links_of(span), span.parent) == ([PARENT], None)
    assert trace_id_of(span) != TRACE
    attributes = attributes_of(span)
    assert attributes["messaging.destination.name"] == "payments"
    assert attributes["messaging.consumer.group.name"] == "warehouse"
    assert attributes["messaging.operation.type"] == "process"


async def test_it_can_be_in_the_producers_trace(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    await TracingMiddleware(provider, continue_traces=True)(delivered({"traceparent": PARENT}), end)
    span = only_span(exporter)
    assert (trace_id_of(span), parent_of(span), links_of(span)) == (TRACE, PARENT.split("-")[2], [PARENT])


async def test_a_current_span_is_its_parent_whatever_it_is_linked_to(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    with provider.get_tracer("consumer").start_as_current_span("receive") as receive:
        await TracingMiddleware(provider, continue_traces=True)(delivered({"traceparent": PARENT}), end)
    span = spans_of(exporter)["process payments"]
    assert parent_of(span) == f"{receive.get_span_context().span_id:016x}"
    assert links_of(span) == [PARENT]


@pytest.mark.parametrize("headers", [{}, {"other": "header"}, {"traceparent": "nonsense"}], ids=str)
async def test_it_needs_no_trace_in_the_headers(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter, headers: dict[str, str]
) -> None:
    assert await tracing(delivered(headers), end) == "end"
    assert (only_span(exporter).links, only_span(exporter).parent) == ((), None)


async def test_its_handler_sees_the_baggage_that_came_along(tracing: TracingMiddleware) -> None:
    seen: list[object] = []

    async def look(context: Context) -> None:
        seen.append(baggage.get_baggage("tenant"))

    await tracing(delivered({"traceparent": PARENT, "baggage": "tenant=blue"}), look)
    assert seen == ["blue"]
    assert baggage.get_baggage("tenant") is None


def handing_on(tracing: TracingMiddleware, outlet: Outlet) -> Next:
    """The rest of a chain: its handler publishes another message, which inherits the headers as a joined one does."""

    async def hand_on(context: Context) -> None:
        joined = Context(Paid(), Route(Paid, "event", "local", "payments"), parent=context)
        await Pipeline(tracing, outlet)(joined, end)

    return hand_on


async def test_what_it_inherited_from_a_delivery_is_replaced(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    outlet = Outlet()
    headers = {"traceparent": PARENT, "tracestate": "a=b", "baggage": "tenant=blue"}
    await tracing(delivered(headers), handing_on(tracing, outlet))
    sent = spans_of(exporter)["send payments"]
    assert parent_of(sent) == span_id_of(spans_of(exporter)["process payments"])
    assert outlet.headers == [{"traceparent": traceparent_of(sent), "baggage": "tenant=blue"}]


async def test_a_provider_that_makes_no_spans_lets_the_trace_go_on() -> None:
    outlet = Outlet()
    tracing = TracingMiddleware(NoOpTracerProvider())
    headers = {"traceparent": PARENT, "tracestate": "a=b"}
    await tracing(delivered(headers), handing_on(tracing, outlet))

    async def publish_from_a_handler(command: Pay, context: Context) -> str:
        await context.mediator.emit(Paid())
        return "paid"

    mediator = Mediator(RequestMap().bind(Pay, publish_from_a_handler), middlewares=[tracing, outlet])

    async def send(context: Context) -> None:
        await mediator.send(Pay())

    await tracing(delivered(headers), send)
    assert outlet.headers == [headers, headers]


# -- from the outbox ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    headers: dict[str, str]


async def test_a_batch_of_the_relays_is_linked_to_each_of_its_messages(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    other = PARENT.replace("b7ad6b7169203331", "00f067aa0ba902b7")
    rows = [Row({"traceparent": PARENT}), Row({}), Row({"traceparent": other})]
    await tracing(Context(rows, Route(Paid, "event", "relay", "payments")), end)
    span = only_span(exporter)
    assert (span.name, span.kind) == ("send payments", SpanKind.CLIENT)
    assert links_of(span) == [PARENT, other]
    assert attributes_of(span)["messaging.batch.message_count"] == 3
    assert [row.headers for row in rows] == [{"traceparent": PARENT}, {}, {"traceparent": other}]


async def test_a_batch_of_the_relays_is_nobodys_child(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    """Whoever wakes the relay has nothing to do with what it publishes."""
    seen: list[Mapping[str, object]] = []

    async def look(context: Context) -> None:
        seen.append(baggage.get_all())

    token = otel.attach(baggage.set_baggage("tenant", "blue"))
    try:
        with provider.get_tracer("test").start_as_current_span("whoever commits"):
            await tracing(Context([Row({})], Route(Paid, "event", "relay", "payments")), look)
    finally:
        otel.detach(token)
    assert spans_of(exporter)["send payments"].parent is None
    assert seen == [{}]


class Kept:
    """An outbox that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[StoredMessage] = []

    async def add(self, resource: object, messages: Sequence[StoredMessage], /) -> None:
        self.messages.extend(messages)

    def committed(self) -> None: ...


def storing(tracing: TracingMiddleware) -> tuple[Mediator, Kept]:
    kept: Any = Kept()
    stack = Pipeline(
        tracing,
        TransactionMiddleware(Memory().begin),
        OutboxMiddleware(kept),
        PublishMiddleware(RecordingBroker(), {Paid: "payments"}),
    )

    async def pay_and_tell(command: Pay, context: Context) -> str:
        context.emit(Paid())
        return "paid"

    return Mediator(RequestMap().bind(Pay, pay_and_tell), middlewares=stack), kept


async def test_what_is_stored_carries_the_span_that_created_it_and_the_baggage(
    tracing: TracingMiddleware, exporter: InMemorySpanExporter
) -> None:
    mediator, kept = storing(tracing)
    token = otel.attach(baggage.set_baggage("tenant", "blue"))
    try:
        await mediator.send(Pay())
    finally:
        otel.detach(token)
    created = spans_of(exporter)["create payments"]
    assert created.kind is SpanKind.PRODUCER
    assert created.context is not None
    (stored,) = kept.messages
    trace_id, span_id = f"{created.context.trace_id:032x}", f"{created.context.span_id:016x}"
    assert stored.headers["traceparent"].startswith(f"00-{trace_id}-{span_id}-")
    assert stored.headers["baggage"] == "tenant=blue"

    exporter.clear()
    row = StoredRow(1, stored, 0, 0.0)
    chain = mediator.relay_chain("Paid", 1, "payments")
    await mediator.walk_relayed(chain, Relayed([row], monotonic() + 60))
    (link,) = links_of(only_span(exporter))
    assert link[:52] == stored.headers["traceparent"][:52]


async def test_what_is_stored_carries_a_trace_that_is_not_sampled_too() -> None:
    """Whoever receives it decides by the flag, and the baggage has to arrive all the same."""
    mediator, kept = storing(TracingMiddleware(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)))
    await mediator.send(Pay())
    _, _, _, flags = kept.messages[0].headers["traceparent"].split("-")
    assert int(flags, 16) & 1 == 0


async def test_without_a_provider_what_is_stored_carries_the_trace_of_what_caused_it() -> None:
    mediator, kept = storing(TracingMiddleware())
    unsampled = PARENT.removesuffix("01") + "00"
    await mediator.send(Pay(), headers={"traceparent": unsampled, "tracestate": "a=b", "baggage": "tenant=blue"})
    headers = kept.messages[0].headers
    assert (headers["traceparent"], headers["tracestate"], headers["baggage"]) == (unsampled, "a=b", "tenant=blue")


# -- without a provider ------------------------------------------------------------------------------------------------


async def test_without_a_provider_no_span_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*args: object, **kwargs: object) -> None:
        pytest.fail("a span of the API's proxy costs microseconds and records nothing")

    monkeypatch.setattr(trace.ProxyTracer, "start_span", begin)
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[TracingMiddleware(), Outlet()])
    assert await mediator.send(Pay()) == "paid"
    await mediator.emit(Paid())


async def test_without_a_provider_what_came_with_a_delivery_goes_on() -> None:
    tracing, outlet = TracingMiddleware(), Outlet()
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[tracing, outlet])
    headers = {"traceparent": PARENT, "tracestate": "a=b", "baggage": "tenant=blue"}
    given = {"traceparent": PARENT.replace("b7ad", "0000")}

    async def publish(context: Context) -> None:
        assert await mediator.send(Pay()) == "paid"
        await mediator.emit(Paid())
        await mediator.emit(Paid(), headers=given)

    await tracing(delivered(headers), publish)
    await tracing(delivered(headers), handing_on(tracing, outlet))
    await tracing(delivered({}), publish)
    await mediator.emit(Paid())
    assert outlet.headers == [headers, given, headers, {}, given, {}]


GLOBAL = """
import asyncio
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pipeline_mediator import Command, Mediator, RequestMap
from pipeline_mediator.middlewares import TracingMiddleware

@dataclass
class Pay(Command):
    number: int

async def pay(command: Pay) -> None:
    numbers.append((command.number, trace.get_current_span().get_span_context().is_valid))

numbers = []
mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[TracingMiddleware()])
asyncio.run(mediator.send(Pay(1)))
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
asyncio.run(mediator.send(Pay(2)))
assert numbers == [(1, False), (2, True)], numbers
assert [span.name for span in exporter.get_finished_spans()] == ["process Pay"]
"""


def test_a_provider_may_be_set_after_the_mediator_was_made() -> None:
    done = subprocess.run([sys.executable, "-c", GLOBAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
