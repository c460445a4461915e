"""`python -m benchmarks`: measures this library and every peer that is installed, shows and keeps the figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks import report
from benchmarks.results import Method
from benchmarks.rounds import BenchmarkError, plan, run

Tell = Callable[[int, str], None]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, show, write."""
    chosen = _parser().parse_args(arguments)
    quick: bool = chosen.quick
    rounds: int = chosen.rounds or (1 if quick else 7)
    method = Method(rounds, repeats=3, seconds=0.004 if quick else 0.06, seed=chosen.seed)
    try:
        what = plan(chosen.only)
        with _progress(rounds, len(what.jobs)) as tell:
            results = run(what, method, tell)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    report.show(results)
    folder: Path | None = chosen.output
    whole = not quick and not chosen.only
    if folder is None and whole and not chosen.no_write:
        folder = report.folder_of(results)
    if folder is None:
        print("Nothing was written: say where with --output.")
        return 0
    report.write(results, folder)
    if chosen.output is None:
        report.update_readme()
    print(f"Written to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what a message costs, as a ratio to a bare call, beside every peer that is installed.",
        epilog="A whole run is kept in benchmarks/results/; a quick one or a part only where --output says.",
    )
    parser.add_argument("--quick", action="store_true", help="one short round: it works, the figures are rough")
    parser.add_argument("--rounds", type=_positive, help="rounds in shuffled order; 7 without --quick")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="libraries, set-ups (diator:rodi), rows")
    parser.add_argument("--seed", type=int, default=1, help="of the order in each round")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FOLDER", help="write here")
    where.add_argument("--no-write", action="store_true", help="only show")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


@contextmanager
def _progress(rounds: int, jobs: int) -> Generator[Tell]:
    """A bar where there is a terminal and rich, else a line for each round."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield _lines(rounds)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(rounds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=rounds * jobs, completed=-1)

        def tell(number: int, what: str) -> None:
            bar.update(task, advance=1, description=f"round {number}/{rounds}  {what:<28}")

        yield tell


def _lines(rounds: int) -> Tell:
    began = perf_counter()
    told = 0

    def tell(number: int, what: str) -> None:
        nonlocal told
        if number > told:
            told = number
            print(f"round {number} of {rounds}, {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
