"""The clock that engines, and the ways inside them, are compared by."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock that other work on the machine disturbs least.

    Returns:
        Seconds: of this thread's own work where torch computes in it, of a clock on the wall otherwise.
    """
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds
