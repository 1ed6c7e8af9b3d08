"""`python -m pals.cli` is the same as `pals`."""

import sys

from pals.cli.main import main

sys.exit(main())
