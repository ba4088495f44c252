"""Training on several processes, started by torchrun, against batches of one in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from opacus.accountants import PRVAccountant
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.poisson import Drawing, PoissonSampler
from dpfix.sampling.randomness import Randomness, Stream
from dpfix.sampling.ranks import Ranks, new_seed
from tests import on_ranks
from tests.helpers import points, setting
from tests.reference import clipped_sum, gradients_one_by_one, norm

RANKS = 2
ROOT = Path(__file__).parents[1]
Seen = list[dict[str, Any]]


def torchrun(*command: str, ranks: int = RANKS) -> str:
    """What the ranks printed."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def launch(scenario: str, folder: Path, ranks: int = RANKS, module: str = "tests.on_ranks") -> Seen:
    """What every rank saw."""
    torchrun("-m", module, scenario, str(folder), ranks=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("trainings", tmp_path_factory.mktemp("trainings"))


SOME_RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SOME_RANKS)
def by_habit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("by habit", tmp_path_factory.mktemp("habit"), request.param)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("refusals", tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def misused(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("misuses", tmp_path_factory.mktemp("misuses"))


def steps(seen: Seen, name: str) -> list[tuple[list[int], dict[str, Tensor], dict[str, Tensor]]]:
    """What all ranks drew together, the weights before and after, for every step."""
    runs = [rank[name] for rank in seen]
    draws = [list(chain(*parts)) for parts in zip(*(run["draws"] for run in runs), strict=True)]
    states = runs[0]["states"]
    return list(zip(draws, states[:-1], states[1:], strict=True))


def wanted(before: dict[str, Tensor], drawn: list[int], name: str = "") -> dict[str, Tensor]:
    """The clipped sum over the drawn digits, from batches of one."""
    model = on_ranks.network(seed=0).double()
    model.load_state_dict({k: v.double() for k, v in before.items()})
    digits = on_ranks.digits()
    singles = [(x[None].double(), y[None]) for x, y, _ in (digits[i] for i in drawn)]
    if not singles:
        return {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    samples = gradients_one_by_one(model, on_ranks.step, singles)
    if name.startswith("automatic"):
        return {n: sum(on_ranks.CLIP / (norm(g) + 0.01) * g[n] for g in samples) for n in samples[0]}
    if name.startswith("groups"):
        groups = [{n for n in samples[0] if n.startswith("0.") is first} for first in (True, False)]
        parts = [[{n: g[n] for n in names} for g in samples] for names in groups]
        return clipped_sum(parts[0], 0.1) | clipped_sum(parts[1], 0.5)
    return clipped_sum(samples, on_ranks.CLIP)


SAME_AS_ONE_PROCESS = {
    "few samples": 2, "memory manager": 20, "lack of memory": 20, "sum": 1, "distributed sampler": 4 * RANKS,
}  # fmt: skip
"""Training -> what its clipped sum is divided by."""


@pytest.mark.parametrize("name", ["auto", "vmap", "microbatch", "hooks", *SAME_AS_ONE_PROCESS, *on_ranks.CLIPPING])
def test_the_ranks_release_one_clipped_sum(trained: Seen, name: str) -> None:
    """The step of all ranks together is that of one process, empty parts of a batch included."""
    scale = on_ranks.RATE / SAME_AS_ONE_PROCESS.get(name, 6)
    for drawn, before, after in steps(trained, name):
        for key, total in wanted(before, drawn, name).items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, scale * total, rtol=1e-4, atol=1e-6), key


BY_HABIT = {
    "vmap": 6, "hooks": 6, "memory manager": 20, "parts": 20, "parts found": 20, "without a wrapper": 6,
    "the script's own object is called": 6,
}  # fmt: skip
"""Training of a model in torch's own wrapper -> what its clipped sum is divided by."""


@pytest.mark.parametrize("name", BY_HABIT)
def test_a_model_in_torchs_wrapper_is_trained_as_in_one_process(by_habit: Seen, name: str) -> None:
    """No gradient is averaged while backward runs: the sum is that of the clipped gradients of batches of one."""
    for drawn, before, after in steps(by_habit, name):
        for key, total in wanted(before, drawn).items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, on_ranks.RATE / BY_HABIT[name] * total, rtol=1e-4, atol=1e-6), key
    report = by_habit[0][name]["report"]
    assert "DPF019" in report and "DistributedDataParallel averages the gradients of the ranks" in report
    assert f"ranks: {len(by_habit)}, each works on its part" in report


def test_the_ranks_agree_on_the_size_of_physical_batches(by_habit: Seen) -> None:
    """Where the one has less memory than the other."""
    sizes = {name: {rank[name]["physical"] for rank in by_habit} for name in ("parts", "parts found", "vmap")}
    assert sizes["parts"] == {4} and sizes["vmap"] == {None}
    assert len(sizes["parts found"]) == 1 and None not in sizes["parts found"]


def test_the_ranks_agree_on_what_memory_is_left_for(trained: Seen) -> None:
    """It ran out on one of them, which had to begin its part of a batch again; the other did not wait in vain."""
    limits = [rank["lack of memory"]["limit"] for rank in trained]
    assert limits[0] is not None and limits[0] <= 5 and limits == [limits[0]] * RANKS
    assert trained[0]["lack of memory"]["history"] == trained[1]["lack of memory"]["history"]


def test_nothing_is_sent_before_a_batch_is_released(by_habit: Seen) -> None:
    """Neither while backward runs nor in the steps of the other physical batches; then one message for every parameter."""
    for rank in by_habit:
        seen = rank["messages"]
        assert seen["ordinary"] > 0, "the messages of torch's wrapper are not seen: the test shows nothing"
        assert True in seen["released"] and False in seen["released"]
        for (backward, stepped), released in zip(seen["parts"], seen["released"], strict=True):
            assert (backward, stepped) == (0, seen["tensors"] + 2 if released else 0)


def test_torchs_wrapper_stays_the_scripts_object(by_habit: Seen) -> None:
    assert all(rank["kept"] == {"module": True, "ranks": False} for rank in by_habit)


def test_the_noise_of_a_model_in_torchs_wrapper_is_added_once(by_habit: Seen) -> None:
    assert noise_in(by_habit, "noise") == pytest.approx(1.0, abs=0.03)


@pytest.mark.slow
def test_what_accelerate_prepares_before_the_call_is_trained_on_all_ranks(tmp_path: Path) -> None:
    """And what it prepares afterwards is refused."""
    pytest.importorskip("accelerate")
    seen = launch("accelerate", tmp_path)
    for drawn, before, after in steps(seen, "before"):
        for key, total in wanted(before, drawn).items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, on_ranks.RATE / 6 * total, rtol=1e-4, atol=1e-6), key
    for rank in seen:
        assert rank["afterwards"]["error"] == "MisuseError" and rank["afterwards"]["kept"]
        assert "prepare the model before the call" in rank["afterwards"]["text"]


