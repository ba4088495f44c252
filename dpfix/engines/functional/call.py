"""Calling a module one sample at a time under ``vmap``, with parameters that have a leading sample dimension.

The forward pass runs under ``vmap``, the backward pass is the script's own: per-sample gradients arrive at the
parameters that were given, nothing is computed twice, and random masks are those of the forward pass.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpfix.engines.base import per_sample
from dpfix.engines.functional.parameter_swap import Aliases, Slot, attributes_kept, swapped
from dpfix.engines.functional.workarounds import Workarounds
from dpfix.instrument import pytree
from dpfix.instrument.precision import InBFloat16
from dpfix.layout.calls import CallLayout, LayerLayout
from dpfix.layout.rows import Rows, rows_of

_GETTER = "_ZN2at9functorch28isVmapFallbackWarningEnabledEv"  # at::functorch::isVmapFallbackWarningEnabled()


@cache
def _fallback_warnings_asked() -> Callable[[], bool]:
    """What tells whether they are on. Torch has a setter for Python only; the getter is in its library."""
    name = {"darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        getter = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))[_GETTER]
    except (OSError, AttributeError):  # another compiler's name for it: they are on unless somebody turned them off
        return lambda: True
    getter.restype = ctypes.c_bool
    return getter


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Operations that ``vmap`` runs in a loop are only slow, and speed is measured before an engine is chosen.

    Yields:
        Nothing.
    """
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    before = _fallback_warnings_asked()()
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(before)


@dataclass(frozen=True)
class MappedCall:
    """A module that is called for every sample, each with parameters of its own.

    Attributes:
        function: the module's forward.
        slots: where its parameters are held.
        workarounds: whether its forward needs :class:`Workarounds`, which take a tenth of the time.
    """

    function: Callable[..., Any]
    slots: list[Slot]
    workarounds: bool = False

    def __call__(
        self,
        values: Aliases,
        layout: CallLayout | LayerLayout,
        samples: int,
        weight: float | torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the module.

        Args:
            values: what is put into the slots, shape ``[samples, *parameter]``.
            layout: how arguments and output carry the samples.
            weight: what a scalar per sample (a loss that the module computes) is multiplied with before they are added up.

        Returns:
            The output for the whole batch.
        """
        found, names, structure = dict(pytree.leaves((args, kwargs))), list(values), list[Any]()
        mapped = {p: rows_of(found[p], dim, samples).split(found[p]) for p, dim in layout.inputs if dim is not None}

        def one(tensors: tuple[torch.Tensor, ...], own: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            given = dict(zip(mapped, tensors, strict=True))
            a, k = pytree.map_leaves(given.get, (args, kwargs))
            with swapped(self.slots, dict(zip(names, own, strict=True))), self._around():
                result = self.function(*a, **k)
            structure[:] = [result]
            return tuple(pytree.tensors(result))

        with without_fallback_warnings(), attributes_kept(getattr(self.function, "__self__", None)):
            tensors = torch.vmap(one, randomness="different")(tuple(mapped.values()), tuple(values.values()))
        return _joined(structure[0], list(tensors), dict(layout.output), samples, weight)

    def _around(self) -> AbstractContextManager[Any]:
        autocast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        autocast |= isinstance(getattr(self.function, "__self__", None), InBFloat16)
        return Workarounds() if self.workarounds or autocast else nullcontext()


def _joined(
    result: Any, tensors: list[torch.Tensor], dims: Mapping[Any, Any], samples: int, weight: float | torch.Tensor
) -> Any:
    def join(path: pytree.Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensor, dim = tensors.pop(0), dims.get(path)
        if dim is not None:
            return Rows.of(dim, samples).merge(tensor)
        if tensor.dim() == 1:
            return (tensor * per_sample(weight, tensor)).sum()
        return tensor.flatten(0, 1) if tensor.shape[1] == 1 else tensor

    return pytree.map_leaves(join, result)
