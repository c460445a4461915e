"""Shows the outcome of a run to a person, and writes it down for a program."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.run import Result

__all__ = ["as_json", "as_text", "progress"]

_SHOWN = 10
"""Of the messages that something is wrong with."""


def progress(seconds: float, faults: int, entries: int) -> str:
    """One line, again and again."""
    return f"{int(seconds) // 60:3d}:{int(seconds) % 60:02d}   faults {faults:4d}   entries in the streams {entries:7d}"


def as_text(result: Result) -> str:
    """A table of the figures, and what is wrong."""
    verdict, plan = result.verdict, result.plan
    kinds = Counter(f"{fault.kind} {fault.target.partition('-')[0]}" for fault in result.faults)
    rows = [
        ("database", plan.database),
        ("seed", plan.seed),
        ("seconds", f"{plan.seconds:g}, and {result.seconds_to_drain:g} to drain"),
        (
            "processes",
            f"{plan.writers} writers, {plan.relays} relays, {plan.consumers} consumers; lease {plan.lease:g} s",
        ),
        ("faults", f"{len(result.faults)}, {result.deaths} of them kills and stops"),
        *((f"  {kind}", number) for kind, number in sorted(kinds.items())),
        ("sends", verdict.sends.total()),
        *((f"  {outcome}", number) for outcome, number in sorted(verdict.sends.items())),
        ("events committed", verdict.events),
        ("  delivered", verdict.delivered),
        ("  duplicates", f"{verdict.duplicates} (at most {verdict.repeatable} rows were in batches that were cut off)"),
        ("handlings", verdict.handlings["begun"]),
        ("  failed on purpose", verdict.handlings["failed on purpose"]),
        ("effects", verdict.effects),
        *((name, len(what)) for name, what in verdict.wrong.items()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for name, what in verdict.wrong.items():
        if what:
            more = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
            lines.append(f"{name}: {', '.join(what[:_SHOWN])}{more}")
    return "\n".join([*lines, result.logs]).rstrip()


def as_json(result: Result) -> str:
    """Everything."""
    verdict = result.verdict
    what: dict[str, Any] = {
        "clean": verdict.clean,
        "plan": asdict(result.plan),
        "faults": [asdict(fault) for fault in result.faults],
        "kills_and_stops": result.deaths,
        "starts": result.starts,
        "seconds_to_drain": result.seconds_to_drain,
        "sends": dict(verdict.sends),
        "events": verdict.events,
        "delivered": verdict.delivered,
        "duplicates": verdict.duplicates,
        "repeatable": verdict.repeatable,
        "handlings": dict(verdict.handlings),
        "effects": verdict.effects,
        "wrong": {name: list(items) for name, items in verdict.wrong.items()},
    }
    return json.dumps(what, indent=2)
