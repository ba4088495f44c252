"""Operations that ``vmap`` refuses, or gets wrong, although what they should do is clear."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dpfix.instrument import pytree
from dpfix.instrument.in_place import is_in_place

_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a value per sample in the innermost ``vmap`` that is going on."""
    level = _functorch.peek_interpreter_stack().level()
    return _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level


def mapped(tensor: torch.Tensor, *, copied: bool = False) -> torch.Tensor:
    """A tensor with a value per sample in the innermost ``vmap`` that is going on.

    Args:
        tensor: a tensor; one that is the same for all samples is given to each of them.
        copied: whether every sample gets a copy of its own, which can be written to.

    Returns:
        Of the same shape, seen from inside.
    """
    if is_mapped(tensor):
        return tensor
    interpreter = _functorch.peek_interpreter_stack()
    samples = _functorch.CVmapInterpreterPtr(interpreter).batchSize()
    every = tensor.unsqueeze(0).expand(samples, *tensor.shape)
    return _functorch._add_batch_dim(every.clone() if copied else every, 0, interpreter.level())


_CAST = frozenset({
    F.linear,
    F.bilinear,
    F.prelu,
    F.scaled_dot_product_attention,
    *(getattr(where, name) for where in (F, torch) for name in ("conv1d", "conv2d", "conv3d", "prelu")),
    *(getattr(where, f"conv_transpose{n}d") for where in (F, torch) for n in (1, 2, 3)),
})
"""Functions whose arguments autocast brings to one type, and under ``vmap`` leaves as they are."""


class Workarounds(TorchFunctionMode):
    """Makes ``vmap`` do what it refuses or gets wrong; to be entered inside it, around the forward of a module.

    * A tensor that was made in this forward (``torch.zeros(...)``) and into which values of single samples are written
      becomes one per sample first; ``vmap`` refuses that, since the tensor was made as one for all of them.
    * The row of the padding token gets no gradient from an embedding; ``vmap`` forgets ``padding_idx`` in the backward
      pass.
    * Attention whose mask gradient passes through is computed with the formula; ``vmap`` hides that from the choice
      between the ways to compute it, and takes one that has no gradient for the mask.
    * Autocast casts the arguments of convolutions and attention; under ``vmap`` it does not see them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.Tensor] = {}  # held, so that no other tensor gets the same id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CAST and (dtype := _autocast_type(args)):
            args, kwargs = pytree.map_leaves(partial(_cast, dtype), (args, kwargs))
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func is torch.embedding:
            return _torch_embedding(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _learns_mask(*args, **kwargs):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if args and is_in_place(getattr(func, "__name__", ""), kwargs):
            self._widen(args[0], args[1:], kwargs)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if type(out) is torch.Tensor and _is_new(out, args, kwargs):
            self._made[id(out)] = out
        return out

    def _widen(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give every sample its own copy, in the very tensor object that the model holds."""
        if id(target) in self._made and not is_mapped(target) and any(map(is_mapped, _tensors(args, kwargs))):
            # Torch refuses to swap a tensor that a view or a graph holds on to: its values would part from theirs.
            torch.utils.swap_tensors(target, mapped(target, copied=True))


def _learns_mask(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> bool:
    while isinstance(attn_mask, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(attn_mask):
        attn_mask = _functorch.get_unwrapped(attn_mask)
    return isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad


def _is_new(out: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation has made a tensor for all samples, with memory of its own."""
    if out.requires_grad or out._is_view() or _functorch.is_functorch_wrapped_tensor(out):
        return False
    given = (t for t in _tensors(args, kwargs) if not _functorch.is_functorch_wrapped_tensor(t))
    return all(t.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for t in given)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    yield from pytree.tensors((args, kwargs))


def _autocast_type(args: tuple[Any, ...]) -> torch.dtype | None:
    kind = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "")
    return torch.get_autocast_dtype(kind) if kind and torch.is_autocast_enabled(kind) else None


def _cast(dtype: torch.dtype, _: pytree.Path, leaf: Any) -> Any:
    single = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return leaf.to(dtype) if single else leaf


def _torch_embedding(weight: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1, *args: Any) -> torch.Tensor:
    return _embedding(indices, weight, None if padding_idx < 0 else padding_idx)


def _embedding(
    input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    found = F.embedding(input, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return found
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, found.detach(), found)
