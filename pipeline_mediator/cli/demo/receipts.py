"""What a subscriber noted before it acknowledged: files that are only appended to, one for each of its processes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.cli.demo.listener import Taker

__all__ = ["Receipts", "listen_to_receipts"]


class _Receipt(msgspec.Struct, frozen=True):
    body: bytes
    content_type: str | None
    headers: dict[str, str]


class Receipts:
    """Writes a line for each message; the operating system has it then, whatever becomes of this process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)

    def take(self, body: bytes, content_type: str | None, headers: Mapping[str, str]) -> None:
        """Note one message."""
        self._file.write(msgspec.json.encode(_Receipt(body, content_type, dict(headers))) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@asynccontextmanager
async def listen_to_receipts(folder: Path, taker: Taker) -> AsyncGenerator[None]:
    """When the block ends, take what the processes of a service noted in this folder, one after the other."""
    yield
    for receipt in _read(folder):
        taker.take(receipt.body, receipt.content_type, receipt.headers)


def _read(folder: Path) -> Iterator[_Receipt]:
    for path in sorted(folder.iterdir()):
        # What stands behind the last newline was cut off by a kill: it was not acknowledged, so it has to come again.
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield msgspec.json.decode(line, type=_Receipt)
