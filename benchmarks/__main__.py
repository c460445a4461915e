"""`python -m benchmarks`: measures this library and every peer that is installed, shows and keeps the figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.progress import progress
from benchmarks.results import Method
from benchmarks.rounds import BenchmarkError, plan, run


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, show, write."""
    chosen = _parser().parse_args(arguments)
    quick: bool = chosen.quick
    rounds: int = chosen.rounds or (1 if quick else 7)
    method = Method(rounds, repeats=3, seconds=0.004 if quick else 0.06, seed=chosen.seed)
    try:
        what = plan(chosen.only)
        with progress(rounds, len(what.jobs)) as tell:
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


if __name__ == "__main__":
    sys.exit(main())