@pytest.mark.parametrize("ranks", SOME_RANKS)
def test_no_sample_moves_the_released_sum_by_more_than_the_clip_norm(tmp_path: Path, ranks: int) -> None:
    """On whichever rank it is, also where its own gradient is a hundred times as large."""
    seen = launch("leave one out", tmp_path, ranks)
    ((drawn, before, everybody),) = steps(seen, "-1")
    tried = [i for i in on_ranks.LEFT_OUT if i in drawn]
    on = {rank for rank, run in enumerate(seen) for i in tried if i in run["-1"]["draws"][0]}
    assert len(on) > 1, "samples of one rank only were left out: the test shows little about the others"
    for i in on_ranks.LEFT_OUT:
        ((again, _, without),) = steps(seen, str(i))
        assert again == drawn
        moved = norm({n: (everybody[n].double() - without[n].double()) * 20 / on_ranks.RATE for n in before})
        assert moved == pytest.approx(on_ranks.CLIP if i in tried else 0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "size"),
    [("persons", 4), ("one person", 1), ("persons, distributed sampler", 4 * RANKS), ("persons, memory manager", 18)],
)
def test_the_ranks_release_one_clipped_sum_over_persons(trained: Seen, name: str, size: int) -> None:
    """All items of whoever is drawn are on one rank, averaged before they are clipped."""
    for rank in trained:
        for drawn in rank[name]["draws"]:
            owners = {on_ranks.OWNERS[i] for i in drawn}
            assert sorted(drawn) == [i for i, owner in enumerate(on_ranks.OWNERS) if owner in owners]
    assert trained[0][name]["history"] == [(0.0, size / 18, len(trained[0][name]["draws"]))]
    for drawn, before, after in steps(trained, name):
        model = on_ranks.network(seed=0).double()
        model.load_state_dict({k: v.double() for k, v in before.items()})
        digits, by_person = on_ranks.digits(), []
        for owner in {on_ranks.OWNERS[i] for i in drawn}:
            mine = [digits[i] for i in drawn if on_ranks.OWNERS[i] == owner]
            each = gradients_one_by_one(model, on_ranks.step, [(x[None].double(), y[None]) for x, y, _ in mine])
            by_person.append({n: torch.stack([g[n] for g in each]).mean(0) for n in each[0]})
        total = clipped_sum(by_person, on_ranks.CLIP) if by_person else wanted(before, [])
        for key, value in total.items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, on_ranks.RATE / size * value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", ["auto", "few samples", "noise", "memory manager", "persons", "one person"])
