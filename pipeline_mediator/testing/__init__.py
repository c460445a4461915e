"""Test tools for applications and for adapters of their own; nothing here is imported unless it is asked for."""

from typing import TYPE_CHECKING

__all__ = ["FakeBroker", "Harness", "Seen"]

if TYPE_CHECKING:
    from pipeline_mediator.testing.harness import FakeBroker, Harness, Seen
else:
    from pipeline_mediator.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(__name__, {"harness": ("FakeBroker", "Harness", "Seen")})
