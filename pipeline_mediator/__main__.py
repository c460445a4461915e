"""`python -m pipeline_mediator`: the command line, as `pipeline-mediator` runs it."""

import sys

from pipeline_mediator.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
