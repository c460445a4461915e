"""How far a run is, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import perf_counter

__all__ = ["Tell", "progress"]

Tell = Callable[[int, str], None]
"""Called before each piece of work with the number of the round, from 1, and what is next."""


@contextmanager
def progress(rounds: int, jobs: int) -> Generator[Tell]:
    """A bar where there is a terminal and rich, else a line for each round."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield _lines(rounds)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(rounds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=rounds * jobs, completed=-1)

        def tell(number: int, what: str) -> None:
            bar.update(task, advance=1, description=f"round {number}/{rounds}  {what:<28}")

        yield tell


def _lines(rounds: int) -> Tell:
    began = perf_counter()
    told = 0

    def tell(number: int, what: str) -> None:
        nonlocal told
        if number > told:
            told = number
            print(f"round {number} of {rounds}, {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    return tell
