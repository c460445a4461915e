"""Runs everything several times, in another order each time, each set-up in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.adapters import OWN, REFERENCE, SETUPS, Setup, installed_version
from benchmarks.cases import BUILT_IN, CASES, STARTUP
from benchmarks.results import ROOT, Measured, Method, Results, Row, Started, machine, own_version
from benchmarks.startup import ANSWER, PROGRAMS, Program

__all__ = ["BenchmarkError", "Plan", "Processes", "fresh_processes", "plan", "run"]

_PATIENCE: Final = 300.0
"""Seconds after which a process is given up."""

_STARTS: Final = 3
"""Fresh processes for each program and round: one start is short, and varies."""

_START: Final = """
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    code = compile(file.read(), sys.argv[1], "exec")
before = set(sys.modules)
from time import process_time
names = {"__name__": "__main__"}
started = process_time()
exec(code, names)
took = process_time() - started
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
third_party = sorted(loaded - set(sys.stdlib_module_names))
print(json.dumps({"ms": took * 1000, "answer": names["answer"], "third_party": third_party}))
"""


_SLOWING: Final = frozenset(
    {"COVERAGE_PROCESS_START", "PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONTRACEMALLOC"}
)
"""What an environment may hold that no application has where it is fast."""


class BenchmarkError(Exception):
    """Something could not be measured; says what, and what the process said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    setups: tuple[Setup, ...]
    programs: tuple[Program, ...]
    rows: frozenset[str]
    left_out: tuple[str, ...]

    @property
    def jobs(self) -> list[Setup | Program]:
        """What one round consists of."""
        return [*self.setups, *(program for program in self.programs for _ in range(_STARTS))]


def plan(only: Collection[str] = ()) -> Plan:
    """What is installed, less what was not asked for.

    `only` names libraries, set-ups ("diator:rodi") and rows. Raises `BenchmarkError` for a name that means nothing.
    """
    rows = {case.name for case in (*CASES, *BUILT_IN)} | {STARTUP}
    names = {name for setup in SETUPS for name in (setup.library, setup.key)}
    unknown = set(only) - rows - names
    if unknown:
        known = ", ".join((*sorted(names), *sorted(rows)))
        raise BenchmarkError(f"unknown: {', '.join(sorted(unknown))}. There are: {known}")
    wanted_rows = (rows & set(only)) or rows
    wanted = (names & set(only)) or names
    asked = [setup for setup in SETUPS if {setup.library, setup.key} & wanted]
    setups = tuple(setup for setup in asked if not setup.missing)
    programs: tuple[Program, ...] = ()
    if STARTUP in wanted_rows:
        libraries = {setup.library for setup in asked}
        programs = tuple(one for one in PROGRAMS if one.installed and (not one.needs or one.library in libraries))
    return Plan(setups, programs, frozenset(wanted_rows), tuple(_left_out(asked)))


def _left_out(asked: Iterable[Setup]) -> Iterator[str]:
    """One line for each library, or for what a set-up needs beside it."""
    told: set[str] = set()
    for setup in asked:
        for distribution in setup.missing:
            if distribution not in told:
                told.add(distribution)
                yield f"{distribution} is not installed{f' ({setup.hint})' if setup.hint else ''}: left out"


def run(chosen: Plan, method: Method, on_progress: Callable[[int, str], None]) -> Results:
    """Measure. `on_progress(round, what)` is called before each process, rounds counted from 1."""
    results = Results(own_version(), f"{sys.version_info.major}.{sys.version_info.minor}", machine(), method)
    results.left_out.extend(chosen.left_out)
    measured = {setup.key: _empty(setup) for setup in chosen.setups}
    started = {program.name: Started(program.name) for program in chosen.programs}
    order = random.Random(method.seed)  # noqa: S311 - a shuffle
    with fresh_processes() as processes:
        for program in chosen.programs:
            processes.start(program)  # the first one compiles
        for number in range(1, method.rounds + 1):
            jobs = chosen.jobs
            order.shuffle(jobs)
            for job in jobs:
                on_progress(number, job.key if isinstance(job, Setup) else f"start of {job.name}")
                if isinstance(job, Setup):
                    _add(measured[job.key], processes.measure(job, chosen.rows, method))
                else:
                    _add_start(started[job.name], processes.start(job), job.package)
    results.measured.extend(one for one in measured.values() if one.rows)
    results.started.extend(started.values())
    return results


def _empty(setup: Setup) -> Measured:
    if setup.library == REFERENCE:
        version = ""
    else:
        version = own_version() if setup.library == OWN else installed_version(setup.library) or ""
    return Measured(setup.library, setup.name, setup.note, version)


def _add(measured: Measured, rows: dict[str, dict[str, float]]) -> None:
    for name, row in rows.items():
        known = measured.rows.setdefault(name, Row())
        known.ns.append(row["ns"])
        known.bare.append(row["bare"])


def _add_start(started: Started, answer: dict[str, Any], package: str) -> None:
    started.ms.append(round(answer["ms"], 2))
    started.third_party[:] = [name for name in answer["third_party"] if name != package]


# -- processes ---------------------------------------------------------------------------------------------------------


@contextmanager
def fresh_processes() -> Generator[Processes]:
    """Processes that find every module compiled from the second time on, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        environment = {name: text for name, text in os.environ.items() if name not in _SLOWING}
        yield Processes({**environment, "PYTHONPYCACHEPREFIX": folder})


class Processes:
    """Runs things one after the other, each in a process of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def measure(self, setup: Setup, rows: Collection[str], method: Method) -> dict[str, dict[str, float]]:
        """The rows of one set-up."""
        timing = ["--repeats", str(method.repeats), "--seconds", str(method.seconds)]
        command = ["-m", "benchmarks.worker", setup.key, *timing, "--rows", *sorted(rows)]
        answer: dict[str, dict[str, float]] = self._ask(setup.key, command)
        return answer

    def start(self, program: Program) -> dict[str, Any]:
        """One program: how long it took, and what it loaded."""
        file = ROOT / "benchmarks" / "startup" / program.file
        answer: dict[str, Any] = self._ask(program.name, ["-c", _START, str(file)])
        if answer["answer"] != ANSWER:
            raise BenchmarkError(f"{program.file} got {answer['answer']!r} for its message; it should be {ANSWER}")
        return answer

    def _ask(self, name: str, arguments: list[str]) -> Any:
        try:
            # From the checkout, which so becomes the first place to import from.
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{name} did not end within {_PATIENCE:g} s") from error
        if done.returncode != 0:
            raise BenchmarkError(f"{name} failed:\n{done.stderr.strip()}")
        return json.loads(done.stdout.splitlines()[-1])
