"""Each measurement once: prepare the tables, start the processes, let them go, and watch the stream."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from statistics import quantiles
from threading import Timer
from time import monotonic, sleep
from typing import Any, Final, Self

from benchmarks.outbox.databases import Servers, address_of, vacuum
from benchmarks.outbox.events import STREAM
from benchmarks.results import ROOT
from benchmarks.rounds import BenchmarkError

__all__ = ["BY_HAND", "CQRS", "OURS", "Relayed", "Worker", "ask", "fill", "latencies", "percentiles", "relay"]

OURS: Final = "ours"
BY_HAND: Final = "by hand"
CQRS: Final = "python-cqrs"

_PATIENCE: Final = 300.0
"""Seconds after which a process is given up."""
_LOOK: Final = 0.002
"""Seconds between two looks at the stream's length."""


class Worker:
    """`benchmarks.outbox.worker` in a process of its own."""

    def __init__(self, side: str, database: str, servers: Servers, *options: str) -> None:
        self._name = f"{side} on {address_of(database).name}"
        command = [sys.executable, "-m", "benchmarks.outbox.worker", side, database, servers.redis, *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._watchdog = Timer(_PATIENCE, self._process.kill)

    def __enter__(self) -> Self:
        self._watchdog.start()
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.communicate()

    def go(self) -> None:
        self._tell("go")

    def stop(self) -> Any:
        """What it found out."""
        self._tell("stop")
        return self._answer()

    def check(self, until: float) -> None:
        """Raises `BenchmarkError` if it has ended by itself, or should have done its work by now."""
        if self._process.poll() is not None or monotonic() > until:
            self._fail()

    def _tell(self, word: str) -> None:
        to: Any = self._process.stdin
        try:
            to.write(f"{word}\n")
            to.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> Any:
        answers: Any = self._process.stdout
        line = answers.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self._process.kill()
        _, said = self._process.communicate()
        raise BenchmarkError(f"{self._name} failed:\n{said.strip()}")


@dataclass(frozen=True, slots=True)
class Relayed:
    """What relaying took."""

    rate: float
    """Events per second, from when connections stood until the last was in the stream."""
    cpu: float
    """Microseconds of the processor for an event, of all relays together."""
    peak: float
    """MiB, of the relay that took most."""


def relay(
    side: str,
    database: str,
    servers: Servers,
    count: int,
    *,
    batch: int,
    relays: int = 1,
    keep: bool = False,
) -> Relayed:
    """Let relays run until `count` of the events that wait are in the stream."""
    servers.client.delete(STREAM)
    options = ("--relay", "--batch", str(batch), *(["--keep"] if keep else []))
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(side, database, servers, *options)) for _ in range(relays)]
        began = monotonic()
        for worker in workers:
            worker.go()
        while servers.client.xlen(STREAM) < count:
            sleep(_LOOK)
            for worker in workers:
                worker.check(began + _PATIENCE)
        took = monotonic() - began
        ended = [worker.stop() for worker in workers]
    servers.client.delete(STREAM)
    cpu = sum(one["cpu_s"] for one in ended) * 1e6 / count
    return Relayed(count / took, cpu, max(one["peak_mib"] for one in ended))


def latencies(side: str, database: str, servers: Servers, count: int, *, notify: bool) -> list[float]:
    """Milliseconds from when each commit is asked for until a reader has the event, one event every 10 ms.

    With `notify` a process writes and another relays, else one does both.
    """
    servers.client.delete(STREAM)
    write = ("--write", str(count), *(["--notify"] if notify else []))
    with ExitStack() as stack:
        relaying = stack.enter_context(Worker(side, database, servers, "--relay", *(["--notify"] if notify else write)))
        writing = stack.enter_context(Worker(side, database, servers, *write)) if notify else relaying
        if notify:
            relaying.go()
            sleep(0.5)  # until it has begun, and found nothing
        writing.go()
        arrived: list[float] = []
        latest: Any = "0"
        began = monotonic()
        while len(arrived) < count:
            relaying.check(began + _PATIENCE)
            for _, entries in servers.client.xread({STREAM: latest}, block=1000) or ():
                now = monotonic()
                latest = entries[-1][0]
                arrived.extend(now for _ in entries)
        committed = writing.stop()["committed"]
    servers.client.delete(STREAM)
    return [(end - begin) * 1000 for begin, end in zip(committed, arrived, strict=True)]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th."""
    hundredths = quantiles(values, n=100, method="inclusive")
    return hundredths[49], hundredths[98]


def fill(side: str, database: str, servers: Servers, count: int, *, sent: bool = False, afresh: bool = True) -> None:
    """Put `count` rows into the table, which is emptied before unless told; as if they had been `sent`."""

    async def filling() -> None:
        if side == CQRS:
            from benchmarks.adapters import outbox_of_python_cqrs

            await outbox_of_python_cqrs.fill(address_of(database).sqlalchemy, count)
            return
        async with _tables(side, database, servers) as tables:
            if afresh:
                await tables.empty()
            await tables.fill(count)
            if sent:
                await tables.mark()

    asyncio.run(filling())
    vacuum(database)


def _tables(side: str, database: str, servers: Servers) -> AbstractAsyncContextManager[Any]:
    address = address_of(database)
    if side == OURS:
        from benchmarks.outbox.ours import ours

        return ours(address.sqlalchemy, servers.redis)
    from benchmarks.outbox.by_hand import PostgresByHand, SQLiteByHand

    return (PostgresByHand if address.postgresql else SQLiteByHand)(address.driver, servers.redis)


def ask(module: str, *arguments: str) -> Any:
    """Run `benchmarks.outbox.<module>` and read what it prints, one line of JSON."""
    command = [sys.executable, "-m", f"benchmarks.outbox.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    if done.returncode != 0:
        raise BenchmarkError(f"{module} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
