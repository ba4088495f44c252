"""The budget is never forgotten: what was released with a model counts on, whatever is called, loaded, copied or emptied."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.schedulers import StepGradClip, StepNoise
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import dpfix
from dpfix.training import lineage
from tests.cases import mlp
from tests.helpers import points, setting, sgd, train

RATE = 8 / 24
DATA = points()


def begin(model: nn.Module | None = None, **changes: Any) -> dpfix.PrivateTraining:
    return dpfix.make_private_safe(**setting(model, **{"data_loader": DataLoader(DATA, 8)} | changes))


def history(training: dpfix.PrivateTraining) -> list[Any]:
    return training.privacy_engine.accountant.history


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def epsilon(steps: int, noise: float = 1.0) -> float:
    accountant = PRVAccountant()
    accountant.history = [(noise, RATE, steps)]
    return accountant.get_epsilon(1e-3)


def after(steps: int, model: nn.Module | None = None, **changes: Any) -> dpfix.PrivateTraining:
    training = begin(model, **changes)
    train(training, steps)
    return training


# ------------------------------------------------------------------ another call on the same model


def of_the_wrapper(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    return training[0]


def of_the_plain_model(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    return training[0].to_standard_module()


def of_a_copy(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    return copy.deepcopy(training[0].to_standard_module())


def of_a_copy_while_training(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(training[0])
    train(training, 1)  # the weights are others than the copy's now
    return copied.to_standard_module()


def of_a_bare_copy_while_training(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    train(training, 1)
    return copied


def of_a_pickle(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(training[0])).to_standard_module()


def of_the_weights(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    other = mlp()
    other.load_state_dict(training[0].to_standard_module().state_dict())
    return other


def of_a_larger_model(training: dpfix.PrivateTraining, model: nn.Module) -> nn.Module:
    return nn.Sequential(training[0].to_standard_module(), nn.ReLU(), nn.Linear(3, 3))


@pytest.mark.parametrize(
    "again",
    [
        of_the_wrapper,
        of_the_plain_model,
        of_a_copy,
        of_a_copy_while_training,
        of_a_bare_copy_while_training,
        of_a_pickle,
        of_the_weights,
        of_a_larger_model,
    ],
)
def test_another_call_counts_on(again: Callable[[dpfix.PrivateTraining, nn.Module], nn.Module]) -> None:
    model = mlp()
    first = after(3, model)
    second = after(2, again(first, model))
    assert history(second) == [(1.0, RATE, 5)] and second.get_epsilon(1e-3) == epsilon(5)
    advice = [f for f in second.report.findings if f.code == "DPF033"]
    assert len(advice) == 1 and "3 private steps" in advice[0].fact


def test_a_body_that_was_frozen_before_counts_what_the_head_released() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    after(3, model)[0].to_standard_module()
    model.requires_grad_(True)
    model[2].requires_grad_(False)
    assert history(after(2, model)) == [(1.0, RATE, 5)]


def test_a_third_call_counts_both_earlier_ones() -> None:
    model = mlp()
    after(2, model, noise_multiplier=2.0)
    after(3, model)
    third = after(1, model)
    assert history(third) == [(2.0, RATE, 2), (1.0, RATE, 4)]


@pytest.mark.parametrize("kind", [PrivacyEngine, dpfix.SafePrivacyEngine])
def test_an_engine_that_does_not_hold_the_history_gets_it_with_a_warning(kind: type[PrivacyEngine]) -> None:
    model = mlp()
    after(3, model)
    with pytest.warns(
        dpfix.DPFixWarning, match="privacy_engine does not hold what was released before: .* 3 private steps"
    ):
        second = begin(model, privacy_engine=kind(accountant="rdp"))
    train(second, 1)
    assert history(second) == [(1.0, RATE, 4)]


def test_the_engine_of_the_earlier_call_counts_once() -> None:
    model, engine = mlp(), dpfix.SafePrivacyEngine()
    after(3, model, privacy_engine=engine)
    second = after(2, model, privacy_engine=engine)
    assert history(second) == [(1.0, RATE, 5)]
    assert "DPF033" not in second.report.details()


def test_an_engine_that_is_given_has_its_own_history_too() -> None:
    engine, model = PrivacyEngine(), mlp()
    engine.accountant.step(noise_multiplier=4.0, sample_rate=0.5)
    training = after(2, model, privacy_engine=engine)
    assert history(training) == [(4.0, 0.5, 1), (1.0, RATE, 2)]
    assert history(begin(model)) == [(1.0, RATE, 2)]  # the other step was not this model's


def test_a_gdp_accountant_refuses_a_history_that_it_cannot_add_up() -> None:
    model = mlp()
    first = after(2, model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="GDP accounting is experimental"):
        engine = PrivacyEngine(accountant="gdp")
    with pytest.raises(
        dpfix.ArgumentError, match="its accountant is 'gdp', and what was released has several settings"
    ):
        begin(model, privacy_engine=engine, noise_multiplier=2.0)
    assert engine.accountant.history == [] and history(first) == [(1.0, RATE, 2)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_a_gdp_accountant_refuses_a_state_that_it_cannot_add_up() -> None:
    state = after(2, (model := mlp()), optimizer=sgd(model, 0.5))[1].state_dict()
    training = after(1, privacy_engine=PrivacyEngine(accountant="gdp"), noise_multiplier=2.0)
    with pytest.raises(
        dpfix.ArgumentError, match="its accountant is 'gdp', and what was released has several settings"
    ):
        training[1].load_state_dict(state)
    assert history(training) == [(2.0, RATE, 1)] and training[1].param_groups[0]["lr"] == 0.1
    training.privacy_engine.accountant.history.insert(0, (1.0, RATE, 5))
    with pytest.warns(dpfix.DPFixWarning, match="it reads the last of several settings only"):
        assert training.get_epsilon(1e-3) > epsilon(5)


# ------------------------------------------------------------------ what is not counted on


def test_a_new_model_on_the_same_data_begins_anew() -> None:
    first = after(2)
    assert history(begin()) == [] and history(first) == [(1.0, RATE, 2)]


def test_a_model_that_is_put_back_to_its_start_begins_anew() -> None:
    """A sweep over settings with one model: nothing of the earlier training is in it."""
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    after(2, model)[0].to_standard_module()
    model.load_state_dict(start)
    assert history(after(1, model)) == [(1.0, RATE, 1)]


def test_a_model_of_scalars_is_not_taken_for_a_new_one() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    loader = DataLoader(TensorDataset(torch.randn(24, 1), torch.randn(24, 1)), 8)
    after(2, model, data_loader=loader, criterion=nn.MSELoss())
    assert history(begin(model, data_loader=loader, criterion=nn.MSELoss())) == [(1.0, RATE, 2)]


def test_weights_that_no_step_has_moved_tell_nothing() -> None:
    """Two models from one file of public weights: the first one's training has released nothing in its frozen head."""
    public = mlp()
    first, second = copy.deepcopy(public), copy.deepcopy(public)
    training = begin(first)
    training[0].to_standard_module()
    after(2, first, noise_multiplier=0.0, optimizer=sgd(first, 0.0))
    assert history(begin(second)) == []


