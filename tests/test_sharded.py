"""Training of models that ``fully_shard`` has spread over processes, against batches of one in this process."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import PRVAccountant
from torch import Tensor

from tests import on_shards, test_distributed
from tests.reference import clipped_sum, gradients_one_by_one, norm
from tests.test_distributed import SOME_RANKS, Seen

launch = partial(test_distributed.launch, module="tests.on_shards")


@pytest.fixture(scope="module", params=SOME_RANKS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("trainings", tmp_path_factory.mktemp("shards"), request.param)


def steps(seen: Seen, name: str) -> list[tuple[list[int], dict[str, Tensor], dict[str, Tensor]]]:
    """What all ranks drew together, the whole weights before and after, for every step."""
    runs = [rank[name] for rank in seen]
    draws = [list(chain(*parts)) for parts in zip(*(run["draws"] for run in runs), strict=True)]
    states = runs[0]["states"]
    return list(zip(draws, states[:-1], states[1:], strict=True))


def wanted(before: dict[str, Tensor], drawn: list[int], name: str) -> dict[str, Tensor]:
    """The clipped sum over what was drawn, from batches of one."""
    of = name if name in on_shards.MODELS else "MLP"
    _, data, step = on_shards.MODELS[of]
    model, samples = on_shards.made(of).double(), data()
    model.load_state_dict({k: v.double() for k, v in before.items()})
    singles = [tuple(t[None].double() if t.is_floating_point() else t[None] for t in samples[i]) for i in drawn]
    if not singles:
        return {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    found = gradients_one_by_one(model, step, singles)
    if name == "frozen":
        found = [{n: g[n] for n in ("3.weight", "3.bias", "5.weight")} for g in found]
    if name == "groups":
        parts = [[{n: g[n] for n in g if n.startswith("1.") is first} for g in found] for first in (True, False)]
        return clipped_sum(parts[0], 0.1) | clipped_sum(parts[1], 0.5)
    return clipped_sum(found, on_shards.CLIP)


EXPECTED = {"few samples": 2, "evaluation": 20}
"""Training -> what its clipped sum is divided by, if not 6."""


@pytest.mark.parametrize("name", [*on_shards.MODELS, *EXPECTED, "frozen", "groups"])
def test_the_ranks_release_one_clipped_sum(trained: Seen, name: str) -> None:
    """That of one process on the union of the batches, where a rank has no sample as well; nothing else moves."""
    scale = on_shards.RATE / EXPECTED.get(name, 6)
    for drawn, before, after in steps(trained, name):
        due = wanted(before, drawn, name)
        for key, value in before.items():
            moved, total = value.double() - after[key].double(), due.get(key)
            if total is None and key != "head.weight":  # tied
                assert torch.equal(value, after[key]), key
            elif total is not None:
                assert torch.allclose(moved, scale * total, rtol=1e-4, atol=1e-6), key


HALF = {"MLP": "5.bias", "transformer": "head.bias"}
"""Models that are trained in half precision, and a parameter of each."""


@pytest.mark.parametrize(("name", "part"), HALF.items())
def test_with_half_precision_the_sum_is_made_in_single_precision(trained: Seen, name: str, part: str) -> None:
    """Layers compute in bfloat16; samples are clipped, added up and reduced in float32."""
    for drawn, before, after in steps(trained, f"half precision, {name}"):
        due = wanted(before, drawn, name)
        moved = {n: (before[n].double() - after[n].double()) * 6 / on_shards.RATE for n in due}
        assert norm({n: moved[n] - due[n] for n in due}) < 0.03 * max(on_shards.CLIP, norm(due))
        finest = moved[part].float()
        assert not torch.equal(finest, finest.bfloat16().float())


def test_real_steps_are_checked(trained: Seen) -> None:
    for name in (*on_shards.MODELS, "evaluation", *(f"half precision, {name}" for name in HALF)):
        for rank in trained:
            assert rank[name]["engine"] == "bookkeeping" and rank[name]["checked"] >= 1, name


def test_a_rank_without_samples_adds_nothing(trained: Seen) -> None:
    draws = list(zip(*(rank["few samples"]["draws"] for rank in trained), strict=True))
    assert any(any(parts) and not all(parts) for parts in draws)
    for parts in draws:
        together = list(chain(*parts))
        assert len(set(together)) == len(together)


def test_every_number_gets_the_accounted_noise_once(trained: Seen) -> None:
    """From numbers of each rank's own: parts of a parameter on different ranks share nothing."""
    noise: list[Tensor] = []
    shards: list[list[Tensor]] = [[] for _ in trained]
    for drawn, before, after in steps(trained, "noise"):
        due = wanted(before, drawn, "MLP")
        for key, total in due.items():
            released = (before[key].double() - after[key].double()) * 6 / on_shards.RATE
            part = (released - total) / (2.0 * on_shards.CLIP)
            noise.append(part.flatten())
            if key == "1.weight":
                for found, shard in zip(shards, part.chunk(len(trained)), strict=True):
                    found.append(shard[:3].flatten())
    every = torch.cat(noise)
    assert len(every) > 5_000
    assert float(every.std()) == pytest.approx(
        1.0, abs=5 / (2 * len(every)) ** 0.5
    )  # 1 run in 1.7 million fails by chance
    assert abs(float(every.mean())) < 5 / len(every) ** 0.5
    for one in range(len(shards)):
        for other in range(one):
            a, b = torch.cat(shards[one]), torch.cat(shards[other])
            assert len(a) > 900 and abs(float((a * b).mean())) < 5 / len(a) ** 0.5


