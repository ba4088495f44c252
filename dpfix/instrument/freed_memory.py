"""Memory that a call no longer needs."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Give freed memory back to the operating system.

    The allocator of C keeps what it thinks will be needed again: gradients of single samples, of which a call holds several
    at a time. Done where that is glibc (``malloc_trim``).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
