"""What the processes of a run are told: a file, whose path is in their environment."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Settings"]

_VARIABLE = "FAULTS_SETTINGS"
_NAME = "FAULTS_NAME"


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for all processes of one run."""

    folder: str
    database: str
    """As SQLAlchemy takes it; through a proxy where there is one."""
    redis: str
    broker: str
    """The same Redis, as the relays know it: each answer takes its time, so that a fault meets open batches."""
    seed: int
    lease: float
    """Seconds: of a relay's batches, and of what a consumer holds."""
    batch: int
    """Rows that a relay takes at a time."""
    rate: float
    """Commands a second, of each writer."""

    @property
    def ledger(self) -> Path:
        return Path(self.folder) / "ledger"

    @property
    def _path(self) -> Path:
        return Path(self.folder) / "settings.json"

    def environment(self, name: str) -> dict[str, str]:
        """For the process of this name."""
        return {_VARIABLE: str(self._path), _NAME: name}

    def save(self) -> None:
        """Before the first process reads it."""
        self._path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def of_this_process() -> tuple[Settings, str]:
        """What this process was told, and its name, which no other one has had."""
        return Settings(**json.loads(Path(os.environ[_VARIABLE]).read_text())), os.environ[_NAME]
