"""No-grad regions: module calls whose result no gradient ever comes back to run without a graph.

``z = encoder(x).detach()`` builds a graph that nobody walks, and under Opacus's hooks it breaks the pairing of
activations and gradients. The remedy users are told is ``with torch.no_grad():`` around the call; this does it for them.
Every region carries a tripwire: should gradient reach its output in a later step, that step is not applied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.replaced import Replaced, mapped_only, takes_gradients, transformed
from dpfix.engines.saved_bytes import saved_bytes
from dpfix.instrument import pytree
from dpfix.instrument.call_sites import CallCounter, CallSite
from dpfix.plan import Region


def line_of(site: CallSite | None) -> Any:
    """What calls from one line of code have in common.

    Returns:
        Module, call of the model and line; ``None`` for a call that is none.
    """
    return None if site is None else (site.path, site.root, site.line)


@contextmanager
def applied(module: nn.Module, regions: Iterable[Region], *, cutting: bool = True) -> Iterator[NoGradRegions]:
    """Put regions on a model while a block runs.

    Args:
        cutting: whether the calls run without a graph; if not, they are only measured.

    Yields:
        The regions at work.
    """
    at_work = NoGradRegions(module, regions, cutting=cutting)
    try:
        yield at_work
    finally:
        at_work.detach()


class NoGradRegions:
    """Regions at work on a model.

    Args:
        cutting: whether the calls run without a graph; if not, they are only measured.

    Attributes:
        tripped: regions whose output a gradient has reached since the last :meth:`reset`.
        bytes: what autograd saved inside each region, if they are only measured.
        seconds: how long the last call of each region took.
    """

    def __init__(self, module: nn.Module, regions: Iterable[Region], *, cutting: bool = True) -> None:
        self.module = module
        self._cutting = cutting
        self._by_line: dict[Any, list[Region]] = {}
        for region in regions:
            self._by_line.setdefault(line_of(region.site), []).append(region)
        self._counter = CallCounter()
        self._anchor = torch.zeros((), requires_grad=True)
        self.tripped: list[Region] = []
        self.bytes: dict[Region, int] = {}
        self.seconds: dict[Region, float] = {}
        paths = {""} | {line[0] for line in self._by_line} if self._by_line else set()
        self._calls = [RegionCall(self, path, module.get_submodule(path)) for path in paths]
        for call in self._calls:
            call.put_in()

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions."""
        return tuple(r for regions in self._by_line.values() for r in regions)

    def reset(self) -> None:
        """A new step begins."""
        if self._calls:
            self._counter.reset()
            self.tripped.clear()

    def drop(self, region: Region) -> None:
        """From now on this call is an ordinary one."""
        self._by_line[line_of(region.site)].remove(region)

    def detach(self) -> None:
        """Take everything off the model."""
        for call in self._calls:
            call.take_out()
        self._calls.clear()

    def call(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module of a region, or the model, is called; ``original`` is what the call does."""
        if not takes_gradients(self.module) or not mapped_only():
            return original(*args, **kwargs)
        site = self._counter.site(path)
        known = self._by_line.get(line_of(site), ())
        region = next((r for r in known if site.number % r.of == r.site.number), None)
        if region is None:
            return original(*args, **kwargs)
        start = time.perf_counter()
        try:
            if self._cutting:
                without_graph = _without_graph_mapped if transformed() else _without_graph
                return without_graph(
                    lambda: original(*args, **kwargs), self._anchor, lambda: self.tripped.append(region)
                )
            with saved_bytes(self.module.parameters()) as saved:
                found = original(*args, **kwargs)
            self.bytes[region] = sum(saved.values())
            return found
        finally:
            self.seconds[region] = time.perf_counter() - start


class RegionCall(Replaced):
    """Stands in for what ``module(...)`` does, hooks included."""

    name = "_call_impl"

    def __init__(self, at_work: NoGradRegions, path: str, module: nn.Module) -> None:
        super().__init__(module)
        self.at_work, self.path = at_work, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call."""
        return self.at_work.call(self.path, self.original, args, kwargs)

    @override
    def take_out(self) -> None:
        if vars(self.module).get(self.name) is self:  # not that of another training of the same model
            super().take_out()


class _Tripwire(torch.autograd.Function):
    """Runs a call without a graph; gradient that reaches its outputs is noticed, and goes no further."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, run: Callable[[], list[torch.Tensor]], trip: Callable[[], None]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.trip = trip
        # Clones: a module may return its input, a view or a buffer, none of which may get a graph from here.
        return tuple(t.clone() for t in run())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:  # type: ignore[override]
        if any(g is not None for g in gradients):
            ctx.trip()
        return None, None, None


def _without_graph(call: Callable[[], Any], anchor: torch.Tensor, trip: Callable[[], None]) -> Any:
    kept: list[Any] = []

    def run() -> list[torch.Tensor]:
        kept.append(call())
        return [t for t in pytree.tensors(kept[0]) if t.is_floating_point()]

    tensors = list(_Tripwire.apply(anchor, run, trip))  # type: ignore[arg-type]
    return pytree.map_leaves(
        lambda _, leaf: tensors.pop(0) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, kept[0]
    )


def _without_graph_mapped(call: Callable[[], Any], anchor: torch.Tensor, trip: Callable[[], None]) -> Any:
    """The same under ``vmap``, which cannot take a call into a custom function: a zero that notices gradient is added."""
    with torch.no_grad():
        found = call()
    zero = anchor * 1

    def stop(gradient: torch.Tensor) -> torch.Tensor:
        trip()
        return torch.zeros_like(gradient)

    zero.register_hook(stop)

    def watched(_: pytree.Path, leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf + zero.to(leaf.dtype) if floating else leaf

    return pytree.map_leaves(watched, found)
