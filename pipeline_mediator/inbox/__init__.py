"""A record of the messages that were handled, so that a message which arrives twice takes effect once."""
