"""What a mediator says about itself: its chains, and what may surprise in them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline_mediator.cli.calls import Answer, answer
from pipeline_mediator.cli.errors import FOUND, CommandError
from pipeline_mediator.cli.options import AsJson, Target

if TYPE_CHECKING:
    from pipeline_mediator.cli.target import Application
    from pipeline_mediator.mediator import Mediator

__all__ = ["check", "describe"]


def describe(
    target: Target,
    *,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="NAME",
            help="Of one message type only: by its class, with or without the module, or by its name on the wire.",
        ),
    ] = None,
    form: Annotated[Literal["text", "json", "mermaid"], typer.Option("--format", help="How.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Print the chains that messages walk, as compiled."""
    import json

    wanted = "json" if as_json else form

    async def work(application: Application) -> Answer:
        mediator = application.mediator
        message_type = None if type_name is None else _type_called(type_name, mediator)
        described = mediator.describe(message_type, format=wanted)
        return Answer(json.loads(described) if wanted == "json" else described, lambda: print(described))

    answer(target, work, as_json=wanted == "json")


def check(
    target: Target,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 if there is a warning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile everything, and tell what may surprise.

    Every chain is compiled, every handler's dependencies are resolved dry; what is wrong is an error, and ends with 2.
    What is legal but may surprise, such as events that a crash may lose, is a warning.
    """

    async def work(application: Application) -> Answer:
        warnings = application.mediator.check()

        def show() -> None:
            for warning in warnings:
                print(warning)
            if not warnings:
                print("nothing to warn of")

        return Answer({"warnings": warnings}, show, FOUND if warnings and strict else 0)

    answer(target, work, as_json=as_json)


def _type_called(name: str, mediator: Mediator) -> type:
    from pipeline_mediator.messages import message_name

    called: dict[str, list[type]] = {}
    for one in mediator.routes.message_types():
        for its_name in {one.__name__, f"{one.__module__}.{one.__qualname__}", message_name(one).name}:
            called.setdefault(its_name, []).append(one)
    found = called.get(name, [])
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(f"{one.__module__}.{one.__qualname__}" for one in found)
        raise CommandError(f"several message types are called {name}: {places}")
    nearest = get_close_matches(name, called, n=2)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise CommandError(f"no message type {name!r} is bound, or has a destination.{hint}")
