"""How long messages take, how many are sent, and what went wrong on the way, as OpenTelemetry metrics."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Final

from opentelemetry import metrics

from pipeline_mediator import telemetry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from opentelemetry.metrics import Meter, MeterProvider

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next, Rule

__all__ = ["MetricsMiddleware"]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The conventions' buckets."""

_COUNTED: Final = {
    "retry": ("retries", "{attempt}", "Further attempts at a message."),
    "timeout": ("timeouts", "{attempt}", "Attempts that took longer than they may."),
    "redelivery": ("redeliveries", "{message}", "Deliveries that failed and come again."),
    "dead letter": ("dead_letters", "{message}", "Deliveries that were given up."),
    "duplicate": ("duplicates", "{message}", "Deliveries that the inbox knew already and skipped."),
    "lost": ("lost_messages", "{message}", "Events that were committed but not published."),
    "after-commit hook failed": ("hook_failures", "{failure}", "After-commit hooks that raised or took too long."),
    "after-commit hooks given up": ("hook_failures", "{failure}", "After-commit hooks that raised or took too long."),
    "scope clean-up failed": ("cleanup_failures", "{failure}", "Scopes that failed to close."),
    "closing the transaction failed": ("transaction_failures", "{failure}", "Transactions that failed to close."),
}
"""The notes that are counted, by name."""


class MetricsMiddleware:
    """Measures messages, by OpenTelemetry's conventions for messaging.

        MetricsMiddleware()                # the global meter provider, whenever it is set

    Histograms, in seconds: `messaging.process.duration` of what is handled here, its transaction included, and
    `messaging.client.operation.duration` of each attempt to hand a message to a broker. Counters:
    `messaging.client.sent.messages` (attempts to send; what an outbox only stores is not one) and, under
    `pipeline_mediator.`, `retries`, `timeouts`, `duplicates`, `lost_messages`, `hook_failures`, `cleanup_failures` (of
    scopes) and `transaction_failures` (to close it when it had ended). `pipeline_mediator.active_messages` goes up and
    down.

    Attributes have few values: message type, destination, operation, consumer group, and `error.type` where something
    failed or was "cancelled"; never an id. Without a meter provider nothing is measured.
    """

    role: ClassVar[str] = "metrics"
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        self._uses_global = meter_provider is None
        version = telemetry.library_version() or ""
        meter = metrics.get_meter(telemetry.SCOPE, version, meter_provider, telemetry.SCHEMA_URL)
        self._instruments = _Instruments(meter)

    def for_route(self, route: Route) -> _Measured:
        """The measurements of this route."""
        return _Measured(route, self._instruments, uses_global=self._uses_global)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Measure the rest of the chain; a mediator compiles `for_route` instead."""
        measured = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if measured is None else measured(context, call_next))


_API: Final = metrics.get_meter_provider.__globals__
"""Where the API keeps the global provider. Asking `get_meter_provider()` costs 1 us."""


class _Instruments:
    """Made once for each middleware; those of the API's proxy become real when a provider is set."""

    def __init__(self, meter: Meter) -> None:
        self.processed = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.sending = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.sent = meter.create_counter(
            "messaging.client.sent.messages",
            "{message}",
            "Number of messages producer attempted to send to the broker.",
        )
        self.active = meter.create_up_down_counter(
            f"{telemetry.SCOPE}.active_messages", "{message}", "Messages that are being handled or published."
        )
        self.counted = {
            note: meter.create_counter(f"{telemetry.SCOPE}.{name}", unit, description)
            for note, (name, unit, description) in _COUNTED.items()
        }


class _Measured:
    """The measurements of one route."""

    def __init__(self, route: Route, instruments: _Instruments, *, uses_global: bool) -> None:
        self._instruments = instruments
        self._uses_global = uses_global
        self._attributes = telemetry.attributes_of(route)
        self._processes = route.destination is None
        self._from_broker = route.origin == "broker"

    def __call__(self, context: Context, call_next: Next) -> Awaitable[Any]:
        # Looked up for each message: applications set their provider after the mediator is made, or never.
        if self._uses_global and _API.get("_METER_PROVIDER", _API) is None:
            return call_next(context)
        return self._walk(context, call_next)

    async def _walk(self, context: Context, call_next: Next) -> Any:
        attributes = self._attributes
        if self._from_broker:
            attributes = attributes | telemetry.delivery_attributes(context.delivery)
        instruments = self._instruments
        notes = _Notes(instruments, attributes)
        context.on_note(notes)
        instruments.active.add(1, attributes)
        failure: str | None = None
        started = perf_counter()
        try:
            return await call_next(context)
        except BaseException as error:
            failure = telemetry.error_type(error)
            raise
        finally:
            notes.close(failure)
            instruments.active.add(-1, attributes)
            if self._processes:
                instruments.processed.record(perf_counter() - started, _with_error(attributes, failure))


class _Notes:
    """Counts the notes of a message while it is walked. Holds no context: that holds its listeners."""

    __slots__ = ("_attributes", "_instruments", "_open", "_send")

    def __init__(self, instruments: _Instruments, attributes: Mapping[str, str]) -> None:
        self._instruments = instruments
        self._attributes = attributes
        self._open = True
        self._send: _Send | None = None

    def __call__(self, name: str, facts: Mapping[str, Any]) -> None:
        if not self._open:
            return
        if name == "publish":
            self._send = _Send(self._instruments, {**self._attributes, **_system(facts)}, facts.get("count", 1))
        elif (counter := self._instruments.counted.get(name)) is not None:
            plain = telemetry.plain_facts(facts)
            error = plain.get("error")
            if name == "retry":
                self._end_send(None if error is None else str(error))
            event = {f"{telemetry.SCOPE}.event": plain["event"]} if "event" in plain else {}
            counter.add(1, {**_with_error(self._attributes, None if error is None else str(error)), **event})

    def close(self, failure: str | None) -> None:
        self._open = False
        self._end_send(failure)

    def _end_send(self, failure: str | None) -> None:
        send, self._send = self._send, None
        if send is not None:
            send.end(failure)


class _Send:
    """One attempt to hand messages to a broker, from Publish's note to the next attempt, or to the end."""

    __slots__ = ("_attributes", "_count", "_instruments", "_started")

    def __init__(self, instruments: _Instruments, attributes: Mapping[str, str], count: int) -> None:
        self._instruments = instruments
        self._attributes = attributes
        self._count = count
        self._started = perf_counter()

    def end(self, failure: str | None) -> None:
        attributes = _with_error(self._attributes, failure)
        self._instruments.sending.record(perf_counter() - self._started, attributes)
        self._instruments.sent.add(self._count, attributes)


def _system(facts: Mapping[str, Any]) -> dict[str, str]:
    return {telemetry.SYSTEM: str(facts["system"])} if "system" in facts else {}


def _with_error(attributes: Mapping[str, str], failure: str | None) -> dict[str, str]:
    return dict(attributes) if failure is None else {**attributes, telemetry.ERROR_TYPE: failure}
