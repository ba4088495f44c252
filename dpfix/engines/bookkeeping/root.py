"""What stands in for the model's own ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpfix.engines.bookkeeping.forward import ReplacedForward
from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.instrument import pytree
from dpfix.layout.rows import rows_of


class RootForward(ReplacedForward):
    """Stands in for the model's own ``forward``.

    Args:
        handle: the engine at work.
        module: the model.
    """

    def __init__(self, handle: BookkeepingHandle, module: nn.Module) -> None:
        super().__init__(handle, module, "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, recorded where gradients are being taken.

        Args:
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            Its output.
        """
        transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        if not (self.module.training and torch.is_grad_enabled()) or transformed:
            return self.original(*args, **kwargs)
        args, kwargs = pytree.plain(args), pytree.plain(kwargs)
        layout = self.handle.call_layout(args, kwargs)
        with self.handle.root_call(layout, args, kwargs) as call:
            output = self.original(*args, **kwargs)
        dims = dict(layout.output)
        for path, leaf in pytree.leaves(output):
            dim = dims.get(path)
            if isinstance(leaf, torch.Tensor) and dim is not None:
                rows_of(leaf, dim, call.samples)
        return output
