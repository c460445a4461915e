"""The public names: these, no others, each found where type checkers are told that it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PUBLIC = {
    "pipeline_mediator": [
        "Codec",
        "Command",
        "Consumer",
        "Context",
        "DomainEvent",
        "ECSTEvent",
        "Event",
        "EventEmitter",
        "EventHandler",
        "EventMap",
        "IntegrationEvent",
        "Mediator",
        "MediatorError",
        "Middleware",
        "Next",
        "NotificationEvent",
        "PermanentError",
        "Pipeline",
        "Query",
        "Request",
        "RequestHandler",
        "RequestMap",
        "Route",
        "Stream",
        "StreamQuery",
        "message",
        "only",
        "unless",
    ],
    "pipeline_mediator.message_brokers": [
        "Ack",
        "AzureMessageBroker",
        "BrokerFeatures",
        "Dead",
        "DeadDelivery",
        "DeadLetterQueue",
        "Delivery",
        "FastStreamBroker",
        "Later",
        "MemoryBroker",
        "MemorySubscription",
        "MessageBroker",
        "Outcome",
        "Outgoing",
        "RedisMessageBroker",
        "RedisStreamBroker",
        "Subscription",
        "Undecodable",
    ],
    "pipeline_mediator.middlewares": [
        "DeadLetterMiddleware",
        "HandleMiddleware",
        "InboxMiddleware",
        "LoggingMiddleware",
        "MetricsMiddleware",
        "OutboxMiddleware",
        "PublishMiddleware",
        "RedeliveryMiddleware",
        "RetryMiddleware",
        "TimeoutMiddleware",
        "TracingMiddleware",
        "TransactionMiddleware",
        "ValidationMiddleware",
    ],
}

packages = pytest.mark.parametrize("package", PUBLIC)


@packages
def test_names_are_pinned(package: str) -> None:
    assert import_module(package).__all__ == PUBLIC[package]


@packages
def test_names_come_from_the_modules_that_type_checkers_see(package: str) -> None:
    module = import_module(package)
    imported = imports_for_type_checkers(Path(str(module.__file__)).read_text())
    assert sorted(imported) == PUBLIC[package]
    for name, origin in imported.items():
        assert getattr(module, name) is getattr(import_module(origin), name), name


def imports_for_type_checkers(source: str) -> dict[str, str]:
    """Where each name of the block `if TYPE_CHECKING:` comes from."""
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@packages
def test_dir_and_star_show_every_name(package: str) -> None:
    # In a fresh interpreter: names that were asked for before stand in the module anyway.
    show = f"import {package} as package; print(*dir(package)); from {package} import *; print(*vars())"
    shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.splitlines()
    for line in shown:
        assert set(PUBLIC[package]) <= set(line.split())


@pytest.mark.parametrize(
    ("package", "misspelt", "meant"),
    [
        ("pipeline_mediator", "Mediatr", "Mediator"),
        ("pipeline_mediator", "RequestsMap", "RequestMap"),
        ("pipeline_mediator.middlewares", "RetryMiddlewear", "RetryMiddleware"),
    ],
)
def test_a_misspelt_name_is_told_the_right_one(package: str, misspelt: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=rf"'{package}' has no attribute '{misspelt}'\. Did you mean {meant}\b"):
        getattr(import_module(package), misspelt)


def test_a_name_like_no_other_gets_no_hint() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'$"):
        import_module("pipeline_mediator").xyzzy  # noqa: B018 - to ask for it is the test
