"""Dead letters of everything that an application has: its outbox, and the subscriptions of its consumer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from pipeline_mediator.cli import acting
from pipeline_mediator.cli.calls import Answer, answer
from pipeline_mediator.cli.letters import place_named, places_of
from pipeline_mediator.cli.options import After, AsJson, Every, Ids, Limit, PageSize, Payload, ShownIds, Target, Yes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pipeline_mediator.cli.letters import Place
    from pipeline_mediator.cli.target import Application

__all__ = ["commands"]

commands = typer.Typer(
    help="Messages that were given up, in the outbox and at the brokers that the consumer receives from.",
    no_args_is_help=True,
)

PlaceName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--place", metavar="NAME", help="`outbox`, or the name of a subscription. Not needed where there is only one."
    ),
]


@commands.command("list")
def list_(
    target: Target,
    *,
    place: PlaceName = None,
    limit: PageSize = 50,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """The dead letters of one place, or of each, oldest first, without their payloads."""

    async def work(places: Sequence[Place]) -> Answer:
        # An id is one place's.
        chosen = [place_named(places, place)] if place is not None or after is not None else places
        found = [await acting.facts_of(one, limit, after) for one in chosen]

        def show() -> None:
            for facts in found:
                acting.print_place(facts)

        return Answer({"places": found}, show)

    _answer(target, work, as_json=as_json)


@commands.command()
def show(
    target: Target,
    *,
    ids: ShownIds,
    place: PlaceName = None,
    payload: Payload = False,
    as_json: AsJson = False,
) -> None:
    """Everything about some dead letters; the payload only if it is asked for. Ends with 1 if one is not there."""

    async def work(places: Sequence[Place]) -> Answer:
        return await acting.shown(place_named(places, place), ids, payload=payload)

    _answer(target, work, as_json=as_json)


@commands.command()
def retry(
    target: Target,
    *,
    ids: Ids = None,
    place: PlaceName = None,
    every: Every = False,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Have dead letters published, or delivered, again. Ends with 1 if one is not there."""
    chosen = acting.Chosen(ids or (), every, limit)

    async def work(places: Sequence[Place]) -> Answer:
        return await acting.retried(place_named(places, place), chosen)

    _answer(target, work, as_json=as_json)


@commands.command()
def drop(
    target: Target,
    *,
    ids: Ids = None,
    place: PlaceName = None,
    every: Every = False,
    limit: Limit = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters for good. Ends with 1 if one is not there."""
    chosen = acting.Chosen(ids or (), every, limit)

    async def work(places: Sequence[Place]) -> Answer:
        return await acting.dropped(place_named(places, place), chosen, confirmed=yes, done="dropped")

    _answer(target, work, as_json=as_json)


def _answer(target: str, work: Callable[[Sequence[Place]], Awaitable[Answer]], *, as_json: bool) -> None:
    async def among_places(application: Application) -> Answer:
        places = places_of(application)
        if all(place.kind == "outbox" for place in places):
            return await work(places)
        # Most subscriptions are of the broker that the mediator publishes to; those are closed with it.
        async with application.mediator:
            return await work(places)

    answer(target, among_places, as_json=as_json)