def test_other_people_have_their_own_budget() -> None:
    model = mlp()
    after(2, model, data_loader=DataLoader(Subset(DATA, range(12)), 4))
    second = after(1, model, data_loader=DataLoader(Subset(DATA, range(12, 24)), 4))
    assert history(second) == [(1.0, 4 / 12, 1)]
    third = begin(model, data_loader=DataLoader(DATA, 8))
    assert sum(entry[-1] for entry in history(third)) == 3  # all of them


# ------------------------------------------------------------------ a target


def epsilon_call(model: nn.Module, **changes: Any) -> dpfix.PrivateTraining:
    given = setting(model, data_loader=DataLoader(DATA, 8), target_delta=1e-3, epochs=2)
    del given["noise_multiplier"]
    return dpfix.make_private_safe_with_epsilon(**given | changes)


@pytest.mark.parametrize("kind", ["prv", "rdp"])
def test_a_target_counts_what_is_spent(kind: str) -> None:
    model = mlp()
    engine = PrivacyEngine(accountant=kind)
    spent = after(3, model, privacy_engine=engine).get_epsilon(1e-3)
    training = epsilon_call(model, target_epsilon=spent + 1.0, privacy_engine=engine)
    train(training, 2 * len(training[2]))
    assert spent < spent + 0.9 < training.get_epsilon(1e-3) <= spent + 1.0


def test_a_target_that_is_spent_is_refused() -> None:
    model = mlp()
    first = after(3, model)
    with pytest.raises(dpfix.ArgumentError, match="the 3 steps that were made before have spent"):
        epsilon_call(model, target_epsilon=first.get_epsilon(1e-3))


# ------------------------------------------------------------------ the state of the optimizer


