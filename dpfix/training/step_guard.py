"""What is checked on every real step, before any parameter moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from dpfix.distributed import ALONE, Ranks
from dpfix.engines import BY_NAME, Handle
from dpfix.engines.base import zeros
from dpfix.engines.no_grad_regions import NoGradRegions
from dpfix.errors import (
    AccumulationError,
    ForeignBatchError,
    MisuseError,
    NonFiniteGradientError,
    PlanBrokenError,
    RankError,
)
from dpfix.instrument.grad_watch import GradWatch
from dpfix.instrument.module_state import Scratch
from dpfix.instrument.source import warn_user
from dpfix.plan import Plan, Region, switched_on
from dpfix.sampling.ledger import DrawLedger
from dpfix.training.loss_proof import LossProof
from dpfix.training.other_optimizers import OtherSteps
from dpfix.training.parameter_writes import ParameterWrites
from dpfix.training.structure import Structure

StepHook = Callable[[DPOptimizer], None]
_MOVED = ("noise_multiplier", "max_grad_norm", "expected_batch_size")
"""Attributes of a private optimizer that schedulers, and adaptive clipping, change while training."""
_SAME_ON_RANKS = (
    "the pass over the data_loader",
    "the number of its batches",
    "the number of accounted steps",
    *_MOVED,
)


class StepGuard:
    """The guard of one private training.

    Args:
        handle: the engine at work.
        module: the plain model.
        plan: what was audited.
        parameters: the trainable parameters by name.
        ledger: what the private loader drew; ``None`` without Poisson sampling.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        handle: Handle,
        module: nn.Module,
        plan: Plan,
        parameters: Mapping[str, nn.Parameter],
        ledger: DrawLedger | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.handle = handle
        self.module = module
        self.plan = plan
        self.ledger = ledger
        if ledger is not None:
            handle.counts = lambda: ledger.counts
        self.parameters = parameters
        self._trained = list(parameters.values())
        self.watch = GradWatch(parameters)
        self.other_steps = OtherSteps(parameters.values())
        self._identity = {name: id(p) for name, p in parameters.items()}
        self._held = frozenset(self._identity.values())
        self._structure = Structure(module)
        self._norms = [module.get_submodule(path) for path in plan.fixed_norms]
        self._scratch = Scratch(module, plan.scratch)
        engine = BY_NAME[plan.engine]
        self._owns_gradients = engine.owns_gradients
        self._loss_proof = LossProof(module, plan, handle.paused) if engine.audited and not plan.loss_known else None
        self.regions = NoGradRegions(module, plan.no_grad_regions)
        self._writes = ParameterWrites(module, parameters.values())
        self.called: dict[str, Any] = {}
        self._accountant: StepHook | None = None
        self._counted = False
        self._released = 0
        self.accounted: Callable[[], int] = lambda: 0
        self._partial = 0  # samples of the present logical batch that earlier physical batches brought
        self._clear = True  # zero_grad was called since the last step
        self._clips = False
        self._sample_norms: torch.Tensor | None = None

    def remember_call(self, optimizer: DPOptimizer) -> None:
        """Remember what the call said, which a scheduler may change.

        Args:
            optimizer: the private optimizer, as the call has set it up.
        """
        self.called = {name: copy.deepcopy(getattr(optimizer, name)) for name in _MOVED}

    def count_steps(self, optimizer: DPOptimizer) -> None:
        """From now on the accountant counts every release once, also if the script attaches its hook again.

        Args:
            optimizer: the private optimizer, with the accountant's step hook.
        """
        account: StepHook = optimizer.step_hook  # type: ignore[assignment]

        def once(optimizer: DPOptimizer) -> None:
            if not self._counted:
                self._counted = True
                account(optimizer)

        self._accountant = optimizer.step_hook = once

    def with_accountant(self, hook: StepHook) -> StepHook:
        """A step hook that leaves the accountant its own; Opacus's optimizers keep one hook only.

        Args:
            hook: what the script attaches.

        Returns:
            A hook that counts the step, and then does what the script wants.
        """
        count = self._accountant
        if count is None:
            return hook

        def both(optimizer: DPOptimizer) -> None:
            count(optimizer)
            hook(optimizer)

        return both

    @contextmanager
    def telling_other_ranks(self, optimizer: DPOptimizer) -> Iterator[None]:
        """A step that fails here is released nowhere.

        Args:
            optimizer: the private optimizer.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            if self.ranks.size > 1 and not isinstance(error, RankError):  # the others have that one too
                self.ranks.exchange_numbers([1.0] * (1 + len(_SAME_ON_RANKS)), optimizer.params[0].device)
            raise

    def agree(self, optimizer: DPOptimizer) -> None:
        """The ranks must be about to release parts of one batch, clipped to one norm.

        Args:
            optimizer: the private optimizer, before noise is added.

        Raises:
            RankError: they are not, or another rank has failed; nothing was released.
        """
        if self.ranks.size == 1:
            return
        seed, number = (self.ledger.seed, self.ledger.number) if self.ledger else (0, self._released)
        settings = [float(getattr(optimizer, name)) for name in _MOVED]
        mine = [0.0, seed, number, self.accounted(), *settings]
        everyone = self.ranks.exchange_numbers(mine, optimizer.params[0].device)
        failed = [rank for rank, values in enumerate(everyone) if values[0]]
        if failed:
            raise RankError(
                f"optimizer.step() on rank {failed[0]} has failed, as its own message says, so this step is released on no rank."
            )
        for rank, values in enumerate(everyone):
            for name, here, there in zip(_SAME_ON_RANKS, everyone[0][1:], values[1:], strict=True):
                if here != there:
                    raise RankError(
                        f"the ranks do not make the same step: {name} is {here:g} on rank 0 and {there:g} on rank {rank}. "
                        "Nothing was released. Every rank has to begin the same passes over the data_loader, to make a step for "
                        "every batch of it, and to use schedulers and checkpoints as the others do."
                    )

    def detach(self) -> None:
        """Take every hook off; the training is over."""
        self.watch.remove()
        self.other_steps.remove()
        self._writes.remove()
        self.regions.detach()
        self.handle.detach()
        self._scratch.put_back()
        if self._loss_proof is not None:
            self._loss_proof.remove()

    def cleared(self) -> None:
        """``zero_grad`` was called."""
        self._clear = True
        self._clear_loss_proof()
        self.regions.reset()
        self.handle.clear()
        self.watch.reset()
        if not self._partial:  # model.zero_grad() has to clear what was released as optimizer.zero_grad() does
            for p in self.parameters.values():
                p.summed_grad = None  # type: ignore[attr-defined]

    def _clear_loss_proof(self) -> None:
        if self._loss_proof is not None:
            self._loss_proof.clear()
            self._loss_proof = None if self._loss_proof.done else self._loss_proof

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The private optimizer is making its step.

        Yields:
            Nothing.
        """
        self.other_steps.allowed = True
        try:
            yield
        finally:
            self.other_steps.allowed = False

    def gives_up(self, optimizer: Any) -> bool:
        """Whether gradient reached the output of a no-grad region, so that this step cannot be applied.

        Nothing is released. The draw is counted by the accountant, since what the loop does may depend on it. From the
        next step on the call is an ordinary one.

        Args:
            optimizer: the private optimizer.

        Returns:
            Whether the step is left out.

        Raises:
            PlanBrokenError: that happened inside a logical batch of a ``BatchMemoryManager``.
        """
        if not self.regions.tripped:
            return False
        tripped = list(dict.fromkeys(self.regions.tripped))
        self.drop_regions(tripped)
        name = tripped[0].site.path or "the model"
        self._counted = False
        if self.ranks.size > 1:
            raise PlanBrokenError(
                f"gradient reached the output of `{name}` ({tripped[0].site.line or 'called by the loop'}), a call that ran "
                "without a graph because no gradient came back to it when it was checked. One rank cannot leave out a step "
                "that the others make. Pass the training_step that the loop makes, or no_grad_regions=False, to "
                "make_private_safe."
            )
        virtual = self._partial or optimizer._check_skip_next_step(pop_next=False)
        for p in self.parameters.values():
            p.grad = p.summed_grad = None  # type: ignore[attr-defined]
            p.grad_sample = zeros(p, 0)  # type: ignore[attr-defined]
        fact = (
            f"gradient reached the output of `{name}` ({tripped[0].site.line or 'called by the loop'}), a call that ran "
            "without a graph because no gradient came back to it when it was checked."
        )
        self._partial = 0
        self.after_step(released=True)
        if virtual:
            optimizer._step_skip_queue.clear()
            raise PlanBrokenError(
                f"{fact} This logical batch of the BatchMemoryManager is lost, nothing was released. The call is an ordinary "
                "one from now on: go on with the next logical batch, or pass no_grad_regions=False."
            )
        if optimizer.step_hook is not None:
            optimizer.step_hook(optimizer)
        warn_user(
            f"{fact} This step is not applied: no parameter has moved, and the accountant has counted the draw. The call is "
            "an ordinary one from the next step on; the loop has nothing to do. Pass the training_step that the loop "
            "makes, or no_grad_regions=False, to make_private_safe."
        )
        return True

    def drop_regions(self, regions: Iterable[Region]) -> None:
        """From now on these calls are ordinary ones.

        Args:
            regions: regions of the plan.
        """
        for region in regions:
            self.regions.drop(region)
        self.plan = replace(self.plan, no_grad_regions=self.regions.regions)

    def before_step(self, optimizer: DPOptimizer) -> None:
        """Check everything, and leave the per-sample gradients where Opacus expects them.

        Args:
            optimizer: the private optimizer.

        Raises:
            AccumulationError: ``zero_grad`` was not called since the last step.
            MisuseError: another assumption of the guarantee does not hold; nothing has moved.
        """
        self._counted = False
        if not self._clear:
            raise AccumulationError(
                "optimizer.step() without optimizer.zero_grad() since the last step: the gradients of two batches would be "
                "added up and released as one. Call optimizer.zero_grad() before every backward()."
            )
        if self._loss_proof is not None:
            self._loss_proof.before_step()
        self._check_scaler(optimizer)
        self._check_plan(optimizer)
        self._writes.check(self.module)
        self._check_gradients()
        self._clips = self.handle.clips and optimizer.flat  # type: ignore[attr-defined]
        self._sample_norms = None
        counts = (self.handle.announce if self._clips else self.handle.collect)(self._trained)
        if self.ledger is not None:
            counts = self._check_draw(optimizer, counts, self.ledger)
        elif not counts:
            raise MisuseError(_NOTHING_ARRIVED)
        self._counts = counts

    def clip(self, optimizer: DPOptimizer) -> bool:
        """Let the engine clip, if it can do so without per-sample gradients.

        Args:
            optimizer: the private optimizer.

        Returns:
            Whether it did; an empty draw is left to Opacus, which makes zeros of it.
        """
        if not self._clips or self._counts == [0]:
            return False
        for p in self._trained:
            p.grad = None  # of the step before; the noise is about to make a new one
        self._sample_norms = self.handle.clip_and_accumulate(self._trained, optimizer.max_grad_norm, keep=False)
        return True

    @property
    def clipped(self) -> bool:
        """Whether the engine clipped in the step that is being made."""
        return self._clips

    def _check_scaler(self, optimizer: DPOptimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise MisuseError(
                "optimizer.step() was called by a torch.amp.GradScaler. Its loss scale would multiply the gradients "
                "before they are clipped, and skipping steps on overflow depends on the data. Call "
                "loss.backward() and optimizer.step() without the scaler; bfloat16 autocast needs none."
            )

    def _check_plan(self, optimizer: DPOptimizer) -> None:
        kind = type(self.module).__name__
        if not self._structure.unchanged():
            changed = self._structure.changes(self.module)
            raise PlanBrokenError(
                f"{changed[0]} of {kind} was replaced, added, frozen or unfrozen after make_private_safe "
                f"({len(changed)} such change(s)), so its gradients are not the audited ones. Change the model "
                "first and call make_private_safe again."
            )
        if not self._structure.grouped_as_before(optimizer):
            self._check_groups(optimizer)
        for path, norm in zip(self.plan.fixed_norms, self._norms, strict=True):
            if norm.training:
                raise PlanBrokenError(switched_on(self.module, path))

    def _check_groups(self, optimizer: DPOptimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if held != self._held:
            missing = [n for n, p in self._identity.items() if p not in held]
            raise PlanBrokenError(
                f"optimizer: its param_groups changed after make_private_safe ({len(missing)} parameter(s) missing"
                + (f", first `{missing[0]}`" if missing else "")
                + "). Set up all groups before the call."
            )
        self._structure.confirm_groups(optimizer)

    def _check_gradients(self) -> None:
        if self._owns_gradients and self.watch.arrived:
            name = self.watch.arrived[0]
            raise PlanBrokenError(
                f"gradient reached parameter `{name}` of {type(self.module).__name__} past the model's forward: by a "
                "penalty on weights in the loss, or a part of the model called directly. It cannot be clipped per "
                "sample. Use weight_decay for penalties, and call the model as a whole."
            )
        if edited := self.watch.edited():
            warn_user(
                f"p.grad of `{edited[0]}` was changed between backward() and step() ({len(edited)} parameter(s)), for "
                "example by clip_grad_norm_. The private optimizer releases the clipped sum of per-sample gradients "
                "and ignores p.grad; change max_grad_norm, or edit p.grad in a hook after the noise."
            )

    def _check_draw(self, optimizer: DPOptimizer, counts: list[int], ledger: DrawLedger) -> list[int]:
        drawn = ledger.pending()
        if len(counts) > 1:
            raise AccumulationError(
                f"optimizer.step() after {len(counts)} backward passes with Poisson sampling: every draw is accounted as "
                "one step. Call optimizer.zero_grad() and step() for every batch of the returned data_loader, add "
                "losses of one batch before one backward(), or use opacus.utils.BatchMemoryManager."
            )
        if drawn is None:
            raise ForeignBatchError(
                "optimizer.step() without a new batch of the returned data_loader: the loop iterates over the original "
                "loader, or makes several steps with one batch. The accountant assumes one Poisson draw per step. "
                "Iterate over the data_loader that make_private_safe returned, one step per batch."
            )
        if drawn == 0:
            for p in self.parameters.values():
                p.grad_sample = zeros(p, 0)  # type: ignore[attr-defined]
            return [0]
        if not counts:
            raise MisuseError(_NOTHING_ARRIVED)
        rows = self._partial + counts[0]
        last = not optimizer._check_skip_next_step(pop_next=False)
        if rows > drawn or (last and rows != drawn):
            raise ForeignBatchError(
                f"optimizer.step() has per-sample gradients of {rows} samples, but the data_loader drew {drawn}. Rows of "
                "the batch are not the drawn samples (filtered, repeated, or from another loader). Train on the "
                "batches of the returned data_loader as they are."
            )
        return counts

    def begin_pass(self, optimizer: DPOptimizer) -> None:
        """A new pass over the loader begins; what a BatchMemoryManager had signalled for the one before is forgotten.

        Left inside a logical batch, its loop has summed up a part of one, which is not released.

        Args:
            optimizer: the private optimizer.
        """
        if self._partial:
            warn_user(
                "a BatchMemoryManager loop was left inside a logical batch; the part that was summed up so far is "
                "discarded. Let the loop reach the end of a logical batch before leaving it."
            )
        optimizer._step_skip_queue.clear()
        optimizer._is_last_step_skipped = False
        self._partial = 0
        for p in self.parameters.values():
            p.summed_grad = None  # type: ignore[attr-defined]

    def after_step(self, released: bool) -> None:
        """A physical batch was processed.

        Args:
            released: whether the logical batch is complete.
        """
        self._clear = False
        if released:
            self._partial = 0
            self._released += 1
            if self.ledger is not None:
                self.ledger.settle()
        else:
            self._partial += sum(self._counts)
        self.handle.finish()
        self._scratch.put_back()
        self.regions.reset()
        self._clear_loss_proof()

    def check_finite(self) -> None:
        """The clipped sum must be finite before noise is added.

        Raises:
            NonFiniteGradientError: it is not; nothing was released and the gradients are dropped.
        """
        if self._sample_norms is not None and math.isfinite(sum(self._sample_norms.tolist())):
            return  # a sum of finitely many finite gradients: no need to read it again
        sums = {n: p.summed_grad.detach() for n, p in self.parameters.items() if p.summed_grad is not None}  # type: ignore[attr-defined]
        totals = [total.sum() for total in sums.values()]
        if not totals or math.isfinite(torch.stack([t.to(totals[0].device) for t in totals]).sum()):
            return
        bad = [n for n, s in sums.items() if not bool(torch.isfinite(s).all())]
        if not bad:
            return  # finite sums whose own sum is too large for the check
        for p in self.parameters.values():
            p.summed_grad = None  # type: ignore[attr-defined]
        self.handle.finish()
        raise NonFiniteGradientError(
            f"the clipped sum of parameter `{(bad or list(sums))[0]}` of {type(self.module).__name__} is not finite "
            f"({len(bad)} parameter(s)). No parameter was moved and no noise was drawn. Lower the learning rate, look "
            "for divisions by zero and logarithms in the loss, or use float32 instead of autocast."
        )


_NOTHING_ARRIVED = (
    "optimizer.step(): no per-sample gradient has arrived. Call loss.backward() on a loss of the private model before "
    "step(), with the model in training mode, and do not call zero_grad() in between. A loop that computes per-sample "
    "gradients itself needs grad_sample_mode='no_op' and torch.func (functional_call, vmap and grad, which replaced "
    "functorch.make_functional), or dpfix.per_sample_gradients."
)
