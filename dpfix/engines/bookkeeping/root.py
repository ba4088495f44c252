"""What stands in for the model's own ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.engines.replaced import Replaced, is_recorded
from dpfix.instrument import pytree
from dpfix.layout.rows import rows_of


class RootForward(Replaced):
    """Stands in for the model's own ``forward``."""

    def __init__(self, handle: BookkeepingHandle, module: nn.Module) -> None:
        super().__init__(module)
        self.handle = handle

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, recorded where per-sample gradients are wanted."""
        if not is_recorded(self.module):
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
