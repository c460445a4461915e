"""`python -m benchmarks.consuming`: messages per second through a consumer, milliseconds from a send to its effect."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import msgspec

from benchmarks import plots, report
from benchmarks.consuming.latency import latencies
from benchmarks.consuming.throughput import BY_HAND, FASTSTREAM, OURS, OURS_ALONE, SIDES, measure
from benchmarks.outbox.databases import Servers, address_of, servers
from benchmarks.plots import Bar, Chart, Panel
from benchmarks.progress import progress
from benchmarks.results import machine, own_version
from benchmarks.tables import Table, times
from tests.servers import MissingServerError

_PLACES = {"one process": False, "three processes": True}
_KINDS = {OURS: "own", OURS_ALONE: "own", BY_HAND: "floor", FASTSTREAM: "peer"}


@dataclass
class Results:
    """One run."""

    version: str
    python: str
    machine: dict[str, str]
    rounds: int
    messages: int
    throughput: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Messages per second by side, one for each round."""
    latency: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Milliseconds by place, of all rounds."""
    left_out: list[str] = field(default_factory=list[str])


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, show, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consuming",
        description="Consume a Redis Stream by this library, by hand and by FastStream; and time a send to its effect.",
    )
    parser.add_argument("--quick", action="store_true", help="one short round: it works, the figures mean little")
    parser.add_argument("--rounds", type=int, default=0, help="rounds in shuffled order; 7 without --quick")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write here")
    chosen = parser.parse_args(arguments)
    rounds = chosen.rounds or (1 if chosen.quick else 7)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        with servers() as found:
            results = Results(
                own_version(), python, machine() | found.versions, rounds, 2_000 if chosen.quick else 20_000
            )
            results.left_out += found.left_out
            run(results, found, 20 if chosen.quick else 200)
    except MissingServerError as error:
        print(error, file=sys.stderr)
        return 1
    report.show_tables(tables(results), results.left_out)
    folder: Path | None = chosen.output
    if folder is None and not chosen.quick:
        folder = report.FOLDER / results.version / f"python-{python}"
    if folder is not None:
        write(results, folder)
        print(f"Written to {folder}")
    return 0


def run(results: Results, found: Servers, sends: int) -> None:
    """Every measurement once in each round, in another order each time."""
    sides = [side for side in SIDES if side != FASTSTREAM or find_spec("faststream") is not None]
    if FASTSTREAM not in sides:
        results.left_out.append("FastStream is left out: it is not installed.")
    database = next((one.sqlalchemy for url in found.databases if (one := address_of(url)).postgresql), None)
    places = list(_PLACES) if database is not None else []
    order = random.Random(1)  # noqa: S311 - a shuffle
    jobs = [*sides, *places]
    with progress(results.rounds, len(jobs)) as tell:
        for number in range(1, results.rounds + 1):
            order.shuffle(jobs)
            for job in jobs:
                tell(number, job)
                if job in sides:
                    rate = asyncio.run(measure(job, found.redis, results.messages))
                    results.throughput.setdefault(job, []).append(rate)
                elif database is not None:
                    took = asyncio.run(latencies(database, found.redis, sends, processes=_PLACES[job]))
                    results.latency.setdefault(job, []).extend(one * 1000 for one in took)


def tables(results: Results) -> list[Table]:
    """What was measured, and what this library wants to reach."""
    throughput = Table("Consuming a Redis Stream", ("", "messages/s", "of by hand"))
    for side in SIDES:
        if rates := results.throughput.get(side):
            throughput.add(side, f"{statistics.median(rates):,.0f}", times(_of_by_hand(results, side)))
    latency = Table("From a send to its effect, idle, PostgreSQL and Redis", ("", "p50, ms", "p99, ms"))
    for place, found in results.latency.items():
        latency.add(place, *(f"{_quantile(found, part):.1f}" for part in (50, 99)))
    goals = Table("What this library wants to reach", ("", "limit", "measured", "reached"))
    ours, alone = (statistics.median(results.throughput[side]) for side in (OURS, OURS_ALONE))
    for title, rate in ((OURS, ours), (OURS_ALONE, alone)):
        goals.add(f"{title}, messages/s", "≥ 40,000", f"{rate:,.0f}", "yes" if rate >= 40_000 else "no")  # noqa: PLR2004
        share = _of_by_hand(results, title)
        goals.add(f"{title}: of by hand", "≥ 0.5", times(share), "yes" if share >= 0.5 else "no")  # noqa: PLR2004
    if peer := results.throughput.get(FASTSTREAM):
        ahead = ours / statistics.median(peer)
        goals.add("recommended: times FastStream", "> 1", times(ahead), "yes" if ahead > 1 else "no")
    for place, found in results.latency.items():
        for part, limit in ((50, 5.0), (99, 25.0)):
            value = _quantile(found, part)
            goals.add(f"{place}, p{part}, ms", f"≤ {limit:g}", f"{value:.1f}", "yes" if value <= limit else "no")
    return [throughput, *([latency] if latency.rows else []), goals]


def _of_by_hand(results: Results, side: str) -> float:
    pairs = zip(results.throughput[side], results.throughput[BY_HAND], strict=True)
    return statistics.median(one / other for one, other in pairs)


def _quantile(values: list[float], part: int) -> float:
    return statistics.quantiles(values, n=100)[part - 1]


def write(results: Results, folder: Path) -> None:
    """`consuming.json`, `consuming.md` and `consuming.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = [
        Bar(side, statistics.median(rates), min(rates), max(rates), f"{statistics.median(rates):,.0f}/s", _KINDS[side])
        for side, rates in results.throughput.items()
    ]
    panel = Panel("20,000 messages of 1 KiB, a handler that does nothing", sorted(bars, key=lambda bar: -bar.value))
    scale = "messages per second; longer is better"
    chart = Chart("consuming.svg", "Consuming a Redis Stream", scale, [panel], logarithmic=False)
    facts = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    sections = [
        f"# Consuming with pipeline-mediator {results.version} on Python {results.python}",
        f"{facts}. The median of {results.rounds} rounds in shuffled order; quotients are of one round each.",
        *(part for table in tables(results) for part in (f"## {table.title}", table.markdown())),
        *results.left_out,
        f"![{chart.title}]({chart.file})",
    ]
    (folder / "consuming.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    (folder / "consuming.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (folder / chart.file).write_text(plots.svg(chart), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
