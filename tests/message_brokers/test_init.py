"""A broker's client is loaded when the broker is asked for, and missed with a hint."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipeline_mediator.message_brokers as brokers


def test_the_memory_broker_comes_without_redis() -> None:
    _run("from pipeline_mediator.message_brokers import MemoryBroker", "import sys; assert 'redis' not in sys.modules")


def test_without_redis_the_error_names_the_extra() -> None:
    _run(
        "import sys; sys.modules['redis'] = None",
        "from pipeline_mediator.errors import MissingExtraError",
        "try: from pipeline_mediator.message_brokers import RedisMessageBroker",
        "except MissingExtraError as error: assert 'pipeline-mediator[redis]' in str(error)",
        "else: raise SystemExit('no error')",
    )


def test_what_redis_itself_misses_is_not_blamed_on_the_extra() -> None:
    _run(
        "import sys; sys.modules['redis.backoff'] = None",
        "try: from pipeline_mediator.message_brokers import RedisMessageBroker",
        "except ModuleNotFoundError as error: assert error.name == 'redis.backoff', error.name",
        "else: raise SystemExit('no error')",
    )


@pytest.mark.parametrize("name", brokers.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert hasattr(brokers, name)
    assert name in dir(brokers)


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="RedisBroker"):
        _ = getattr(brokers, "RedisBroker")  # noqa: B009 - a type checker would refuse the plain form


def _run(*lines: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], check=True)
