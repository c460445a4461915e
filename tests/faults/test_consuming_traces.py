"""One trace from who sends to who handles, over outbox, relay, stream and consumer, by OpenTelemetry's conventions.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker

from pipeline_mediator import Context, Mediator, Pipeline, RequestMap
from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.middlewares import PublishMiddleware, TracingMiddleware
from pipeline_mediator.outbox.relay import OutboxRelay
from tests.faults.application import INBOX, OUTBOX, Move, Moved, Note, Noted, codec, move, note
from tests.faults.consuming import GROUP
from tests.faults.scene import Scene

DATABASES = pytest.mark.parametrize("database", ["postgresql", "sqlite"], indirect=True)
STREAM = "faults.moved"
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C


class Process:
    """What one process would have: a provider of its own, and what it exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.provider = provider

    def tracing(self, *, continue_traces: bool = False) -> TracingMiddleware:
        return TracingMiddleware(self.provider, continue_traces=continue_traces)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


@dataclass
class Travelled:
    """What an event had with it at each place on its way."""

    writer: Process = field(default_factory=Process)
    relay: Process = field(default_factory=Process)
    consumer: Process = field(default_factory=Process)
    stored: dict[str, str] = field(default_factory=dict[str, str])
    entry: dict[str, str] = field(default_factory=dict[str, str])
    message_id: str = ""
    span: SpanContext = trace.INVALID_SPAN_CONTEXT
    """The handler's."""
    tenant: object = None
    """In the handler's baggage."""


async def travel(scene: Scene, *, sampled: bool = True, continue_traces: bool = False) -> Travelled:
    """One event, caused by a request from elsewhere, on its way through three processes."""
    seen = Travelled()

    async def look(_event: Moved | Noted, context: Context) -> None:
        seen.span = trace.get_current_span().get_span_context()
        seen.tenant = baggage.get_baggage("tenant")
        seen.message_id = context.message_id

    with request_from_elsewhere(sampled=sampled):
        await traced(scene, seen.writer).send(scene.command("a"))
    async with scene.engine.connect() as connection:
        (row,) = await connection.execute(select(OUTBOX.rows))
        seen.stored = json.loads(row.headers)
    mediator = traced(scene, seen.relay)
    async with mediator:
        assert await OutboxRelay(mediator).drain() == 1
    ((_, fields),) = await scene.client.xrange(STREAM)
    seen.entry = {name.decode(): value.decode() for name, value in fields.items()}
    await scene.consume(before=look, tracing=seen.consumer.tracing(continue_traces=continue_traces))
    assert await scene.effects() == [seen.message_id]
    return seen


def traced(scene: Scene, process: Process) -> Mediator:
    pipeline = Pipeline.recommended(
        async_sessionmaker(scene.engine, expire_on_commit=False).begin,
        scene.store(),
        PublishMiddleware(RedisStreamBroker(scene.redis)),
        inbox=SQLAlchemyInbox(INBOX),
    ).replace(TracingMiddleware, process.tracing())
    return Mediator(RequestMap().bind(Move, move).bind(Note, note), middlewares=pipeline, codec=codec())


@contextmanager
def request_from_elsewhere(*, sampled: bool) -> Generator[None]:
    """What an instrumented web framework would have made current."""
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    caller = SpanContext(TRACE_ID, 0xB7AD6B7169203331, True, flags, TraceState([("vendor", "x")]))  # noqa: FBT003
    around = trace.set_span_in_context(NonRecordingSpan(caller), baggage.set_baggage("tenant", "blue"))
    token = otel.attach(around)
    try:
        yield
    finally:
        otel.detach(token)


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def traceparent(context: SpanContext | None) -> str:
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def linked(span: ReadableSpan) -> list[str]:
    return [traceparent(link.context)[:52] for link in span.links]


@DATABASES
@pytest.mark.parametrize("continue_traces", [False, True], ids=["linked", "continued"])
async def test_53_a_trace_goes_from_the_sender_to_the_handler(scene: Scene, *, continue_traces: bool) -> None:
    seen = await travel(scene, continue_traces=continue_traces)
    about = {"messaging.destination.name": STREAM, "messaging.message.id": seen.message_id}

    created = seen.writer.spans[f"create {STREAM}"]
    assert created.kind is SpanKind.PRODUCER
    operation = {"messaging.operation.name": "create", "messaging.operation.type": "create"}
    assert attributes_of(created).items() >= (about | operation).items()
    creation = traceparent(created.context)
    assert creation[3:35] == f"{TRACE_ID:032x}"
    assert created.parent == seen.writer.spans["process Move"].context

    # What was created travels, and nobody writes over it.
    assert seen.stored["traceparent"] == seen.entry["traceparent"] == creation
    assert seen.stored["tracestate"] == seen.entry["tracestate"] == "vendor=x"
    assert seen.entry["baggage"] == "tenant=blue", seen.entry

    (sent,) = seen.relay.spans.values()
    assert (sent.name, sent.kind, sent.parent) == (f"send {STREAM}", SpanKind.CLIENT, None)
    assert linked(sent) == [creation[:52]]
    sending: dict[str, Any] = {
        "messaging.system": "redis",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": STREAM,
        "messaging.batch.message_count": 1,
    }
    assert attributes_of(sent).items() >= sending.items()

    (processed,) = seen.consumer.spans.values()
    assert (processed.name, processed.kind) == (f"process {STREAM}", SpanKind.CONSUMER)
    assert linked(processed) == [creation[:52]]
    operation = {
        "messaging.system": "redis",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": GROUP,
    }
    assert attributes_of(processed).items() >= (about | operation).items()
    assert "error.type" not in attributes_of(processed)
    if continue_traces:
        assert traceparent(processed.parent) == creation
    else:
        assert processed.parent is None
        assert processed.context is not None
        assert processed.context.trace_id != TRACE_ID

    assert seen.span == processed.context
    assert seen.tenant == "blue"


@DATABASES
async def test_53_a_trace_that_is_not_sampled_travels_as_such(scene: Scene) -> None:
    seen = await travel(scene, sampled=False, continue_traces=True)
    assert (seen.writer.spans, seen.consumer.spans) == ({}, {})
    assert seen.stored["traceparent"] == seen.entry["traceparent"]
    assert seen.stored["traceparent"].startswith(f"00-{TRACE_ID:032x}-")
    assert seen.stored["traceparent"].endswith("-00")
    assert seen.entry["tracestate"] == "vendor=x"
    assert (seen.span.trace_id, seen.span.trace_flags) == (TRACE_ID, TraceFlags.DEFAULT)
    assert seen.span.trace_state.get("vendor") == "x"
    assert seen.tenant == "blue"
    # The relay's own work is nobody's request, and recorded by its own lot.
    (sent,) = seen.relay.spans.values()
    assert linked(sent) == [seen.stored["traceparent"][:52]]


@DATABASES
async def test_53_where_traces_are_not_continued_an_unsampled_one_is_linked(scene: Scene) -> None:
    seen = await travel(scene, sampled=False)
    (processed,) = seen.consumer.spans.values()
    assert processed.parent is None
    assert linked(processed) == [seen.stored["traceparent"][:52]]
    assert seen.tenant == "blue"
