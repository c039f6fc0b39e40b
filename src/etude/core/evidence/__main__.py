"""``python -m etude.core.evidence PART FOLDER``: one run of the evidence, in this process (see `stage`)."""

import sys

from etude.core.evidence.stage import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
