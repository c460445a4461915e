"""One OpenTelemetry span per message, and its trace context in what leaves the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from opentelemetry import context as otel
from opentelemetry import propagate, trace
from opentelemetry.trace import INVALID_SPAN, INVALID_SPAN_CONTEXT, Link, SpanKind, StatusCode

from pipeline_mediator import telemetry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from opentelemetry.trace import Span, SpanContext, Tracer, TracerProvider

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next, Rule

__all__ = ["TracingMiddleware"]


class TracingMiddleware:
    """Gives each message a span, by OpenTelemetry's conventions for messaging.

        TracingMiddleware()                          # the global tracer provider, whenever it is set
        TracingMiddleware(provider, local=False)     # spans only where a message leaves or enters the process

    What is handled in the process has an INTERNAL span, `process PlaceOrder`. What goes to a broker has a PRODUCER
    span, `send shop.orders` (`create` where an outbox stores it), whose trace context goes into the headers. What came
    from a broker has a CONSUMER span, `process shop.orders`, linked to that context, in a trace of its own or, with
    `continue_traces=True`, in the producer's. A batch of the relay's has a CLIENT span with a link to each message's. A
    trace context that the caller put into the headers is not overwritten: it is linked, by a CLIENT span.

    Further attempts and other notes are events of the span. What failed has the status ERROR and `error.type`; what was
    cancelled has `error.type` "cancelled" and no such status. Texts and stacks of errors may quote the message, so they
    are recorded only with `record_errors=True`; payloads never are.

    Without a tracer provider nothing is recorded, and the headers that came from a broker (traceparent, tracestate,
    baggage, or what the global propagator names) go on with what is published meanwhile.
    """

    role: ClassVar[str] = "tracing"
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        *,
        local: bool = True,
        continue_traces: bool = False,
        record_errors: bool = False,
    ) -> None:
        self._local = local
        self._continue_traces = continue_traces
        self._record_errors = record_errors
        self._uses_global = tracer_provider is None
        self._tracer = trace.get_tracer(
            telemetry.SCOPE, telemetry.library_version(), tracer_provider, telemetry.SCHEMA_URL
        )

    def for_route(self, route: Route) -> _Spans | None:
        """The spans of this route; None where it shall have none."""
        spans: _Spans
        if route.origin == "relay":
            spans = _RelaySpans(route, self._tracer)
        elif route.destination is not None:
            spans = _SendSpans(route, self._tracer)
        elif route.origin == "broker":
            spans = _ConsumeSpans(route, self._tracer, continue_traces=self._continue_traces)
        elif self._local:
            spans = _LocalSpans(route, self._tracer)
        else:
            return None
        spans.uses_global = self._uses_global
        spans.record_errors = self._record_errors
        return spans

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain in a span; a mediator compiles `for_route` instead."""
        spans = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if spans is None else spans(context, call_next))


_API: Final = trace.get_tracer_provider.__globals__
"""Where the API keeps the global provider. Asking `get_tracer_provider()` costs 1 us, a span of the proxy's 3 us."""

_ARRIVED: Final = otel.create_key("pipeline_mediator-arrived")
"""The trace context that the message at work came with; in the headers of what it causes it is inherited, not given."""


