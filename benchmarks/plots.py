"""Horizontal bars, most of them on a logarithmic scale, as SVG that is readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from benchmarks.adapters import OWN, REFERENCE
from benchmarks.cases import BASELINE, BUILT_IN, CASES
from benchmarks.results import Measured, Results
from benchmarks.startup import FLOOR
from benchmarks.tables import times

__all__ = ["Bar", "Chart", "Panel", "charts", "svg"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One value, with the least and the most of all rounds."""

    label: str
    value: float
    low: float
    high: float
    text: str
    kind: str = "peer"
    """"own", "peer" or "floor"."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars that are compared with each other."""

    title: str
    bars: list[Bar]


@dataclass(frozen=True, slots=True)
class Chart:
    """One file."""

    file: str
    title: str
    scale: str
    """What the bars show, and in what."""
    panels: list[Panel]
    logarithmic: bool = True


# -- what is drawn -----------------------------------------------------------------------------------------------------


def charts(results: Results) -> Iterator[Chart]:
    """Those for which there are figures."""
    ratio = "times a bare call, logarithmic; shorter is better"
    drawn = (
        Chart("send.svg", "Sending a request", ratio, _panels(results, "send", "send_new")),
        Chart("middlewares.svg", "Sending through five middlewares", ratio, _panels(results, "functions", "objects")),
        Chart("emit.svg", "Emitting an event", ratio, _panels(results, "emit_1", "emit_10")),
        Chart("scope.svg", "A scope for each message", ratio, _panels(results, "scope")),
        Chart(
            "built-in.svg",
            "What built-in middlewares add",
            "nanoseconds, logarithmic; shorter is better",
            _added(results),
        ),
        Chart(
            "startup.svg",
            "From nothing to the first message",
            "milliseconds; shorter is better",
            _starts(results),
            logarithmic=False,
        ),
    )
    return (chart for chart in drawn if chart.panels)


def _panels(results: Results, *names: str) -> list[Panel]:
    what = {case.name: case.what for case in CASES}
    panels: list[Panel] = []
    for name in names:
        bars = [_bar(one, name) for one in results.measured if name in one.rows]
        if bars:
            panels.append(Panel(what[name], sorted(bars, key=lambda bar: bar.value)))
    return panels


def _bar(measured: Measured, name: str) -> Bar:
    row = measured.rows[name]
    kind = "own" if measured.own else "floor" if measured.library == REFERENCE else "peer"
    text = f"{times(row.ratio)}× · {row.median:,.0f} ns"
    return Bar(measured.label, row.ratio, min(row.ratios), max(row.ratios), text, kind)


def _added(results: Results) -> list[Panel]:
    base = results.row(OWN, "built-in", BASELINE)
    bars: list[Bar] = []
    for case in BUILT_IN:
        row = results.row(OWN, "built-in", case.name)
        if base is None or row is None or row is base:
            continue
        each = sorted(mine - its for mine, its in zip(row.ns, base.ns, strict=True))
        added = row.added_to(base)
        kind = "floor" if case.name == "another" else "own"
        bars.append(Bar(case.title, added, each[0], each[-1], f"{added:,.0f} ns", kind))
    return [Panel("added to a send through one pass-through function", bars)] if bars else []


def _starts(results: Results) -> list[Panel]:
    bars: list[Bar] = []
    for one in results.started:
        kind = "own" if one.name == OWN else "floor" if one.name == FLOOR else "peer"
        bars.append(Bar(one.name, one.median, min(one.ms), max(one.ms), f"{one.median:.1f} ms", kind))
    return [Panel("import, build a mediator, send", sorted(bars, key=lambda bar: bar.value))] if bars else []


# -- drawing -----------------------------------------------------------------------------------------------------------

_WIDTH: Final = 920
_LEFT: Final = 230
"""Where bars begin; labels end before it."""
_RIGHT: Final = 770
"""Where the longest bar ends; its text follows."""
_STEP: Final = 26
_THICK: Final = 16

_STYLE: Final = """
.page { fill: #ffffff; stroke: #e2e8f0 }
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #334155 }
.title { font-size: 18px; font-weight: 600; fill: #0f172a }
.panel { font-size: 13px; font-weight: 600; fill: #0f172a }
.small { font-size: 11px; fill: #64748b }
.label { text-anchor: end }
.own-text { font-weight: 600; fill: #1d4ed8 }
.tick { text-anchor: middle }
.grid { stroke: #e2e8f0 }
.whisker { stroke: #0f172a; stroke-opacity: 0.55 }
.own { fill: #2563eb }
.peer { fill: #a8b4c6 }
.floor { fill: #e2e8f0; stroke: #94a3b8; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; stroke: #30363d }
  text { fill: #c9d1d9 }
  .title, .panel { fill: #f0f6fc }
  .small { fill: #8b949e }
  .own-text { fill: #79b8ff }
  .grid { stroke: #262c36 }
  .whisker { stroke: #f0f6fc }
  .own { fill: #388bfd }
  .peer { fill: #57606a }
  .floor { fill: #161b22; stroke: #6e7681 }
}
"""


