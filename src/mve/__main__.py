"""`python -m mve`, the same as `mve`."""

import sys

from mve.cli import main

sys.exit(main())