class _Spans:
    """The spans of one route: where each begins is its subclass's business, the rest is alike."""

    kind: ClassVar[SpanKind]
    uses_global = False
    record_errors = False

    def __init__(self, route: Route, tracer: Tracer) -> None:
        self._tracer = tracer
        self._attributes = telemetry.attributes_of(route)
        self._name = telemetry.span_name(self._attributes)
        self.summary = f"{self.kind.name} span `{self._name}`"

    def __call__(self, context: Context, call_next: Next) -> Awaitable[Any]:
        # Looked up for each message: applications set their provider after the mediator is made, or never.
        if self.uses_global and _API.get("_TRACER_PROVIDER", _API) is None:
            return self._walk_without(context, call_next)
        return self._walk(context, call_next)

    def _start(self, context: Context) -> tuple[Span, otel.Context]:
        """A new span, and OpenTelemetry's context for what is done in it."""
        raise NotImplementedError

    def _walk_without(self, context: Context, call_next: Next) -> Awaitable[Any]:
        return call_next(context)

    async def _walk(self, context: Context, call_next: Next) -> Any:
        span, within = self._start(context)
        token = otel.attach(within)
        try:
            if span.is_recording():
                span.set_attribute(telemetry.MESSAGE_ID, context.message_id)
                span.set_attribute(telemetry.CONVERSATION_ID, context.correlation_id)
                context.on_note(_Notes(span, self._attributes))
            return await call_next(context)
        except BaseException as error:
            self._fail(span, error)
            raise
        finally:
            otel.detach(token)
            span.end()

    def _fail(self, span: Span, error: BaseException) -> None:
        span.set_attribute(telemetry.ERROR_TYPE, telemetry.error_type(error))
        if not isinstance(error, Exception):
            return
        if self.record_errors:
            span.record_exception(error)
        span.set_status(StatusCode.ERROR, str(error) if self.record_errors else None)


class _LocalSpans(_Spans):
    """In the process: a child of the current span, or of what the caller put into the headers."""

    kind = SpanKind.INTERNAL

    def _start(self, context: Context) -> tuple[Span, otel.Context]:
        around = otel.get_current()
        if context.parent is None and (arrived := _extract(context.headers)) is not None:
            around = _arrive(around, arrived, continue_trace=True)
        span = self._tracer.start_span(self._name, around, self.kind, self._attributes)
        return span, _within(span, around)


class _ConsumeSpans(_Spans):
    """From a broker: linked to where the message was made, which may be long ago and have other consumers."""

    kind = SpanKind.CONSUMER

    def __init__(self, route: Route, tracer: Tracer, *, continue_traces: bool) -> None:
        super().__init__(route, tracer)
        self._continue_traces = continue_traces

    def _start(self, context: Context) -> tuple[Span, otel.Context]:
        around = parent = otel.get_current()
        arrived = _extract(context.headers)
        links: list[Link] = []
        if arrived is not None:
            parent = _arrive(around, arrived, continue_trace=self._continue_traces)
            around = _arrive(around, arrived, continue_trace=True)
            links = _links_to(_span_context(arrived))
        attributes = self._attributes | telemetry.delivery_attributes(context.delivery)
        span = self._tracer.start_span(telemetry.span_name(attributes), parent, self.kind, attributes, links)
        return span, _within(span, around)

    def _walk_without(self, context: Context, call_next: Next) -> Awaitable[Any]:
        arrived = _extract(context.headers)
        if arrived is None:
            return call_next(context)
        return _walk_within(_arrive(otel.get_current(), arrived, continue_trace=True), context, call_next)


class _SendSpans(_Spans):
    """To a broker: the span's context travels in the headers, unless the caller gave another."""

    kind = SpanKind.PRODUCER

    def _start(self, context: Context) -> tuple[Span, otel.Context]:
        around = otel.get_current()
        given, inherited = _given(context.headers, around)
        kind = SpanKind.CLIENT if given.is_valid else self.kind
        span = self._tracer.start_span(self._name, around, kind, self._attributes, _links_to(given))
        within = _within(span, around)
        if not given.is_valid:
            _inject(context.headers, within, replace=inherited)
        return span, within

    def _walk_without(self, context: Context, call_next: Next) -> Awaitable[Any]:
        around = otel.get_current()
        if around:
            given, inherited = _given(context.headers, around)
            if not given.is_valid:
                _inject(context.headers, around, replace=inherited)
        return call_next(context)


class _HasHeaders(Protocol):
    @property
    def headers(self) -> Mapping[str, str]: ...


