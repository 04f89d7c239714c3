"""``python -m flwr_moe.cli``."""

import sys

from flwr_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
