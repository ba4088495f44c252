"""Private training of a model that torch's ``fully_shard`` (FSDP2) has spread over processes.

What is checked before a training is checked on a copy of the model whose parameters are put together. In the training the
engine measures and sums up a layer while it is whole; the sums of the processes are added up onto the shards, and every
process adds the noise to its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dpfix.engines import FOR_SHARDS
from dpfix.errors import ModelError
from dpfix.instrument.sharded import as_shard_of, hide_shards, whole_values
from dpfix.repair.surgery import Surgery
from dpfix.report.finding import Finding, Fixability
from dpfix.rules import RULES
from dpfix.scan.arguments import check_ranks
from dpfix.scan.request import Request
from dpfix.scan.sharded import check_shards
from dpfix.training.normal_noise import add_normal
from dpfix.weights.copies import plain_copy


def as_whole(request: Request, secure_mode: bool) -> Request:
    """The call as it is checked: on a copy of a model that is spread, whose parameters are put together.

    Returns:
        The same call for all other models.

    Raises:
        ModelError: the model cannot be trained as it is spread.
        ArgumentError: what was asked for is not possible with it, or on several processes.
    """
    check_ranks(request.ranks, request.privacy, secure_mode)
    if not request.ranks.sharded:
        return request
    check_shards(request)
    request.ranks.exchange("put together")  # one that has failed takes no part in what follows
    hide_shards(request.module)
    module = plain_copy(request.module, whole_values(request.module))
    optimizer = _on(module, request.module, request.optimizer)
    performance = replace(request.performance, grad_sample_mode=FOR_SHARDS, no_grad_regions=False)
    return replace(request, module=module, optimizer=optimizer, performance=performance)


def _on(module: nn.Module, spread: nn.Module, optimizer: Optimizer) -> Optimizer:
    """An optimizer like another one, without its state, over the parameters of a copy of its model."""
    inside = vars(optimizer).get("optimizer")
    if isinstance(inside, Optimizer):  # of accelerate's wrapper, whose groups are those of the one inside
        optimizer = inside
    pairs = zip(spread.parameters(), module.parameters(), strict=True)
    ours = {id(theirs): p for theirs, p in pairs}
    like = copy.copy(optimizer)
    groups = [{**g, "params": [ours.get(id(p), p) for p in g["params"]]} for g in optimizer.param_groups]
    vars(like).update(param_groups=groups, state=type(optimizer.state)(optimizer.state.default_factory))  # type: ignore[attr-defined]
    return like


def repair_spread(request: Request, repairs: Iterable[Finding]) -> None:
    """Make the changes to a model that is spread which were made to its copy, where they leave the parameters as they are.

    Args:
        request: the call as it was made.
        repairs: findings that were repaired.

    Raises:
        ModelError: a repair replaces a layer, or changes what is trained.
    """
    changes = [f for f in repairs if f.fixability in (Fixability.EXACT, Fixability.CHANGES_MODEL)]
    if not request.ranks.sharded or not changes:
        return
    rules = {rule.code: rule for rule in RULES if rule.sets_attributes}
    found = [(rules[f.code], f) for f in changes if f.code in rules]
    other = next((f for f in changes if all(f is not kept for _, kept in found)), None)
    if other is not None:
        raise ModelError(
            Finding.refusal(
                "DPF053",
                f"{other.fact} This has to be changed ({other.code}), and fully_shard was called on the model already.",
                other.why,
                "change the model before fully_shard is called on it, and build the optimizer after that "
                f"({other.fix or other.help}).",
                path=other.path,
            )
        )
    with Surgery(request.scan) as surgery:
        surgery.repair(tuple(found))
        surgery.commit()


def add_noise_to_shards(optimizer: Any) -> None:
    """Every process adds noise of the accounted size to its own part of every clipped sum, from random numbers of its own.

    Args:
        optimizer: the private optimizer, whose parameters have this process's part of the sum in ``summed_grad``.
    """
    std = float(optimizer.noise_multiplier * optimizer.max_grad_norm)
    sums = [p.summed_grad for p in optimizer.params]
    if std > 0:
        add_normal(sums, std, optimizer.randomness.noise)
    for p, total in zip(optimizer.params, sums, strict=True):
        p.grad = as_shard_of(p, total)
        p.summed_grad = None
