"""Opacus's own engines: backward hooks, with hand-written or functorch samplers per layer.

Opacus keeps one stack of activations per layer and pops it in the order of the backward passes. Two calls of the
model whose backward passes come in call order, or a call that is never backpropagated, then pair activations with the
wrong gradients. Here every call of the model keeps its activations to itself: they are put aside when the next call
begins and put back when a gradient reaches the outputs of that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, Handle, Verdict, no_counts, zeros
from dpfix.engines.frozen_parameters import Frozen
from dpfix.engines.iterations import check_one_size
from dpfix.engines.replaced import takes_gradients, transformed
from dpfix.errors import AccumulationError, MisuseError, PlanBrokenError
from dpfix.instrument import pytree
from dpfix.layout.rows import Rows
from dpfix.plan import Plan


class OpacusHooks(Engine):
    """The engine.

    Args:
        name: ``"hooks"`` or ``"functorch"``; also the mode handed to Opacus.
    """

    owns_gradients = False

    def __init__(self, name: str) -> None:
        self.name = self.opacus_mode = name

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Where Opacus's validators say so and nothing random is recomputed."""
        if record.counts:
            return Verdict("samples have different numbers of rows")
        errors = [*ModuleValidator.validate(module, strict=False), *GradSampleModule.validate(module)]
        if errors:
            return Verdict(f"Opacus refuses the model: {str(errors[0])[:120]}")
        random = sorted(record.random_modules & self._recomputed(module))
        if random:
            return Verdict(f"functorch recomputes `{random[0] or 'the root module'}` with another random draw")
        return Verdict()

    def _recomputed(self, module: nn.Module) -> frozenset[str]:
        """Paths of the modules whose forward functorch runs a second time."""
        known = {} if self.name == "functorch" else GradSampleModule.GRAD_SAMPLERS
        return frozenset(
            path
            for path, child in module.named_modules()
            if type(child) not in known and any(p.requires_grad for p in child.parameters(recurse=False))
        )

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> HooksHandle:
        own = prepared is None
        if own:
            prepared = GradSampleModule(
                module,
                batch_first=plan.batch_first,
                loss_reduction=plan.loss_reduction,
                force_functorch=self.name == "functorch",
            )
        return HooksHandle(module, prepared, plan, mode=self.name, own=own)


