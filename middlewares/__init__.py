"""The built-in middlewares, one per file."""
