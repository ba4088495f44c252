"""The plan: how one model is going to be trained. Frozen; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dpfix.instrument.call_sites import CallSite
from dpfix.instrument.clipping import FLAT, Scheme
from dpfix.layout.calls import CallLayout, LayerLayout
from dpfix.layout.row_count import RowCounter


@dataclass(frozen=True)
class Region:
    """A module call that runs without a graph, since no gradient comes back to it.

    Attributes:
        site: the call.
        of: how many calls of the module that line makes in one call of the model.
        cut: what cuts the graph behind it, with its line; empty if that was not seen.
        saved_bytes: size of what autograd would have kept for the probe batch.
        saved_seconds: time that building the graph took for the probe batch.
    """

    site: CallSite
    of: int
    cut: str = field(default="", compare=False)
    saved_bytes: int = field(default=0, compare=False)
    saved_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Plan:
    """What was decided for one model.

    Attributes:
        engine: name of the engine; empty until the first real call has decided.
        opacus_mode: the ``grad_sample_mode`` handed to Opacus.
        calls: how the calls of ``forward`` carry their samples.
        layers: how the calls of the modules that own parameters, and the functions on parameters, carry theirs.
        elsewhere: trainable parameters that modules use which do not own them, with the paths of these modules.
        loss_reduction: ``"mean"`` or ``"sum"`` over the samples.
        loss_known: whether the loss was checked beforehand; on real steps it is in any case.
        batch_first: whether the layers see the samples in dimension 0 (Opacus engines only).
        frozen_parameters: trainable parameters that no gradient reaches; frozen while training privately.
        fixed_norms: paths of BatchNorm layers in evaluation mode, which have to stay there.
        scratch: ``(module path, name)`` of attributes that are put back after every step.
        no_grad_regions: module calls that run without a graph.
        help_vmap: whether forward does what ``vmap`` does wrong or refuses without the workarounds for it.
        views: rows of every sample that a sum would add up and that are averaged (augmentation multiplicity, items of a person).
        row_counter: how to tell the number of rows of a sample from what the dataset returns, where it is not the same
            for all samples.
        weighted_by_rows: whether a sample weighs as much in the loss as it has rows (a mean over all rows); if not, all
            samples weigh the same.
        per_person: whether a sample is a person, the rows of whose items are averaged.
        own_engines: whether only engines of dpfix are chosen by themselves: a real call may show that another is needed.
        clipping: how the gradient of a sample is clipped.
        physical: samples that the loader delivers together at most; ``None`` for whole batches.
        halves: whether that number was found, and is halved where memory runs out.
    """

    engine: str = ""
    opacus_mode: str = ""
    calls: tuple[CallLayout, ...] = ()
    layers: tuple[LayerLayout, ...] = ()
    elsewhere: tuple[tuple[str, tuple[str, ...]], ...] = ()
    loss_reduction: str = "mean"
    loss_known: bool = True
    batch_first: bool = True
    frozen_parameters: tuple[str, ...] = ()
    fixed_norms: tuple[str, ...] = ()
    scratch: tuple[tuple[str, str], ...] = ()
    no_grad_regions: tuple[Region, ...] = ()
    help_vmap: bool = False
    views: int = 1
    row_counter: RowCounter | None = None
    weighted_by_rows: bool = False
    per_person: bool = False
    own_engines: bool = False
    clipping: Scheme = FLAT
    physical: int | None = None
    halves: bool = False

    @property
    def followed_by_row(self) -> bool:
        """Whether on real steps every row is looked at as a sample: an item of a person, who may have any number of them."""
        return self.per_person and self.row_counter is not None

    @property
    def followed_calls(self) -> tuple[CallLayout, ...]:
        """How the calls of ``forward`` carry what is looked at as a sample on real steps."""
        return tuple(call.by_row() for call in self.calls) if self.followed_by_row else self.calls

    def with_engine(self, engine: Any) -> Plan:
        """The same training with another engine.

        Args:
            engine: the engine, or anything with its ``name`` and ``opacus_mode``.

        Returns:
            The plan.
        """
        return replace(self, engine=engine.name, opacus_mode=engine.opacus_mode)

    def weight(self, samples: int, counts: tuple[int, ...] = ()) -> float | torch.Tensor:
        """How much of a sample's own loss is in the loss of the batch.

        Args:
            counts: rows of every sample, where these are not the same for all.

        Returns:
            One number for all samples, or shape ``[samples]``.
        """
        if self.loss_reduction == "sum":
            return 1.0
        if self.weighted_by_rows and counts:
            return torch.tensor(counts, dtype=torch.float64) / sum(counts)
        return 1.0 / samples

    def share(self, counts: tuple[int, ...] = ()) -> float | torch.Tensor:
        """What a sample's own loss is multiplied with: views are averaged, which a sum over their rows does not do.

        Args:
            counts: rows of every sample, where these are not the same for all.

        Returns:
            One number for all samples, or shape ``[samples]``.
        """
        if self.loss_reduction != "sum":
            return 1.0
        if self.per_person and counts:
            return 1 / torch.tensor(counts, dtype=torch.float64).clamp(min=1)
        return 1 / self.views

    def scale(self, samples: int, counts: tuple[int, ...] = ()) -> float | torch.Tensor:
        """What the gradient that arrives for a sample is multiplied with before it is clipped.

        That undoes the mean over the samples, and makes a sum over views their mean.

        Args:
            counts: rows of every sample, where these are not the same for all.

        Returns:
            One number for all samples, or shape ``[samples]``.
        """
        weight, share = self.weight(samples, counts), self.share(counts)
        if isinstance(weight, torch.Tensor):  # a sample without rows has no weight, and no gradient either
            return torch.where(weight > 0, share / weight, 0.0)
        return share / weight


def switched_on(module: nn.Module, path: str) -> tuple[str, str, str]:
    """What is said about a normalisation that was audited in evaluation mode and is in training mode now.

    Returns:
        Fact, reason and way out, for the refusal.
    """
    return (
        f"{type(module.get_submodule(path)).__name__} at `{path}` of {type(module).__name__} was in eval() when it was audited "
        "and is in training mode now, where it mixes the samples of a batch.",
        "model.train() switches it on:",
        f"call model.get_submodule('{path}').eval() after it.",
    )
