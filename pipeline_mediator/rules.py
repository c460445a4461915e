"""Where a middleware may stand: rules by role, because a middleware never imports another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline_mediator.chain import Link
    from pipeline_mediator.context import Route

__all__ = ["Inside", "Once", "Outside", "Rule", "Without", "violations"]


@dataclass(frozen=True, slots=True)
class Inside:
    """This middleware stands inside (after) every one with that role; with `required` there must be one."""

    role: str
    reason: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Outside:
    """This middleware stands outside (before) every one with that role."""

    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Once:
    """No other middleware of this one's role stands in the same chain."""

    reason: str


@dataclass(frozen=True, slots=True)
class Without:
    """No middleware with that role stands in the same chain; `fix` says what to do about it."""

    role: str
    reason: str
    fix: str


Rule: TypeAlias = Inside | Outside | Once | Without


def violations(links: Sequence[Link], cut_off: Sequence[Link], route: Route) -> Iterator[str]:
    """What is wrong in a chain; `cut_off` are the links behind its terminal."""
    for position, link in enumerate(links):
        for rule in link.rules:
            # What should have stood around this link, and is not even reached, would silently do nothing.
            others = [*links, *cut_off] if isinstance(rule, Inside) else links
            for violation in _broken(rule, others, position, route):
                yield f"{route}: {violation}"


def _broken(rule: Rule, links: Sequence[Link], position: int, route: Route) -> Iterator[str]:
    """What is wrong by this rule of the link at this position."""
    link, here = links[position], _place(links, position)
    if isinstance(rule, Once):
        others = [f"position {at + 1}" for at in range(position + 1, len(links)) if _alike(link, links[at])]
        if others:
            kind = link.role or link.name
            yield f"a second {kind} stands inside {here}, at {', '.join(others)}: {rule.reason}. {_KEEP_APART}"
        return
    found = [at for at, other in enumerate(links) if other.role == rule.role and at != position]
    if isinstance(rule, Inside) and rule.required and not found:
        yield f"{here} needs a {rule.role} middleware around it: {rule.reason}. {_how_to_add(rule, route)}"
    for at in found:
        there = _place(links, at)
        if isinstance(rule, Without):
            yield f"{here} and {there} exclude each other: {rule.reason}. {rule.fix}"
        elif isinstance(rule, Inside) and at > position:
            yield f"{here} must stand inside {there}: {rule.reason}. Move it behind {links[at].name}."
        elif isinstance(rule, Outside) and at < position:
            yield f"{here} must stand outside {there}: {rule.reason}. Move it before {links[at].name}."


_KEEP_APART = "Remove one, or keep them apart with only()."


def _place(links: Sequence[Link], position: int) -> str:
    return f"{links[position].name} (position {position + 1})"


def _alike(link: Link, other: Link) -> bool:
    return other.name == link.name if link.role is None else other.role == link.role


def _how_to_add(rule: Inside, route: Route) -> str:
    if rule.role == "transaction" and route.destination is not None:
        return (
            "What goes straight to a broker is in no transaction: leave it out of such chains with "
            "only(..., when=lambda route: route.destination is None), or add an OutboxMiddleware."
        )
    return "Add one before it."
