"""``python -m dpfix``: the command line of :mod:`dpfix.cli`."""

from __future__ import annotations

import sys

from dpfix.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
