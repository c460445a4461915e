"""What every broker has to do that publishes and subscribes, as tests to derive from.

    class TestMyBroker(BrokerSuite):
        features = TransportFeatures(delays=False)

        @pytest.fixture
        async def transport(self) -> AsyncIterator[Transport]:
            ...  # yield an object with the methods of Transport, over a broker that is empty

Runs under pytest with anyio's plugin. For readable failures say
`pytest.register_assert_rewrite("pipeline_mediator.testing.broker_suite")` in a conftest.py.

What it cannot show: that a killed process, or a killed server, loses nothing; that a hold outlives a network which is
away. Kill real ones.
"""

from __future__ import annotations

from pipeline_mediator.testing.broker_suite.backing import Transport, TransportFeatures
from pipeline_mediator.testing.broker_suite.dead_letters import DeadLetters
from pipeline_mediator.testing.broker_suite.endings import Endings
from pipeline_mediator.testing.broker_suite.order import Order
from pipeline_mediator.testing.broker_suite.publishing import Publishing
from pipeline_mediator.testing.broker_suite.receiving import Receiving
from pipeline_mediator.testing.broker_suite.settling import Settling

__all__ = ["BrokerSuite", "Transport", "TransportFeatures"]


class BrokerSuite(Publishing, Receiving, Settling, DeadLetters, Order, Endings):
    """The promises of `MessageBroker` and `Subscription`, one test each; derive, and say what your broker is."""
