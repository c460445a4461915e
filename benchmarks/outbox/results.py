"""What was measured, what follows from it, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks import plots
from benchmarks.outbox.cases import GOALS, GROUPS, Goal, Group
from benchmarks.outbox.measuring import BY_HAND, CQRS, OURS
from benchmarks.plots import Bar, Chart, Panel
from benchmarks.tables import Table, times

__all__ = ["Results", "charts", "page", "tables", "write"]

_SIDES = (OURS, BY_HAND, CQRS)
_KINDS = {OURS: "own", BY_HAND: "floor", CQRS: "peer"}


@dataclass(frozen=True, slots=True)
class Results:
    """One run."""

    version: str
    """Of this library."""
    python: str
    machine: dict[str, str]
    size: dict[str, int]
    values: dict[str, dict[str, dict[str, list[float]]]] = field(
        default_factory=dict[str, dict[str, dict[str, list[float]]]]
    )
    """By group, row and side: one for each round."""
    left_out: list[str] = field(default_factory=list[str])

    def add(self, group: str, row: str, side: str, value: float) -> None:
        self.values.setdefault(group, {}).setdefault(row, {}).setdefault(side, []).append(value)

    def of(self, group: str, row: str, side: str) -> list[float]:
        """Empty if it was not measured."""
        return self.values.get(group, {}).get(row, {}).get(side, [])

    def quotient(self, upper: tuple[str, str, str], lower: tuple[str, str, str]) -> float | None:
        """The median over the rounds."""
        above, below = self.of(*upper), self.of(*lower)
        if not above or not below:
            return None
        if len(above) != len(below):
            return statistics.median(above) / statistics.median(below)
        return statistics.median(one / other for one, other in zip(above, below, strict=True))

    def to_json(self) -> bytes:
        """As it is kept in `outbox.json`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def tables(results: Results) -> Iterator[Table]:
    """Those for which there are figures; the last says what was reached."""
    for group in GROUPS:
        if rows := results.values.get(group.name):
            yield _table(results, group, sorted(rows))
    goals = Table("What this library wants to reach", ("", "limit", "measured", "reached"))
    for goal in GOALS:
        measured = _measured(results, goal)
        if measured is not None:
            reached = measured >= goal.limit if goal.at_least else measured <= goal.limit
            limit = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"
            goals.add(goal.title, limit, times(measured), "yes" if reached else "no")
    if goals.rows:
        yield goals


def _table(results: Results, group: Group, rows: list[str]) -> Table:
    sides = [side for side in _SIDES if any(results.of(group.name, row, side) for row in rows)]
    compared = len(sides) > 1
    table = Table(
        f"{group.title}{f', {group.unit}' if group.unit else ''}",
        ("", *sides, *(["ours / by hand"] if compared else [])),
    )
    for row in rows:
        cells = [_cell(results.of(group.name, row, side)) for side in sides]
        if compared:
            ratio = results.quotient((group.name, row, OURS), (group.name, row, BY_HAND))
            cells.append("—" if ratio is None else times(ratio))
        table.add(row, *cells)
    return table


def _cell(values: list[float]) -> str:
    if not values:
        return "—"
    middle = statistics.median(values)
    spread = (max(values) - min(values)) / 2 / middle if middle else 0.0
    shown = f"{middle:,.0f}" if middle >= 100 else times(middle)  # noqa: PLR2004
    return f"{shown} ±{spread:.0%}" if len(values) > 1 else shown


def _measured(results: Results, goal: Goal) -> float | None:
    if goal.over is not None:
        return results.quotient(goal.figure, goal.over)
    values = results.of(*goal.figure)
    return statistics.median(values) if values else None


def charts(results: Results) -> Iterator[Chart]:
    """One for each group that compares."""
    for group in GROUPS:
        rows = results.values.get(group.name, {})
        panels = [Panel(row, _bars(rows[row])) for row in sorted(rows) if len(rows[row]) > 1]
        if panels:
            yield Chart(f"outbox-{group.name}.svg", group.title, group.scale, panels, logarithmic=group.name == "poll")


def _bars(sides: dict[str, list[float]]) -> list[Bar]:
    return [
        Bar(side, statistics.median(values), min(values), max(values), _cell(values), _KINDS[side])
        for side in _SIDES
        if (values := sides.get(side))
    ]


def page(results: Results) -> str:
    """Everything about one run, as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    size = results.size
    method = (
        f"{facts}. The median of {size['rounds']} rounds in shuffled order, ± half the distance between the best and "
        f"the worst; quotients are of one round each. A backlog of {size['backlog']:,} events of 1 KiB; many rows are "
        f"{size['many']:,}, rows behind a failed head {size['behind']:,}, latencies {size['latencies']:,} a round."
    )
    sections = [f"# The outbox of pipeline-mediator {results.version} on {results.machine['python']}", method]
    for table in tables(results):
        sections += [f"## {table.title}", table.markdown()]
    if results.left_out:
        sections.append("\n".join(f"* {line}" for line in results.left_out))
    sections.append("\n\n".join(f"![{chart.title}]({chart.file})" for chart in charts(results)))
    return "\n\n".join(sections) + "\n"


def write(results: Results, folder: Path) -> None:
    """`outbox.json`, `outbox.md` and the charts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"outbox.json": results.to_json().decode(), "outbox.md": page(results)}
    texts |= {chart.file: plots.svg(chart) for chart in charts(results)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
