"""Copies of a model that share nothing with it and carry none of the hooks of dpfix or Opacus."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpfix.errors import ArgumentError
from dpfix.instrument import pytree
from dpfix.instrument.sharded import is_sharded

_WRAPPERS = {
    "AbstractGradSampleModule": "_module",
    "AbstractGradSampleHooks": "_module",
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DifferentiallyPrivateDistributedDataParallel": "module",
    "AveragedModel": "module",
}
"""Name of a class among a wrapper's bases, and the attribute in which it keeps the model."""
_KINDS = ("forward", "forward_pre", "backward", "backward_pre", "state_dict_pre", "load_state_dict_pre")
_HOOKS = tuple(f"_{kind}_hooks" for kind in _KINDS)
_LEFT_BY_OPACUS = ("autograd_grad_sample_hooks", "ft_compute_sample_grad")
_LEFT_BY_HOOKS = ("activations", "max_batch_len", "norm_sample")
_OURS = ("dpfix", "opacus", "torch.distributed.fsdp")
_OF_FSDP = ("__composable_api_state_key", "_is_fsdp", "_fsdp_")
"""How attributes begin that ``fully_shard`` leaves on modules."""


def unwrap(model: Any) -> nn.Module:
    """The user's own module inside Opacus's, ``torch.compile``'s and the data-parallel wrappers.

    Args:
        model: a module, a wrapper of it, or Opacus's hooks object for a model that is not wrapped.

    Returns:
        The innermost module.

    Raises:
        ArgumentError: there is no module inside.
    """
    inner = model
    while (attribute := _inside(inner)) is not None:
        inner = getattr(inner, attribute)
    if not isinstance(inner, nn.Module):
        raise ArgumentError(
            f"model is a {type(model).__name__}, not a torch.nn.Module.",
            help="Pass the model, or the first item of what make_private_safe returned.",
            path="model",
        )
    return inner


def _inside(model: Any) -> str | None:
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((attribute for name, attribute in _WRAPPERS.items() if name in names), None)


def plain_copy(module: nn.Module, values: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy with cloned weights, ties kept, and without hooks and gradients of private training.

    Args:
        module: the model.
        values: of parameters that are spread over processes, by identity of what the model holds; the copy is not spread.

    Returns:
        The copy.
    """
    memo: dict[int, Any] = {}
    spread: list[tuple[nn.Module, nn.Module]] = []
    if values is not None:
        memo |= _whole_parameters(module, values)
        spread = [(child, _of_own_class(child)) for child in module.modules() if is_sharded(child)]
        memo |= {id(child): plain for child, plain in spread}
    left_out: list[tuple[str, str]] = []
    for path, child in module.named_modules():
        hooked = False
        for name, hooks in _hook_tables(child):
            kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_ours(hook))
            hooked |= len(kept) < len(hooks)
            memo[id(hooks)] = kept
            flags = getattr(child, f"{name}_with_kwargs", None)
            if flags is not None:
                memo[id(flags)] = OrderedDict((k, v) for k, v in flags.items() if k in kept)
        for name, value in vars(child).items():
            if (
                name in _LEFT_BY_OPACUS
                or (hooked and name in _LEFT_BY_HOOKS)
                or (name == "forward" and _is_ours(value))
            ):
                if not isinstance(value, int):  # numbers are shared: all that are equal would be left out
                    memo[id(value)] = None
                left_out.append((path, name))
            elif isinstance(value, (torch.Tensor, list, tuple, dict)):
                memo |= {id(t): _by_itself(t) for t in pytree.tensors(value) if not t.is_leaf or _in_vmap(t)}
    copied = copy.deepcopy(module, memo)
    for child, plain in spread:
        vars(plain).update({n: copy.deepcopy(v, memo) for n, v in vars(child).items() if not n.startswith(_OF_FSDP)})
    for path, name in left_out:
        child = copied.get_submodule(path)
        vars(child).pop(name, None)
        below = _below(vars(module.get_submodule(path)).get(name))
        if isinstance(below, MethodType):  # another package's forward, which ours stands in for
            vars(child)[name] = MethodType(below.__func__, child)
    return copied


def _below(method: Any) -> Any:
    """What a method was before something of ours came to stand in for it."""
    while method is not None and _is_ours(method):
        method = vars(method).get("_before")
    return method


def _in_vmap(t: torch.Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]


def _by_itself(t: torch.Tensor) -> torch.Tensor | None:
    """What a forward pass has left behind cannot be copied as it is; inside ``vmap`` nobody can read it any more."""
    return None if _in_vmap(t) else t.detach().clone()


def _hook_tables(module: nn.Module) -> Iterator[tuple[str, Mapping[int, Any]]]:
    for name in _HOOKS:
        yield name, getattr(module, name)


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, partial) or type(hook).__name__ == "_WrappedHook":
        hook = hook.func if isinstance(hook, partial) else hook.hook
    owner = getattr(hook, "__self__", hook)
    if getattr(owner, "part_of_the_model", False):
        return False
    defined_in = getattr(hook, "__module__", None) or type(owner).__module__
    return f"{defined_in}.".startswith(tuple(f"{name}." for name in _OURS))


def _of_own_class(child: nn.Module) -> nn.Module:
    """An empty module of the class that a module had before ``fully_shard``."""
    cls: Any = next(c for c in type(child).__mro__ if not issubclass(c, FSDPModule))
    return cls.__new__(cls)


def _whole_parameters(module: nn.Module, values: Mapping[int, torch.Tensor]) -> dict[int, Any]:
    """Parameters to be in the place of those that a model holds, by identity; one for those that are tied."""
    trained = {id(values[id(p)]): p.requires_grad for p in module.parameters() if id(p) in values}
    tensors = {id(t): t for t in values.values()}
    made = {key: nn.Parameter(t.clone(), requires_grad=trained.get(key, False)) for key, t in tensors.items()}
    return {key: made[id(t)] for key, t in values.items()}
