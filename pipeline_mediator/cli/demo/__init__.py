"""`python -m pipeline_mediator demo`: sends varied orders through `examples/orders` and checks that it all adds up."""
