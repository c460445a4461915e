"""The demo in colour, with a progress bar."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from pipeline_mediator.cli.demo.screen import cells

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pipeline_mediator.cli.demo.table import Table

__all__ = ["RichScreen"]


class RichScreen:
    """Draws with rich; without a terminal behind it there are no colours."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)

    def heading(self, text: str) -> None:
        """In bold."""
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def text(self, text: str) -> None:
        """Unchanged, and only the terminal breaks its lines."""
        self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Generator[Callable[[], None]]:
        """A bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)

    def table(self, table: Table) -> None:
        """In columns; what does not add up is red."""
        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        drawn.add_column("", no_wrap=True)
        for source in (*table.sources, ""):
            drawn.add_column(source, justify="right")
        for row in table.rows:
            drawn.add_row(*cells(row), style=None if row.adds_up else "bold red")
        self.heading(table.title)
        self._console.print(drawn)

    def verdict(self, text: str, *, good: bool) -> None:
        """Green or red."""
        self._console.print()
        self._console.print(Text(text, style="bold green" if good else "bold red"), soft_wrap=True)
