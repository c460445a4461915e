"""The service's process, from outside: it is started, killed, and started again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import msgspec

from pipeline_mediator.cli.errors import CommandError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import IO, Self

    from pipeline_mediator.cli.demo.service import Settings

__all__ = ["ServiceProcess"]

PROGRAM = "pipeline_mediator.cli.demo.service"

SECONDS = 30.0
"""How long a start may take."""


class ServiceProcess:
    """One process at a time, and none when the block ends, however it ends.

    `folder` is for what the processes write. Raises `CommandError` for one that does not start, or ends by itself.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.receipts = folder / "receipts"
        self.receipts.mkdir()
        self._settings = settings
        self._complaints = folder / "complaints"
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""
        self._up = asyncio.Event()

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        self._starts += 1
        settings = msgspec.structs.replace(self._settings, receipts=str(self.receipts / f"{self._starts:03}"))
        with self._complaints.open("ab") as complaints:
            # In a session of its own: a Ctrl-C at the terminal is for the demo, which then ends it.
            process = self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - it starts in no time; a module of ours
                [sys.executable, "-m", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
        stdin, stdout = _pipes(process)
        # By the pipe, which stays open: not everybody may read the password in a database URL, and its end tells the
        # process that this one has ended.
        with suppress(BrokenPipeError):  # it has ended already, which is seen below
            stdin.write(msgspec.json.encode(settings) + b"\n")
            stdin.flush()
        reading = asyncio.ensure_future(asyncio.to_thread(stdout.readline))
        await asyncio.wait([reading], timeout=SECONDS)
        if not reading.done():
            self.kill()
        port = await reading
        if not port:
            raise CommandError(f"the service did not start: {self._complaint()}")
        self._address = f"http://127.0.0.1:{int(port)}"
        self._up.set()

    async def address(self) -> str:
        """Where it listens, as soon as it does: a start that takes too long fails."""
        await self._up.wait()
        if self._process is not None and self._process.poll() is not None:
            raise CommandError(f"the service ended by itself: {self._complaint()}")
        return self._address

    def kill(self) -> None:
        """As `kill -9` does it: nothing is finished, nothing is said to anybody."""
        self._up.clear()
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in _pipes(self._process):
            pipe.close()
        self._process = None

    def _complaint(self) -> str:
        lines = self._complaints.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it says nothing; see --log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Its input and its output, which are there because they were asked for."""
    return cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