def test_all_ranks_have_the_same_weights_plan_and_budget(trained: Seen, name: str) -> None:
    first, *others = (rank[name] for rank in trained)
    for other in others:
        assert other["engine"] == first["engine"] and other["history"] == first["history"]
        for here, there in zip(first["states"], other["states"], strict=True):
            assert all(torch.equal(v, there[k]) for k, v in here.items())


def test_every_batch_is_shared_out(trained: Seen) -> None:
    empty = 0
    for runs in zip(*(rank["few samples"]["draws"] for rank in trained), strict=True):
        together = list(chain(*runs))
        assert len(set(together)) == len(together)
        assert max(map(len, runs)) - min(map(len, runs)) <= 1
        empty += not all(runs)
    assert empty, "no rank was ever without samples: the test shows nothing about that"
    assert "ranks: 2, each works on its part of every batch" in trained[0]["auto"]["report"]


def test_the_noise_is_added_once(trained: Seen) -> None:
    """With the standard deviation noise_multiplier x clip norm, not once per rank."""
    assert noise_in(trained, "noise") == pytest.approx(1.0, abs=0.03)


def noise_in(seen: Seen, name: str) -> float:
    """Standard deviation of the noise, in multiples of what the accountant counts."""
    found = []
    for drawn, before, after in steps(seen, name):
        for key, total in wanted(before, drawn).items():
            released = (before[key].double() - after[key].double()) * 6 / on_ranks.RATE
            found.append((released - total).flatten() / (2.0 * on_ranks.CLIP))
    noise = torch.cat(found)
    assert (
        len(noise) > 10_000 and abs(float(noise.mean())) < 5 / len(noise) ** 0.5
    )  # 1 run in 1.7 million fails by chance
    return float(noise.std())


def test_the_budget_is_that_of_one_process(trained: Seen) -> None:
    alone = PRVAccountant()
    for _ in range(6):
        alone.step(noise_multiplier=2.0, sample_rate=6 / 60)
    assert trained[0]["noise"]["epsilon"] == alone.get_epsilon(1e-3) > 0
    assert trained[0]["distributed sampler"]["history"] == [(0.0, 4 * RANKS / 60, 3)]


def test_opacus_draws_the_same_positions_on_all_ranks(trained: Seen) -> None:
    """Why the ranks share one draw; when this fails, Opacus has learnt of it, and the documentation has to."""
    positions = [rank["Opacus"]["positions"] for rank in trained]
    assert positions[0] == positions[1] and any(positions[0])


