"""Writes the spans of every process to files, and draws what they have to do with each other.

`python -m examples.orders.tracing FOLDER` prints a Mermaid graph. A real service sends its spans to a collector; the
middleware does not know the difference.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["as_mermaid", "read_spans", "trace_if_told"]


def trace_if_told(service: str) -> None:
    """Where ORDERS_TRACES names a folder, write this process's spans there. Needs opentelemetry-sdk."""
    folder = os.environ.get("ORDERS_TRACES")
    if not folder:
        return
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class ToFile(SpanExporter):
        def __init__(self, file: Path) -> None:
            self._file = file

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            with self._file.open("a") as file:
                for span in spans:
                    file.write(json.dumps(_facts(service, span)) + "\n")
            return SpanExportResult.SUCCESS

    provider = TracerProvider(resource=Resource({"service.name": service}))
    provider.add_span_processor(SimpleSpanProcessor(ToFile(Path(folder) / f"{service}-{os.getpid()}.jsonl")))
    trace.set_tracer_provider(provider)


def _facts(service: str, span: Any) -> dict[str, Any]:
    return {
        "service": service,
        "name": span.name,
        "kind": span.kind.name,
        "id": f"{span.context.span_id:016x}",
        "parent": None if span.parent is None else f"{span.parent.span_id:016x}",
        "links": [f"{link.context.span_id:016x}" for link in span.links],
    }


def read_spans(folder: Path) -> list[dict[str, Any]]:
    """What all processes wrote; a line that a killed one left half-written is passed over."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def as_mermaid(spans: Iterable[dict[str, Any]]) -> str:
    """An arrow from each span to those inside it, a dotted one to those that are linked to it; a box per process."""
    lines = ["flowchart LR"]
    known = {span["id"]: span for span in spans}
    for service in dict.fromkeys(span["service"] for span in known.values()):
        lines.append(f'  subgraph {service}["{service}"]')
        own = [span for span in known.values() if span["service"] == service]
        lines += [f'    s{span["id"]}["{span["name"]}<br/>{span["kind"]}"]' for span in own]
        lines.append("  end")
    for span in known.values():
        if span["parent"] in known:
            lines.append(f"  s{span['parent']} --> s{span['id']}")
        lines += [f"  s{link} -.-> s{span['id']}" for link in span["links"] if link in known and link != span["parent"]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_mermaid(read_spans(Path(sys.argv[1]))))
