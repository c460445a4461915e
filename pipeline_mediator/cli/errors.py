"""What stops a command, told to a person."""

from __future__ import annotations

from pipeline_mediator.errors import MediatorError

__all__ = ["FOUND", "INTERRUPTED", "STOPPED", "CommandError"]

FOUND = 1
"""The command was carried out, and the answer is no: something was left, or found, or not found."""
STOPPED = 2
"""It could not be carried out: usage, configuration, a server that is away."""
INTERRUPTED = 130
"""What a shell makes of a program that SIGINT ended."""


class CommandError(MediatorError):
    """A command cannot do what it was asked to; the text says why in one line."""