class Told(Ranks):
    """A rank that was told the seed of rank 0."""

    def first(self, value: Any) -> Any:
        return 7


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_draw_one_poisson_batch(size: int) -> None:
    """Also when they had left the pass before at other places; equal draws from equal shares would not be independent."""

    def sampler(ranks: Ranks, source: Stream) -> PoissonSampler:
        drawing = Drawing(DrawLedger(), source, ranks)
        return PoissonSampler(list(range(100, 140)), drawing, sample_rate=0.2, steps=30)

    parts = []
    for rank in range(size):
        ranks = Told(rank, size)
        mine = sampler(ranks, cast(Stream, Randomness.of(None, None, ranks).draws))
        list(islice(mine, 1 + rank))
        parts.append(list(mine))
    seeds = Stream((7,)).generator()
    _, second = new_seed(seeds), new_seed(seeds)
    one = list(sampler(Ranks(), Stream((second,))))
    assert [sorted(chain(*shares)) for shares in zip(*parts, strict=True)] == one


def test_the_script_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/ranks.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "script.py").write_text(script)
    out = torchrun(str(tmp_path / "script.py"))
    assert out.count("privacy statement") == 1 and "Poisson, rate 0.0356" in out
    assert re.search(r"steps: +29\n", out), out


@pytest.mark.parametrize(
    ("name", "errors", "text"),
    [
        ("torch's wrapper inside", ("ModelError",) * 2, "wrap the whole model with torch.nn.parallel.Distr"),
        ("a group of its own", ("ModelError",) * 2, "leave process_group and device_mesh out"),
        ("coupled on rank 1 in torch's wrapper", ("RankError", "CoupledModelError"), "mixes the samples of a batch"),
        ("inside", ("ModelError",) * 2, "wrap the whole model with it"),
        ("coupled on rank 1", ("RankError", "CoupledModelError"), "mixes the samples of a batch"),
        ("wrong argument on rank 1", ("RankError", "ArgumentError"), "max_grad_norm=-1.0 must be a positive"),
        ("noise", ("RankError",) * 2, "noise_multiplier is 1.0 on rank 0 and 2.0 on rank 1"),
        ("weights", ("RankError",) * 2, "the content of parameter `module.0.0.weight` differs on rank 1"),
        ("buffers", ("RankError",) * 2, "the content of buffer `module.scale` differs on rank 1"),
        ("another learning rate", ("RankError",) * 2, "the options of the optimizer is "),
        ("another order of parameters", ("RankError",) * 2, "the order of the optimizer's parameters is "),
        ("other indices", ("RankError",) * 2, "the list of indices to draw from differs on rank 1"),
        ("another split", ("RankError",) * 2, "the list of indices of Subset 1 differs on rank 1"),
        ("other people", ("RankError",) * 2, "sample 20 of the data, entry (0,) differs on rank 1"),
        ("other persons", ("RankError",) * 2, "who the items belong to differs on rank 1"),
        ("persons on one rank", ("RankError",) * 2, "the number of samples is 60 on rank 0 and 18 on rank 1"),
        ("no persons on rank 1", ("RankError", "ArgumentError"), "60 of 60 items have no name"),
        ("epsilon", ("RankError", "ArgumentError"), "delta=2.0 must lie between 0 and 1"),
        ("own order", ("LoaderError",) * 2, "no DistributedSampler that shares its samples among 2 ranks"),
        ("repeated samples", ("LoaderError",) * 2, "drop_last=True"),
        ("samples", ("RankError",) * 2, "the number of samples is 60 on rank 0 and 61 on rank 1"),
        ("replicas", ("LoaderError",) * 2, "a DistributedSampler for 3 rank"),
        ("seed", ("RankError",) * 2, "that noise can be computed again is True on rank 0 and False on rank 1"),
        ("clipping", ("ArgumentError",) * 2, "clipping='adaptive' with 2 ranks"),
    ],
)
def test_what_one_rank_cannot_do_no_rank_does(refused: Seen, name: str, errors: tuple[str, ...], text: str) -> None:
    for rank, error in zip(refused, errors, strict=True):
        assert rank[name]["error"] == error, rank[name]
        assert text in rank[name]["text"] and rank[name]["kept"]


