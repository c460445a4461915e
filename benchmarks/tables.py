"""What is told about a run: tables that a terminal and a Markdown file show alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from benchmarks.adapters import OWN, REFERENCE
from benchmarks.cases import BASELINE, BUILT_IN, CASES, LIMITS, STARTUP, Limit
from benchmarks.results import Measured, Results, Row, Started
from benchmarks.startup import FLOOR

__all__ = ["Table", "behind", "tables", "times"]

_TITLES: Final = {case.name: case.title for case in (*CASES, *BUILT_IN)}
_COMPARED: Final = [case.name for case in CASES if not case.name.startswith("scope")]


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, and texts under column names; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    own: set[int] = field(default_factory=set[int])
    """The rows that are this library's, by number."""

    def add(self, *cells: str, own: bool = False) -> None:
        """Append a row."""
        if own:
            self.own.add(len(self.rows))
        self.rows.append(cells)

    def plain(self) -> str:
        """With columns aligned."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Iterable[str], mark: str = " ") -> str:
            first, *others = zip(cells, widths, strict=True)
            return f"{mark} {first[0]:<{first[1]}}" + "".join(f"  {text:>{width}}" for text, width in others)

        marked = (line(row, "*" if number in self.own else " ") for number, row in enumerate(self.rows))
        return "\n".join([self.title, line(self.header), *marked])

    def markdown(self) -> str:
        """A Markdown table, without the title."""
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        for number in self.own:
            name, *others = self.rows[number]
            lines[number + 2] = (f"**{name}**", *(f"**{text}**" if text.strip("— ") else text for text in others))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def times(ratio: float) -> str:
    """Three digits: 2.74, 10.5, 109."""
    before_the_point = len(str(int(ratio)))
    return f"{ratio:,.{max(3 - before_the_point, 0)}f}"


def tables(results: Results) -> Iterator[Table]:
    """Those for which there are figures."""
    made = (
        _compared(results, "Times a bare call (± half the distance between the best and the worst round)", _ratio),
        _compared(results, "Nanoseconds", _nanoseconds),
        _scopes(results),
        _built_in(results),
        _starts(results),
        _limits(results),
    )
    return (table for table in made if table.rows)


def _ratio(row: Row) -> str:
    return f"{times(row.ratio)} ±{row.spread:.0%}"


def _nanoseconds(row: Row) -> str:
    return f"{row.median:,.0f}"


def _compared(results: Results, title: str, cell: Callable[[Row], str]) -> Table:
    names = [name for name in _COMPARED if any(name in one.rows for one in results.measured)]
    table = Table(title, ("", *(_TITLES[name] for name in names)))
    taking_part = [one for one in results.measured if any(name in one.rows for name in names)]
    for one in sorted(taking_part, key=lambda one: min(one.rows[name].ratio for name in names if name in one.rows)):
        table.add(one.label, *(cell(one.rows[name]) if name in one.rows else "—" for name in names), own=one.own)
    return table


def _scopes(results: Results) -> Table:
    table = Table("A scope for each message", ("", "ns", "times a bare call", "container alone, ns", "added to it, ns"))
    scoped = [one for one in results.measured if "scope" in one.rows]
    for one in sorted(scoped, key=lambda one: one.rows["scope"].ratio):
        row = one.rows["scope"]
        alone = results.row(OWN, one.setup, "scope_alone")
        added = ("—", "—") if alone is None else (_nanoseconds(alone), f"{row.median - alone.median:,.0f}")
        table.add(one.label, _nanoseconds(row), _ratio(row), *added, own=one.own)
    return table


def _built_in(results: Results) -> Table:
    table = Table(
        "What each built-in middleware adds to a message", ("", "added, ns", "in bare calls", "whole send, ns")
    )
    base = results.row(OWN, "built-in", BASELINE)
    for case in BUILT_IN:
        row = results.row(OWN, "built-in", case.name)
        if row is None or base is None:
            continue
        if row is base:
            table.add(case.title, "—", "—", _nanoseconds(row))
        else:
            added = row.added_to(base)
            bare = row.median / row.ratio
            table.add(case.title, f"{added:,.0f}", times(max(added / bare, 0)), _nanoseconds(row))
    return table


def _starts(results: Results) -> Table:
    table = Table(
        "Import, build a mediator, send one message, in a fresh process",
        ("", "ms", "over asyncio, ms", "third-party modules"),
    )
    floor = _started(results, FLOOR)
    for one in sorted(results.started, key=lambda one: one.median):
        over = "—" if floor is None or one is floor else f"{one.median - floor.median:+.1f}"
        table.add(one.name, f"{one.median:.1f}", over, " ".join(one.third_party) or "none", own=one.name == OWN)
    return table


def _limits(results: Results) -> Table:
    table = Table("What this library wants to reach", ("", "at most", "measured", "reached"))
    for limit in LIMITS:
        found = _against(limit, results)
        if found is not None:
            name, at_most, measured, reached = found
            table.add(name, at_most, measured, "yes" if reached else "no")
    return table


def _against(limit: Limit, results: Results) -> tuple[str, str, str, bool] | None:
    if limit.case == STARTUP:
        own, floor = _started(results, OWN), _started(results, FLOOR)
        if own is None or floor is None:
            return None
        over, loaded = own.median - floor.median, " ".join(own.third_party) or "nothing third-party"
        reached = over <= limit.at_most and not own.third_party
        return (
            "first message",
            f"asyncio + {limit.at_most:g} ms, nothing third-party",
            f"+{over:.1f} ms, {loaded}",
            reached,
        )
    row = results.row(OWN, limit.setup, limit.case)
    if row is None:
        return None
    title = _TITLES[limit.case]
    if limit.unit == "x":
        return title, f"{limit.at_most:g}×", f"{times(row.ratio)}×", row.ratio <= limit.at_most
    beside = results.row(OWN, limit.setup, limit.beside)
    if beside is None:
        return None
    added = row.added_to(beside)
    name = f"{title}, {limit.setup}" if limit.setup != "built-in" else title
    return name, f"+{limit.at_most:,.0f} ns", f"{added:+,.0f} ns", added <= limit.at_most


def _started(results: Results, name: str) -> Started | None:
    return next((one for one in results.started if one.name == name), None)


def behind(results: Results) -> list[str]:
    """Every row in which some set-up of another library takes less than this one's usual set-up, or as much.

    Over a container, only set-ups over the same container are compared.
    """
    lines: list[str] = []
    peers = [one for one in results.measured if not one.own and one.library != REFERENCE]
    for name in _COMPARED:
        own = results.row(OWN, "class", name)
        if own is not None:
            lines += _ahead(_TITLES[name], own, ((one, one.rows[name]) for one in peers if name in one.rows))
    for one in results.measured:
        if one.own and "scope" in one.rows:
            same = ((peer, peer.rows["scope"]) for peer in peers if peer.setup == one.setup and "scope" in peer.rows)
            lines += _ahead(f"{_TITLES['scope']}, {one.setup}", one.rows["scope"], same)
    own_start = _started(results, OWN)
    for started in results.started:
        if own_start is not None and started.name not in {OWN, FLOOR} and started.median <= own_start.median:
            lines.append(
                f"first message: {started.name} {started.median:.1f} ms, this library {own_start.median:.1f} ms"
            )
    return lines


def _ahead(title: str, own: Row, others: Iterable[tuple[Measured, Row]]) -> Iterator[str]:
    for peer, row in others:
        if row.ratio <= own.ratio:
            yield f"{title}: {peer.label} {times(row.ratio)}×, this library {times(own.ratio)}×"
