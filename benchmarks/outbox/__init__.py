"""What the outbox costs and what its relay carries, beside relays written by hand for the same tables and streams."""
