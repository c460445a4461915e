"""Figures from several sources, side by side: each row adds up, or it does not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Row", "Table"]


@dataclass(frozen=True, slots=True)
class Row:
    """One fact, as each source knows it; None where a source cannot know it."""

    name: str
    values: tuple[int | None, ...]
    same: bool = True
    """False where the figures may be equal and yet are of different orders."""
    beside: tuple[int | None, ...] = ()
    """Figures that are shown behind the others, and need not be equal to anything."""

    @property
    def adds_up(self) -> bool:
        """Whether all that know it agree."""
        return self.same and len({value for value in self.values if value is not None}) <= 1


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of figures under the names of their sources."""

    title: str
    sources: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def failures(self) -> list[str]:
        """The names of the rows that do not add up."""
        return [row.name for row in self.rows if not row.adds_up]
