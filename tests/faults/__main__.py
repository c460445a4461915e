"""`python -m tests.faults`: breaks real processes and servers at random, and checks that nothing was lost."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.databases import KINDS
from tests.faults.plan import Plan
from tests.faults.report import as_json, as_text, progress
from tests.faults.run import run

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is well, 1 if anything is wrong."""
    options = _parser().parse_args(arguments)
    # So that what was started is ended, and what was written is removed.
    signal.signal(signal.SIGTERM, _leave)
    plan = Plan(
        options.minutes * 60,
        options.seed,
        database=options.database,
        relays=options.relays,
        writers=options.writers,
        consumers=options.consumers,
        lease=options.lease,
        rate=options.rate,
        logs=options.logs,
    )
    try:
        result = run(plan, _show)
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(as_text(result) + "\n")
    if options.json is not None:
        options.json.write_text(as_json(result))
    return 0 if result.verdict.clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1, help="of the faults and of the commands; default 1")
    parser.add_argument("--database", choices=list(KINDS), default="postgresql")
    parser.add_argument("--relays", type=int, default=2, metavar="N", help="processes; default 2")
    parser.add_argument("--writers", type=int, default=2, metavar="N", help="processes; default 2")
    parser.add_argument("--consumers", type=int, default=2, metavar="N", help="processes; default 2")
    parser.add_argument(
        "--lease", type=float, default=3.0, metavar="SECONDS", help="of relays and consumers; default 3"
    )
    parser.add_argument("--rate", type=float, default=25.0, help="commands a second of each writer; default 25")
    parser.add_argument("--logs", action="store_true", help="show what the processes printed though all is well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser


def _show(seconds: float, faults: int, entries: int) -> None:
    sys.stderr.write(progress(seconds, faults, entries) + "\n")


def _leave(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
