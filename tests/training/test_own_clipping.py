"""An optimizer class of the script's own that clips by itself is measured on real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from torch import nn

import dpfix
from tests.helpers import setting


class Halves(DPOptimizer):
    """Gives every sample half of the clip norm."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        for p in self.params:
            p.summed_grad = 0.5 * p.summed_grad


class Doubles(DPOptimizer):
    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        for p in self.params:
            p.summed_grad = 2 * p.summed_grad


class ByTheLargest(DPOptimizer):
    """Scales all samples by the norm of the largest one."""

    def clip_and_accumulate(self) -> None:
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in self.grad_samples], 1).norm(dim=1)
        for p in self.params:
            p.summed_grad = (self._get_flat_grad_sample(p) * (self.max_grad_norm / norms.max())).sum(0)


class Counting(Halves):
    """Counts the samples that it has clipped."""

    clipped = 0

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        self.clipped += len(self.grad_samples[0])


def engine_with(cls: type[DPOptimizer]) -> dpfix.SafePrivacyEngine:
    class Engine(dpfix.SafePrivacyEngine):
        def _prepare_optimizer(self, **given: Any) -> Any:
            names = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction")
            return cls(given["optimizer"], **{name: given[name] for name in names})

    return Engine()


def trained(
    cls: type[DPOptimizer], engine: str = "auto", passes: int = 2, model: nn.Module | None = None, **changes: Any
) -> Any:
    torch.manual_seed(0)
    training = dpfix.make_private_safe(
        **setting(
            model, privacy_engine=engine_with(cls), grad_sample_mode=engine, max_grad_norm=0.01, seed=1, **changes
        )
    )
    for _ in range(passes):
        for x, y in training[2]:
            training[1].zero_grad()
            F.cross_entropy(training[0](x), y).backward()
            training[1].step()
    return training


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "hooks"])
def test_a_sum_that_a_sample_moves_too_far_is_refused(engine: str) -> None:
    with pytest.raises(dpfix.PlanBrokenError, match=r"Doubles.clip_and_accumulate: leaving one .* by 2 clip norms"):
        trained(Doubles, engine)


def test_so_is_one_in_which_the_others_matter() -> None:
    with pytest.raises(dpfix.PlanBrokenError, match=r"ByTheLargest.clip_and_accumulate"):
        trained(ByTheLargest, model=nn.Linear(6, 3, bias=False), passes=20, data_loader=_one_much_larger())


def _one_much_larger() -> Any:
    data = torch.utils.data.TensorDataset(
        torch.cat([torch.ones(1, 6), 0.01 * torch.ones(7, 6)]), torch.zeros(8, dtype=torch.long)
    )
    return torch.utils.data.DataLoader(data, batch_size=8)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "hooks"])
def test_one_that_keeps_the_bound_goes_on(engine: str) -> None:
    training = trained(Counting, engine)
    assert training.statement(1e-3).steps == 6
    drawn = training[1].clipped
    assert 24 < drawn < 80, "samples that were left out to look are not counted"


@pytest.mark.parametrize(
    "way",
    [{"clipping": "automatic"}, {"clipping": "per_group", "max_grad_norm": {"*": 0.01}}],
    ids=["automatic", "per_group"],
)
def test_a_way_to_clip_that_it_does_not_know_is_refused(way: dict[str, Any]) -> None:
    given = setting(privacy_engine=engine_with(Halves)) | way
    before = {n: p.clone() for n, p in given["module"].state_dict().items()}
    with pytest.raises(dpfix.ArgumentError, match="Halves, an optimizer class of your own that clips by itself"):
        dpfix.make_private_safe(**given)
    assert type(given["optimizer"]) is torch.optim.SGD
    assert all(torch.equal(before[n], p) for n, p in given["module"].state_dict().items())
    dpfix.make_private_safe(**given | {"privacy_engine": dpfix.SafePrivacyEngine()})
