"""Calls of ``torch.nn.functional.batch_norm``, wherever a module makes them: seen, and computed per sample instead.

A module that makes such a call keeps its class, its parameters and everything else that its ``forward`` does; within that
``forward`` the call is given to a group normalisation.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from dpfix.errors import ModelError
from dpfix.instrument.source import calling_line

_MAX_GROUPS = 32
_FOLDED = 16
"""Least number of channels in a group that stands for tracked statistics; in smaller ones a sample's own differ too much."""
_LAST = ("training", "momentum", "eps")
_FORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", *_LAST),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", *_LAST, "cudnn_enabled"),
}
"""The functions, each with the names of its arguments."""
_BETWEEN = frozenset({__file__, torch.overrides.__file__, F.__file__})

Site = tuple[str, str, int]
"""A line of code that makes a call: module, function, and the line within it. The same on every machine."""


def group_count(channels: int, smallest: int) -> int:
    """The largest number of groups with enough channels in each.

    Args:
        channels: number of channels.
        smallest: least number of channels in a group.

    Returns:
        A divisor of ``channels``, at most 32; 1 if there is no better one.

    >>> group_count(64, 2), group_count(8, 2), group_count(16, 8), group_count(7, 2)
    (32, 4, 2, 1)
    """
    return max(g for g in range(1, _MAX_GROUPS + 1) if channels % g == 0 and (channels // g >= smallest or g == 1))


def groups_of(norm: str, channels: int, spatial: bool) -> int:
    """How many groups take the place of a batch normalisation.

    Args:
        norm: see :class:`~dpfix.scan.options.PrivacyOptions`.
        spatial: whether there are at least two spatial dimensions; without, a channel may be a single number.

    Returns:
        The number; as many as there are channels for an instance normalisation.
    """
    return {"layer": 1, "instance": channels}.get(norm) or group_count(
        channels, _FOLDED if norm == "folded" else 2 if spatial else 8
    )


@dataclass(frozen=True)
class BatchNormCall:
    """One call.

    Attributes:
        given: its arguments by name.
        site: the line that makes it.
    """

    given: dict[str, Any]
    site: Site

    @property
    def of_the_batch(self) -> bool:
        """Whether it normalises with the statistics of its input."""
        return bool(self.given.get("training")) or self.given.get("running_mean") is None

    @property
    def several_rows(self) -> bool:
        """Whether there are several rows to mix: a weight, or each sample by itself, is normalised as a single one."""
        return self.given["input"].shape[0] > 1

    def groups(self, norm: str) -> int:
        """The number of groups of what takes its place."""
        x = self.given["input"]
        return groups_of(norm, x.shape[1], x.dim() > 3)

    def per_sample(self, norm: str) -> torch.Tensor:
        """What takes its place: the same weight, bias and eps, with statistics of one row."""
        x, groups = self.given["input"], self.groups(norm)
        if x[0].numel() == groups:
            raise ModelError(
                f"norm={norm!r} leaves one number per group of an input of shape {list(x.shape)}:",
                "it would be normalised to zero.",
                "Pass norm='group' or 'layer'.",
                path="norm",
            )
        return F.group_norm(x, groups, self.given.get("weight"), self.given.get("bias"), self.given.get("eps", 1e-5))


class _Calls(TorchFunctionMode):
    """Gives every call to a function, which may answer it; any other function goes on as it is."""

    def __init__(self, answer: Callable[[BatchNormCall], torch.Tensor | None]) -> None:
        super().__init__()
        self._answer = answer

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = _FORMS.get(func)
        if names is None:
            return func(*args, **kwargs)
        found = self._answer(BatchNormCall(dict(zip(names, args, strict=False)) | kwargs, _site()))
        return func(*args, **kwargs) if found is None else found


def _site() -> Site:
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    code = frame.f_code
    return frame.f_globals.get("__name__", ""), code.co_qualname, frame.f_lineno - code.co_firstlineno


class PerSampleNorm(nn.Module):
    """What a module becomes whose ``forward`` normalises with the statistics of the batch: a subclass of its own class.

    In its ``forward`` a call that normalises with those statistics, or with what an earlier such call would have tracked,
    is a group normalisation. The tracked statistics are never written; they leave the state dict, and nobody but that
    ``forward`` can read them: folded into a convolution (RepVGG) they would give another function without an error.
    """

    original: type[nn.Module]
    norm: str
    sites: frozenset[Site]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        state = vars(self)
        state["_running"] = state.get("_running", 0) + 1
        try:
            with _Calls(self._instead):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state["_running"] -= 1

    def __getattr__(self, name: str) -> Any:
        state = vars(self)
        if name in state.get("_tracked", ()) and not state.get("_running"):
            raise AttributeError(
                f"{type(self).__name__}.{name}: private training has put {describe(self.norm)} in the place of batch_norm "
                "here. It normalises each sample by itself and tracks no statistics; it cannot be folded into a convolution."
            )
        return super().__getattr__(name)

    def _instead(self, call: BatchNormCall) -> torch.Tensor | None:
        tracked = vars(self).setdefault("_tracked", set())
        if call.of_the_batch and (call.several_rows or call.site in self.sites or isinstance(self, _BatchNorm)):
            for name in ("running_mean", "running_var"):
                tracked.update(self._names_of(call.given.get(name)))
            self._non_persistent_buffers_set.update(tracked & self._buffers.keys())
        elif call.site not in self.sites and not any(n in tracked for n in self._names_of(call.given["running_mean"])):
            return None
        return call.per_sample(self.norm)

    def _names_of(self, statistics: torch.Tensor | None) -> Iterator[str]:
        if statistics is not None:
            yield from (name for held in (self._buffers, vars(self)) for name, t in held.items() if t is statistics)

    def extra_repr(self) -> str:
        """That of the module's own class, and what is different."""
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}batch_norm -> {describe(self.norm)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _unpickled, (self.original, self.norm, self.sites), *rest


def describe(norm: str, channels: int | None = None, groups: int | None = None) -> str:
    """A normalisation.

    Returns:
        It in words.

    >>> describe("group", 64, 32), describe("instance", 64), describe("layer")
    ('GroupNorm(32, 64)', 'InstanceNorm(64)', 'GroupNorm(1, channels)')
    """
    if norm == "instance":
        return f"InstanceNorm({channels or 'channels'})"
    return f"GroupNorm({1 if norm == 'layer' else groups or 'groups'}, {channels or 'channels'})"


class _Alone(nn.SyncBatchNorm):
    """A synchronised normalisation as one process computes it, for the subclasses that call it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _BatchNorm.forward(self, input)


@functools.cache
def per_sample_class(original: type[nn.Module], norm: str, sites: frozenset[Site] = frozenset()) -> type[PerSampleNorm]:
    """The class that a module gets.

    Args:
        original: its class.
        norm: see :class:`~dpfix.scan.options.PrivacyOptions`.
        sites: lines where a run has shown that a call mixes samples.

    Returns:
        A subclass of it, with its name.
    """
    if issubclass(original, PerSampleNorm):
        original, sites = original.original, sites | original.sites
    bases: Any = (PerSampleNorm, original, *((_Alone,) if issubclass(original, nn.SyncBatchNorm) else ()))
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, bases, names | {"original": original, "norm": norm, "sites": sites})


def _unpickled(original: type[nn.Module], norm: str, sites: frozenset[Site]) -> nn.Module:
    cls = per_sample_class(original, norm, sites)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Mixing:
    """What a run has shown of one module.

    Attributes:
        lines: ``file:line`` of its calls.
        sites: the same, for the machine.
        channels: number of channels of the first one.
        groups: number of groups of what takes its place.
    """

    lines: tuple[str, ...]
    sites: frozenset[Site]
    channels: int
    groups: int

    @staticmethod
    def of(calls: Sequence[tuple[str, BatchNormCall]], norm: str) -> Mixing:
        """What the calls of one module show; ``norm`` as in :func:`groups_of`."""
        first = calls[0][1]
        lines = tuple(dict.fromkeys(line for line, _ in calls))
        sites = frozenset(call.site for _, call in calls)
        return Mixing(lines, sites, first.given["input"].shape[1], first.groups(norm))


@contextmanager
def mixing_calls(norm: str) -> Iterator[dict[nn.Module, list[tuple[str, BatchNormCall]]]]:
    """See the calls that mix the rows of their input; each is computed per row, so that none of them fails.

    Yields:
        Modules, each the innermost that was running, with the lines and calls in it.
    """
    running: list[nn.Module] = []
    found: dict[nn.Module, list[tuple[str, BatchNormCall]]] = {}

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def see(call: BatchNormCall) -> torch.Tensor | None:
        if not (call.of_the_batch and call.several_rows and running):
            return None
        found.setdefault(running[-1], []).append((calling_line(), call))
        return call.per_sample(norm)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with _Calls(see):
            yield found
    finally:
        for handle in handles:
            handle.remove()
