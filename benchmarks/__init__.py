"""What a message costs, measured beside a bare call and beside every other mediator that is installed."""
