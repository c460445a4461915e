"""Reads the arguments, runs the command, and turns its end into an exit code."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline_mediator.cli import relay
from pipeline_mediator.cli.demo import command as demo
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {"demo": demo, "relay": relay}
"""Modules with HELP, DESCRIPTION, `add_arguments(parser)` and `run(options)`, which returns 0 or 1."""

FAILED = 2
INTERRUPTED = 130
"""What a shell makes of a program that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: done, and the answer is no. 2: it could not be done. 130: stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m pipeline_mediator", description="Tools of pipeline-mediator.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except MediatorError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return INTERRUPTED
    return code
