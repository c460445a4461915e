"""A run: faults as the schedule has them, then quiet until all has drained, then a verdict."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.evidence import gather
from tests.faults.stage import Stage
from tests.faults.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.faults.plan import Plan
    from tests.faults.schedule import Fault
    from tests.faults.verdict import Verdict

__all__ = ["Result", "run"]


@dataclass(slots=True)
class Result:
    """What came of it."""

    plan: Plan
    verdict: Verdict
    faults: Sequence[Fault]
    starts: dict[str, int] = field(default_factory=dict[str, int])
    """Of each process."""
    seconds_to_drain: float = 0.0
    logs: str = ""
    """The end of what each process printed, if something is wrong."""

    @property
    def deaths(self) -> int:
        """Kills and stops."""
        return sum(fault.is_death for fault in self.faults)


def _tell_nobody(seconds: float, faults: int, entries: int) -> None:
    """As most tests want it."""


def run(plan: Plan, tell: Callable[[float, int, int], None] = _tell_nobody) -> Result:
    """Do it. `tell` is told, every now and then: seconds since the start, faults so far, entries in the streams.

    Whatever happens, every process that was started is ended, and nothing is left on the disk.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "ledger").mkdir()
        stage = Stage(stack, plan, folder)
        stage.open()
        began = time.monotonic()
        stage.play(tell)
        stage.calm()
        ended = time.monotonic()
        record = asyncio.run(gather(stage.database_url, stage.redis.url, folder / "ledger", stage.troubles))
        verdict = judge(record)
        return Result(
            plan,
            verdict,
            stage.done,
            {child.name: child.starts for child in stage.children.values()},
            round(ended - began - plan.seconds, 1),
            "" if verdict.clean and not plan.logs else stage.logs(),
        )
