"""The order in which the rows of a batch are published: by place, side by side, but never past another of its key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline_mediator.outbox.protocol import StoredRow

__all__ = ["Group", "Place", "cut", "in_waves", "probe_of", "sorted_out"]

_WALK: Final = 250
"""Rows that walk a chain at once: what was accepted is known, and told to the store, when the walk has ended."""


@dataclass(slots=True, eq=False)
class Place:
    """One destination of one broker, in one batch."""

    destination: str
    chain: Any = None
    error: MediatorError | None = None
    """Why there is no chain."""
    accepted: bool = False
    """Whether it took any row."""
    trusted: bool = False
    """Whether it has just taken one that was published alone."""
    closed: bool = False
    """Whether it is to blame for a refusal, and gets no more."""
    began: float | None = None
    """When the walk that is under way began."""


@dataclass(slots=True, eq=False)
class Group:
    """The rows of one wave that go to one place, in order of id."""

    place: Place
    wave: int
    rows: list[StoredRow] = field(default_factory=list["StoredRow"])
    has_failed: bool = False
    """Whether one of them failed before."""


def in_waves(
    rows: Sequence[StoredRow], chain_of: Callable[[str, int, str], Any]
) -> tuple[list[list[Group]], Sequence[Place]]:
    """The rows by wave and place, and the places.

    Rows of one key that go to one place are in one group; those that go elsewhere are in a later wave than the ones
    before them. Mostly there is one wave.
    """
    places: dict[tuple[str, int, str], Place] = {}
    groups: dict[tuple[int, Place], Group] = {}
    latest: dict[str, Group] = {}
    for row in rows:
        message = row.message
        kind = (message.name, message.version, message.destination)
        place = places.get(kind)
        if place is None:
            place = places[kind] = _place_of(kind, chain_of, places)
        key = message.key
        wave = 0
        if key is not None and (before := latest.get(key)) is not None:
            wave = before.wave + (before.place is not place)
        group = groups.get((wave, place))
        if group is None:
            group = groups[wave, place] = Group(place, wave)
        group.rows.append(row)
        if row.failures:
            group.has_failed = True
        if key is not None:
            latest[key] = group
    last = max((group.wave for group in groups.values()), default=-1)
    waves = [[group for group in groups.values() if group.wave == wave] for wave in range(last + 1)]
    return waves, list(dict.fromkeys(places.values()))


def _place_of(
    kind: tuple[str, int, str], chain_of: Callable[[str, int, str], Any], known: dict[tuple[str, int, str], Place]
) -> Place:
    destination = kind[2]
    try:
        chain = chain_of(*kind)
    except MediatorError as error:
        return Place(destination, error=error)
    return next((one for one in known.values() if one.chain is chain), None) or Place(destination, chain)


def cut(rows: Sequence[StoredRow]) -> Iterator[Sequence[StoredRow]]:
    """As many as walk a chain at once, in order."""
    for start in range(0, len(rows), _WALK):
        yield rows[start : start + _WALK]


def probe_of(rows: Sequence[StoredRow], failures: int) -> StoredRow:
    """The one row to try a place with: another one each time, for the first may be what it cannot take.

    Never one behind another of its key.
    """
    first_of_key: dict[str | int, StoredRow] = {}
    for row in rows:
        key = row.message.key
        first_of_key.setdefault(row.id if key is None else key, row)
    candidates = list(first_of_key.values())
    unsuspected = [row for row in candidates if not row.failures] or candidates
    return unsuspected[failures % len(unsuspected)]


def sorted_out(rows: Sequence[StoredRow]) -> tuple[list[StoredRow], list[StoredRow], list[StoredRow]]:
    """Rows that never failed, those to be published alone, and those behind one of the latter in its key."""
    first: list[StoredRow] = []
    alone: list[StoredRow] = []
    behind: list[StoredRow] = []
    suspects: set[str] = set()
    for row in rows:
        key = row.message.key
        if key is not None and key in suspects:
            behind.append(row)
        elif row.failures:
            alone.append(row)
            if key is not None:
                suspects.add(key)
        else:
            first.append(row)
    return first, alone, behind
