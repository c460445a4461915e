"""One set-up in one process of its own: proves that it does its work, times it, and prints what it took as JSON.

python -m benchmarks.worker diator:rodi --repeats 3 --seconds 0.06
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from types import CodeType, FrameType
from typing import Any, TypeAlias

from benchmarks.adapters import SETUPS
from benchmarks.cases import BUILT_IN, CASES
from benchmarks.work import ANY, COUNT, AdapterError, Subject, copies

__all__ = ["measure", "prove", "rows_of"]

Loop: TypeAlias = Callable[[Any, Any, int], Awaitable[None]]

# What the thread itself took: the same as by the wall on an idle machine, and nearly the same on a busy one. Windows
# counts it in steps of 16 ms.
_now = time.perf_counter_ns if sys.platform == "win32" else time.thread_time_ns

_LEAST = 16
"""Calls in the first, shortest loop."""


def rows_of(adapter: object) -> Iterator[str]:
    """The rows in which an adapter takes part, in the order of the report."""
    return (case.name for case in (*CASES, *BUILT_IN) if hasattr(adapter, case.name))


# -- proving -----------------------------------------------------------------------------------------------------------


async def prove(subject: Subject) -> None:
    """See by one call that what will be timed does what it should: each step once, in order, and the result.

    Nothing is added to the code that is timed: the interpreter itself tells which functions it enters. Raises
    `AdapterError` if they are others.
    """
    expected = [step.__code__ for step in subject.steps]
    frames: list[FrameType] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        # A coroutine that goes on after a suspension is entered again, with the same frame.
        known = any(frame.f_code is code for code in expected)
        if event == "call" and known and not any(frame is one for one in frames):
            frames.append(frame)

    before = COUNT[0]
    sys.setprofile(watch)
    try:
        result = subject.call(subject.message)
        if subject.awaited:
            result = await result
    finally:
        sys.setprofile(None)
    _expect("runs", _names(frame.f_code for frame in frames), _names(expected))
    _expect("handles", COUNT[0] - before, subject.handled)
    if subject.result is not ANY:
        _expect("returns", result, subject.result)


def _names(codes: Iterator[CodeType] | list[CodeType]) -> list[str]:
    return [code.co_qualname for code in codes]


def _expect(verb: str, found: object, expected: object) -> None:
    if found != expected:
        raise AdapterError(f"one call {verb} {found!r}; it should be {expected!r}")


# -- timing ------------------------------------------------------------------------------------------------------------


def _loop_for(subject: Subject) -> Loop:
    if not subject.awaited:
        return _call
    return _await if subject.new_message is None else _await_new


async def _await(call: Any, message: Any, number: int) -> None:
    for _ in range(number):
        await call(message)


async def _await_new(call: Any, make: Any, number: int) -> None:
    for _ in range(number):
        await call(make())


async def _call(call: Any, message: Any, number: int) -> None:
    for _ in range(number):
        call(message)


class Timer:
    """Times one subject, in loops of about the same length."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._argument = subject.message if subject.new_message is None else subject.new_message
        # A loop of its own, or CPython would specialise one loop for what ran in it first.
        self._loop: Loop = copies(_loop_for(subject), 1)[0]
        self._number = _LEAST

    async def prepare(self, seconds: float) -> None:
        """Warm up, and find out how many calls take so long."""
        while (each := await self.time()) * self._number < seconds * 1e9 / 4:
            self._number *= 2
        self._number = max(_LEAST, round(seconds * 1e9 / each))

    async def time(self) -> float:
        """Nanoseconds for each call, in one loop. Raises `AdapterError` if not every call was handled."""
        before = COUNT[0]
        started = _now()
        await self._loop(self._subject.call, self._argument, self._number)
        took = _now() - started
        handled = COUNT[0] - before
        if handled != self._number * self._subject.handled:
            raise AdapterError(f"{self._number} calls were handled {handled} times")
        return took / self._number


async def measure(adapter: Any, rows: Collection[str], *, repeats: int, seconds: float) -> dict[str, dict[str, float]]:
    """Nanoseconds of each row, and of the bare call around it.

    Bare call and row take turns, so that a machine that changes its pace changes it for both.
    """
    bare_subject: Subject = adapter.bare()
    await prove(bare_subject)
    bare = Timer(bare_subject)
    await bare.prepare(seconds / 3)
    measured: dict[str, dict[str, float]] = {}
    for row in rows:
        subject: Subject = getattr(adapter, row)()
        try:
            await prove(subject)
            timer = Timer(subject)
            await timer.prepare(seconds)
            bares, took = [await bare.time()], list[float]()
            for _ in range(repeats):
                took.append(await timer.time())
                bares.append(await bare.time())
        except AdapterError as error:
            raise AdapterError(f"{row}: {error}") from error
        measured[row] = {"ns": round(statistics.median(took), 1), "bare": round(statistics.median(bares), 2)}
    return measured


def main() -> None:
    """Measure one set-up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description="Measure one set-up.")
    parser.add_argument("setup", choices=[setup.key for setup in SETUPS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.06)
    parser.add_argument("--rows", nargs="*")
    chosen = parser.parse_args()
    adapter = next(setup for setup in SETUPS if setup.key == chosen.setup).load()
    rows = [row for row in rows_of(adapter) if chosen.rows is None or row in chosen.rows]
    print(json.dumps(asyncio.run(measure(adapter, rows, repeats=chosen.repeats, seconds=chosen.seconds))))


if __name__ == "__main__":
    main()
