"""A budget in a file: what every training writes, what is refused, and files that cannot be what they should be."""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.schedulers import StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, Subset

import dpfix
from dpfix.__main__ import main
from dpfix.training import budget_file, spender
from tests.cases import mlp
from tests.helpers import points, setting, train
from tests.interrupts import Lines
from tests.training.steps import values

RATE, DELTA = 8 / 24, 1e-3
DATA = points()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data.budget.json"


def budget_of(file: Path, epsilon: float = 8.0, **changes: Any) -> dpfix.Budget:
    return dpfix.Budget(file, epsilon=epsilon, delta=DELTA, **changes)


class Centred(torch.nn.Sequential):
    """Mixes the samples of a batch."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0))


def begin(budget: Any, model: Any = None, **changes: Any) -> dpfix.PrivateTraining:
    return dpfix.make_private_safe(**setting(model, **{"data_loader": DataLoader(DATA, 8), "budget": budget} | changes))


def end(training: Any) -> None:
    training[0].cleanup()


def written(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["trainings"].values())


def steps_in(line: dict[str, Any], ahead: bool = True) -> int:
    rows = [*line["released"], *([line["ahead"]] if ahead and line["ahead"] else [])]
    return sum(row["steps"] for row in rows)


def epsilon_of(*history: tuple[float, float, int], kind: Any = PRVAccountant) -> float:
    accountant = kind()
    accountant.history = list(history)
    return accountant.get_epsilon(DELTA)


def until_refused(training: Any, most: int = 500) -> dpfix.BudgetError:
    with pytest.raises(dpfix.BudgetError) as caught:
        train(training, most)
    return caught.value


# ------------------------------------------------------------------ what is written, and when


def test_a_release_is_written_before_it_leaves(file: Path) -> None:
    training = begin(budget_of(file, 100.0))
    before = file.read_text()
    assert written(file) == []
    seen = []
    original = training[1].original_optimizer
    step = original.step

    def looking(*args: Any) -> Any:
        seen.append(steps_in(written(file)[0]))
        return step(*args)

    original.step = looking
    train(training, 40)
    assert all(held >= number for number, held in enumerate(seen, 1))
    assert len(set(seen)) <= 3  # in blocks: most steps write nothing
    assert file.read_text() != before


def test_what_was_not_used_is_given_back_at_the_end(file: Path) -> None:
    training = begin(budget_of(file))
    train(training, 5)
    assert steps_in(written(file)[0]) == spender.AHEAD
    end(training)
    assert steps_in(written(file)[0]) == 5 and written(file)[0]["ahead"] is None


def test_blocks_grow_with_what_was_released(file: Path) -> None:
    training = begin(budget_of(file, 1e4))
    train(training, 401)
    line = written(file)[0]
    assert steps_in(line, ahead=False) < 401 <= steps_in(line) <= 401 * (1 + 1 / spender.SHARE) + 1


def test_what_is_dropped_gives_back_with_the_next_writing(file: Path) -> None:
    budget = budget_of(file)
    train(begin(budget), 3)
    gc.collect()
    train(begin(budget), 1)
    assert [steps_in(line) for line in written(file)] == [3, spender.AHEAD]


def test_own_trainings_are_known_exactly(file: Path) -> None:
    budget = budget_of(file)
    training = begin(budget)
    train(training, 5)
    assert budget.spent() == training.get_epsilon(DELTA) == epsilon_of((1.0, RATE, 5))
    assert budget.remaining == 8.0 - budget.spent()


def test_skipped_draws_count(file: Path) -> None:
    training = begin(budget_of(file))
    for number, (x, y) in enumerate(training[2]):
        if number == 2:
            training[1].zero_grad()
            F.cross_entropy(training[0](x), y).backward()
            training[1].step()
    end(training)
    assert steps_in(written(file)[0]) == 3


def test_skipped_draws_are_reserved_with_the_next_step(file: Path) -> None:
    training = begin(budget_of(file), data_loader=DataLoader(DATA, 1))
    for number, (x, y) in enumerate(training[2]):
        if number == 20:
            training[1].zero_grad()
            F.cross_entropy(training[0](x), y).backward()
            training[1].step()
            assert steps_in(written(file)[0]) == 21


def test_batches_in_parts_are_one_release(file: Path) -> None:
    training = begin(budget_of(file))
    model, optimizer, loader = training
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for x, y in parts:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    end(training)
    assert steps_in(written(file)[0]) == 3


@pytest.mark.parametrize(("sampling", "releases"), [("shuffle", 2), ("fixed", 6), ("truncated", 6), ("poisson", 6)])
def test_each_sampling_is_written_as_it_is_accounted(file: Path, sampling: str, releases: int) -> None:
    budget = budget_of(file, 100.0)
    training = begin(budget, sampling=sampling)
    train(training, 6)
    assert budget.spent() == pytest.approx(training.get_epsilon(DELTA), rel=1e-6)
    end(training)
    assert steps_in(written(file)[0]) == releases


def test_a_schedule_of_the_noise_is_written(file: Path) -> None:
    budget = budget_of(file, 100.0)
    training = begin(budget, noise_multiplier=2.0)
    schedule = StepNoise(training[1], step_size=2, gamma=0.5)
    for _ in range(4):
        train(training, 1)
        schedule.step()
    end(training)
    rows = [(row["noise_multiplier"], row["steps"]) for row in written(file)[0]["released"]]
    assert rows == [(2.0, 2), (1.0, 2)]
    assert budget.spent() == training.get_epsilon(DELTA)


def test_a_block_does_not_cover_less_noise(file: Path) -> None:
    training = begin(budget_of(file, 1e4))
    train(training, 1)
    training[1].noise_multiplier = 0.5
    train(training, 1)
    assert [row["noise_multiplier"] for row in written(file)[0]["released"]] == [1.0]
    assert written(file)[0]["ahead"]["noise_multiplier"] == 0.5


# ------------------------------------------------------------------ refused


def test_a_step_beyond_the_budget_is_refused_and_nothing_moves(file: Path) -> None:
    budget = budget_of(file, 4.0)
    model = mlp()
    training = begin(budget, model)
    steps = 1
    while epsilon_of((1.0, RATE, steps + 1)) <= 4.0:
        steps += 1
    train(training, steps)
    before = values(model)
    error = until_refused(training, 1)
    assert torch.equal(values(model), before)
    assert all(getattr(p, "summed_grad", None) is None for p in model.parameters())
    text = str(error)
    assert f"epsilon is {epsilon_of((1.0, RATE, steps)):.4g} of 4" in text
    assert f"would be {epsilon_of((1.0, RATE, steps + 1)):.4g}" in text and "data.budget.json" in text
    assert error.findings[0].code == "DPF052" and error.findings[0].help
    end(training)
    assert [steps_in(line) for line in written(file)] == [steps]
    assert training.get_epsilon(DELTA) == budget.spent() <= 4.0


def test_no_noise_that_was_refused_is_left_in_the_gradients(file: Path) -> None:
    model = mlp()
    training = begin(budget_of(file, 4.0), model)
    until_refused(training)
    held = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    until_refused(training, 1)
    assert all(
        p.grad is None or (p.grad == h).all() for p, h in zip(model.parameters(), held, strict=True) if h is not None
    )


def test_a_pass_with_skipped_batches_counts_when_a_step_is_refused(file: Path) -> None:
    training = begin(budget_of(file, 4.8), sampling="shuffle")
    train(training, 3)
    for number, batch in enumerate(training[2]):
        if number == 2:
            with pytest.raises(dpfix.BudgetError):
                step_on(training, batch)
    end(training)
    assert steps_in(written(file)[0]) == 2


def test_every_further_step_is_refused(file: Path) -> None:
    training = begin(budget_of(file, 4.0))
    until_refused(training)
    content = file.read_text()
    for _ in range(3):
        until_refused(training, 1)
    assert file.read_text() == content


def test_another_training_is_refused_at_the_call_and_nothing_is_written(file: Path) -> None:
    budget = budget_of(file, 4.0)
    until_refused(begin(budget))
    gc.collect()
    content, model = file.read_text(), mlp()
    before, hooks = values(model), len(model._forward_pre_hooks)
    with pytest.raises(dpfix.BudgetError, match="does not allow a step of this training"):
        begin(budget, model)
    assert file.read_text() == content
    assert torch.equal(values(model), before) and len(model._forward_pre_hooks) == hooks


def test_no_noise_fits_no_budget(file: Path) -> None:
    with pytest.raises(dpfix.BudgetError, match="would be inf"):
        begin(budget_of(file), noise_multiplier=0.0)
    assert written(file) == []


def test_a_refused_call_leaves_the_file(file: Path) -> None:
    budget = budget_of(file)
    content = file.read_bytes()
    with pytest.raises(dpfix.CoupledModelError):
        begin(budget, Centred())
    assert file.read_bytes() == content and len(list(file.parent.iterdir())) == 2


def test_something_else_is_no_budget(file: Path) -> None:
    with pytest.raises(dpfix.ArgumentError, match=r"budget='data\.json' is no dpfix\.Budget"):
        begin("data.json")


# ------------------------------------------------------------------ several trainings


def test_trainings_compose(file: Path) -> None:
    budget = budget_of(file, 100.0)
    for noise, batch, steps in [(1.0, 8, 5), (2.0, 4, 7), (1.5, 12, 2)]:
        training = begin(budget, noise_multiplier=noise, data_loader=DataLoader(DATA, batch))
        train(training, steps)
        end(training)
    history = [(1.0, 8 / 24, 5), (2.0, 4 / 24, 7), (1.5, 12 / 24, 2)]
    assert budget.spent() == pytest.approx(epsilon_of(*history), rel=1e-9)
    exact = PLDAccountant()
    for noise, rate, steps in history:
        exact.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    assert exact.get_epsilon(DELTA) == pytest.approx(budget.spent(), abs=0.02)
    assert budget.spent() <= epsilon_of(*history, kind=RDPAccountant)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_accountant_is_that_of_the_file(file: Path, accountant: str) -> None:
    budget = budget_of(file, accountant=accountant)
    train(begin(budget), 5)
    exact = PLDAccountant().compose(PoissonSampledDpEvent(RATE, GaussianDpEvent(1.0)), 5).get_epsilon(DELTA)
    wanted = epsilon_of((1.0, RATE, 5), kind=RDPAccountant) if accountant == "rdp" else exact
    assert dpfix.Budget(file).accountant == accountant
    assert dpfix.Budget(file).spent() == pytest.approx(wanted, rel=1e-3)


def test_two_trainings_of_one_process_take_turns(file: Path) -> None:
    one, other = begin(budget_of(file, 4.0, accountant="rdp")), begin(dpfix.Budget(file))
    made, refused = [0, 0], [False, False]
    while not all(refused):
        for k, training in enumerate((one, other)):
            try:
                train(training, 1)
                made[k] += 1
            except dpfix.BudgetError:
                refused[k] = True
    assert abs(made[0] - made[1]) <= 1  # what one has reserved does not keep the other from going on
    budget = dpfix.Budget(file)
    assert budget.spent() == pytest.approx(epsilon_of((1.0, RATE, sum(made)), kind=RDPAccountant), rel=1e-9)
    assert budget.spent() <= 4.0 < epsilon_of((1.0, RATE, sum(made) + 1), kind=RDPAccountant)


def test_what_is_spent_counts_in_the_search_for_the_noise(file: Path) -> None:
    budget = budget_of(file)
    first = begin(budget)
    train(first, 5)
    given = setting(data_loader=DataLoader(DATA, 8), budget=budget, target_epsilon=8.0, target_delta=DELTA, epochs=4)
    given.pop("noise_multiplier")
    second = dpfix.make_private_safe_with_epsilon(**given)
    assert 7.9 < epsilon_of((1.0, RATE, 5), (second[1].noise_multiplier, RATE, 12)) <= 8.0
    train(second, 12)  # is not refused
    assert budget.spent() <= 8.0
    until_refused(second, 60)


def test_a_target_beyond_the_budget_is_refused_at_the_call(file: Path) -> None:
    given = setting(
        data_loader=DataLoader(DATA, 8), budget=budget_of(file, 4.0), target_epsilon=8.0, target_delta=DELTA
    )
    given.pop("noise_multiplier")
    with pytest.raises(dpfix.BudgetError, match="the 12 releases of target_epsilon=8"):
        dpfix.make_private_safe_with_epsilon(**given, epochs=4)
    assert written(file) == []


def test_a_training_on_the_same_model_counts_once_in_the_search(file: Path) -> None:
    budget, model = budget_of(file), mlp()
    first = begin(budget, model)
    train(first, 5)
    end(first)
    given = setting(
        model, data_loader=DataLoader(DATA, 8), budget=budget, target_epsilon=8.0, target_delta=DELTA, epochs=4
    )
    given.pop("noise_multiplier")
    second = dpfix.make_private_safe_with_epsilon(**given, privacy_engine=first.privacy_engine)
    assert 7.9 < epsilon_of((1.0, RATE, 5), (second[1].noise_multiplier, RATE, 12)) <= 8.0
    train(second, 12)
    assert second.get_epsilon(DELTA) == pytest.approx(budget.spent(), rel=1e-9)


def test_what_was_released_without_the_budget_is_written_too(file: Path) -> None:
    model = mlp()
    first = begin(None, model)
    train(first, 5)
    end(first)
    training = begin(budget_of(file), model)
    train(training, 1)
    assert [steps_in(line, ahead=False) for line in written(file)] == [5, 0]
    assert dpfix.Budget(file).spent() == training.get_epsilon(DELTA)


def test_what_other_records_of_the_data_set_have_lost_is_written_too(file: Path) -> None:
    model = mlp()
    first = begin(None, model, data_loader=DataLoader(Subset(DATA, range(12)), 8))
    train(first, 5)
    end(first)
    training = begin(budget_of(file, 100.0), model, data_loader=DataLoader(Subset(DATA, range(12, 24)), 8))
    train(training, 1)
    end(training)
    assert sorted(steps_in(line) for line in written(file)) == [1, 5]


def test_a_second_call_without_the_budget_is_warned_about(file: Path) -> None:
    model = mlp()
    train(begin(budget_of(file, 100.0), model), 1)
    with pytest.warns(UserWarning, match="this call has none") as said:
        begin(None, model)
    assert sum("this call has none" in str(w.message) for w in said) == 1


def test_a_state_in_the_optimizer_inside_counts_before_the_step(file: Path) -> None:
    first = begin(None)
    train(first, 30)
    state = first[1].state_dict()
    training = begin(budget_of(file, 2.0))
    training[1].original_optimizer.load_state_dict(state)
    before = values(training[0])
    with pytest.raises(dpfix.BudgetError):
        train(training, 1)
    assert torch.equal(values(training[0]), before)


def test_steps_that_are_repeated_after_a_resume_count_again(file: Path, tmp_path: Path) -> None:
    budget = budget_of(file, 100.0)
    engine, model = dpfix.SafePrivacyEngine(), mlp()
    training = begin(budget, model, privacy_engine=engine)
    train(training, 3)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=training[0], optimizer=training[1])
    train(training, 3)
    end(training)
    other = dpfix.SafePrivacyEngine()
    again = begin(dpfix.Budget(file), mlp(), privacy_engine=other)
    other.load_checkpoint(path=tmp_path / "c.pt", module=again[0], optimizer=again[1])
    train(again, 3)
    end(again)
    assert [steps_in(line) for line in written(file)] == [6, 3]


def test_a_checkpoint_of_a_training_without_budget_is_written_too(file: Path, tmp_path: Path) -> None:
    engine, model = dpfix.SafePrivacyEngine(), mlp()
    training = begin(None, model, privacy_engine=engine)
    train(training, 3)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=training[0], optimizer=training[1])
    other = dpfix.SafePrivacyEngine()
    again = begin(budget_of(file), mlp(), privacy_engine=other)
    other.load_checkpoint(path=tmp_path / "c.pt", module=again[0], optimizer=again[1])
    train(again, 1)
    end(again)
    assert sorted(steps_in(line) for line in written(file)) == [1, 3]


def test_parts_of_a_data_set_are_that_data_set(file: Path) -> None:
    budget = budget_of(file)
    for fold in (range(0, 16), range(8, 24)):
        train(begin(budget, data_loader=DataLoader(Subset(DATA, fold), 8)), 1)
    assert len(written(file)) == 2 and json.loads(file.read_text())["samples"] == 24


def test_another_data_set_is_refused(file: Path) -> None:
    budget = budget_of(file)
    train(begin(budget), 1)
    content = file.read_text()
    with pytest.raises(dpfix.BudgetError, match=r"budget of 24 samples .*reads a data set of 25"):
        begin(budget, data_loader=DataLoader(points(25), 8))
    assert file.read_text() == content


def test_parts_that_are_data_sets_of_their_own_have_to_be_announced(file: Path) -> None:
    train(begin(budget_of(file, 50.0), data_loader=DataLoader(points(16), 8)), 1)
    budget = dpfix.Budget(file, samples=24)
    train(begin(budget, data_loader=DataLoader(points(20), 8)), 1)
    with pytest.raises(dpfix.BudgetError, match="budget of 24 samples"):
        begin(budget, data_loader=DataLoader(points(25), 8))
    with pytest.raises(dpfix.ArgumentError, match="samples=23 is not a whole number from 24"):
        dpfix.Budget(file, samples=23)


# ------------------------------------------------------------------ files


def test_a_new_budget_needs_its_numbers(file: Path) -> None:
    with pytest.raises(dpfix.ArgumentError, match="there is no such file, and a new budget needs epsilon and delta"):
        dpfix.Budget(file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"epsilon": 0}, "epsilon=0"), ({"epsilon": math.nan}, "epsilon=nan"), ({"delta": 1}, "delta=1"),
        ({"accountant": "gdp"}, "accountant='gdp'"), ({"samples": 2.5}, "samples=2.5"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_used(file: Path, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=text):
        dpfix.Budget(file, **{"epsilon": 8.0, "delta": DELTA} | wrong)
    assert not file.exists() or written(file) == []


def test_a_budget_is_not_changed_by_a_call(file: Path) -> None:
    budget_of(file)
    for changed in ({"epsilon": 9.0}, {"delta": 1e-2}, {"accountant": "rdp"}):
        with pytest.raises(dpfix.BudgetError, match=next(iter(changed))):
            dpfix.Budget(file, **changed)
    assert dpfix.Budget(file).epsilon == 8.0


def changed(text: str) -> str:
    return text.replace('"steps": 2', '"steps": 1')


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a smaller number": changed,
    "no object": lambda text: "[1, 2]",
    "nested": lambda text: "[" * 100_000,
    "not text": lambda text: "\udcff\udcfe",
    "another file": lambda text: json.dumps({"epsilon": 8.0}),
    "no checksum": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "checksum"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(file: Path, damage: str) -> None:
    budget = budget_of(file)
    training = begin(budget)
    train(training, 2)
    end(training)
    text = file.read_text()
    damaged = DAMAGES[damage](text)
    assert damaged != text
    file.write_bytes(damaged.encode(errors="surrogateescape"))
    for use in (lambda: dpfix.Budget(file), budget.spent, lambda: begin(budget)):
        with pytest.raises(dpfix.BudgetError, match="is damaged, was changed by hand, or is no file of a budget"):
            use()
    assert file.read_bytes() == damaged.encode(errors="surrogateescape")


def test_a_later_version_is_named(file: Path) -> None:
    budget_of(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    with pytest.raises(dpfix.BudgetError, match="written by a later version"):
        dpfix.Budget(file)


def test_a_file_that_vanishes_or_goes_back_stops_the_training(file: Path) -> None:
    training = begin(budget_of(file, 1e3))
    early = file.read_bytes()
    train(training, spender.AHEAD)
    for content in (None, early):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(dpfix.BudgetError, match="is gone, or is an earlier copy of itself"):
            train(training, 1)


def test_a_file_that_is_made_anew_with_other_numbers_is_another_one(file: Path) -> None:
    budget = budget_of(file)
    training = begin(budget)
    file.unlink()
    other = dpfix.Budget(file, epsilon=0.5, delta=1e-5, accountant="rdp")
    with pytest.raises(dpfix.BudgetError, match="or another file"):
        train(training, 1)
    with pytest.raises(dpfix.BudgetError, match="or another file"):
        budget.spent()
    assert other.spent() == 0.0 and written(file) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(dpfix.BudgetError, match="cannot be written"):
        budget_of(tmp_path / "none" / "data.json")
    with pytest.raises(dpfix.BudgetError, match="cannot be read"):
        budget_of(tmp_path)


def test_what_cannot_be_written_is_not_released(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    training = begin(budget_of(file), model)
    before = values(model)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dpfix.weights.files.os.fsync", full)
        with pytest.raises(dpfix.BudgetError, match="cannot be written"):
            train(training, 1)
    assert torch.equal(values(model), before) and written(file) == []
    train(training, 1)
    assert steps_in(written(file)[0]) == spender.AHEAD


def test_without_locks_there_is_no_budget(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_file, "fcntl", None)
    with pytest.raises(dpfix.BudgetError, match="has no fcntl"):
        budget_of(file)


def test_a_lock_that_is_never_let_go_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget_of(file)
    monkeypatch.setattr(budget_file, "PATIENCE", 0.05)
    with (file.parent / f"{file.name}.lock").open("ab") as held:
        budget_file.fcntl.flock(held, budget_file.fcntl.LOCK_EX)  # type: ignore[union-attr]
        with pytest.raises(dpfix.BudgetError, match="another process has held the lock"):
            dpfix.Budget(file, samples=30)


def test_a_lock_that_was_removed_locks_nobody_out(file: Path) -> None:
    training = begin(budget_of(file))
    train(training, 1)
    (file.parent / f"{file.name}.lock").unlink()
    end(training)
    assert steps_in(written(file)[0]) == 1


def test_what_others_have_left_stays(file: Path) -> None:
    mine = file.with_name(f".{file.name}.ab12cd34.part")
    its = file.with_name(f".{file.name}.other.json.ab12cd34.part")
    mine.touch()
    its.touch()
    budget_of(file)
    assert its.exists() and not mine.exists()


def test_links_and_another_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget_of(file)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = dpfix.Budget("link.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(begin(relative), 1)
    assert link.is_symlink() and len(written(file)) == 1 and list((tmp_path / "elsewhere").iterdir()) == []


def test_two_names_of_one_file_are_refused(file: Path) -> None:
    budget_of(file)
    os.link(file, file.with_name("other.json"))
    with pytest.raises(dpfix.BudgetError, match="2 names"):
        dpfix.Budget(file)


# ------------------------------------------------------------------ whatever the script does


@pytest.mark.parametrize("hook", [None, lambda optimizer: None])
@pytest.mark.parametrize("with_budget", [True, False])
def test_a_release_counts_without_the_hook(file: Path, with_budget: bool, hook: Any) -> None:
    training = begin(budget_of(file, 100.0) if with_budget else None)
    train(training, 1)
    training[1].step_hook = hook
    train(training, 3)
    end(training)
    assert training.get_epsilon(DELTA) == pytest.approx(epsilon_of((1.0, RATE, 4)), rel=1e-2)
    assert not with_budget or [steps_in(line) for line in written(file)] == [4]


def test_threads_that_train_and_ask(file: Path) -> None:
    budget = budget_of(file, 1e3)
    trainings = [begin(budget) for _ in range(2)]
    failed: list[Exception] = []

    def run(act: Callable[[], Any]) -> None:
        try:
            act()
        except (dpfix.DPFixError, RuntimeError) as error:
            failed.append(error)

    acts = [*(lambda t=t: train(t, 30) for t in trainings), lambda: [budget.spent() for _ in range(10)]]
    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []
    [end(training) for training in trainings]
    assert [steps_in(line) for line in written(file)] == [30, 30]


def test_copies_and_files_of_a_training_write_nothing(file: Path) -> None:
    budget = budget_of(file)
    training = begin(budget)
    train(training, 1)
    content = file.read_text()
    copied, through = copy.deepcopy(training[0]), pickle.loads(pickle.dumps(training[1]))
    with pytest.raises(dpfix.MisuseError):
        through.step()
    again = pickle.loads(pickle.dumps(copy.deepcopy(budget)))
    assert again.spent() == budget.spent() and file.read_text() == content
    del copied, through
    end(training)
    assert steps_in(written(file)[0]) == 1


def test_a_fork_is_another_training(file: Path) -> None:
    training = begin(budget_of(file, 1e3))
    train(training, 5)
    process = multiprocessing.get_context("fork").Process(target=train, args=(training, 2))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    train(training, 1)
    end(training)
    assert [steps_in(line) for line in written(file)] == [6, 2]


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_a_fork_counts_what_was_counted_before_it(file: Path, sampling: str) -> None:
    training = begin(budget_of(file, 1e3), sampling=sampling)
    passing = iter(training[2])
    batch = next(passing)
    if sampling == "shuffle":
        step_on(training, batch)  # the pass is counted
        batch = next(passing)
    else:
        training.get_epsilon(DELTA)  # the draw is counted
    process = multiprocessing.get_context("fork").Process(target=step_on, args=(training, batch))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    lines = written(file)
    assert len(lines) == 2 and all(steps_in(line) for line in lines)
    del passing


def step_on(training: Any, batch: Any) -> None:
    model, optimizer, _ = training
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def test_an_error_in_the_loop_and_on_it_goes(file: Path) -> None:
    training = begin(budget_of(file))
    train(training, 2)

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(training, 1, broken)
    train(training, 2)
    with pytest.warns(dpfix.DPFixWarning, match="skipped"):
        assert training.get_epsilon(DELTA) == epsilon_of((1.0, RATE, 5))
    end(training)
    assert steps_in(written(file)[0]) == 5  # the draw of the broken step too, as the accountant counts it


@pytest.mark.parametrize("within", ["spender.py", "budget_file.py", "budget.py"])
def test_an_interrupt_anywhere_leaves_at_least_what_was_released(tmp_path: Path, within: str) -> None:
    room = str(Path(dpfix.__file__).parent / "training" / within)
    count = Lines(within=room)
    training = begin(budget_of(tmp_path / "first.json"))
    count.run(lambda: train(training, 1))
    assert count.count > 3
    file = tmp_path / "second.json"
    training, moved = begin(budget_of(file, 1e3)), 0
    original = training[1].original_optimizer
    step = original.step

    def counting(*args: Any) -> Any:
        nonlocal moved
        moved += 1
        return step(*args)

    original.step = counting
    for at in range(1, count.count + 1, 3):
        training[1].guard.guarded.accounting.spender._ahead = None  # so that the step writes
        Lines(at, within=room).run(lambda: train(training, 1))
        assert steps_in(written(file)[0] if written(file) else {"released": [], "ahead": None}) >= moved
    train(training, 2)
    end(training)
    assert steps_in(written(file)[0]) >= moved >= 2


def test_the_table_and_the_statement(file: Path) -> None:
    budget = budget_of(file)
    assert "no training yet" in str(budget)
    training = begin(budget)
    assert "this one is not in it yet" in str(training.statement(DELTA))
    train(training, 5)
    end(training)
    second = begin(budget)
    train(second, 2)
    table = str(budget).splitlines()
    assert "24 samples" in table[0] and "epsilon 8 at delta 0.001" in table[0]
    assert len(table) == 5 and table[2].split()[2:5] == ["Sequential", "5", "0"]
    assert f"epsilon {budget.spent():.4g} of 8" in table[-1]
    text = str(second.statement(DELTA))
    assert f"({budget.spent():.4g}, 0.001)-differential privacy for all 2 training(s) in {file}" in text
    assert "by the budget's only as far as all that was looked at are trainings in its file" in text
    assert "budget" not in str(begin(None).statement(DELTA))
    assert second.statement(DELTA).budget and repr(budget).startswith("Budget(")


def test_a_statement_says_that_the_file_is_gone(file: Path) -> None:
    training = begin(budget_of(file))
    train(training, 1)
    file.unlink()
    assert "budget of the data: not known: data.budget.json is gone" in str(training.statement(DELTA))


def test_the_command_line_shows_the_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", str(file)]) == 2
    assert str(budget_of(file)) in (main(["budget", str(file)]), capsys.readouterr().out)[1]


def test_a_call_that_is_undone_takes_back_no_release(file: Path) -> None:
    budget, model = budget_of(file), mlp()
    training = begin(budget, model)
    batches = iter(training[2])  # its pass goes on
    x, y = next(batches)

    def releasing(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        training[1].guard.guarded.accounting.complete()  # as the end of a pass in another thread does
        raise ValueError("this step fails")

    assert budget.spent() == 0.0
    with pytest.raises(dpfix.TrainingStepError):
        begin(budget, model, criterion=None, training_step=releasing)
    training[1].zero_grad()
    F.cross_entropy(training[0](x), y).backward()
    training[1].step()
    assert steps_in(written(file)[0]) == 1 + spender.AHEAD  # once in the call that was undone, which nothing takes back
    end(training)
    assert steps_in(written(file)[0]) == 2


def test_a_training_that_is_decided_on_its_first_step_keeps_to_the_budget(file: Path) -> None:
    training = begin(budget_of(file, 4.0), criterion=None)
    error = until_refused(training)
    assert "does not allow this step" in str(error)
    end(training)
    assert budget_of(file, 4.0).spent() <= 4.0 and steps_in(written(file)[0]) > 5
