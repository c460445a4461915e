"""The arguments of the demo; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
from importlib import import_module
from typing import TYPE_CHECKING

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.errors import MissingExtraError

if TYPE_CHECKING:
    from pipeline_mediator.cli.demo.screen import Screen

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "send some hundreds of orders through the example application, kill it meanwhile, and see that it adds up"
DESCRIPTION = (
    "Runs examples/orders in this process, sends it varied orders over HTTP (some are refused, some need another "
    "attempt, one handler crashes), and compares what the clients were told with what was committed, published and "
    "received. Then the same with the service in a process of its own, which is killed twice and started again. Exit "
    "code 1 if that does not add up."
)

LIBRARIES = {
    "aiosqlite": "aiosqlite",
    "greenlet": "greenlet",
    "httpx": "httpx",
    "sqlalchemy": "SQLAlchemy",
    "starlette": "Starlette",
    "uvicorn": "Uvicorn",
}
"""What the demo cannot do without, by the names that are imported."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the demo may be told."""
    parser.add_argument(
        "--database",
        metavar="URL",
        help="a database such as postgresql+asyncpg://user:password@localhost/demo, in which the demo creates tables "
        "and drops them at the end (default: SQLite in a temporary file)",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="publish to a stream of a Redis such as redis://localhost:6379/0, and delete it at the end (default: "
        "within the process)",
    )
    parser.add_argument("--orders", metavar="N", type=_above_0, default=300, help="how many to send (default: 300)")
    parser.add_argument("--seed", metavar="S", type=int, default=1, help="for another mixture of orders (default: 1)")
    parser.add_argument("--log", metavar="FILE", help="append what is logged meanwhile to this file")
    parser.add_argument(
        "--describe",
        choices=["text", "json", "mermaid"],
        help="print every chain of the application, and do nothing else",
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo; 0 if it adds up, else 1.

    Raises `MissingExtraError`, and other `MediatorError`s for servers that cannot be used.
    """
    _require_libraries()
    from pipeline_mediator.cli.demo import run as demo

    if options.describe is not None:
        print(demo.describe(options.describe))
        return 0
    set_up_logging(options.log)
    running = demo.run(_screen(), options.database, options.redis, options.orders, options.seed, log=options.log)
    return 0 if asyncio.run(running) else 1


def _require_libraries() -> None:
    for name, library in LIBRARIES.items():
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise MissingExtraError("the demo", library, "demo") from error


def _screen() -> Screen:
    try:
        from pipeline_mediator.cli.demo.rich_screen import RichScreen
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        from pipeline_mediator.cli.demo.screen import PlainScreen

        return PlainScreen()
    return RichScreen()


def set_up_logging(path: str | None) -> None:
    handler: logging.Handler = logging.NullHandler()
    if path is not None:
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"the log cannot be written to {path}: {error.strerror}") from error
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _above_0(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