class _RelaySpans(_Spans):
    """A batch of stored messages to a broker: what each carries was decided when it was stored, and is only linked."""

    kind = SpanKind.CLIENT

    def _start(self, context: Context) -> tuple[Span, otel.Context]:
        batch: Sequence[_HasHeaders] = context.message
        links: list[Link] = []
        for one in batch:
            arrived = _extract(one.headers)
            if arrived is not None:
                links += _links_to(_span_context(arrived))
        attributes: dict[str, str | int] = {**self._attributes, telemetry.BATCH_MESSAGE_COUNT: len(batch)}
        # A trace of its own, and no baggage: whatever woke the relay has nothing to do with these messages.
        nothing = otel.Context()
        span = self._tracer.start_span(self._name, nothing, self.kind, attributes, links)
        return span, _within(span, nothing)


class _Notes:
    """Turns the notes of a message into events of its span. Holds no context: that holds its listeners."""

    __slots__ = ("_attributes", "_span")

    def __init__(self, span: Span, attributes: Mapping[str, str]) -> None:
        self._span = span
        self._attributes = attributes

    def __call__(self, name: str, facts: Mapping[str, Any]) -> None:
        span = self._span
        if not span.is_recording():
            return  # ended: a note of something outside it
        if name == "publish":
            span.set_attribute(telemetry.SYSTEM, str(facts.get("system", telemetry.SCOPE)))
        elif name == "stored":
            created = {**self._attributes, telemetry.OPERATION_NAME: "create", telemetry.OPERATION_TYPE: "create"}
            span.update_name(telemetry.span_name(created))
            span.set_attributes(created)
        else:
            plain = telemetry.plain_facts(facts)
            span.add_event(name, {_attribute_name(fact): value for fact, value in plain.items()})
            if "attempt" in plain:
                span.set_attribute(f"{telemetry.SCOPE}.attempts", plain["attempt"])


def _attribute_name(fact: str) -> str:
    return telemetry.ERROR_TYPE if fact == "error" else f"{telemetry.SCOPE}.{fact}"


async def _walk_within(around: otel.Context, context: Context, call_next: Next) -> Any:
    token = otel.attach(around)
    try:
        return await call_next(context)
    finally:
        otel.detach(token)


def _extract(headers: Mapping[str, str]) -> otel.Context | None:
    """What the headers tell of a trace and its baggage; None without asking the propagator if they tell nothing."""
    if not headers or headers.keys().isdisjoint(propagate.get_global_textmap().fields):
        return None
    return propagate.extract(headers, otel.Context())


def _arrive(around: otel.Context, arrived: otel.Context, *, continue_trace: bool) -> otel.Context:
    """The surroundings of a message that brought a trace: a span that is already current stays the parent."""
    merged = otel.Context({**around, **arrived, _ARRIVED: _span_context(arrived)})
    current = trace.get_current_span(around)
    if current.get_span_context().is_valid:
        return trace.set_span_in_context(current, merged)
    return merged if continue_trace else trace.set_span_in_context(INVALID_SPAN, merged)


def _within(span: Span, around: otel.Context) -> otel.Context:
    """What is done in the span; where the provider makes none (a disabled SDK's), the trace around it goes on."""
    return trace.set_span_in_context(span, around) if span.get_span_context().is_valid else around


def _given(headers: Mapping[str, str], around: otel.Context) -> tuple[SpanContext, bool]:
    """The creation context that the caller put into the headers, invalid if none; and whether they are inherited."""
    arrived = _extract(headers)
    if arrived is None:
        return INVALID_SPAN_CONTEXT, False
    found = _span_context(arrived)
    inherited = found.is_valid and found == otel.get_value(_ARRIVED, around)
    return (INVALID_SPAN_CONTEXT if inherited else found), inherited


def _inject(headers: dict[str, str], within: otel.Context, *, replace: bool) -> None:
    if replace:
        # An inherited tracestate would stand beside a traceparent that it does not belong to.
        for field in propagate.get_global_textmap().fields:
            headers.pop(field, None)
    propagate.inject(headers, within)


def _span_context(context: otel.Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _links_to(span_context: SpanContext) -> list[Link]:
    return [Link(span_context)] if span_context.is_valid else []
