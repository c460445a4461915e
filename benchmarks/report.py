"""Shows a run on the terminal and writes it down: JSON, Markdown, SVG, and the figures in benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import plots
from benchmarks.results import ROOT, Results
from benchmarks.tables import Table, behind, tables

__all__ = ["BEGIN", "END", "FOLDER", "folder_of", "show", "show_tables", "update_readme", "write"]

FOLDER: Final = ROOT / "benchmarks" / "results"
"""One folder for each version of this library, and in it one for each Python."""

_README: Final = ROOT / "benchmarks" / "README.md"
BEGIN: Final = "<!-- figures: written by a whole run, see benchmarks/report.py -->"
END: Final = "<!-- end of figures -->"


def folder_of(results: Results) -> Path:
    """Where a whole run is kept."""
    return FOLDER / results.version / f"python-{results.python}"


# -- terminal ----------------------------------------------------------------------------------------------------------


def show(results: Results) -> None:
    """Print the tables."""
    show_tables(tables(results), _remarks(results))


def show_tables(shown: Iterable[Table], remarks: Iterable[str]) -> None:
    """Print them; in colours if rich is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print("\n\n".join([*(table.plain() for table in shown), "\n".join(remarks)]))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in shown:
        console.print(_as_rich(table))
    console.print("\n".join(remarks), markup=False)


def _as_rich(table: Table) -> object:
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for number, row in enumerate(table.rows):
        shown.add_row(*row, style="bold cyan" if number in table.own else None)
    return shown


def _remarks(results: Results) -> Iterator[str]:
    yield from results.left_out
    yield from (f"behind: {line}" for line in behind(results))


# -- files -------------------------------------------------------------------------------------------------------------


def write(results: Results, folder: Path) -> list[Path]:
    """Write `results.json`, `README.md` and the charts; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(chart.file, plots.svg(chart)) for chart in plots.charts(results)]
    texts = [("results.json", results.to_json().decode()), ("README.md", _page(results)), *drawn]
    for name, text in texts:
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name, _ in texts]


def _page(results: Results) -> str:
    """Everything about one run."""
    sections = [f"# pipeline-mediator {results.version} on {results.machine['python']}", _conditions(results)]
    for table in tables(results):
        sections += [f"## {table.title}", table.markdown()]
    sections += ["## Where others take less", _behind(results)]
    sections += ["## How each was set up", _setups(results)]
    sections += ["## Charts", "\n\n".join(f"![{chart.title}]({chart.file})" for chart in plots.charts(results))]
    return "\n\n".join(sections) + "\n"


def _conditions(results: Results) -> str:
    method = results.method
    facts = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    return (
        f"{facts}. The median of {method.rounds} rounds in shuffled order (seed {method.seed}); in each a process "
        f"for every set-up, and in that the median of {method.repeats} loops of {method.seconds * 1000:g} ms."
    )


def _behind(results: Results) -> str:
    lines = [*behind(results)] or ["In no row that was measured here."]
    return "\n".join(f"* {line}" for line in [*lines, *results.left_out])


def _setups(results: Results) -> str:
    return "\n".join(f"* {one.label} {one.version}: {one.note}".replace(" :", ":") for one in results.measured)


def update_readme(readme: Path = _README, folder: Path = FOLDER) -> None:
    """Put the figures of the newest version between the marks in benchmarks/README.md."""
    head, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme.name} has lost its marks {BEGIN!r} and {END!r}")
    figures = "\n\n".join(_summaries(_newest(folder), readme.parent))
    readme.write_text(f"{head}{begin}\n\n{figures}\n\n{end}{tail}", encoding="utf-8")


def _newest(folder: Path) -> list[Path]:
    kept = sorted(folder.glob("*/*/results.json"), key=lambda path: [_number(part) for part in path.parts[-3:-1]])
    return [path for path in kept if path.parts[-3] == kept[-1].parts[-3]]


def _number(text: str) -> list[int]:
    return [int(part) for part in text.removeprefix("python-").split(".") if part.isdigit()]


def _summaries(files: Iterable[Path], readme_folder: Path) -> Iterator[str]:
    for file in files:
        results = Results.from_json(file.read_bytes())
        where = file.parent.relative_to(readme_folder).as_posix()
        ratios, *others = tables(results)
        yield f"### {results.version} on {results.machine['python']}"
        yield f"{_conditions(results)} All of it: [{where}]({where}/README.md)."
        yield f"{ratios.title}:\n\n{ratios.markdown()}"
        yield from (f"{table.title}:\n\n{table.markdown()}" for table in others if table.title != "Nanoseconds")
        yield f"Where others take less than the usual set-up of this library:\n\n{_behind(results)}"
        yield "\n".join(f"![{chart.title}]({where}/{chart.file})" for chart in plots.charts(results))
