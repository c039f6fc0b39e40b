"""`python -m etude` is the `etude` command (what torchrun starts)."""

import sys

from etude.cli import main

if __name__ == "__main__":
    sys.exit(main())
