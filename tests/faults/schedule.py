"""Which fault comes when: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Fault", "Kind", "Targets", "schedule"]

Kind = Literal["kill", "stop", "restart", "cut", "cut reply", "terminate", "stall"]
"""
kill       SIGKILL; the process is started again at once
stop       SIGSTOP, and SIGCONT after `seconds`
restart    SIGKILL of a server, which is started again after `seconds`
cut        every connection to a server is reset
cut reply  a server carries out one more request, and the connection is gone before its answer
terminate  the server itself ends every connection
stall      for `seconds` nothing goes through to a server or back
"""

_GAP = (1.0, 4.6)
"""Seconds between two faults, at least and at most: about 21 a minute, 13 of them kills and stops."""


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    """Seconds after the start."""
    kind: Kind
    target: str
    seconds: float = 0.0

    @property
    def is_death(self) -> bool:
        """Whether it kills a process or stops it."""
        return self.kind in {"kill", "stop", "restart"}

    def __str__(self) -> str:
        return f"{self.kind} {self.target}" + (f" for {self.seconds:.1f} s" if self.seconds else "")


@dataclass(frozen=True, slots=True)
class Targets:
    """What there is to break."""

    relays: Sequence[str]
    writers: Sequence[str]
    consumers: Sequence[str]
    servers: Sequence[str]
    """With connections that can be cut; an SQLite file is none."""


def schedule(seed: int, seconds: float, targets: Targets, lease: float) -> list[Fault]:
    """The faults of a run; a longer one begins with those of a shorter one with the same seed.

    Drawn like cards, so that all of them have come before one comes a second time: even a short run has most of them.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret, and it has to be repeatable
    cards = _shuffled(chance, targets)
    faults: list[Fault] = []
    stopped: dict[str, float] = {}
    now = chance.uniform(*_GAP)
    while now < seconds:
        kind, target = next(cards)
        holds = target in (*targets.relays, *targets.consumers)
        lasts = round(_duration(chance, kind, holds, lease), 2)
        # A process that is stopped already would be continued by the first of the two.
        if kind != "stop" or stopped.get(target, 0.0) < now:
            faults.append(Fault(round(now, 2), kind, target, lasts))
            if kind == "stop":
                stopped[target] = now + lasts
            now += chance.uniform(*_GAP)
    return faults


def _shuffled(chance: random.Random, targets: Targets) -> Iterator[tuple[Kind, str]]:
    cards: list[tuple[Kind, str]] = []
    for one in (*targets.relays, *targets.consumers):
        cards += _all_of(one, "kill", "kill", "stop")
    for writer in targets.writers:
        cards += _all_of(writer, "kill", "stop")
    for server in targets.servers:
        cards += _all_of(server, "restart", "cut", "cut reply", "terminate", "stall")
    while True:
        chance.shuffle(cards)
        yield from cards


def _all_of(target: str, *kinds: Kind) -> list[tuple[Kind, str]]:
    return [(kind, target) for kind in kinds]


def _duration(chance: random.Random, kind: Kind, holds: bool, lease: float) -> float:  # noqa: FBT001 - a fact
    if kind == "stop":
        # Past the lease, so that what it had taken is another's when it goes on; a writer only holds locks.
        return chance.uniform(1.2, 2.0) * lease if holds else chance.uniform(0.5, 2.0)
    return {"restart": chance.uniform(0.0, 1.0), "stall": chance.uniform(0.5, 1.5) * lease}.get(kind, 0.0)
