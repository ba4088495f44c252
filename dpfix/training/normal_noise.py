"""Normal noise for all parameters at once, drawn by as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import torch

from dpfix.instrument.own_draws import OWN_THREADS
from dpfix.sampling.randomness import Stream

LANES = 8
"""Generators that draw in turn, so that the numbers are the same however many threads there are."""
AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Numbers that are drawn together; on the CPU they stay in its cache."""

Chunk = list[torch.Tensor]
"""Tensors, and flat pieces of large ones, that get numbers which are drawn together."""


def add_normal(totals: Sequence[torch.Tensor], std: float, stream: Stream) -> None:
    """Add independent normal numbers to every number of some tensors, in place.

    Torch draws normal numbers with one thread, which would take longer than a whole step on many cores.

    Args:
        totals: tensors of any shapes, devices and precisions.
        std: standard deviation of the numbers.
        stream: where they come from.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for total in totals:
        kinds.setdefault((total.device, total.dtype), []).append(total)
    for (device, dtype), tensors in kinds.items():
        chunks = list(_chunks(tensors, AT_ONCE.get(device.type, 2**18)))
        lanes = min(LANES, len(chunks)) if device.type == "cpu" else 1
        threads = min(torch.get_num_threads(), lanes) if dtype in _OF_NUMPY else 1
        add = torch._foreach_add_ if threads == 1 else _add_by_one_thread
        _run([partial(_draw, chunks[k::lanes], std, stream.generator(device, k), add) for k in range(lanes)], threads)


def _chunks(tensors: Sequence[torch.Tensor], size: int) -> Iterator[Chunk]:
    """The numbers of tensors in their order, ``size`` together; those that lie scattered in memory by themselves."""
    chunk: Chunk = []
    room = size
    for tensor in tensors:
        if not tensor.is_contiguous():
            yield [tensor]
            continue
        fits = tensor.numel() < room
        for piece in (tensor,) if fits else tensor.view(-1).split(_sizes(tensor.numel(), room, size)):
            chunk.append(piece)
            room -= piece.numel()
            if not room:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def _sizes(numbers: int, room: int, size: int) -> list[int]:
    """Sizes of the pieces of a tensor: what still has room with others, whole chunks, and the rest."""
    first = min(numbers, room)
    whole, rest = divmod(numbers - first, size)
    return [n for n in (first, *[size] * whole, rest) if n]


def _draw(chunks: Sequence[Chunk], std: float, generator: torch.Generator, add: Callable[..., None]) -> None:
    every = [[piece.numel() for piece in chunk] for chunk in chunks]
    memory = torch.empty(max(map(sum, every)), dtype=chunks[0][0].dtype, device=chunks[0][0].device)
    for chunk, sizes in zip(chunks, every, strict=True):
        numbers = sum(sizes)
        noise = memory if numbers == len(memory) else memory[:numbers]
        noise.normal_(0.0, std, generator=generator)
        parts = noise.split(sizes) if len(sizes) > 1 else (noise,)
        add(
            chunk,
            [part if piece.dim() == 1 else part.view(piece.shape) for piece, part in zip(chunk, parts, strict=True)],
        )


def _add_by_one_thread(chunk: Chunk, parts: Sequence[torch.Tensor]) -> None:
    """Torch would use all of its threads in each of ours."""
    for piece, part in zip(chunk, parts, strict=True):
        np.add(piece.numpy(), part.numpy(), out=piece.numpy())


_OF_NUMPY = (torch.float32, torch.float64)


def _run(works: Sequence[Callable[[], None]], threads: int) -> None:
    """Do some work with a number of threads, this one among them."""
    shares = [works[k::threads] for k in range(max(1, threads))]
    others = [_pool().submit(_one_by_one, share) for share in shares[1:]]
    try:
        _one_by_one(shares[0])
    finally:
        wait(others)  # an interrupt must not leave a thread behind that writes
    for other in others:
        other.result()


def _one_by_one(works: Sequence[Callable[[], None]]) -> None:
    for work in works:
        work()


_POOLS: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_POOLS.clear)  # its threads are not in the child


def _pool() -> ThreadPoolExecutor:
    if not _POOLS:
        _POOLS.append(ThreadPoolExecutor(LANES - 1, thread_name_prefix=OWN_THREADS))
    return _POOLS[0]
