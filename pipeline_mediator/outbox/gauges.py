"""How much waits in the outboxes that this process relays, as OpenTelemetry gauges."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from pipeline_mediator import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions

    from pipeline_mediator.outbox.protocol import Health

__all__ = ["show", "wanted"]

_API: Final = metrics.get_meter_provider.__globals__
"""Where the API keeps the global provider; asking for it would make one."""

_GAUGES: Final = {
    "pending": ("{message}", "Messages in the outbox that are due or back off."),
    "waiting": ("{message}", "Messages behind one of the same key that could not be published."),
    "dead": ("{message}", "Messages that were given up."),
    "oldest": ("s", "Age of the oldest message that is neither sent nor given up."),
}
_OUTBOX: Final = f"{telemetry.SCOPE}.outbox"
_STALE: Final = 60.0
"""Seconds after which what was seen is not shown any more: no value is better than one that looks well."""

_seen: dict[str, tuple[float, Health]] = {}
_made = False


def wanted() -> bool:
    """Whether the application has set a meter provider."""
    return _API.get("_METER_PROVIDER", _API) is not None


def show(name: str, health: Health) -> None:
    """Let the gauges show this for the outbox that its relay calls `name`."""
    _seen[name] = (time.monotonic(), health)
    _make()


def _make() -> None:
    """Once in a process: the API cannot take an instrument back."""
    global _made  # noqa: PLW0603 - so is the provider
    if _made:
        return
    _made = True
    meter = metrics.get_meter(telemetry.SCOPE, telemetry.library_version() or "", schema_url=telemetry.SCHEMA_URL)
    for gauge, (unit, description) in _GAUGES.items():
        meter.create_observable_gauge(f"{_OUTBOX}.{gauge}", [_reading(gauge)], unit, description)


def _reading(gauge: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_: CallbackOptions) -> Iterable[Observation]:
        now = time.monotonic()
        for name, (seen_at, health) in list(_seen.items()):
            if now - seen_at < _STALE:
                yield Observation(getattr(health, gauge), {_OUTBOX: name})

    return read
