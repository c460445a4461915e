"""What a run is to do."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of one run."""

    seconds: float
    seed: int
    database: str = "postgresql"
    relays: int = 2
    writers: int = 2
    consumers: int = 2
    lease: float = 3.0
    """Seconds, of the relays and of the consumers; short, so that stopping one often outlasts it."""
    batch: int = 100
    rate: float = 25.0
    """Commands a second, of each writer."""
    logs: bool = False
    """Whether to show the end of what each process printed though all is well."""
