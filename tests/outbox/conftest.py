"""Readable failures for the shipped suite."""

import pytest

pytest.register_assert_rewrite("pipeline_mediator.testing.outbox_suite")
