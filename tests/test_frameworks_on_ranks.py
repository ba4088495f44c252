"""Frameworks on several processes, started by torchrun, against batches of one in this process."""

from __future__ import annotations

from functools import partial
from itertools import chain

import pytest
import torch
from opacus.accountants import PRVAccountant
from torch import Tensor

from tests import on_ranks, test_distributed
from tests.reference import norm
from tests.test_distributed import Seen, noise_in, steps, wanted

pytest.importorskip("lightning")
pytest.importorskip("transformers")

LEFT_OUT = range(4)


launch = partial(test_distributed.launch, module="tests.on_frameworks")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("few", tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("everything", tmp_path_factory.mktemp("frameworks"))


def check_sums(seen: Seen, name: str, size: int) -> None:
    """Every step moved all parameters by the clipped sum over what the ranks drew together, from batches of one."""
    made = steps(seen, name)
    assert any(drawn for drawn, *_ in made)
    for drawn, before, after in made:
        assert len(set(drawn)) == len(drawn)
        for key, total in wanted(before, drawn).items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, on_ranks.RATE / size * total, rtol=1e-4, atol=1e-6), (name, key)
    first, *others = (rank[name]["states"] for rank in seen)
    for other in others:
        assert all(torch.equal(v, there[k]) for here, there in zip(first, other, strict=True) for k, v in here.items())


@pytest.mark.parametrize("name", ["ddp", "spread", "transformers", "accelerate, loader too"])
def test_the_ranks_release_one_clipped_sum(few: Seen, name: str) -> None:
    check_sums(few, name, 6)
    assert few[0][name]["history"][0][:2] == (0.0, 6 / 60)


def test_the_strategys_wrapper_is_told_of(few: Seen) -> None:
    assert "DPF019" in few[0]["ddp"]["report"] and "ranks: 2, each works on its part" in few[0]["ddp"]["report"]
    assert all(rank["ddp"]["plain"] and rank["spread"]["plain"] for rank in few)


FEW_REFUSED = {
    "refused, on rank 1": (("RankError", "ArgumentError"), "max_grad_norm=-1.0 must be a positive"),
    "refused, transformers, on rank 1": (("RankError", "CoupledModelError"), "mixes the samples of a batch"),
}


@pytest.mark.parametrize("name", FEW_REFUSED)
def test_what_one_rank_cannot_do_no_rank_does(few: Seen, name: str) -> None:
    errors, text = FEW_REFUSED[name]
    for rank, error in zip(few, errors, strict=True):
        assert rank[name]["told"].startswith(f"{error}: ") and text in rank[name]["told"]


