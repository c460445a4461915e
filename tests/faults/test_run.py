"""The tool itself: a short run of random faults on each database, and how it ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.plan import Plan
from tests.faults.report import as_text
from tests.faults.run import run
from tests.faults.scene import ROOT
from tests.servers import MissingServerError

SECONDS = 60.0 * float(os.environ.get("FAULT_MINUTES", "0.4"))
"""Of the run on PostgreSQL; a third of it on each of the others."""

SEED = 1


# The client library leaves a connection to the garbage collector that is cut while it connects.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning")
@pytest.mark.parametrize(
    ("database", "seconds"), [("postgresql", SECONDS), ("mariadb", SECONDS / 3), ("sqlite", SECONDS / 3)]
)
def test_random_faults_lose_invent_invert_and_double_nothing(database: str, seconds: float) -> None:
    try:
        result = run(Plan(seconds, SEED, database))
    except MissingServerError as error:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    gc.collect()
    assert result.verdict.clean, as_text(result)
    assert result.deaths > 0
    assert result.verdict.delivered == result.verdict.events > 0
    assert result.verdict.duplicates <= result.verdict.repeatable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_what_it_started_and_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.faults", "--minutes", "2", "--database", "sqlite"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as tool:
        assert tool.stderr is not None
        try:
            assert "entries" in tool.stderr.readline()
            assert processes_that_know(tmp_path) >= 7
            tool.send_signal(number)
            tool.stderr.read()
            assert tool.wait(30) == 128 + number
        finally:
            tool.kill()
    assert processes_that_know(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def processes_that_know(folder: Path) -> int:
    """How many processes have this folder in their environment."""
    number = 0
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            number += str(folder).encode() in environment.read_bytes()
        except OSError:
            continue
    return number
