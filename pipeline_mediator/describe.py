"""What a mediator says about itself: its compiled chains as text, JSON or Mermaid, and what may surprise in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pipeline_mediator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.pipeline import Chain

__all__ = ["describe", "warnings_of"]


def describe(mediator: Mediator, message_type: type | None, form: Literal["text", "json", "mermaid"]) -> str:
    """Render the chains of one message type, or of every type that is bound or has a destination."""
    if message_type is not None and not isinstance(message_type, type):
        raise ConfigurationError(f"describe() takes a message type, not a message: {type(message_type).__name__}")
    types = mediator.routes.message_types() if message_type is None else [message_type]
    # Each once: what a relay publishes walks one chain per destination, whatever its type.
    chains = list({id(chain): chain for one in types for chain in mediator.routes.all_of(one)}.values())
    if form == "text":
        return "\n\n".join(_text(chain) for chain in chains)
    if form == "json":
        return json.dumps([_facts(chain) for chain in chains], indent=2)
    if form == "mermaid":
        return _mermaid(chains)
    raise ConfigurationError(f'describe(format={form!r}): it is "text", "json" or "mermaid"')


def warnings_of(mediator: Mediator) -> list[str]:
    """What the links say about the chains that they stand in, each text once, with the routes that it is about."""
    found: dict[str, dict[str, None]] = {}
    for chain in (
        one for message_type in mediator.routes.message_types() for one in mediator.routes.all_of(message_type)
    ):
        for link in chain.links:
            for text in link.warnings_for(chain):
                found.setdefault(text, {})[str(chain.route)] = None
    return [f"{', '.join(routes)}: {text}" for text, routes in found.items()]


def _facts(chain: Chain) -> dict[str, Any]:
    route = chain.route
    return {
        "message": route.message_type.__name__,
        "kind": route.kind,
        "origin": route.origin,
        "destination": route.destination,
        "links": [{"name": link.name, "role": link.role, "summary": link.summary} for link in chain.links],
    }


def _text(chain: Chain) -> str:
    width = max(len(link.name) for link in chain.links)
    rows = [
        f"  {number:>2}  {link.name:<{width}}  {link.summary}".rstrip()
        for number, link in enumerate(chain.links, start=1)
    ]
    return "\n".join([str(chain.route), *rows])


def _mermaid(chains: Iterable[Chain]) -> str:
    lines = ["flowchart LR"]
    for number, chain in enumerate(chains):
        names = [f"{number}_{position}" for position in range(len(chain.links) + 1)]
        lines.append(f'  subgraph c{number}["{_quoted(str(chain.route))}"]')
        lines.append(f'    n{names[0]}(["{_quoted(chain.route.message_type.__name__)}"])')
        for name, link in zip(names[1:], chain.links, strict=True):
            text = "<br/>".join(_quoted(line) for line in (link.name, link.summary) if line)
            left, right = ("[[", "]]") if name == names[-1] else ("[", "]")
            lines.append(f'    n{name}{left}"{text}"{right}')
        lines.append("    " + " --> ".join(f"n{name}" for name in names))
        lines.append("  end")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Without the characters that Mermaid, or the HTML that it makes, takes for its own; `main.<locals>.f` has some."""
    return text.translate(_ENTITIES)


_ENTITIES = str.maketrans({"#": "#35;", '"': "#quot;", "&": "#amp;", "<": "#lt;", ">": "#gt;"})
