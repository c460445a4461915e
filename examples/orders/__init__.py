"""An order service over HTTP: what an application built on pipeline-mediator looks like."""
