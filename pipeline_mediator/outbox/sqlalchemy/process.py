"""Whether the process that wrote its name somewhere still runs on this machine."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

__all__ = ["ProcessName"]

_PROC = Path("/proc")


class ProcessName(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same number, nor for one on another machine."""

    pid: int
    started: str
    """Ticks since the machine started; empty where the system does not tell."""
    machine: str

    @classmethod
    def own(cls) -> ProcessName:
        """Of this process, which may be a fork of the one that asked before."""
        return name_of(os.getpid())

    def is_dead(self) -> bool:
        """True only if that is certain."""
        if self.machine != _machine():
            return False
        if self.started:
            return _started(self.pid) != self.started
        if os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@cache
def name_of(own: int) -> ProcessName:
    """The name of the process that asks, which has this number."""
    return ProcessName(own, _started(own) or "", _machine())


def _started(pid: int) -> str | None:
    """None for one that is not there any more, a zombie included."""
    with suppress(OSError):
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in {"Z", "X"} else fields[19]
    return None


def _machine() -> str:
    """The same for processes that see each other's numbers: in a container, only those of that container."""
    boot = namespace = ""
    with suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink(_PROC / "self/ns/pid")  # noqa: PTH115 - what it points to is no path
    return f"{socket.gethostname()} {boot} {namespace}"
