"""`python -m pals.cli` is the same as `pals`."""

import sys

from pals.cli.main import main

if __name__ == "__main__":  # worker processes import the main module
    sys.exit(main())
