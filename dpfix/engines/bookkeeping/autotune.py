"""Choosing among equal ways to compute the same thing by trying them once, as cuDNN's benchmark mode does.

Which way is faster depends on shapes and on the machine. What is kept is the name of the fastest way for shapes, never
anything about data; shapes are rounded up to powers of two, so that inputs of varying length are not tried again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

import torch

from dpfix.instrument.clock import clock_for

TRIALS = 2
"""How often every way is tried; the fastest time counts."""
CLOSE = 2.0
"""Ways that take up to this many times the fastest one's time on a few samples are tried on all of them: what fits into the
caches of a processor with a few does not with all."""
LONG_SECONDS = 0.1
"""A way that takes this long is tried once: what a first call costs beside (memory, code made for a shape) is little then."""


def rounded(sizes: Iterable[int]) -> tuple[int, ...]:
    """Bit lengths of sizes, which rounds them up to a power of two."""
    return tuple((size - 1).bit_length() if size > 8 else size for size in sizes)


class Autotune:
    """Remembers which way was fastest."""

    def __init__(self) -> None:
        self._chosen: dict[Hashable, str] = {}

    def fastest(
        self,
        key: Hashable,
        ways: Mapping[str, Callable[[], object]],
        device: torch.device,
        whole: Mapping[str, Callable[[], object]] | None = None,
    ) -> str:
        """The name of the fastest way; tried the first time a key is seen.

        Args:
            key: what the choice depends on.
            ways: what computes in each of them, on a few samples.
            device: where they compute.
            whole: the same on all samples, where these are more.

        Returns:
            The name.
        """
        names = tuple(ways)
        if len(names) == 1:
            return names[0]
        full = (key, names, str(device), torch.get_num_threads())
        if full not in self._chosen:
            best: dict[str, float] = {}
            for name in names:
                best[name] = _seconds(ways[name], device, 4 * min(best.values(), default=float("inf")))
            close = [name for name in names if best[name] <= CLOSE * min(best.values())]
            if whole is not None and len(close) > 1:
                best = {name: _seconds(whole[name], device, 0.0) for name in close}
            self._chosen[full] = min(best, key=best.__getitem__)
        return self._chosen[full]


def _seconds(way: Callable[[], object], device: torch.device, hopeless: float) -> float:
    best = float("inf")
    clock = clock_for(device)
    for _ in range(TRIALS):
        start = clock()
        way()
        best = min(best, clock() - start)
        if best > min(hopeless, LONG_SECONDS):
            break
    return best
