"""``python -m fttrain``."""

import sys

from fttrain.cli import main

sys.exit(main())
