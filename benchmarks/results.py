"""What was measured, and what follows from it: medians, ratios, spread."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tomllib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.adapters import OWN

__all__ = ["ROOT", "Measured", "Method", "Results", "Row", "Started", "machine", "own_version"]

ROOT: Final = Path(__file__).resolve().parents[1]
"""The checkout."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one set-up: in each round, nanoseconds for a call and for the bare call around it."""

    ns: list[float] = field(default_factory=list[float])
    bare: list[float] = field(default_factory=list[float])

    @property
    def median(self) -> float:
        """Nanoseconds."""
        return statistics.median(self.ns)

    @property
    def ratios(self) -> list[float]:
        """How many bare calls it took, in each round."""
        return [ns / bare for ns, bare in zip(self.ns, self.bare, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of them."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half the distance between the best and the worst round, as a part of the ratio."""
        return (max(self.ratios) - min(self.ratios)) / 2 / self.ratio

    def added_to(self, other: Row) -> float:
        """Nanoseconds more than another row of the same set-up: the median over the rounds."""
        return statistics.median(mine - its for mine, its in zip(self.ns, other.ns, strict=True))


@dataclass(frozen=True, slots=True)
class Measured:
    """One set-up of one library."""

    library: str
    setup: str
    note: str
    version: str
    rows: dict[str, Row] = field(default_factory=dict[str, Row])

    @property
    def own(self) -> bool:
        """Whether it is this library."""
        return self.library == OWN

    @property
    def label(self) -> str:
        """Such as "diator (rodi)"."""
        return f"{self.library} ({self.setup})"


@dataclass(frozen=True, slots=True)
class Started:
    """From nothing to the first message, in fresh processes."""

    name: str
    ms: list[float] = field(default_factory=list[float])
    third_party: list[str] = field(default_factory=list[str])
    """Top-level modules that are neither the standard library's nor the library's own."""

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.ms)


@dataclass(frozen=True, slots=True)
class Method:
    """How it was measured."""

    rounds: int
    repeats: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Results:
    """One run."""

    version: str
    """Of this library."""
    python: str
    machine: dict[str, str]
    method: Method
    measured: list[Measured] = field(default_factory=list[Measured])
    started: list[Started] = field(default_factory=list[Started])
    left_out: list[str] = field(default_factory=list[str])

    def to_json(self) -> bytes:
        """As it is kept in `results.json`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Results:
        """What `to_json` wrote."""
        return msgspec.json.decode(text, type=cls)

    def row(self, library: str, setup: str, name: str) -> Row | None:
        """One row of one set-up, if it was measured."""
        found = (one.rows.get(name) for one in self.measured if (one.library, one.setup) == (library, setup))
        return next(found, None)


def own_version() -> str:
    """The version of the checkout that is measured."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version: str = tomllib.load(file)["project"]["version"]
    return version


def machine() -> dict[str, str]:
    """What the figures depend on. Nothing that tells whose machine it is."""
    facts = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": str(os.cpu_count()),
        "date": datetime.now().astimezone().date().isoformat(),
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def _cpu() -> str:
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