def test_a_state_of_the_optimizer_goes_on() -> None:
    first = after(3)
    state = through_a_file(first[1].state_dict())
    second = begin()
    second[1].load_state_dict(state)
    train(second, 2)
    assert history(second) == [(1.0, RATE, 5)] and second.get_epsilon(1e-3) == epsilon(5)
    third = begin(mlp())
    third[1].load_state_dict(through_a_file(second[1].state_dict()))
    assert history(third) == [(1.0, RATE, 5)]
    assert set(second[1].param_groups[0]) == set(sgd(mlp()).param_groups[0])


def test_a_state_that_is_loaded_before_the_call_goes_on() -> None:
    state = through_a_file(after(3)[1].state_dict())
    model = mlp()
    optimizer = sgd(model, 0.1)
    optimizer.load_state_dict(state)
    training = begin(model, optimizer=optimizer)
    assert history(training) == [(1.0, RATE, 3)]
    assert set(optimizer.param_groups[0]) == set(sgd(mlp()).param_groups[0])
    training[1].load_state_dict(state)  # again: the same steps
    assert history(training) == [(1.0, RATE, 3)]


def test_a_state_that_is_loaded_into_the_optimizer_inside_goes_on() -> None:
    state = through_a_file(after(3)[1].state_dict())
    training = begin()
    training[1].original_optimizer.load_state_dict(state)
    train(training, 1)
    assert history(training) == [(1.0, RATE, 4)]


def test_a_state_that_is_loaded_into_a_plain_optimizer_keeps_its_groups() -> None:
    training = after(2, optimizer=torch.optim.Adam((model := mlp()).parameters(), 0.3), module=model)
    other = mlp()
    plain = torch.optim.Adam(other.parameters())
    plain.load_state_dict(training[1].state_dict())
    other(torch.randn(4, 6)).sum().backward()
    plain.step()
    assert plain.param_groups[0]["lr"] == 0.3
    again = begin(other, optimizer=plain)  # and the private steps are not forgotten on the way
    assert history(again) == [(1.0, RATE, 2)]


