"""Repeating a step by the script's own code, where the call was told it and the loop really makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.errors import USER_CODE_ERRORS, TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.own_draws import draws_from
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.rows import Rows
from dpfix.observe.training_step import TrainingStep
from dpfix.training.follow.delivery import BatchLayout, Exchange
from dpfix.training.follow.placement import Placement, placement
from dpfix.training.follow.step import NotFollowedError, RealStep, Repeated, Way, close, tensors_of

_SEED = 7


class ToldStep(Way):
    """The training step that the call was told, on the delivered batch, with the outputs that the model really gave.

    Args:
        step: what the call was told.
        layout: how the loader's batches carry their samples.
        real: the real step.
        values: gives what an output of the model was, whatever the script has written into it since.
        module: a plain copy of the model; its ``forward`` is replaced.

    Raises:
        NotFollowedError: the loop makes another step than the one that was told.
    """

    def __init__(
        self,
        step: TrainingStep,
        layout: BatchLayout,
        real: RealStep,
        values: Callable[[torch.Tensor], torch.Tensor],
        module: nn.Module,
    ) -> None:
        if not step.loss_known or len(real.deliveries) != 1:
            raise NotFollowedError("the loss was not told")
        self._step, self._layout, self._real, self._values, self._module = step, layout, real, values, module
        self._batch: Any = real.deliveries[0].batch
        if self._batch is None:
            raise NotFollowedError("the script has dropped a part of the batch")
        self._base = self.repeat(None)
        if not self._is_the_loops():
            raise NotFollowedError("the loop makes another step than the one that was told")

    def _is_the_loops(self) -> bool:
        for call, arguments in zip(self._real.calls, self._base.arguments, strict=True):
            mine, loops = tensors_of(arguments), call.arguments
            if len(mine) != len(loops) or not all(
                close(a.detach(), b.detach()) for (_, a), (_, b) in zip(mine, loops, strict=True)
            ):
                return False
        pairs = zip(self._base.gradients, self._real.gradients, strict=True)
        return all(b is None or close(a, b) for mine, real in pairs for a, b in zip(mine, real, strict=True))

    @override
    def repeat(self, exchange: Exchange | None) -> Repeated:
        real = self._real
        batch = self._batch if exchange is None else exchange.batch(self._batch, self._layout, real.samples)
        arguments: list[Any] = []
        leaves: list[list[torch.Tensor]] = []
        places: list[Placement] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(arguments) == len(real.calls):
                raise NotFollowedError("the told step calls the model more often than the loop")
            number = len(arguments)
            call = real.calls[number]
            arguments.append((args, kwargs))
            if exchange is not None and call.layout is not None:
                base = self._base.arguments[number]
                found = placement(base, (args, kwargs), call.layout, real.samples, exchange)
                places.extend([found] if found else [])
            dims = {id(o.tensor): o.dim for o in call.outputs}
            mine: list[torch.Tensor] = []

            def leaf_of(_: pytree.Path, leaf: Any) -> Any:
                if not isinstance(leaf, torch.Tensor):
                    return leaf
                value = self._values(leaf).detach()
                dim = dims.get(id(leaf))
                if dim is None:
                    return value
                if exchange is not None:
                    rows = Rows.of(dim, real.samples)
                    value = rows.exchange(value, places[-1].rows) if places else exchange.rows(value, rows)
                mine.append(value.clone().requires_grad_())
                return mine[-1].clone()

            out = pytree.map_leaves(leaf_of, call.result)
            leaves.append(mine)
            return out

        own = vars(self._module).get("forward")
        self._module.forward = forward  # type: ignore[method-assign]
        try:
            with rng_untouched(), torch.enable_grad(), draws_from(_seeded()):
                loss = self._step.loss(self._module, batch)
                flat = [leaf for mine in leaves for leaf in mine]
                found = torch.autograd.grad(loss, flat, allow_unused=True)
        except (TrainingStepError, *USER_CODE_ERRORS) as error:
            raise NotFollowedError(f"the told step does not repeat: {error}") from error
        finally:
            vars(self._module).pop("forward", None)
            if own is not None:
                vars(self._module)["forward"] = own
        if len(arguments) != len(real.calls):
            raise NotFollowedError("the told step calls the model less often than the loop")
        grads = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(flat, found, strict=True)])
        gradients = [[next(grads) for _ in mine] for mine in leaves]
        return Repeated(arguments, gradients, places[-1] if places else None)


def _seeded() -> torch.Tensor:
    torch.manual_seed(_SEED)  # on the accelerator
    return torch.Generator().manual_seed(_SEED).get_state()
