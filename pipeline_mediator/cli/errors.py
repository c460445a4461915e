"""What stops a command, told to a person."""

from __future__ import annotations

from pipeline_mediator.errors import MediatorError

__all__ = ["CommandError"]


class CommandError(MediatorError):
    """A command cannot do what it was asked to; the text says why in one line."""
