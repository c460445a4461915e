"""Azure Service Bus: queues, topics, subscriptions and sessions, by its own client."""

from pipeline_mediator.message_brokers.azure.broker import AzureMessageBroker
from pipeline_mediator.message_brokers.azure.subscription import AzureSubscription

__all__ = ["AzureMessageBroker", "AzureSubscription"]
