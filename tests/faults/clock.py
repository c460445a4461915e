"""Runs a program of `tests.faults.programs` on a host whose clock is off; SECONDS are the first argument."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import time
from datetime import datetime
from importlib import import_module
from typing import Any

__all__ = ["set_clock_off"]


def set_clock_off(seconds: float) -> None:
    """From here on, for whoever is imported after it."""
    real_time = time.time
    off = dt.timedelta(seconds=seconds)

    class OnReal(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, datetime)

    class Off(datetime, metaclass=OnReal):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return datetime.now(tz) + off

        @classmethod
        def utcnow(cls) -> Any:
            return datetime.now(dt.UTC).replace(tzinfo=None) + off

    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: int((real_time() + seconds) * 1e9)
    dt.datetime = Off  # type: ignore[misc]


if __name__ == "__main__":
    # msgspec knows only the real class.
    import_module("pipeline_mediator.cloudevents")
    set_clock_off(float(sys.argv[1]))
    asyncio.run(import_module("tests.faults.programs").run(*sys.argv[2:]))