SIZES = {
    "ddp, few samples": 2, "ddp, own sampler": 6, "fabric": 6, "accelerate, split": 6,
    "accelerate, loader afterwards": 6, "accelerate, FSDP2": 6, "transformers, outputs": 6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_all_other_ways_release_one_clipped_sum(trained: Seen, name: str) -> None:
    check_sums(trained, name, SIZES[name])


@pytest.mark.slow
def test_a_sampler_of_the_scripts_own_is_kept(trained: Seen) -> None:
    drawn = set(chain(*(part for rank in trained for part in rank["ddp, own sampler"]["draws"])))
    assert drawn and drawn < set(range(40)) and trained[0]["ddp, own sampler"]["history"] == [(0.0, 6 / 40, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp, noise", "spread, noise", "transformers, noise", "accelerate, noise", "fabric, noise"]
)
def test_the_noise_is_added_once(trained: Seen, name: str) -> None:
    assert noise_in(trained, name) == pytest.approx(1.0, abs=0.03)
    alone = PRVAccountant()
    for _ in range(len(trained[0][name]["draws"])):
        alone.step(noise_multiplier=2.0, sample_rate=6 / 60)
    for rank in trained:
        assert rank[name]["history"] == alone.history
        if "metrics" in rank[name]:
            assert rank[name]["epsilon"] == alone.get_epsilon(1e-3) > 0


@pytest.mark.slow
def test_epsilon_is_logged_and_a_training_stops_before_its_target(trained: Seen) -> None:
    first, second = (rank["ddp, target"] for rank in trained)
    assert not first["told"] and first["history"] == second["history"] and 0 < first["epsilon"] <= 2.0
    for rank in trained:
        assert rank["ddp, target"]["metrics"]["epsilon"] == pytest.approx(first["epsilon"], rel=1e-5)


@pytest.mark.slow
def test_all_ranks_stop_where_the_budget_of_the_data_is_spent(trained: Seen) -> None:
    first, second = (rank["ddp, budget"] for rank in trained)
    assert first["told"].startswith("BudgetError") and second["told"].startswith("RankError")
    assert len(first["states"]) == len(second["states"]) > 1
    for seen in (first, second):
        assert all(torch.equal(seen["after"][k], v) for k, v in seen["states"][-1].items())
        assert all(torch.equal(first["after"][k], v) for k, v in seen["after"].items())


@pytest.mark.slow
def test_trainings_go_on_from_checkpoints(trained: Seen) -> None:
    for rank in trained:
        assert rank["ddp, gone on"]["history"] == [(2.0, 6 / 60, 5)] and not rank["ddp, gone on"]["told"]
        assert rank["transformers, gone on"]["history"] == [(2.0, 6 / 60, 8)]
        for name, last in (("ddp", "ddp, saved"), ("transformers", "transformers, noise")):
            begun, ended = rank[f"{name}, gone on"]["states"], rank[last]["states"]
            assert all(torch.equal(begun[0][k], v) for k, v in ended[-1].items())


REFUSED = {
    "refused, module": "module='net' together with strategy: DDPStrategy",
    "refused, by hand": "automatic_optimization=False together with strategy: DDPStrategy",
    "refused, own sampler": "Use Trainer(use_distributed_sampler=False)",
    "refused, spread in part": "call fully_shard in configure_model on the parts that have these parameters too",
    "refused, spread, checkpoints": "ModelCheckpoint(save_weights_only=True)",
    "refused, spread, going on": "and no ckpt_path",
    "refused, call inside": "a DistributedSampler for 2 rank(s), and 1 rank(s) train this model",
    "refused, call inside, no sampler": "was put around it after the call",
    "refused, fabric afterwards": "was put around it after the call",
    "refused, accelerate afterwards": "prepare the model before the call",
    "refused, accelerate, the loader only": "BatchSamplerShard",
    "refused, FSDP2 afterwards": "Change the model first and call make_private_safe again",
    "refused, FSDP1": "fsdp_version=2",
    "refused, transformers, smoothing": "Leave label_smoothing_factor out, or train with one process",
    "refused, transformers, accumulation": "gradient_accumulation_steps=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_on_all_ranks(trained: Seen, name: str) -> None:
    told = [rank[name]["told"] for rank in trained]
    assert all(told) and REFUSED[name] in told[0], told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "spread", "transformers", "accelerate"])
def test_no_sample_moves_the_released_sum_by_more_than_the_clip_norm(left_out: Seen, name: str) -> None:
    """On whichever rank it is, also where its own gradient is a hundred times as large."""

    def step_without(number: int) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        ((drawn, before, after),) = steps(left_out, f"{name} without {number}")
        return drawn, before, after

    drawn, before, everybody = step_without(-1)
    tried = [i for i in LEFT_OUT if i in drawn]
    assert tried
    for i in LEFT_OUT:
        again, _, without = step_without(i)
        assert again == drawn
        moved = norm({n: (everybody[n].double() - without[n].double()) * 20 / on_ranks.RATE for n in before})
        assert moved == pytest.approx(on_ranks.CLIP if i in tried else 0.0, abs=1e-4)


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("leave one out", tmp_path_factory.mktemp("left out"))
