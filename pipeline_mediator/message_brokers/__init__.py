"""Brokers that a Publish middleware can hand messages to."""