@pytest.mark.parametrize(
    ("name", "errors", "text"),
    [
        ("region", ("PlanBrokenError",) * 2, "One rank cannot leave out a step that the others make"),
        ("left out", ("RankError",) * 2, "the number of its batches is 2 on rank 0 and 3 on rank 1"),
        ("not finite", ("RankError", "NonFiniteGradientError"), ""),
        ("scheduler", ("RankError",) * 2, "max_grad_norm is 0.25 on rank 0 and 0.5 on rank 1"),
        ("load", ("RankError",) * 2, "the number of states that were loaded is 1 on rank 0 and 0 on rank 1"),
        ("peek", ("RankError",) * 2, "the pass over the data_loader is "),
        ("noise on every rank", ("RankError", "NoiseError"), ""),
        ("noise on no rank", ("NoiseError", "RankError"), ""),
        ("wrapped afterwards", ("MisuseError",) * 2, "was put around it after the call"),
        ("wrapped afterwards, hooks", ("MisuseError",) * 2, "was put around it after the call"),
    ],
)
def test_a_step_that_one_rank_does_not_make_is_released_nowhere(
    misused: Seen, name: str, errors: tuple[str, ...], text: str
) -> None:
    for rank, error in zip(misused, errors, strict=True):
        assert rank[name]["error"] == error, rank[name]
        assert text in rank[name]["text"] and rank[name]["kept"]


def test_a_rank_that_ends_ends_the_others(tmp_path: Path) -> None:
    torchrun("-m", "tests.on_ranks", "death", str(tmp_path))
    seen = torch.load(tmp_path / "0.pt")
    assert seen["error"] == "RankError" and seen["kept"] and seen["took"] < 60
    for part in ("another rank no longer answers", "Its own output says why", "init_process_group(timeout=...)"):
        assert part in seen["text"]


@pytest.mark.parametrize("ranks", [2, 1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """With a warning; what is released is right, and accounted with what was released before."""
    first = launch("checkpoint", tmp_path, 2)
    second = launch("checkpoint", tmp_path, ranks)
    (last, *_), states = second[0]["run"]["states"], first[0]["run"]["states"]
    assert all(torch.equal(last[k], v) for k, v in states[-1].items())
    assert second[0]["history"] == [(0.0, 20 / 60, 6)]
    for drawn, before, after in steps(second, "run"):
        for key, total in wanted(before, drawn).items():
            moved = before[key].double() - after[key].double()
            assert torch.allclose(moved, on_ranks.RATE / 20 * total, rtol=1e-4, atol=1e-6), key
    assert any("a training on 2 ranks, and goes on with" in text for text in second[0]["told"]) is (ranks != 2)


def test_passes_that_were_left_at_other_places_do_not_matter(misused: Seen) -> None:
    first, second = (rank["left early"] for rank in misused)
    assert len(first["draws"]) == len(second["draws"]) == 10
    assert all(not set(a) & set(b) for a, b in zip(first["draws"], second["draws"], strict=True))
    assert all(torch.equal(v, second["weights"][k]) for k, v in first["weights"].items())


def test_the_wrapper_without_a_process_group_is_refused() -> None:
    """A model that was loaded with its wrapper: this process alone cannot know who trains with it."""
    model = DifferentiallyPrivateDistributedDataParallel(nn.ParameterList())
    model.module = nn.Linear(6, 3)
    with pytest.raises(dpfix.ModelError, match="there is no process group"):
        dpfix.make_private_safe(**setting(model))


def test_a_distributed_sampler_without_the_wrapper_is_refused() -> None:
    sampler = torch.utils.data.DistributedSampler(points(), num_replicas=2, rank=0)
    loader = DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
    with pytest.raises(dpfix.LoaderError, match=r"for 2 rank\(s\), and 1 rank\(s\) train this model"):
        dpfix.make_private_safe(**setting(data_loader=loader))


def test_all_ranks_together_make_one_release_of_a_budget(tmp_path: Path) -> None:
    first, second = launch("budgets", tmp_path)
    assert (first["refused"], second["refused"]) == ("BudgetError", "RankError")
    assert first["steps"] == second["steps"] > 0
    (line,) = json.loads((tmp_path / "data.budget.json").read_text())["trainings"].values()
    assert [row["steps"] for row in line["released"]] == [first["steps"]] and line["ahead"] is None
    for seen in (first, second):
        assert seen["spent"] <= 4.0 and all(torch.equal(seen["before"][n], value) for n, value in seen["after"].items())
