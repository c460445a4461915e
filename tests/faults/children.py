"""The processes of a run: each started under a name of its own, and never touched but by its id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.settings import Settings

__all__ = ["Child"]

ROOT = Path(__file__).parents[2]
_END_SECONDS = 20.0
_BEGIN_SECONDS = 15.0
"""So long it may take, on a busy machine, until a process heeds SIGTERM."""


class Child:
    """A part that somebody plays: when its process ends, another one is started in its place."""

    def __init__(self, name: str, arguments: Sequence[str], settings: Settings) -> None:
        self.name = name
        self.starts = 0
        self._arguments = [sys.executable, "-u", *arguments]
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @property
    def log(self) -> Path:
        """What all processes of this name have printed."""
        return Path(self._settings.folder) / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.starts += 1
        self._started_at = time.monotonic()
        environment = self._settings.environment(f"{self.name}.{self.starts}")
        with self.log.open("ab") as log:
            # Whatever it is told by its input: the end of it tells that we have ended.
            self._process = subprocess.Popen(
                self._arguments,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Like a crash."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(_END_SECONDS)
            self._close_input()

    def ended(self) -> int | None:
        """The exit code of a process that has ended without being killed by us; once."""
        if self._process is None or self.running:
            return None
        code = self._process.returncode
        self._close_input()
        self._process = None
        return code

    def end(self) -> str | None:
        """Ask it to end, and wait; what is wrong with how it did that, None if nothing is."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        process = self._process
        if process is None:
            return f"{self.name} had ended already"
        try:
            code = process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} did not end within {_END_SECONDS:g} s of SIGTERM"
        finally:
            self.kill()
            self._process = None
        young = time.monotonic() < self._started_at + _BEGIN_SECONDS
        if code == 0 or (code == -signal.SIGTERM and young):
            return None
        return f"{self.name} ended with {code} when asked to end"

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
