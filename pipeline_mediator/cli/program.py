"""The program `pipeline-mediator`: its commands, and how what goes wrong in them is told."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from pipeline_mediator.cli import dead_letters, outbox
from pipeline_mediator.cli.consume import consume
from pipeline_mediator.cli.demo.command import HELP as DEMO
from pipeline_mediator.cli.demonstrate import demonstrate
from pipeline_mediator.cli.describe import check, describe
from pipeline_mediator.cli.errors import INTERRUPTED, STOPPED
from pipeline_mediator.cli.output import complain
from pipeline_mediator.cli.relay import relay
from pipeline_mediator.errors import MediatorError

__all__ = ["app"]


class _Program(TyperGroup):
    """Errors of ours are told in a line: whoever reads them did not write the code behind them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MediatorError as error:
            complain(error)
            raise typer.Exit(STOPPED) from error
        except KeyboardInterrupt as error:
            complain("stopped")
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    name="pipeline-mediator",
    cls=_Program,
    help="Tools of pipeline-mediator. Exit codes: 0 done; 1 done, and the answer is no; 2 it could not be done (usage, "
    "configuration, a server that is away); 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    # Both would load Rich for every --help and every mistyped option, and show stacks to who cannot use them.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(describe)
app.command()(check)
app.command()(consume)
app.command()(relay)
app.add_typer(outbox.commands, name="outbox")
app.add_typer(dead_letters.commands, name="dead-letters")


@app.command(
    help=f"{DEMO[0].upper()}{DEMO[1:]}.",
    short_help="Run an example, kill it, and count.",
    # Its own parser reads them, --help too.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def demo(context: typer.Context) -> None:
    """See `demonstrate`."""
    raise typer.Exit(demonstrate(context.args))
