"""How a relay works: what `OutboxRelay` was told, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.outbox.protocol import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity.wait import WaitBaseT

    from pipeline_mediator.outbox.protocol import Health

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one relay; times in seconds. Raises `ConfigurationError`."""

    name: str
    batch: int
    poll: float
    attempts: int
    backoff: WaitBaseT
    """For a row."""
    pauses: WaitBaseT
    """For a destination, or the database."""
    lease: float
    on_dead: str
    clean_every: float | None
    stop_within: float
    on_health: Callable[[Health], object] | None

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value!r}, and has to be {limit}"
            for name, value, limit, holds in (
                ("batch", self.batch, "at least 1", self.batch >= 1),
                ("poll", self.poll, "above 0", self.poll > 0),
                ("attempts", self.attempts, "at least 1", self.attempts >= 1),
                ("lease", self.lease, "above 0", self.lease > 0),
                ("on_dead", self.on_dead, '"block" or "park"', self.on_dead in {"block", "park"}),
                ("clean_every", self.clean_every, "above 0, or None", self.clean_every is None or self.clean_every > 0),
                ("stop_within", self.stop_within, "at least 0", self.stop_within >= 0),
            )
            if not holds
        ]
        if wrong:
            raise ConfigurationError(f"OutboxRelay: {'; '.join(wrong)}")

    @property
    def policy(self) -> Policy:
        """What the store needs to know of it."""
        return Policy(self.lease, self.on_dead == "park")
