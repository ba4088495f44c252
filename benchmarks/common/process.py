"""Time and memory of a process."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function


def quiet() -> None:
    """One thread, and neither warnings nor log lines between the rows of a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, on one thread."""
    with multiprocessing.get_context("spawn").Pool(1, _one_thread) as pool:
        return pool.apply(function, arguments)


def _one_thread() -> None:
    torch.set_num_threads(1)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Largest number of bytes that tensors hold during a warm step."""
    step()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()  # what the step before left behind is freed here, which the profiler does not see
        with record_function("warm step"):
            step()
    gc.collect()
    present = peak = 0
    for size, inside in _allocations(recorded, "warm step"):
        present += size
        peak = max(peak, present) if inside else present
    return _live_bytes() + peak - present


def most_allocated(work: Callable[[], Any]) -> int:
    """Largest number of bytes that a piece of work has allocated at one time; what was there before does not count."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()  # alive until the profiler has stopped
    del kept
    present = peak = 0
    for size, _ in _allocations(recorded):
        present += size
        peak = max(peak, present)
    return peak


def _allocations(recorded: profile, name: str = "") -> Iterator[tuple[int, bool]]:
    """Bytes that were taken or given back, in order, and whether that was after a named event had begun."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next((e.start_ns() for e in events if e.name() == name), 0)
    return ((e.nbytes(), e.start_ns() >= start) for e in events if e.name() == "[memory]")


def _live_bytes() -> int:
    tensors = (t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())
