"""Kernels that draw random numbers inside, as the operations they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


class Unfused(TorchFunctionMode):
    """Attention with dropout, and recurrent networks with dropout between their layers, show their draws.

    On a GPU they are one kernel each. Its masks depend on where a sample stands in the batch, and no other generator can be
    given to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention and _probability(args, kwargs) > 0
        if attention or func is F.multi_head_attention_forward:  # no mode sees what that calls
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _RECURRENT:
            with _without_cudnn():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _probability(args: Any, kwargs: Any) -> float:
    """Of dropout: the fifth argument of attention."""
    return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
