"""`python -m benchmarks.outbox`: measures the outbox beside what one writes by hand, shows and keeps the figures."""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.outbox.cases import Job, Size, jobs
from benchmarks.outbox.databases import Servers, servers
from benchmarks.outbox.results import Results, tables, write
from benchmarks.progress import progress
from benchmarks.results import machine, own_version
from benchmarks.rounds import BenchmarkError
from tests.servers import MissingServerError

WHOLE = Size(rounds=5, backlog=20_000, many=1_000_000, taken=100_000, behind=200_000, latencies=300, loops=300)
QUICK = Size(rounds=1, backlog=2_000, many=5_000, taken=4_000, behind=2_000, latencies=30, loops=20)


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, show, write."""
    chosen = _parser().parse_args(arguments)
    size = QUICK if chosen.quick else WHOLE
    if chosen.rounds:
        size = dataclasses.replace(size, rounds=chosen.rounds)
    try:
        with servers() as found:
            results = run(found, size, chosen.only, chosen.seed)
    except (BenchmarkError, MissingServerError) as error:
        print(error, file=sys.stderr)
        return 1
    report.show_tables(tables(results), results.left_out)
    folder: Path | None = chosen.output
    if folder is None and not (chosen.quick or chosen.only or chosen.no_write):
        folder = report.FOLDER / results.version / f"python-{results.python}"
    if folder is None:
        print("Nothing was written: say where with --output.")
        return 0
    write(results, folder)
    print(f"Written to {folder}")
    return 0


def run(found: Servers, size: Size, only: str, seed: int) -> Results:
    """Every job once in each round, in another order each time."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    results = Results(own_version(), python, machine() | found.versions, dataclasses.asdict(size))
    results.left_out.extend(found.left_out)
    wanted = [job for job in jobs(found, size) if only in job.name]
    if not wanted:
        raise BenchmarkError(f"no measurement has {only!r} in its name")
    order = random.Random(seed)  # noqa: S311 - a shuffle
    with progress(size.rounds, len(wanted)) as tell:
        for number in range(1, size.rounds + 1):
            order.shuffle(wanted)
            for job in wanted:
                tell(number, job.name)
                if number == 1 or not job.once:
                    _measure(job, results)
    return results


def _measure(job: Job, results: Results) -> None:
    for figure in job.measure():
        results.add(figure.group, figure.row, figure.side, figure.value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outbox",
        description="Measure the outbox and its relay, beside what one writes by hand, in processes of their own.",
        epilog="Servers are started here, or named by BENCHMARK_REDIS_URL and BENCHMARK_POSTGRES_URL: the stream "
        "`orders`, some tables and some databases there are deleted. A whole run is kept in benchmarks/results/; a "
        "quick one or a part only where --output says.",
    )
    parser.add_argument("--quick", action="store_true", help="one short round: it works, the figures mean little")
    parser.add_argument("--rounds", type=int, help="rounds in shuffled order; 5 without --quick")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name, such as SQLite or poll")
    parser.add_argument("--seed", type=int, default=1, help="of the order in each round")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FOLDER", help="write here")
    where.add_argument("--no-write", action="store_true", help="only show")
    return parser


if __name__ == "__main__":
    sys.exit(main())
