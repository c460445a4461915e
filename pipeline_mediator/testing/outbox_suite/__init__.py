"""What every outbox has to do, as tests to derive from.

    class TestMyOutbox(OutboxStoreSuite):
        @pytest.fixture
        async def database(self) -> AsyncIterator[OutboxDatabase]:
            ...  # yield an object with the methods of OutboxDatabase, over empty tables

Runs under pytest with anyio's plugin. For readable failures say
`pytest.register_assert_rewrite("pipeline_mediator.testing.outbox_suite")` in a conftest.py.

What it cannot show: that a killed process, or a killed server, loses nothing. A connection that ends is all it has of a
crash, and no test of one process can do better; kill real ones.
"""

from __future__ import annotations

from pipeline_mediator.testing.outbox_suite.backing import OutboxDatabase, OutboxFeatures
from pipeline_mediator.testing.outbox_suite.cleaning import Cleaning
from pipeline_mediator.testing.outbox_suite.clocks import Clocks
from pipeline_mediator.testing.outbox_suite.crashes import Crashes
from pipeline_mediator.testing.outbox_suite.dead_letters import DeadLetters
from pipeline_mediator.testing.outbox_suite.endings import Endings
from pipeline_mediator.testing.outbox_suite.operating import Operating
from pipeline_mediator.testing.outbox_suite.refusals import Refusals
from pipeline_mediator.testing.outbox_suite.sharing import Sharing
from pipeline_mediator.testing.outbox_suite.taking import Taking
from pipeline_mediator.testing.outbox_suite.writing import Writing

__all__ = ["OutboxDatabase", "OutboxFeatures", "OutboxStoreSuite"]


class OutboxStoreSuite(Writing, Taking, Sharing, Refusals, DeadLetters, Endings, Crashes, Cleaning, Operating, Clocks):
    """The promises of `OutboxStore`, one test each; derive, and say what your database is."""