def test_the_state_of_a_plain_optimizer_is_loaded() -> None:
    training = begin()
    training[1].load_state_dict(sgd(mlp(), 0.7).state_dict())
    assert training[1].param_groups[0]["lr"] == 0.7
    train(training, 2)
    assert history(training) == [(1.0, RATE, 2)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def test_a_state_with_steps_and_no_history_is_told_at_the_next_step() -> None:
    model, first = mlp(), mlp()
    training = begin(first, optimizer=adam(first))
    train(training, 3)
    resumed = begin(model, optimizer=adam(model))
    resumed[1].load_state_dict(training[1].original_optimizer.state_dict())
    with pytest.warns(dpfix.DPFixWarning, match="comes from 3 or more steps, and does not say what they released"):
        train(resumed, 1)
    train(resumed, 1)  # once


def test_a_state_without_history_is_not_told_where_the_accountant_was_loaded() -> None:
    model, first = mlp(), mlp()
    training = begin(first, optimizer=adam(first))
    train(training, 3)
    resumed = begin(model, optimizer=adam(model))
    resumed[1].load_state_dict(training[1].original_optimizer.state_dict())
    resumed.privacy_engine.accountant.load_state_dict(training.privacy_engine.accountant.state_dict())
    train(resumed, 1)
    assert history(resumed) == [(1.0, RATE, 4)]


@pytest.mark.parametrize("accountant_first", [True, False])
def test_a_script_that_loads_the_accountant_too_counts_once(accountant_first: bool) -> None:
    first = after(3)
    state, accounted = first[1].state_dict(), first.privacy_engine.accountant.state_dict()
    second = begin()
    for is_accountant in (accountant_first, not accountant_first):
        target = second.privacy_engine.accountant if is_accountant else second[1]
        target.load_state_dict(copy.deepcopy(accounted if is_accountant else state))
    train(second, 1)
    assert history(second) == [(1.0, RATE, 4)]


def test_an_accountant_that_is_loaded_before_the_call_counts_once() -> None:
    first = after(3)
    model, engine = mlp(), dpfix.SafePrivacyEngine()
    engine.accountant.load_state_dict(first.privacy_engine.accountant.state_dict())
    optimizer = sgd(model, 0.1)
    optimizer.load_state_dict(first[1].state_dict())
    assert history(after(1, model, optimizer=optimizer, privacy_engine=engine)) == [(1.0, RATE, 4)]


def test_going_back_is_told_and_takes_nothing_back() -> None:
    training = after(2)
    early = through_a_file(training[1].state_dict())
    train(training, 3)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 3 steps were released since"):
        training[1].load_state_dict(early)
    train(training, 1)
    assert history(training) == [(1.0, RATE, 6)]
    training[1].load_state_dict(through_a_file(training[1].state_dict()))  # the present one


def test_going_back_after_a_resume_is_told() -> None:
    first = after(2)
    state = through_a_file(first[1].state_dict())
    second = begin()
    second[1].load_state_dict(state)
    train(second, 3)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 3 steps were released since"):
        second[1].load_state_dict(state)
    assert history(second) == [(1.0, RATE, 5)]


def test_two_that_go_on_from_one_state_are_united() -> None:
    state = after(2)[1].state_dict()
    one, other = begin(), begin()
    for training, steps in ((one, 1), (other, 3)):
        training[1].load_state_dict(state)
        train(training, steps)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 1 steps"):
        one[1].load_state_dict(other[1].state_dict())
    assert history(one) == [(1.0, RATE, 6)]


DAMAGED = [
    lambda entry: entry["trainings"].update(a=[[2, -1.0, RATE, 1.0]]),
    lambda entry: entry["trainings"].update(a=[[-2, 1.0, RATE, 1.0]]),
    lambda entry: entry["trainings"].update(a=[[2, 1.0, float("nan"), 1.0]]),
    lambda entry: entry["trainings"].update(a="many"),
    lambda entry: entry["trainings"].update({3: [[2, 1.0, RATE, 1.0]]}),
    lambda entry: entry.pop("others"),
    lambda entry: entry.update(trainings=None),
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_history_is_refused_before_anything_changes(damage: Callable[[Any], Any]) -> None:
    state = after(2, (model := mlp()), optimizer=sgd(model, 0.5))[1].state_dict()
    damage(state["param_groups"][0]["dpfix"])
    training = begin()
    with pytest.raises(
        dpfix.CheckpointError, match="the history of releases in the state of the optimizer cannot be read"
    ):
        training[1].load_state_dict(state)
    assert history(training) == [] and training[1].param_groups[0]["lr"] == 0.1


def test_a_checkpoint_of_dpfix_goes_back_with_a_warning(tmp_path: Path) -> None:
    training = after(2)
    given = {"path": tmp_path / "run.pt", "module": training[0], "optimizer": training[1]}
    training.privacy_engine.save_checkpoint(**given)
    train(training, 3)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 3 steps were released since"):
        training.privacy_engine.load_checkpoint(**given)
    assert history(training) == [(1.0, RATE, 5)]


def test_a_checkpoint_without_optimizer_counts_once(tmp_path: Path) -> None:
    training = after(2)
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", module=training[0])
    model, engine = mlp(), dpfix.SafePrivacyEngine()
    for _ in range(2):
        engine.load_checkpoint(path=tmp_path / "run.pt", module=model)
    assert history(after(1, model, privacy_engine=engine)) == [(1.0, RATE, 3)]
    assert history(begin(model)) == [(1.0, RATE, 3)]


def test_several_optimizers_of_one_engine_count_once() -> None:
    engine, again = dpfix.SafePrivacyEngine(), dpfix.SafePrivacyEngine()
    states = [after(2, privacy_engine=engine)[1].state_dict() for _ in range(2)]
    for state in states:
        training = begin(privacy_engine=again)
        training[1].load_state_dict(state)
    assert again.accountant.history == [(1.0, RATE, 4)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_makes_releases_of_its_own() -> None:
    training = after(2)
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # pragma: no cover
        train(training, 3)
        os.write(write, pickle.dumps(training[1].state_dict()["param_groups"][0]["dpfix"]))
        os._exit(0)
    entry = pickle.loads(os.read(read, 1 << 16))
    os.waitpid(child, 0)
    train(training, 1)
    state = training[1].state_dict()
    state["param_groups"][0]["dpfix"] = entry
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 1 steps"):
        training[1].load_state_dict(state)
    assert history(training) == [(1.0, RATE, 6)]


# ------------------------------------------------------------------ an accountant that others write to


def clear(engine: PrivacyEngine) -> None:
    engine.accountant.history.clear()


def empty(engine: PrivacyEngine) -> None:
    engine.accountant.history = []


def nothing(engine: PrivacyEngine) -> None:
    engine.accountant.history = None  # type: ignore[assignment]


def shorten(engine: PrivacyEngine) -> None:
    engine.accountant.history[-1] = (1.0, RATE, 1)


def swap(engine: PrivacyEngine) -> None:
    engine.accountant = RDPAccountant()


def swap_for_one_in_use(engine: PrivacyEngine) -> None:
    engine.accountant = RDPAccountant()
    engine.accountant.step(noise_multiplier=1.0, sample_rate=RATE)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("at_once", [True, False], ids=["asked at once", "after another step"])
@pytest.mark.parametrize("tamper", [clear, empty, nothing, shorten, swap, swap_for_one_in_use])
def test_a_release_that_the_accountant_forgets_is_counted(
    tamper: Callable[[PrivacyEngine], None], at_once: bool, safe: bool
) -> None:
    engine = dpfix.SafePrivacyEngine(accountant="rdp") if safe else PrivacyEngine(accountant="rdp")
    training = after(3, privacy_engine=engine)
    tamper(engine)
    with pytest.warns(dpfix.DPFixWarning, match="its accountant does not hold . steps that were released"):
        engine.get_epsilon(1e-3) if at_once else train(training, 1)
    total = 3 + (not at_once) + (tamper is swap_for_one_in_use)
    assert engine.accountant.history == [(1.0, RATE, total)]
    assert training.statement(1e-3).steps == total
    assert training.get_epsilon(1e-3) == engine.get_epsilon(1e-3)


def test_the_accountant_may_be_chosen_after_the_call() -> None:
    training = begin()
    training.privacy_engine.accountant = RDPAccountant()
    train(training, 2)
    assert history(training) == [(1.0, RATE, 2)] and training.statement(1e-3).accountant == "rdp"


def test_a_history_that_is_copied_over_is_the_same() -> None:
    training = after(2)
    other = RDPAccountant()
    other.history = list(history(training))
    training.privacy_engine.accountant = other
    train(training, 1)
    assert history(training) == [(1.0, RATE, 3)]


def test_further_steps_in_the_accountant_count() -> None:
    training = after(2)
    training.privacy_engine.accountant.step(noise_multiplier=3.0, sample_rate=0.5)
    train(training, 1)
    assert history(training) == [(1.0, RATE, 2), (3.0, 0.5, 1), (1.0, RATE, 1)]
    training.privacy_engine.accountant.history.pop(1)
    with pytest.warns(dpfix.DPFixWarning, match="does not hold 1 steps"):
        training.get_epsilon(1e-3)


def test_one_accountant_of_two_engines_counts_each_step_once() -> None:
    one, other = PrivacyEngine(), PrivacyEngine()
    other.accountant = one.accountant
    first, second = begin(privacy_engine=one), begin(privacy_engine=other)
    for _ in range(2):
        train(first, 2)
        train(second, 1)
    assert one.accountant.history == [(1.0, RATE, 6)]
    assert first.get_epsilon(1e-3) == second.get_epsilon(1e-3) == epsilon(6)


def test_noise_that_is_no_number_is_counted_once() -> None:
    training = after(1)
    training.privacy_engine.accountant.step(noise_multiplier=float("nan"), sample_rate=RATE)
    for _ in range(2):
        assert training.statement(1e-3).steps == 2 and training.get_epsilon(1e-3) == float("inf")


# ------------------------------------------------------------------ the statement


def test_a_schedule_stands_in_the_statement_entry_by_entry() -> None:
    training = begin(noise_multiplier=2.0)
    noise = StepNoise(training[1], step_size=1, gamma=0.5)
    clip = StepGradClip(training[1], step_size=1, gamma=0.5)
    train(training, 2)
    noise.step()
    train(training, 1)
    clip.step()
    train(training, 3)
    statement = training.statement(1e-3)
    found = [(s.steps, s.noise_multiplier, s.sampling_rate, s.max_grad_norm) for s in statement.schedule]
    assert found == [(2, 2.0, RATE, 1.0), (1, 1.0, RATE, 1.0), (3, 1.0, RATE, 0.5)]
    assert "- 1 steps: noise multiplier 1, sampling rate 0.333333, clip norm 1.0" in str(statement)
    assert '"max_grad_norm": 0.5' in statement.to_json()


def test_an_earlier_rate_stands_in_the_statement() -> None:
    model = mlp()
    after(2, model)
    training = after(1, model, data_loader=DataLoader(DATA, 4))
    text = str(training.statement(1e-3))
    assert "2 steps: noise multiplier 1, sampling rate 0.333333" in text and "1 steps: noise multiplier 1" in text
    assert "schedule" not in str(after(2).statement(1e-3))


def test_adaptive_clipping_is_one_entry() -> None:
    adaptive = {
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.1,
        "unclipped_num_std": 4.0,
    }
    training = after(3, clipping="adaptive", **adaptive)
    (entry,) = training.statement(1e-3).schedule
    assert entry.steps == 3 and "clip norm adaptive" in str(entry)


def test_what_is_remembered_of_copies_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MOST_NOTED", 3)
    after(2)[0].to_standard_module()
    assert len(lineage._NOTED) == 3
