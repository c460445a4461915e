"""What a command prints: its result on stdout, as one JSON document or for people; everything else on stderr."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from pipeline_mediator.cli.wording import printable, told

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

__all__ = ["complain", "note", "nothing_else_on_stdout", "print_document", "print_facts", "print_table", "progress"]

_UNBOUNDED = 1_000_000
"""Columns of what is no terminal: whoever reads a pipe wants whole values."""


@contextmanager
def nothing_else_on_stdout(*, enforced: bool) -> Generator[None]:
    """What an application prints meanwhile goes to stderr, so that the one document stands alone."""
    if not enforced:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_document(document: object) -> None:
    """One JSON document."""
    # In ASCII: what came from outside may hold characters that a terminal obeys.
    print(json.dumps(document, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Rows for people, and for `awk`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(_cell(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False, emoji=False).print(table)


def print_facts(facts: dict[str, Any], *, indent: int = 0) -> None:
    """One line each; what is not known is left out."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value is not None:
            print(f"{' ' * indent}{_cell(name):<{width}}  {_cell(value)}".rstrip())


def note(text: str) -> None:
    """A line beside the result."""
    print(printable(text), file=sys.stderr)


def complain(of: BaseException | str) -> None:
    """Why the command ends."""
    print(f"pipeline-mediator: {printable(of, lines=True) if isinstance(of, str) else told(of)}", file=sys.stderr)


@contextmanager
def progress(doing: str, total: int) -> Generator[Callable[[int], None]]:
    """Shows how far it is: a bar on a terminal, elsewhere a line for each tenth. Nothing where one step does it."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(doing, total=total)
            yield lambda more: bars.advance(bar, more)
        return
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if done < total and before * 10 // total < done * 10 // total:
            note(f"{doing}: {done} of {total}")

    yield advance


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))
