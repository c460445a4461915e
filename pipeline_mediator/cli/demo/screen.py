"""What the demo shows, in plain text; `rich_screen` does the same in colour."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from pipeline_mediator.cli.demo.table import Row, Table

__all__ = ["PlainScreen", "Screen", "cells"]


class Screen(Protocol):
    """Where the demo writes to."""

    def heading(self, text: str) -> None:
        """Begin a part."""
        ...

    def text(self, text: str) -> None:
        """Lines as they are."""
        ...

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Gives a function to call after each of `total` steps."""
        ...

    def table(self, table: Table) -> None:
        """Figures, and whether they add up."""
        ...

    def verdict(self, text: str, *, good: bool) -> None:
        """The last line."""
        ...


class PlainScreen:
    """Prints lines."""

    def heading(self, text: str) -> None:
        """After an empty line."""
        print(f"\n== {text}", flush=True)

    def text(self, text: str) -> None:
        """Unchanged."""
        print(text, flush=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Generator[Callable[[], None]]:
        """A line for each tenth."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{what}: {done} of {total}", flush=True)

        yield advance

    def table(self, table: Table) -> None:
        """In columns."""
        rows = [("", *table.sources, ""), *(cells(row) for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        self.heading(table.title)
        for name, *values in rows:
            right = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            print("  ".join([name.ljust(widths[0]), *right]).rstrip())

    def verdict(self, text: str, *, good: bool) -> None:
        """Marked if it is bad."""
        print(f"\n{'' if good else 'ERROR: '}{text}", flush=True)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    values = ("" if value is None else f"{value:,}" for value in (*row.values, *row.beside))
    return (row.name, *values, "ok" if row.adds_up else "WRONG")
