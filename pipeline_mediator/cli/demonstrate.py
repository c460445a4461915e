"""The command `demo`. It stays without Typer: who only wants to see it run needs nothing but what it runs on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline_mediator.cli.demo import command
from pipeline_mediator.cli.errors import INTERRUPTED, STOPPED
from pipeline_mediator.cli.output import complain
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["demonstrate"]


def demonstrate(arguments: Sequence[str]) -> int:
    """Run it, and give the exit code. Raises `SystemExit` for wrong arguments."""
    parser = argparse.ArgumentParser(prog="pipeline-mediator demo", description=command.DESCRIPTION)
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return command.run(options)
    except MediatorError as error:
        complain(error)
        return STOPPED
    except KeyboardInterrupt:
        complain("stopped")
        return INTERRUPTED
