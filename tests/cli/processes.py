"""Commands as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 20
"""That no process of these takes."""


@contextmanager
def running(*arguments: str, apart: bool = False) -> Generator[subprocess.Popen[str]]:
    """The program as a process; what it says on stderr is in its output, unless `apart`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline_mediator", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if apart else subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    too_long = threading.Timer(SECONDS, process.kill)
    too_long.start()
    with process:
        try:
            yield process
        finally:
            too_long.cancel()
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    pytest.fail(f"it never said {text!r}, but {''.join(said)}")
