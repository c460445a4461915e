"""Test tools for applications and for adapters of their own; nothing here is imported unless it is asked for."""