def svg(chart: Chart) -> str:
    """The chart as one SVG document."""
    height = 84 + sum(_height(panel) for panel in chart.panels)
    size = {"width": str(_WIDTH), "height": str(height), "viewBox": f"0 0 {_WIDTH} {height}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": chart.title, **size})
    ET.SubElement(root, "style").text = _STYLE
    _shape(root, "rect", "page", x=0.5, y=0.5, width=_WIDTH - 1, height=height - 1, rx=10)
    _text(root, 24, 36, chart.title, "title")
    _text(root, 24, 56, chart.scale, "small")
    bars = [bar for panel in chart.panels for bar in panel.bars]
    scale = _Logarithmic(bars) if chart.logarithmic else _Linear(bars)
    top = 76.0
    for panel in chart.panels:
        _draw(root, panel, scale, top)
        top += _height(panel)
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode") + "\n"


def _height(panel: Panel) -> int:
    return 62 + _STEP * len(panel.bars)


class _Logarithmic:
    """From a value to a place between the left and the right end. Begins at a power of ten."""

    def __init__(self, bars: Iterable[Bar]) -> None:
        shown = [bar.value for bar in bars if bar.value > 0]
        self._least = 10.0 ** math.floor(math.log10(min(shown, default=1.0)))
        self._most = max(*shown, self._least * 10)

    def x(self, value: float) -> float:
        """What is out of its range is drawn at the end."""
        part = math.log(max(value, self._least) / self._least) / math.log(self._most / self._least)
        return _LEFT + (_RIGHT - _LEFT) * min(part, 1.0)

    def ticks(self) -> Iterator[float]:
        """1, 3, 10, 30, and so on."""
        tick = self._least
        while tick <= self._most:
            yield tick
            if 3 * tick <= self._most:
                yield 3 * tick
            tick *= 10


class _Linear:
    """From a value to a place between the left and the right end. Begins at zero."""

    def __init__(self, bars: Iterable[Bar]) -> None:
        self._most = max(bar.value for bar in bars)

    def x(self, value: float) -> float:
        """What is out of its range is drawn at the end."""
        return _LEFT + (_RIGHT - _LEFT) * min(max(value, 0.0) / self._most, 1.0)

    def ticks(self) -> Iterator[float]:
        """Up to ten of them, at round numbers."""
        magnitude = 10.0 ** math.floor(math.log10(self._most))
        step = next(magnitude * part for part in (0.1, 0.2, 0.5, 1.0) if magnitude * part * 10 >= self._most)
        return (step * number for number in range(int(self._most / step) + 1))


def _draw(root: ET.Element, panel: Panel, scale: _Logarithmic | _Linear, top: float) -> None:
    _text(root, 24, top + 14, panel.title, "panel")
    first = top + 28
    bottom = first + _STEP * len(panel.bars)
    for tick in scale.ticks():
        x = scale.x(tick)
        _shape(root, "line", "grid", x1=x, y1=first - 4, x2=x, y2=bottom)
        _text(root, x, bottom + 14, f"{tick:,g}", "small tick")
    for number, bar in enumerate(panel.bars):
        y = first + _STEP * number
        middle = y + _THICK / 2
        _text(root, _LEFT - 10, middle + 4.5, bar.label, "label own-text" if bar.kind == "own" else "label")
        _shape(root, "rect", bar.kind, x=_LEFT, y=y, width=max(scale.x(bar.value) - _LEFT, 1.5), height=_THICK, rx=3)
        low, high = scale.x(bar.low), scale.x(bar.high)
        _shape(root, "line", "whisker", x1=low, y1=middle, x2=high, y2=middle)
        _text(root, max(scale.x(bar.value), high) + 8, middle + 4.5, bar.text, "own-text" if bar.kind == "own" else "")


def _shape(root: ET.Element, name: str, kind: str, **numbers: float) -> None:
    ET.SubElement(root, name, {"class": kind, **{key: f"{number:g}" for key, number in numbers.items()}})


def _text(root: ET.Element, x: float, y: float, text: str, kind: str) -> None:
    ET.SubElement(root, "text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text
