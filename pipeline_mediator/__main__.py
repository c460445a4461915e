"""`python -m pipeline_mediator`: the command line."""

import sys

from pipeline_mediator.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