def test_the_budget_is_that_of_one_process(trained: Seen) -> None:
    alone = PRVAccountant()
    for _ in range(5):
        alone.step(noise_multiplier=2.0, sample_rate=6 / 60)
    for rank in trained:
        assert rank["noise"]["epsilon"] == alone.get_epsilon(1e-3) > 0
        assert rank["few samples"]["history"] == [(0.0, 2 / 60, 8)]
    assert "each adds the noise to its part of the parameters" in trained[0]["noise"]["report"]


REFUSED = {
    "engine": ("ArgumentError", "grad_sample_mode='vmap' with a model on which fully_shard was called"),
    "parts": ("ArgumentError", "max_physical_batch_size=2 with a model on which fully_shard was called"),
    "generator": ("ArgumentError", "pass seed= for an experiment"),
    "adaptive": ("ArgumentError", "clipping='adaptive' with a model on which fully_shard was called"),
    "secure mode": ("ArgumentError", "secure_mode=True with a model on which fully_shard was called"),
    "generator on rank 1": ("RankError", "rank 1 of"),
    "ignored": ("ModelError", "parameter `5.bias` is on every rank as a whole"),
    "in part": ("ModelError", "call torch.distributed.fsdp.fully_shard on the whole model too"),
    "batch norm": ("ModelError", "has to be changed (DPF001), and fully_shard was called on the model already"),
    "order": ("LoaderError", "no DistributedSampler that shares its samples"),
    "noise": ("RankError", "noise_multiplier is 1.0 on rank 0 and 2.0 on rank 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(trained: Seen, name: str) -> None:
    error, text = REFUSED[name]
    told = [rank["refused"][name] for rank in trained]
    assert told[0].startswith(f"{error}: ") and text in told[0]
    assert all(told)


MISUSED = {
    "loss": ("RankError", "CoupledLossError"),
    "penalty": ("PlanBrokenError", "gradient reached parameter `5.weight` of FSDPSequential past the model's forward"),
    "no noise": ("RankError", "NoiseError"),
    "parts": ("MisuseError", "in parts of 2 samples"),
    "clip norm": ("RankError", "max_grad_norm is 0.5 on rank 0 and 0.25 on rank 1"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_a_step_that_one_rank_cannot_make_is_released_nowhere(trained: Seen, name: str) -> None:
    error, text = MISUSED[name]
    assert trained[0]["misused"][name]["told"].startswith(f"{error}: ")
    assert text in trained[1]["misused"][name]["told"]
    assert all(rank["misused"][name]["kept"] for rank in trained)


def test_a_step_of_another_kind_is_looked_at_before_it_is_released(trained: Seen) -> None:
    assert "CoupledLossError" in trained[1]["late"]["told"] and trained[0]["late"]["told"].startswith("RankError: ")
    assert all(rank["late"]["steps"] in (7, 8) for rank in trained), "the draw of the refused step may count as lost"


def test_whole_parameters_are_there_only_where_a_rank_looks_at_the_step(trained: Seen) -> None:
    """All take part in putting them together, and only the one that looks does."""
    for rank in trained:
        assert rank["looks"]["gathered"] == [0, 0, 1]
    assert [rank["looks"]["checked"] for rank in trained] == [[0] * 3] * (len(trained) - 1) + [[0, 0, 1]]


def test_a_model_that_is_another_one_in_the_step_is_not_looked_at_without_a_word(trained: Seen) -> None:
    said = [
        "the spread model has changed between its call and optimizer.step()" in str(rank["changed"]) for rank in trained
    ]
    assert said == [True] + [False] * (len(trained) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_sample_moves_the_released_sum_by_more_than_the_clip_norm(tmp_path: Path, ranks: int) -> None:
    """On whichever rank it is, also where its own gradient is a hundred times as large."""
    seen = launch("leave one out", tmp_path, ranks)
    ((drawn, before, everybody),) = steps(seen, "-1")
    assert any(i in drawn for i in on_shards.LEFT_OUT)
    for i in on_shards.LEFT_OUT:
        ((again, _, without),) = steps(seen, str(i))
        assert again == drawn
        moved: dict[str, Any] = {n: (everybody[n].double() - without[n].double()) * 20 / on_shards.RATE for n in before}
        assert norm(moved) <= on_shards.CLIP + 1e-4 if i in drawn else norm(moved) == 0


def check_gone_on(before: dict[str, Any], after: dict[str, Any], *, same_ranks: bool) -> None:
    """Weights, the optimizer's state and the budget are those that were saved; three more steps are counted."""
    assert before["history"] == [(2.0, 20 / 60, 3)]
    assert after["weights"].keys() == before["weights"].keys()
    assert all(torch.equal(value, before["weights"][name]) for name, value in after["weights"].items())
    assert len(after["adam"]) == len(before["adam"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(after["adam"], before["adam"], strict=True))
    assert after["history"] == before["history"] and after["then"]["history"] == [(2.0, 20 / 60, 6)]
    assert any("saved by a training on 2 ranks" in told for told in after["told"]) is not same_ranks


def test_a_training_goes_on_from_torchs_checkpoint(trained: Seen) -> None:
    for rank in trained:
        check_gone_on(rank["saved"], rank["gone on"], same_ranks=True)
        assert rank["saved"]["loaded again"] == rank["saved"]["history"], (
            "in the same processes nothing was released in between"
        )
        told = rank["saved"]["file"]
        assert told.startswith("CheckpointError") and "torch.distributed.checkpoint.save" in told


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_it_goes_on_with_other_numbers_of_ranks(tmp_path: Path, ranks: int) -> None:
    """One of them has the plain model."""
    before = launch("save", tmp_path, 2)[0]
    for rank in launch("go on", tmp_path, ranks):
        check_gone_on(before, rank, same_ranks=False)
