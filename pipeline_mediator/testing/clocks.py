"""A host whose clock is wrong, for tests of what must go by the database's."""

from __future__ import annotations

import datetime as dt
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["host_clock_off_by"]

_real = dt.datetime


@contextmanager
def host_clock_off_by(shift: dt.timedelta, of: object) -> Generator[None]:
    """Within, `time.time()` and `datetime.now()` are off as the package of the object `of` sees them.

    What is compiled keeps its own look at the clock; monotonic time goes on as ever.
    """
    wrong = _wrong_datetime(shift)
    seconds, nanoseconds = time.time, time.time_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: seconds() + shift.total_seconds())
        patch.setattr(time, "time_ns", lambda: nanoseconds() + int(shift.total_seconds() * 1e9))
        patch.setattr(dt, "datetime", wrong)
        package = type(of).__module__.partition(".")[0]
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == package and vars(module).get("datetime") is _real:
                patch.setattr(module, "datetime", wrong)
        yield


def _wrong_datetime(shift: dt.timedelta) -> type[dt.datetime]:
    class OfEveryDatetime(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _real)

    class Datetime(_real, metaclass=OfEveryDatetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return _real.now(tz) + shift

        @classmethod
        def utcnow(cls) -> Any:
            return _real.now(dt.UTC).replace(tzinfo=None) + shift

    return Datetime
