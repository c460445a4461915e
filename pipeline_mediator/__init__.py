"""An async CQRS mediator with one ordered chain of middlewares for send, emit, publish and consume."""