class HooksHandle(Handle):
    """Opacus's hooks at work on one model.

    Args:
        prepared: Opacus's hooks object or wrapper.
        plan: how the calls carry their samples.
        mode: name of the engine, for messages.
        own: whether it was made here and is to be cleaned up here.
    """

    def __init__(self, module: nn.Module, prepared: Any, plan: Plan, *, mode: str, own: bool) -> None:
        self.model = module
        self.prepared = prepared
        self.plan = plan
        self.counts: Callable[[], tuple[int, ...]] = no_counts
        self._rows = next((dim for call in plan.calls for _, dim in call.inputs if dim and dim.rows > 1), None)
        self.mode = mode
        self._own = own
        self.several_iterations = True
        self._next = 0
        self._installed: int | None = None
        self._aside: dict[int, dict[nn.Module, tuple[list[Any], int | None]]] = {}
        self._counters: dict[int, list[tuple[nn.Parameter, int]]] = {}
        self._reached: set[int] = set()
        self._passed: set[tuple[int, int]] = set()
        self._iteration: dict[int, int] = {}
        self._handles = [
            module.register_forward_pre_hook(self._before_call, prepend=True),
            module.register_forward_hook(self._after_call),
        ]
        prepared.allow_grad_accumulation()

    @override
    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()
        if self._own:
            self.prepared.cleanup()

    @override
    @contextmanager
    def paused(self) -> Iterator[None]:
        """One of Opacus's hooks may be on the model itself."""
        self.prepared.disable_hooks()
        try:
            yield
        finally:
            self.prepared.enable_hooks()

    @override
    def clear(self) -> None:
        for number in self._reached:
            self._aside.pop(number, None)
            self._counters.pop(number, None)
        if self._installed in self._reached:  # its backward pass may not have come to an end
            self._installed = None
            self._sweep()
        self._drop_partial()
        self._reached.clear()

    @override
    def finish(self) -> None:
        """``grad_sample`` stays until ``zero_grad``, as in Opacus."""
        self._forget()

    def _forget(self) -> None:
        self._aside.clear()
        self._counters.clear()
        self._reached.clear()
        self._passed.clear()
        self._iteration.clear()
        self._installed = None
        self._sweep()
        self._drop_partial()

    def _sweep(self) -> None:
        """Nothing that stands on layers and parameters belongs to a call any more."""
        for layer in self._layers():
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)
        for p in self.model.parameters():
            if getattr(p, "_forward_counter", 0):
                p._forward_counter = 0  # type: ignore[attr-defined]

    def _drop_partial(self) -> None:
        """Forget gradients of a parameter to which more were to be added."""
        for p in self.model.parameters():
            if getattr(p, "_current_grad_sample", None) is not None:
                del p._current_grad_sample  # type: ignore[attr-defined]

    def _layers(self) -> Iterator[nn.Module]:
        return (m for m in self.model.modules() if "activations" in vars(m))

    def _before_call(self, module: nn.Module, args: Any) -> None:
        if not takes_gradients(module):
            return
        if transformed():
            refuse_transforms(module, self.mode)
        self._check_hooked(module)
        self._put_aside()
        self._installed = self._next
        # A call after a backward pass belongs to a new iteration; its gradients are clipped on their own.
        self._iteration[self._next] = max(self._reached, default=-1)
        self._next += 1

    def _check_hooked(self, module: nn.Module) -> None:
        """Opacus prepares parameters when it hooks the model; one that came later dies inside its backward hook."""
        for name, p in module.named_parameters():
            if p.requires_grad and not hasattr(p, "_forward_counter") and not isinstance(p, Frozen):
                raise PlanBrokenError(
                    f"parameter `{name}` of {type(module).__name__} was replaced, added or unfrozen after "
                    "make_private_safe, so its gradients are not the audited ones.",
                    help="Change the model first and call make_private_safe again.",
                    path=name,
                )

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not takes_gradients(module):
            return output
        # The output of a hooked layer is a view that autograd forbids to overwrite; the script's loss may do so.
        output = pytree.map_leaves(
            lambda _, t: t.clone() if isinstance(t, torch.Tensor) and t._is_view() else t, output
        )
        for place, tensor in enumerate(pytree.gradient_tensors(output)):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(self._gradient_arrives, self._next - 1, place))
        return output

    def _gradient_arrives(self, number: int, place: int, gradients: Any) -> None:
        if (number, place) in self._passed:
            raise AccumulationError(
                f"a second backward pass went through the same forward call of {type(self.model).__name__}, which "
                "grad_sample_mode='hooks' cannot follow.",
                help="Add the losses and call backward() once, or pass grad_sample_mode='microbatch'.",
            )
        self._passed.add((number, place))
        if not self.several_iterations and any(self._iteration[n] != self._iteration[number] for n in self._reached):
            raise AccumulationError(
                "a second backward pass before optimizer.step(), with Poisson sampling: every draw is accounted as one step.",
                help="Call step() and zero_grad() for every batch, add losses of one batch before one backward(), or use "
                "opacus.utils.batch_memory_manager.",
            )
        self._reached.add(number)
        if self._installed == number:
            return
        self._put_aside()
        for layer, (activations, length) in self._aside.pop(number, {}).items():
            layer.activations = activations  # type: ignore[assignment]
            if length is not None:
                layer.max_batch_len = length  # type: ignore[assignment]
        for p, count in self._counters.pop(number, ()):
            p._forward_counter = count  # type: ignore[attr-defined]
        self._installed = number

    def _put_aside(self) -> None:
        if self._installed is None:
            self._sweep()  # what an interrupt has left half put back
            return
        kept = {}
        for layer in self._layers():
            if layer.activations:
                kept[layer] = (layer.activations, getattr(layer, "max_batch_len", None))
                layer.activations = []  # type: ignore[assignment]
            vars(layer).pop("max_batch_len", None)
        self._aside[self._installed] = kept
        counted = [(p, p._forward_counter) for p in self.model.parameters() if getattr(p, "_forward_counter", 0)]  # type: ignore[attr-defined]
        self._counters[self._installed] = counted
        for p, _ in counted:
            p._forward_counter = 0  # type: ignore[attr-defined]
        self._installed = None

    @override
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Add up what the calls of one iteration left, and fill in zeros."""
        names = {p: name for name, p in self.model.named_parameters()}
        iterations = sorted({self._iteration.get(n, -1) for n in self._reached})
        gathered: dict[nn.Parameter, list[torch.Tensor]] = {}
        for p in parameters:
            if getattr(p, "_current_grad_sample", None) is not None and p._forward_counter:  # type: ignore[attr-defined]
                raise PlanBrokenError(
                    f"parameter `{names.get(p)}` of {type(self.model).__name__} was used {p._forward_counter} time(s) "  # type: ignore[attr-defined]
                    "more than gradients came back for it (a detached or unused result), so its per-sample gradient is "
                    "incomplete.",
                    help="Put the detached branch under torch.no_grad(), or pass grad_sample_mode='microbatch'.",
                    path=names.get(p, ""),
                )
            found = getattr(p, "grad_sample", None)
            parts = [] if found is None else [found] if isinstance(found, torch.Tensor) else list(found)
            # Under autocast they are in half precision, in which Opacus would take norms and clip: above C by rounding.
            gathered[p] = [self._by_sample(part.to(p.dtype)) for part in parts]
        several = len(iterations) > 1
        if several:
            return _as_lists(gathered, len(iterations))
        samples = sorted({g.shape[0] for parts in gathered.values() for g in parts})
        check_one_size(samples, self.model, AccumulationError)
        for p, parts in gathered.items():
            if not samples:
                p.grad_sample = None  # type: ignore[attr-defined]
            elif not parts:
                p.grad_sample = zeros(p, samples[0])  # type: ignore[attr-defined]
            else:
                p.grad_sample = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)  # type: ignore[attr-defined]
        return samples

    def _by_sample(self, gradients: torch.Tensor) -> torch.Tensor:
        """Add up the rows of every sample, which Opacus takes for samples."""
        layout = self._rows
        if layout is None:
            return gradients
        samples, left = divmod(len(gradients), layout.rows)
        if left:
            raise PlanBrokenError(
                f"a layer of {type(self.model).__name__} left per-sample gradients of {len(gradients)} rows, which are not "
                f"{layout.rows} for every sample."
            )
        rows = Rows(samples, 0, layout.interleaved).split(gradients)
        # With a mean, every gradient was multiplied with the number of rows, instead of the number of samples.
        return rows.mean(1) if self.plan.loss_reduction == "mean" else rows.sum(1) * self.plan.share()


def _as_lists(gathered: dict[nn.Parameter, list[torch.Tensor]], iterations: int) -> list[int]:
    """Several iterations, clipped one by one as Opacus does; every parameter needs the same number of them."""
    lengths = next((p for p in gathered.values() if len(p) == iterations), None)
    if lengths is None:
        raise AccumulationError(
            "optimizer.step(): several backward passes were accumulated, and their per-sample gradients do not match up.",
            help="Add the losses and call backward() once.",
        )
    for p, parts in gathered.items():
        if parts and len(parts) != iterations:
            raise AccumulationError(
                "optimizer.step(): a parameter has gradients of some of the accumulated backward passes only.",
                help="Add the losses and call backward() once.",
            )
        p.grad_sample = parts or [zeros(p, g.shape[0]) for g in lengths]  # type: ignore[attr-defined]
    return [g.shape[0] for g in lengths]


def refuse_transforms(module: nn.Module, mode: str) -> NoReturn:
    """Refuse a script that computes per-sample gradients of a model which has Opacus's hooks.

    Raises:
        MisuseError: always.
    """
    raise MisuseError(
        f"{type(module).__name__} is in private training with grad_sample_mode='{mode}', whose hooks cannot run inside a "
        "torch.func transform (grad, vmap, functional_call).",
        help="Pass grad_sample_mode='no_op' if the loop computes per-sample gradients itself (also by "
        "dpfix.per_sample_gradients), 'microbatch' if the transform is part of the model or the loss, or call "
        "to_standard_module() first.",
        path="grad_sample_mode",
    )


def hooks_of(model: nn.Module) -> HooksHandle | None:
    """The engine with Opacus's hooks that is at work on a model.

    Args:
        model: the model, wrapped or not.

    Returns:
        ``None`` if there is none.
    """
    hooks = (getattr(h, "__self__", None) for m in model.modules() for h in m._forward_pre_hooks.values())
    return next((h for h in hooks if isinstance(h, HooksHandle)), None)
