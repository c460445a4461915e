"""What happened, written down outside of every database: files to which processes append, line by line."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

__all__ = ["Ledger", "entries", "files"]


class Ledger:
    """The file of one process, and of nobody else.

    A line is handed to the operating system in one write, before anything else happens: a process that is killed loses
    none of those that it wrote. Only the machine itself could, which is not what dies here, so nothing is synced.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def write(self, **entry: Any) -> None:
        os.write(self._file, json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def files(folder: Path, role: str) -> list[Path]:
    """Of all processes that played this part: writer, relay."""
    return sorted(folder.glob(f"{role}-*.jsonl"))


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """What one process wrote. The last line may be cut off, because the process was killed over it."""
    *lines, rest = file.read_bytes().split(b"\n")
    yield from map(json.loads, lines)
    if rest:
        with suppress(ValueError):
            yield json.loads(rest)
