"""Models whose parameters are spread over processes by torch's ``fully_shard`` (FSDP2): shards and whole parameters.

Between its calls a module of such a model holds the shards, which the optimizer has: a ``DTensor`` for each parameter. While the
module is called, and while gradients go back through it, it holds whole parameters instead, other objects that stay the same
from call to call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils.hooks import RemovableHandle

from dpfix.instrument import pytree

Place = tuple[nn.Module, str, str]
"""The module that owns a parameter, what it is called there, and its name in the model."""


def is_sharded(module: Any) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return isinstance(module, FSDPModule)


def local(tensor: Any) -> Any:
    """What this process has of a tensor: the tensor itself, unless it is spread over several."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def as_shard_of(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values that this process has of something of the same shape and placement as a parameter.

    Args:
        values: of the shape of its own shard.

    Returns:
        A tensor that is spread as the parameter is.
    """
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        values,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def hide_shards(module: nn.Module) -> None:
    """Let a model hold its shards, as between two steps; after an evaluation some whole parameters may be left."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def whole_values(module: nn.Module) -> dict[int, torch.Tensor]:
    """The values of all parameters that are spread, put together; every process has to call it.

    Args:
        module: a model that holds its shards.

    Returns:
        By identity of the shards.
    """
    return _together(module.parameters())


def _together(parameters: Iterable[nn.Parameter], *, keep: bool = True) -> dict[int, torch.Tensor]:
    spread: dict[int, Any] = {id(p): p for p in parameters if isinstance(p, DTensor)}
    found: dict[int, torch.Tensor] = {}
    for key, p in spread.items():
        whole = p.detach().full_tensor()
        if keep:
            found[key] = whole
    return found


class Shards:
    """The parameters of a model in private training that is spread over processes.

    Args:
        module: the model, on whose root ``fully_shard`` was called.

    Attributes:
        parameters: its shards by every name that they have.
        past: names of parameters that gradient has reached past the engine since :meth:`clear`. It is thrown away where it
            arrives: the processes would add it up without clipping.
        values: the whole parameters by identity of their shards, in a step that this process looks at.
        looking: whether this process looks at the step.
        own: this process's own sums by name, in a step that it looks at.
        mixed: whether whole parameters have another type than their shards.
    """

    def __init__(self, module: nn.Module) -> None:
        hide_shards(module)
        self._module = module
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.names = {id(p): name for name, p in reversed(self.parameters.items())}
        self._shard_of: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.past: list[str] = []
        self.looking = False
        self.values: dict[int, torch.Tensor] | None = None
        self.own: dict[str, torch.Tensor] = {}
        self.mixed, self._version = False, -1
        self._watching: list[RemovableHandle] = []
        self._handles = [module.register_forward_hook(_apart), module.register_forward_pre_hook(self._called)]
        for root, places in _places(module):
            self._handles.append(root.register_forward_pre_hook(partial(self._look, places)))

    # ------------------------------------------------------------------ whole parameters

    def _look(self, places: list[Place], module: nn.Module, args: Any) -> None:
        """The module holds whole parameters: learn which is whose."""
        while places:
            owner, attribute, name = places[-1]
            whole: Any = owner._parameters[attribute]
            if isinstance(whole, DTensor):
                return  # another group of parameters, whose turn comes
            shard: Any = self.parameters[name]
            if id(whole) not in self._shard_of:
                self._shard_of[id(whole)] = whole, shard
                self.mixed |= whole.dtype != shard.dtype
                if whole.requires_grad:
                    self._watching.append(whole.register_post_accumulate_grad_hook(partial(self._came_past, name)))
            places.pop()

    def _came_past(self, name: str, whole: torch.Tensor) -> None:
        self.past.append(name)
        whole.grad = None

    def shard_of(self, whole: nn.Parameter) -> nn.Parameter:
        """The shard of a whole parameter that the model was called with.

        Returns:
            What the optimizer has.

        Raises:
            KeyError: it is none of them.
        """
        return self._shard_of[id(whole)][1]

    def _called(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._version = self._versions()

    def moment(self) -> tuple[tuple[Any, ...], ...]:
        """What tells whether the model still is what it is now: modes, and how often parameters and buffers were written."""
        modules, buffers = self._module.modules(), self._module.buffers()
        return tuple(m.training for m in modules), tuple(b._version for b in buffers), (self._versions(),)

    def put_together(self, *, keep: bool) -> bool:
        """Put the parameters together, which every process has to do where one looks at a step.

        Args:
            keep: whether this process does.

        Returns:
            Whether it can: the parameters are those with which the model was called.
        """
        self.looking, self.own = keep and self._version == self._versions(), {}
        self.values = _together(self.parameters.values(), keep=self.looking)
        return self.looking

    def _versions(self) -> int:
        return sum(p._version for p in self.parameters.values())

    def whole(self) -> dict[int, torch.Tensor]:
        """The values of :attr:`values` by identity of all that the model may hold: shards, and whole parameters."""
        values = self.values or {}
        held = {id(p): self.parameters[name] for name, p in self._module.named_parameters(remove_duplicate=False)}
        held |= {key: shard for key, (_, shard) in self._shard_of.items()}
        return values | {key: values[id(shard)] for key, shard in held.items() if id(shard) in values}

    def forget_values(self) -> None:
        """The step is over: the whole parameters are not needed any more."""
        self.values, self.looking, self.own = None, False, {}

    # ------------------------------------------------------------------ sums

    def add(self, shard: nn.Parameter, total: torch.Tensor | None) -> None:
        """Add up the sums of all processes, which call this in the same order, and keep this process's part in ``summed_grad``.

        Args:
            shard: the parameter.
            total: this process's sum, of the whole parameter's shape; ``None`` if it has nothing to add.
        """
        assert isinstance(shard, DTensor)
        if total is None:
            total = torch.zeros(shard.shape, dtype=shard.dtype, device=shard.device)
        if self.looking:
            self.own[self.names[id(shard)]] = total
        spread = DTensor.from_local(total, shard.device_mesh, [Partial("sum")], run_check=False)
        part = spread.redistribute(placements=shard.placements).to_local()
        before = getattr(shard, "summed_grad", None)
        shard.summed_grad = part if before is None else before + part  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Forget what came past the engine."""
        self.past.clear()

    def detach(self) -> None:
        """The training is over: take everything off the model."""
        for handle in (*self._handles, *self._watching):
            handle.remove()
        self._handles.clear()
        self._watching.clear()
        self._shard_of.clear()
        self.forget_values()


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, list[Place]]]:
    """For every module on which ``fully_shard`` was called, the parameters inside that no such module further inside has."""
    paths = {m: path for path, m in module.named_modules()}
    inside: dict[nn.Module, list[Place]] = {}

    def walk(owner: nn.Module, root: nn.Module) -> None:
        root = owner if is_sharded(owner) else root
        found = inside.setdefault(root, [])
        path = f"{paths[owner]}." if paths[owner] else ""
        found += [(owner, name, path + name) for name, p in owner._parameters.items() if p is not None]
        for child in owner.children():
            walk(child, root)

    walk(module, module)
    yield from inside.items()


def _apart(module: nn.Module, args: Any, output: Any) -> Any:
    """What the model returns, one step behind FSDP's hooks in the graph: whoever takes gradients up to it sets off none."""

    def moved(_: Any, leaf: Any) -> Any:
        return leaf.view_as(leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf

    return pytree.map_leaves(moved, output)
