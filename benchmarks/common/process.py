"""Time and memory of a process."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def quiet() -> None:
    """One thread, and neither warnings nor log lines between the rows of a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], Any]) -> float:
    """Seconds of a clock on the wall, until a GPU has done what it was given, too."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any, threads: int = 1) -> Any:
    """What a function returns in a process of its own, on so many threads."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as pool:
        return pool.apply(function, arguments)


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], Any]) -> int:
    """Number of torch operations that are dispatched."""
    with _Count() as count:
        work()
    return count.calls


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func.overloadpacket in flop_registry:
            kind = next(t.dtype for t in args if isinstance(t, Tensor))
            count = flop_registry[func.overloadpacket](*args, **given, out_val=result)
            self.found[kind] = self.found.get(kind, 0) + count
        return result


def products(work: Callable[[], Any]) -> dict[torch.dtype, int]:
    """Operations in products of matrices, as ``torch.utils.flop_counter`` counts them, by the type of the factors."""
    with _Products() as seen:
        work()
    return seen.found


def resident_bytes() -> int:
    """Memory that the operating system has given to this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_on_gpu(step: Callable[[], Any]) -> int:
    """Largest number of bytes that tensors on the GPU hold during a warm step."""
    step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


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
    # of a tensor that is spread over processes, the part that is here is another object
    tensors = (t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor) and type(t) is not DTensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


def on_ranks(work: Callable[..., Any], size: int, *given: Any) -> list[Any]:
    """What a function returns on each of some processes that train together (gloo).

    Args:
        work: a function of a module, which takes rank, size, a folder that all share, and what is given.
        size: number of processes.

    Raises:
        RuntimeError: one has failed; its own output says why.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_on_rank, args=(work, rank, size, folder, given)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"{given}, {size} processes: a rank has failed")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _on_rank(work: Callable[..., Any], rank: int, size: int, folder: Path, given: tuple[Any, ...]) -> None:
    quiet()
    if size > 1:
        distributed.init_process_group("gloo", f"file://{folder}/meeting", timedelta(minutes=5), size, rank)
    torch.save(work(rank, size, folder, *given), folder / f"{rank}.pt")
    if size > 1:
        distributed.destroy_process_group()
