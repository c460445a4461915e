"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from pipeline_mediator.cli.logs import LogFormat, LogLevel

__all__ = [
    "After",
    "AsJson",
    "Every",
    "Ids",
    "Limit",
    "LogFormatOption",
    "LogLevelOption",
    "PageSize",
    "Payload",
    "ShownIds",
    "Target",
    "Yes",
]

Target: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        show_default=False,
        help="module:attribute or module:factory of a Mediator, an OutboxRelay or a Consumer; a factory may be async, "
        "or an async context manager. Looked for in the current directory too.",
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
LogLevelOption: TypeAlias = Annotated[
    LogLevel | None, typer.Option("--log-level", case_sensitive=False, help="What is logged at least (info).")
]
LogFormatOption: TypeAlias = Annotated[
    LogFormat | None,
    typer.Option(
        "--log-format", help="Lines for people, or JSON objects. Overrules an application that sets up logging (text)."
    ),
]
Ids: TypeAlias = Annotated[
    list[str] | None, typer.Argument(metavar="ID", show_default=False, help="As `list` shows them.")
]
ShownIds: TypeAlias = Annotated[
    list[str], typer.Argument(metavar="ID", show_default=False, help="As `list` shows them.")
]
PageSize: TypeAlias = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many at most.")]
After: TypeAlias = Annotated[str | None, typer.Option(metavar="ID", help="Begin behind this one.")]
Payload: TypeAlias = Annotated[bool, typer.Option("--payload", help="The payload too.")]
Limit: TypeAlias = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Of --all, how many at most.")
]
Every: TypeAlias = Annotated[bool, typer.Option("--all", help="All that are there, the oldest first.")]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
