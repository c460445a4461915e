"""The outbox of an application: what waits in it, and its dead letters."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline_mediator.cli import acting
from pipeline_mediator.cli.calls import Answer, answer
from pipeline_mediator.cli.errors import FOUND
from pipeline_mediator.cli.letters import outbox_of, reading
from pipeline_mediator.cli.options import After, AsJson, Every, Ids, Limit, PageSize, Payload, ShownIds, Target, Yes
from pipeline_mediator.cli.output import print_facts
from pipeline_mediator.cli.wording import seconds

if TYPE_CHECKING:
    from pipeline_mediator.cli.target import Application

__all__ = ["commands"]

commands = typer.Typer(help="What waits in an outbox, and its dead letters.", no_args_is_help=True)


@commands.command()
def status(
    target: Target,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 if there are dead letters.")] = False,
    as_json: AsJson = False,
) -> None:
    """How many messages wait, and for how long."""

    async def work(application: Application) -> Answer:
        place = outbox_of(application)
        with reading("the outbox"):
            health = await place.store.health()
            next_due = await place.store.next_due()
        facts = asdict(health) | {"next_due": next_due}
        words = facts | {
            "oldest": seconds(health.oldest),
            "next due": None if next_due is None else f"in {seconds(next_due)}",
        }
        del words["next_due"]
        return Answer(facts, lambda: print_facts(words), FOUND if strict and health.dead else 0)

    answer(target, work, as_json=as_json)


@commands.command("list")
def list_(
    target: Target,
    *,
    limit: PageSize = 50,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """The dead letters, oldest first, without their payloads."""

    async def work(application: Application) -> Answer:
        facts = await acting.facts_of(outbox_of(application), limit, after)
        return Answer(facts, lambda: acting.print_place(facts))

    answer(target, work, as_json=as_json)


@commands.command()
def show(
    target: Target,
    *,
    ids: ShownIds,
    payload: Payload = False,
    as_json: AsJson = False,
) -> None:
    """Everything about some dead letters; the payload only if it is asked for. Ends with 1 if one is not there."""

    async def work(application: Application) -> Answer:
        return await acting.shown(outbox_of(application), ids, payload=payload)

    answer(target, work, as_json=as_json)


@commands.command()
def retry(
    target: Target,
    *,
    ids: Ids = None,
    every: Every = False,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Make dead letters due again: a relay publishes them. Ends with 1 if one is not there."""
    chosen = acting.Chosen(ids or (), every, limit)

    async def work(application: Application) -> Answer:
        return await acting.retried(outbox_of(application), chosen)

    answer(target, work, as_json=as_json)


@commands.command()
def purge(
    target: Target,
    *,
    ids: Ids = None,
    every: Every = False,
    limit: Limit = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters for good. What waited behind them is released. Ends with 1 if one is not there."""
    chosen = acting.Chosen(ids or (), every, limit)

    async def work(application: Application) -> Answer:
        return await acting.dropped(outbox_of(application), chosen, confirmed=yes, done="purged")

    answer(target, work, as_json=as_json)
