"""``python -m flwr_moe.cli``."""

import sys

from flwr_moe.cli import main

sys.exit(main())
