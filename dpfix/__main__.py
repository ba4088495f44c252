"""``python -m dpfix``."""

import sys

from dpfix.cli import main

if __name__ == "__main__":
    sys.exit(main())
